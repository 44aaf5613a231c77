import subprocess
import sys

import pytest
import torch
from torch import nn

import refold
from refold.errors import BackendError, UsageError
from tests.backends.pytorch.test_inductor import Counts, Sizes
from tests.compare import SINGLE, relative_error
from tests.small_nets import ConvNet, assert_same, seeded

# Loads a package where neither refold nor the model's class can be imported.
_RUN = """
import sys, torch
sys.modules["refold"] = sys.modules["tests"] = None
package = torch._inductor.aoti_load_package(sys.argv[1])
for x, expected in torch.load(sys.argv[2]):
    torch.testing.assert_close(package(x), expected)
print("equal")
"""


def test_modes_with_cuda_graphs_are_refused():
    with pytest.raises(UsageError, match="max-autotune-no-cudagraphs"):
        refold.compile_for_inference(ConvNet(), target="aoti", mode="reduce-overhead")


def test_written_state_is_refused():
    with pytest.raises(BackendError, match="writes its own state"):
        refold.compile_for_inference(seeded(Counts()), torch.randn(2, 3, 8, 8), target="aoti")


@pytest.mark.slow
def test_package_runs_without_the_model(tmp_path):
    model = seeded(ConvNet())
    compiled = refold.compile_for_inference(model, torch.randn(2, 3, 8, 8), target="aoti")
    assert compiled.report.artifact_numerics["passed"]
    assert compiled.report.after.census.get("batch-norm", 0) == 0
    path = compiled.save(tmp_path / "net.pt2")
    assert compiled.report.artifact["bytes"] == path.stat().st_size
    pairs = []
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 8, 8)
        with torch.no_grad():
            pairs.append((x, model(x)))
        strided = x.to(memory_format=torch.channels_last)
        assert relative_error(compiled(strided), pairs[-1][1]) <= SINGLE
    torch.save(pairs, tmp_path / "pairs.pt")
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(path), str(tmp_path / "pairs.pt")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


@pytest.mark.slow
def test_dynamic_height_and_width(tmp_path):
    model, x = seeded(Sizes()), torch.randn(2, 3, 8, 10)
    auto = torch.export.Dim.AUTO
    compiled = refold.compile_for_inference(
        model, x, target="aoti", dynamic_shapes=({0: auto, 2: auto, 3: auto},)
    )
    for sizes in ((2, 8, 10), (1, 8, 10), (3, 9, 12), (5, 32, 16)):
        x = torch.randn(sizes[0], 3, *sizes[1:])
        with torch.no_grad():
            assert relative_error(compiled(x), model(x)) <= SINGLE


@pytest.mark.slow
def test_constants_among_the_outputs():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = ConvNet()

        def forward(self, x, flag=True):
            y = self.net(x)
            return {"y": y, "none": None, "flag": flag, "three": (3, y.argmax(1))}

    model = seeded(Net())
    compiled = refold.compile_for_inference(model, torch.randn(2, 3, 8, 8), target="aoti")
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        assert_same(compiled(x), model(x))
