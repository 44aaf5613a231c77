"""Parameters that no output depends on are named, and no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import refold
from refold.diagnose.dead_parameters import dead_parameters
from refold.frontends.export import trace


class Net(nn.Module):
    """A function of its own parts and an input; tensors become parameters."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def traced(model: nn.Module, x: Tensor) -> fx.GraphModule:
    with torch.no_grad():
        return trace(model.eval(), (x,), {}).graph_module


def dead(forward: Callable[..., Any], x: Tensor, **parts: Any) -> dict[str, tuple[str, int]]:
    """Where and how many, by name; checks that other values there change nothing."""
    model = Net(forward, **parts).eval().requires_grad_(False).double()
    x = x.double()
    found = dead_parameters(traced(model, x))
    parameters, expected = dict(model.named_parameters()), model(x).clone()
    for record in found:
        assert record.of == parameters[record.name].numel()
        target = parameters[record.name]
        if record.where:
            exec(f"target{record.where} += 3.0", {"target": target})
        elif record.entries == record.of:
            target += torch.randn_like(target)
        assert torch.allclose(model(x), expected, rtol=1e-13, atol=1e-12), record
    return {record.name: (record.where, record.entries) for record in found}


def central(m: Any, x: Tensor) -> Tensor:
    flat = m.w.flatten(2)
    kernel = torch.zeros_like(flat)
    kernel[:, :, :] = flat[:, :, :]
    kernel[:, :, 4] = flat[:, :, 4] - flat.sum(2)
    return F.conv2d(x, kernel.reshape(m.w.shape), padding=1)


W, IMAGE = torch.randn(3, 2, 3, 3), torch.randn(1, 2, 5, 6)


def test_the_centre_of_a_central_difference() -> None:
    assert dead(central, IMAGE, w=W) == {"w": ("[:, :, 1, 1]", 6)}


def test_a_sliced_weight() -> None:
    """A sub-network cut from shared weights; the rest of them is dead here."""
    assert dead(lambda m, x: F.conv2d(x, m.w[:2]), IMAGE, w=W) == {"w": ("[2, :, :, :]", 18)}


def test_entries_that_are_no_block() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.conv2d(x, m.w.flatten(2)[:, :, [0, 5, 7]].unsqueeze(2))

    assert dead(forward, IMAGE, w=W) == {"w": ("", 36)}


def test_a_mask_that_is_a_buffer() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 3))
            self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0]))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.w * self.mask)

    (record,) = dead_parameters(traced(Masked(), torch.randn(2, 3)))
    assert (record.name, record.where, record.entries) == ("w", "[:, 1]", 2)


def test_a_parameter_that_nothing_reads() -> None:
    x, w = torch.randn(2, 3), torch.randn(4, 3)
    assert dead(lambda m, x: F.linear(x, m.w), x, w=w, bias=torch.randn(4)) == {"bias": ("", 4)}


def test_a_tied_parameter_is_read() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert not dead_parameters(traced(model, torch.randn(2, 3)))


def test_the_shift_before_pool_minus_identity() -> None:
    pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    norm = nn.GroupNorm(1, 2)

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(x)
        return x + 2 * (m.pool(y) - y)

    assert dead(forward, IMAGE, norm=norm, pool=pool) == {"norm.bias": ("", 2)}


POOL = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
PADDED = nn.AvgPool2d(3, 1, 1)


@pytest.mark.parametrize(
    ("forward", "parts"),
    [
        (lambda m, x: m.pool(m.norm(x)) + m.norm(x), {"pool": POOL}),
        (lambda m, x: m.pool(y := m.norm(x)) - y, {"pool": PADDED}),
        (lambda m, x: (m.pool(y := m.norm(x)) - y) * y, {"pool": POOL}),
        (lambda m, x: m.pool(y := m.norm(x)) - 2 * y, {"pool": POOL}),
        (lambda m, x: (m.pool(y := m.norm(x)) - y, y)[0] + y.relu(), {"pool": POOL}),
        (lambda m, x: torch.sub(m.pool(y := m.norm(x)), y, alpha=0.5), {"pool": POOL}),
        (lambda m, x: m.pool(y := m.norm(x)) - y + m.norm.bias.sum(), {"pool": POOL}),
    ],
    ids=["sum", "padded pool", "read again", "twice", "other user", "alpha", "bias read again"],
)
def test_shifts_that_matter(forward: Callable[..., Any], parts: dict[str, Any]) -> None:
    assert not dead(forward, IMAGE, norm=nn.GroupNorm(1, 2), **parts)


def test_a_layer_norm_s_shift_varies_over_what_is_pooled() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(x)
        return m.pool(y) - y

    assert not dead(forward, IMAGE, norm=nn.LayerNorm((2, 5, 6)), pool=POOL)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: F.conv2d(x, m.w),
        lambda m, x: F.conv2d(x, m.w - 0.5 * m.w),
        lambda m, x: F.conv2d(x, m.w * m.w.flatten(2).sum(2)[:, :, None, None]),
        lambda m, x: F.conv2d(x, m.w.relu() - m.w.relu()),  # it is, but no linear call says so
        lambda m, x: F.conv2d(x, m.w[:2]) + m.w.sum(),
        lambda m, x: F.conv2d(x, torch.div(m.w, 2, rounding_mode="floor")),
        lambda m, x: F.conv2d(x, m.w.round()),
        lambda m, x: central(m, x) + F.conv2d(x, m.w, padding=1),
        lambda m, x: x.sum() + torch.ops.aten.copy(m.w - m.w.mean(1, keepdim=True), m.w),
    ],
    ids=[
        "as it is",
        "half",
        "product",
        "not linear",
        "sum",
        "floor",
        "round",
        "read plain",
        "no derivative",
    ],
)
def test_parameters_that_matter_or_cannot_be_told(forward: Callable[..., Any]) -> None:
    assert not dead(forward, IMAGE, w=W)


def test_a_zero_factor_of_a_product_does_not_make_the_other_dead() -> None:
    """A fresh adapter: its value is 0 now, and another checkpoint's is not."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return F.linear(x, m.w + m.up @ m.down)

    parts = {"w": torch.randn(4, 3), "up": torch.zeros(4, 2), "down": torch.randn(2, 3)}
    assert not dead(forward, torch.randn(2, 3), **parts)


def test_the_report_names_them() -> None:
    model = Net(central, w=W).eval()
    report = refold.explain(model, IMAGE)
    assert "w[:, :, 1, 1] (6 of 54, no output depends on it)" in " ".join(report.render().split())
    assert refold.Report.from_json(report.to_json()).dead == report.dead
    assert report.to_dict()["dead"][0]["entries"] == 6
