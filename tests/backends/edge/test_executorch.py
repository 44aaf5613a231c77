import dataclasses
import gc

import pytest
import torch

import refold
from refold.backends.base import Artifact
from refold.backends.edge import executorch as backend
from refold.errors import BackendError
from tests.backends import runtimes

pytestmark = pytest.mark.edge


@pytest.fixture(scope="module")
def built():
    return runtimes.compile_net("executorch", 2)


def test_one_delegate_takes_the_whole_graph(built):
    # conv, relu, mean that keeps its dimensions, view, linear
    report = built[0].report
    assert report.artifact["delegates"] == 1
    assert report.artifact["nodes"] == 5
    assert not any("portable kernels" in note for note in report.notes)
    assert any("fixed shapes" in note for note in report.notes)


def test_what_xnnpack_leaves_is_said():
    class Net(torch.nn.Module):
        def forward(self, x):
            return torch.relu(x).cumsum(1)

    x = torch.randn(2, 5)
    compiled = refold.compile_for_inference(Net(), x, target="executorch")
    torch.testing.assert_close(compiled(x), Net()(x))
    assert any("left to portable kernels" in n and "1 cumsum" in n for n in compiled.report.notes)


def test_saved_file_runs(built, tmp_path):
    compiled, model, x = built
    path = compiled.save(tmp_path / "net.pte")
    runtimes.check_files(tmp_path, {"net.pte"})
    (got,) = backend.load_program(path.read_bytes()).execute([x])
    torch.testing.assert_close(got, model(x))


def test_runner_outlives_the_artifact(built):
    # The runtime reads the program where it is; without its owner the call would crash.
    compiled, model, x = built
    content = compiled._done.artifact.content
    alone = dataclasses.replace(content, data=bytes(bytearray(content.data)))
    run = backend.ExecuTorchTarget().load(Artifact(alone), backend.ExecuTorchTarget.options())
    owners = [cell.cell_contents for cell in run.__closure__]
    assert any(isinstance(o, backend.Loaded) and o.data is alone.data for o in owners)
    del alone, owners
    gc.collect()
    torch.testing.assert_close(run(x), model(x))


def test_corrupt_program_is_an_error(built):
    with pytest.raises(BackendError, match="ExecuTorch cannot load the program"):
        backend.load_program(b"no program" * 100)


def test_lowering_failure_names_the_node(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("Missing out variants: {'aten::relu'}")

    monkeypatch.setattr("executorch.exir.to_edge_transform_and_lower", refuse)
    with pytest.raises(BackendError, match=r"Missing out variants: .*\n  relu"):
        refold.compile_for_inference(torch.nn.ReLU(), torch.randn(2, 3), target="executorch")
