"""What TensorRT-RTX's parser and builder make of shift-add layers in INT4. Nothing is executed."""

from __future__ import annotations

import pytest
import torch

from refold.backends.tensorrt import artifact, build, check, library, ops
from tests.backends.onnx.shift_add.test_shift_add import Shared, compiled

pytestmark = pytest.mark.rtx
RTX = "tensorrt_rtx"


CASES = [(2, "uniform"), (3, "uniform"), (4, "uniform"), (3, "any")]


def built_from(model, folder, **options):
    folder.mkdir()
    made = compiled(model, torch.randn(2, 3, 256), target="trt", build=False, **options)
    path = made.save(folder / "net.trt")
    found = check.preflight(path / artifact.MODEL, ops.Version.parse("rtx"), library.find(RTX))
    assert not found.rejections
    built = build.build(path, library=RTX)
    assert built.record.layers
    return built.path.stat().st_size


@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize(("bits", "family"), CASES)
def test_int4_layers_are_accepted_and_stay_small(bits, family, size, tmp_path):
    ask = {"requantise": 4} if family == "any" else {}
    model = Shared(bits, width=256, size=size, family=family)
    small = built_from(model, tmp_path / "small", **ask)
    assert built_from(model, tmp_path / "half", precision="fp16", **ask) < 1.1 * small
    floats = Shared(bits, width=256, size=size, family="any")
    # Four layers of 256 x 256: 1 MiB of floats, an eighth of it as codes, and scales and kernels.
    assert built_from(floats, tmp_path / "floats") - small > 500_000
