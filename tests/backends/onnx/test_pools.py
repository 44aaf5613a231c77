"""A divisor of an average pool survives the exporter, which leaves it out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import refold
from refold.errors import BackendError

POOLS = {2: F.avg_pool2d, 3: F.avg_pool3d}


class Pool(nn.Module):
    def __init__(self, rank: int, kernel: Any, **options: Any) -> None:
        super().__init__()
        self.rank, self.kernel, self.options = rank, kernel, options

    def forward(self, x: Tensor) -> Tensor:
        return POOLS[self.rank](x, self.kernel, **self.options).relu()


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("kernel", [3, (2, 3, 4)])
def test_the_divisor_survives(rank: int, padding: int, counted: bool, kernel: Any) -> None:
    pytest.importorskip("onnxruntime")
    kernel = kernel if isinstance(kernel, int) else kernel[:rank]
    options = {"stride": 2, "padding": padding, "count_include_pad": counted}
    model = Pool(rank, kernel, divisor_override=5, **options)
    x = torch.randn(2, 3, *[6] * rank)
    compiled = refold.compile_for_inference(model, (x,), target="ort", verify=False)
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, *[6] * rank)
        torch.testing.assert_close(compiled(x), model(x))


def test_windows_that_end_behind_the_padding_are_refused() -> None:
    pytest.importorskip("onnxruntime")
    model = Pool(2, 3, stride=2, ceil_mode=True, divisor_override=5)
    with pytest.raises(BackendError, match="ceil_mode and divisor_override"):
        refold.compile_for_inference(model, (torch.randn(2, 3, 6, 6),), target="ort", verify=False)
