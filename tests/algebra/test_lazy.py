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


def counted(tensor: torch.Tensor) -> tuple[Lazy, list[int]]:
    """A lazy tensor, and a list that grows with each time that it is computed."""
    calls: list[int] = []

    def compute() -> torch.Tensor:
        calls.append(1)
        return tensor.clone()

    return Lazy(tuple(tensor.shape), compute, fresh=True), calls


def test_what_several_parents_share_is_computed_once_and_written_by_none() -> None:
    base, calls = counted(random(3, 2))
    value = base.get()
    factor = torch.tensor(3.0, dtype=torch.float64)
    left, right = base.times(factor), base.times(-factor)
    both = Lazy((3, 2), lambda: left.get() + right.get() + base.get(), parents=(left, right, base))
    del calls[:]
    assert torch.allclose(both.evaluate(), value, rtol=0, atol=1e-12)
    assert len(calls) == 1
    assert torch.equal(base.evaluate(), value)
    assert len(calls) == 2  # nothing is kept once the constant is there


def test_a_ladder_costs_its_rungs_and_not_its_paths() -> None:
    base, calls = counted(random(2, 2))
    first = base.get()
    del calls[:]
    rung, rungs = base, []
    for _ in range(64):
        below, made = rung, []
        rungs.append(made)

        def half(below: Lazy = below, made: list[int] = made) -> torch.Tensor:
            made.append(1)
            return (below.get() + below.get()) / 2

        rung = Lazy((2, 2), half, parents=(below, below))
    for compute in (rung.evaluate, rung.get):
        assert torch.equal(compute(), first)
        assert [len(made) for made in rungs] == [1] * 64
        assert len(calls) == 1
        del calls[:]
        for made in rungs:
            del made[:]


def test_a_long_chain_is_computed_piece_by_piece() -> None:
    """Ten thousand steps, one inside the other, would be too deep for the interpreter."""
    lazy = Lazy.of(random(2))
    start = lazy.get()
    made: list[int] = []
    for step in range(10_000):

        def plus(t: torch.Tensor, step: int = step) -> torch.Tensor:
            made.append(step)
            return t + 1

        lazy = lazy.map((2,), plus)
    silent = Lazy((2,), lambda: lazy.get())  # it does not say what it is made of
    for compute in (lazy.evaluate, lazy.get, lazy.map((2,), lambda t: t).get, silent.evaluate):
        assert torch.allclose(compute(), start + 10_000, rtol=0, atol=1e-9)
        assert sorted(made) == list(range(10_000))
        del made[:]


def test_a_sum_takes_a_product_in_or_what_is_known_of_it() -> None:
    left, calls = counted(random(3, 4))
    product = Lazy.product(left, Lazy.of(random(4, 2)))
    value = product.get()
    del calls[:]
    scaled = product.times(torch.tensor(2.0, dtype=torch.float64))

    def sum_of(*terms: Lazy) -> torch.Tensor:
        out = torch.zeros(3, 2, dtype=torch.float64)
        for term in terms:
            term.add_to(out)
        return out

    terms = (product, product, scaled)
    both = Lazy((3, 2), lambda: sum_of(*terms), parents=terms)
    assert torch.allclose(both.evaluate(), 4 * value, rtol=0, atol=1e-12)
    assert len(calls) == 1
    del calls[:]
    twice = Lazy((3, 2), lambda: sum_of(product, product), parents=(product, product))
    assert torch.allclose(twice.evaluate(), 2 * value, rtol=0, atol=1e-12)
    assert len(calls) == 1
    assert (product.fresh, scaled.fresh, Lazy.of(value).fresh) == (True, True, False)
    assert product.numel() == 6


@pytest.mark.parametrize(
    "shape", [(2, 3, 4, 5), (2, 3, 4, 5, 6), (2, 3, 1, 1), (2, 1, 4, 5), (2, 3)]
)
def test_what_is_made_of_a_weight_is_laid_out_as_it_is(shape: tuple[int, ...]) -> None:
    """By strides; of a kernel of one tap, and of one input, both layouts are the same memory."""
    plain = Lazy.of(random(*shape))
    assert not plain.channels_last
    assert plain.memory_format == torch.contiguous_format
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape))
    if last is None:
        return
    turned = Lazy.of(random(*shape).contiguous(memory_format=last))
    differs = shape[1] > 1 and max(shape[2:]) > 1
    assert turned.channels_last is differs
    expected = last if differs else torch.contiguous_format
    for lazy in (turned, turned.map(shape, torch.neg), turned.times(random(1))):
        assert lazy.memory_format == expected
    for parents in ((plain, turned), (turned, plain)):
        assert Lazy(shape, plain.get, parents=parents).memory_format == expected
        told = Lazy(shape, plain.get, parents=parents, channels_last=False)
        assert told.memory_format == torch.contiguous_format
    flat = Lazy((2, 3), lambda: random(2, 3), parents=(turned,))
    assert flat.memory_format == torch.contiguous_format


def test_scaling_rows_or_all_of_a_product_leaves_it_one() -> None:
    product = Lazy.product(Lazy.of(random(4, 2)), Lazy.of(random(2, 2)))
    value = product.get()
    for shape, factored in (
        ((), True), ((1,), True), ((4, 1), True), ((4, 2), False),
        ((2,), False), ((1, 2), False),
    ):  # fmt: skip
        factor = random(*shape)
        scaled = product.times(factor)
        assert (scaled._factors is not None) is factored, shape
        assert torch.allclose(scaled.get(), value * factor, rtol=0, atol=1e-12)


def test_what_long_chains_share_is_computed_once() -> None:
    base, calls = counted(random(2))
    chain = base
    for _ in range(50):
        chain = chain.map((2,), lambda t: t + 1)
    left, right = chain.map((2,), torch.neg), chain.map((2,), torch.abs)
    for parents in ((left, right, Lazy.of(random(2))), (Lazy.of(random(2)), left, right)):
        both = Lazy((2,), lambda: left.get() + right.get(), parents=parents)
        del calls[:]
        both.get()
        assert len(calls) == 1
