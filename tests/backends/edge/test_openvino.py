import numpy as np
import pytest
import torch

import refold
from refold.errors import BackendError, UsageError
from tests.backends import runtimes

openvino = pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def built():
    return runtimes.compile_net("openvino", 2, threads=1)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_batch_is_dynamic(built, batch):
    compiled, model, _ = built
    runtimes.check_calls(compiled, model, batch)


def test_saved_file_keeps_names_and_float32(built, tmp_path):
    compiled, model, x = built
    path = compiled.save(tmp_path / "net.xml")
    runtimes.check_files(tmp_path, {"net.xml", "net.bin"})
    read = openvino.Core().read_model(str(path))
    assert [i.any_name for i in read.inputs] == ["x"]
    assert [o.get_any_name() for o in read.outputs] == ["output"]
    assert str(read.inputs[0].partial_shape) == "[?,3,8,8]"
    assert read.get_rt_info(["refold", "version"]).astype(str) == refold.__version__
    weights = {
        op.get_element_type().get_type_name()
        for op in read.get_ops()
        if op.get_type_name() == "Constant" and op.get_byte_size() > 8
    }
    assert "f16" not in weights
    compiled_file = openvino.Core().compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    got = torch.from_numpy(np.array(compiled_file([x.numpy()])[0]))
    torch.testing.assert_close(got, model(x))


def test_precision_is_said(built):
    assert any("INFERENCE_PRECISION_HINT=f32" in note for note in built[0].report.notes)


def test_executed_layers(built):
    from refold.backends.edge import openvino as backend

    model = built[0]._done.artifact.content.model
    # convolution with relu, mean, linear; reorders of layouts may come on top
    assert 3 <= backend.executed_layers(backend.compile_model(model, threads=1)) <= 5


def test_other_suffix_is_refused(built, tmp_path):
    with pytest.raises(UsageError, match=r"net\.ir\.xml"):
        built[0].save(tmp_path / "net.ir")
    assert not list(tmp_path.iterdir())


def test_unsupported_operator_names_its_origin(monkeypatch):
    class Net(torch.nn.Module):
        def forward(self, x):
            return torch.relu(x)

    def refuse(self, path):
        raise RuntimeError("failed\n-- No conversion rule found for operations: Relu")

    monkeypatch.setattr(openvino.Core, "read_model", refuse)
    with pytest.raises(BackendError, match=r"found for operations: Relu\n  Relu node_relu at test"):
        refold.compile_for_inference(Net(), torch.randn(2, 3), target="openvino")


def test_negative_threads():
    with pytest.raises(UsageError, match="threads must be 0"):
        refold.compile_for_inference(
            torch.nn.ReLU(), torch.randn(2, 3), target="openvino", threads=-1
        )
