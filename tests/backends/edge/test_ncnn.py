import pytest
import torch
from torch.nn import functional as F

import refold
from refold.backends.edge import ncnn as backend
from refold.cli import exit_codes
from refold.errors import BackendError, UsageError
from refold.frontends.export import trace
from tests.backends import runtimes

pytestmark = pytest.mark.edge


@pytest.fixture(scope="module")
def built():
    return runtimes.compile_net("ncnn", 1)


def test_layers(built):
    kinds = backend.layer_kinds(built[0]._done.artifact.content.param)
    assert kinds == ["Input", "Convolution", "Reduction", "InnerProduct"]
    assert built[0].report.artifact["nodes"] == 3
    assert any("Winograd" in note for note in built[0].report.notes)


def test_saved_files_run(built, tmp_path):
    import ncnn

    compiled, model, x = built
    path = compiled.save(tmp_path / "net.param")
    runtimes.check_files(tmp_path, {"net.param", "net.bin"})
    network = ncnn.Net()
    assert network.load_param(str(path)) == 0
    assert network.load_model(str(tmp_path / "net.bin")) == 0
    content = compiled._done.artifact.content
    (got,) = backend.run_network(network, content, [x])
    # This network is as others open it: half precision where the processor has it.
    torch.testing.assert_close(got, model(x), rtol=1e-2, atol=1e-2)


def test_other_suffix_is_refused(built, tmp_path):
    with pytest.raises(UsageError, match=r"net\.txt\.param"):
        built[0].save(tmp_path / "net.txt")


def test_two_inputs_and_results():
    class Net(torch.nn.Module):
        def forward(self, x, y):
            return F.relu(x - y), F.max_pool2d(x * y, 2)

    x, y = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    compiled = refold.compile_for_inference(Net(), (x, y), target="ncnn")
    for got, expected in zip(compiled(x, y), Net()(x, y), strict=True):
        torch.testing.assert_close(got, expected)


class Projection(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 4)

    def forward(self, x):
        return F.relu(self.layer(x)) * 2


@pytest.mark.parametrize("shape", [(1, 8), (1, 5, 8), (1, 3, 5, 8)])
def test_no_layer_says_which_axis_is_the_batch(shape, tmp_path):
    model, x = Projection().eval(), torch.randn(shape)
    compiled = refold.compile_for_inference(model, x, target="ncnn")
    torch.testing.assert_close(compiled(x), model(x))
    program = trace(model, (x,), {}, dynamic_batch=False)
    path = compiled.save(tmp_path / "net.param")
    loaded = backend.NcnnTarget().load_file(path, program)
    torch.testing.assert_close(loaded(x), model(x))


def test_larger_batch_is_refused():
    with pytest.raises(UsageError, match=r"one example at a time.*batch 1"):
        refold.compile_for_inference(torch.nn.ReLU(), torch.randn(2, 3), target="ncnn")


def test_integers_are_refused():
    class Net(torch.nn.Module):
        def forward(self, x):
            return x + 1

    with pytest.raises(BackendError, match=r"float32 inputs alone; x is torch\.int64: compute"):
        refold.compile_for_inference(Net(), torch.ones(1, 3, dtype=torch.int64), target="ncnn")


def test_operator_without_a_layer_is_named():
    class Net(torch.nn.Module):
        def forward(self, x):
            return torch.relu(x)[:, ::2, ::2]

    # pnnx writes such slices under a name of its own, and ends without an error
    with pytest.raises(
        BackendError, match=r"ncnn has no layer for Tensor\.slice\n  slice_1 at .*test_ncnn"
    ):
        refold.compile_for_inference(Net(), torch.randn(1, 8, 8, 3), target="ncnn")


def test_weights_beside_the_file_are_needed(run, built, tmp_path):
    path = built[0].save(tmp_path / "net.param")
    (tmp_path / "net.bin").unlink()
    code, _, err = run("verify", "tests.small_nets:ConvNet", path, "--shape", "1x3x8x8")
    assert code == exit_codes.ERROR
    assert "needs net.bin beside it" in err
