"""Lazy tensors: what is written in place is never somebody else's, and products stay factored."""

from __future__ import annotations

import pytest
import torch

from refold.algebra.lazy import Lazy


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_times_never_writes_the_source(dtype: torch.dtype) -> None:
    w = random(4, 3, dtype=dtype)
    kept = w.clone()
    lazy = Lazy.of(w).times(torch.full((4, 1), 2.0, dtype=torch.float64))
    assert lazy.get().dtype == torch.float64
    third = torch.tensor(1 / 3, dtype=torch.float64)
    assert torch.equal(Lazy.of(w).times(third).get(), kept.double() * third)
    assert torch.equal(lazy.get(), kept.double() * 2)
    assert torch.equal(lazy.get(), kept.double() * 2)
    assert torch.equal(w, kept)


@pytest.mark.parametrize("shape", [(), (1,), (4, 1), (5,), (1, 5), (4, 5)])
def test_a_scaled_product_is_the_product_scaled(shape: tuple[int, ...]) -> None:
    a, b, factor = random(4, 3), random(3, 5), random(*shape)
    lazy = Lazy.product(Lazy.of(a), Lazy.of(b)).times(factor)
    expected = (a @ b) * factor
    assert torch.allclose(lazy.get(), expected, rtol=0, atol=1e-12)
    out = random(4, 5)
    base = out.clone()
    lazy.add_to(out)
    assert torch.allclose(out, base + expected, rtol=0, atol=1e-12)
