"""A folded weight is laid out as the weights that it is made of: results keep their strides."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import refold
from tests.examples import few
from tests.folding import Net
from tests.randomise import randomise

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def _branches(s: Net, x: Tensor) -> Tensor:
    return F.relu(s.b(s.c(x)) + s.e(s.d(x)))


def _chain(s: Net, x: Tensor) -> Tensor:
    return s.f(s.b(s.c(x)))


NETS: dict[str, tuple[Callable[[Net, Tensor], Tensor], dict[str, nn.Module]]] = {
    "a norm": (lambda s, x: s.b(s.c(x)),
               {"c": nn.Conv2d(4, 6, 3, padding=1), "b": nn.BatchNorm2d(6)}),
    "a 1x1 kernel": (lambda s, x: s.b(s.c(x)), {"c": nn.Conv2d(4, 6, 1), "b": nn.BatchNorm2d(6)}),
    "a transposed one": (lambda s, x: s.b(s.c(x)),
                         {"c": nn.ConvTranspose2d(4, 6, 2, 2), "b": nn.BatchNorm2d(6)}),
    "three dimensions": (lambda s, x: s.b(s.c(x)),
                         {"c": nn.Conv3d(4, 6, 3), "b": nn.BatchNorm3d(6)}),
    "branches": (_branches, {"c": nn.Conv2d(4, 6, 3, padding=1), "b": nn.BatchNorm2d(6),
                             "d": nn.Conv2d(4, 6, 1), "e": nn.BatchNorm2d(6)}),
    "depthwise": (lambda s, x: s.b(s.c(x)), {"c": nn.Conv2d(4, 4, 3, padding=1, groups=4),
                                             "b": nn.BatchNorm2d(4)}),
    "one channel": (lambda s, x: s.f(s.c(x[:, :1])),
                    {"c": nn.Conv2d(1, 8, 1), "f": nn.Conv2d(8, 6, 3)}),
    "a chain": (_chain, {"c": nn.Conv2d(4, 16, 1), "b": nn.BatchNorm2d(16),
                         "f": nn.Conv2d(16, 4, 3, padding=1)}),
}  # fmt: skip


@pytest.mark.parametrize("name", few(NETS, 4))
@pytest.mark.parametrize("last", [True, False], ids=["weights last", "weights contiguous"])
@pytest.mark.parametrize("input_last", [True, False], ids=["input last", "input contiguous"])
def test_results_have_the_strides_of_the_model(name: str, last: bool, input_last: bool) -> None:
    forward, parts = NETS[name]
    torch.manual_seed(0)
    x = torch.randn(2, 4, *(6,) * (3 if name == "three dimensions" else 2))
    model = randomise(Net(forward, **parts).float().eval(), (x,))
    layout = FORMATS[x.ndim]
    if last:
        model = model.to(memory_format=layout)
    else:
        model = model.to(memory_format=torch.contiguous_format)
    x = x.to(memory_format=layout) if input_last else x
    expected = model(x)
    compiled = refold.compile_for_inference(model, x)
    assert compiled.report.after.census.get("batch-norm", 0) == 0
    got = compiled(x)
    assert got.stride() == expected.stride()
    assert torch.allclose(got, expected, atol=1e-5)


def _of_both(forward: Callable[[Net, Tensor], Tensor]) -> Net:
    torch.manual_seed(0)
    last = nn.Conv2d(4, 4, 3, padding=1).to(memory_format=torch.channels_last)
    return Net(forward, a=last, c=nn.Conv2d(4, 4, 3, padding=1), b=nn.BatchNorm2d(4)).float().eval()


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: s.c(x) + s.a(x),
        lambda s, x: s.c(x) - s.a(x),
        lambda s, x: torch.cat([s.a(x), s.c(x)], 1),
        lambda s, x: torch.cat([s.a(x), x], 1),
        lambda s, x: x + s.b(s.a(x)),
    ],
)  # fmt: skip
def test_branches_of_two_layouts_have_the_result_that_a_sum_has(
    forward: Callable[[Net, Tensor], Tensor],
) -> None:
    model, x = _of_both(forward), torch.randn(2, 4, 6, 6)
    compiled = refold.compile_for_inference(model, x)
    assert compiled.report.after.census["conv"] == 1
    assert compiled(x).stride() == model(x).stride()
