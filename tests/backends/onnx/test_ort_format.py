import pytest
import torch

import refold
from refold.backends.onnx import ort_format
from refold.errors import BackendError, UsageError
from tests.backends import runtimes
from tests.small_nets import ConvNet, seeded

onnxruntime = pytest.importorskip("onnxruntime")


def domains(data):
    from onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs import InferenceSession

    graph = InferenceSession.InferenceSession.GetRootAs(data, 0).Model().Graph()
    return {graph.Nodes(i).Domain() for i in range(graph.NodesLength())}


@pytest.fixture(scope="module")
def built():
    return runtimes.compile_net("ort-format", 2, threads=1)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_batch_is_dynamic(built, batch):
    compiled, model, _ = built
    runtimes.check_calls(compiled, model, batch)


def test_saved_file_is_portable(built, tmp_path):
    compiled, model, x = built
    path = compiled.save(tmp_path / "net.ort")
    runtimes.check_files(tmp_path, {"net.ort"})
    data = path.read_bytes()
    assert data[4:8] == b"ORTM"
    # A level above would bake in this processor's layouts, or operators outside of the standard.
    assert domains(data) <= {b"", b"ai.onnx"}
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (got,) = session.run(["output"], {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(x))


def test_nodes_are_counted_in_the_file(built):
    compiled = built[0]
    assert compiled.report.artifact["nodes"] == 4  # Conv, Relu, ReduceMean, Gemm
    assert ort_format.count_nodes(compiled._done.artifact.content.data) == 4


@pytest.mark.slow
def test_conversion_failure_names_the_node(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("Could not find an implementation for Relu(14) node 'node_relu'")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(BackendError, match=r"cannot convert.*\n  Relu node_relu"):
        refold.compile_for_inference(torch.nn.ReLU(), torch.randn(2, 3), target="ort-format")


@pytest.mark.slow
def test_it_says_that_it_takes_no_new_weights():
    model, x = seeded(ConvNet()), torch.randn(1, 3, 8, 8)
    compiled = refold.compile_for_inference(model, x, target="ort-format", recipe=True)
    with pytest.raises(UsageError, match="target 'ort-format' cannot take new weights"):
        compiled.refit(model.state_dict())
