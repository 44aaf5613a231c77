import pytest
import torch

import refold
from refold.backends.edge import litert as backend
from refold.errors import BackendError, UsageError
from tests.backends import runtimes

pytestmark = pytest.mark.edge


@pytest.fixture(scope="module")
def built():
    return runtimes.compile_net("litert", 2)


def test_saved_file_runs(built, tmp_path):
    compiled, model, x = built
    assert any("fixed shapes" in note for note in compiled.report.notes)
    path = compiled.save(tmp_path / "net.tflite")
    runtimes.check_files(tmp_path, {"net.tflite"})
    data = path.read_bytes()
    assert backend.count_operators(data) == compiled.report.artifact["nodes"] == 5
    run = backend.open_interpreter(data).get_signature_runner()
    got = torch.from_numpy(run(args_0=x.numpy())["output_0"])
    torch.testing.assert_close(got, model(x))


def test_order_of_inputs_and_results():
    class Net(torch.nn.Module):
        def forward(self, x, y):
            return {"difference": x - y, "x": (x * 2).relu(), "y": y.exp()}

    x, y = torch.randn(2, 3), torch.randn(2, 3)
    compiled = refold.compile_for_inference(Net(), (x, y), target="litert")
    for name, expected in Net()(x, y).items():
        torch.testing.assert_close(compiled(x, y)[name], expected)


class Nearest(torch.nn.Module):
    """Which row of a table is nearest to that of an index."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(10, 8)

    def forward(self, index):
        found = self.table(index)
        return found, (found @ self.table.weight.T).argmax(-1)


def test_integers_of_64_bits():
    model, index = Nearest().eval(), torch.tensor([[1, 2, 3]])
    compiled = refold.compile_for_inference(model, index, target="litert")
    for given in (index, torch.tensor([[9, 0, 4]])):
        for got, expected in zip(compiled(given), model(given), strict=True):
            assert got.dtype == expected.dtype
            torch.testing.assert_close(got, expected)
    assert any("integers of 64 bits in 32" in note for note in compiled.report.notes)
    with pytest.raises(BackendError, match="int32, which cannot hold 4294967298"):
        compiled(index + 2**32 - 1)


def test_corrupt_model_is_an_error():
    with pytest.raises(BackendError, match="LiteRT cannot load the model"):
        backend.open_interpreter(b"no model" * 100)


def test_no_threads():
    with pytest.raises(UsageError, match="threads must be 1 or more"):
        backend.LiteRtTarget.options(threads=0)
