"""The product with formed weights, which AVX2 has."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from refold.native.interface import KernelLibrary, NativeError
from refold.native.layer import GEMV_ROWS, multiply
from tests.native.layers import EXACT, Layer, activations, layer, relative

ISA = "avx2"


@pytest.fixture
def kernel(kernel: KernelLibrary) -> KernelLibrary:
    if ISA not in kernel.isas:
        pytest.skip(f"no {ISA} here")
    return kernel


def run(
    kernel: KernelLibrary, of: Layer, x: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    got = kernel.product(x, of.packed, bias, isa=ISA)
    assert got is not None
    return got


@pytest.mark.parametrize("q", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("rows", "features", "group_size"),
    [(1, 1, 8), (16, 8, 8), (65, 77, 32), (64, 264, 24), (130, 511, 128), (81, 513, 1024)],
)
def test_it_computes_what_the_reference_computes(
    kernel: KernelLibrary, q: int, rows: int, features: int, group_size: int
) -> None:
    for uniform in (False, True):
        for dtype in (torch.float32, torch.float16):
            of = layer(q, rows, features, group_size, uniform=uniform, dtype=dtype)
            of.alpha.add_(1)  # an output of one weight should not be zero
            x, bias = activations(7, features), activations(rows, seed=2)
            assert relative(run(kernel, of, x, bias), of.reference(x, bias)) <= EXACT, of


@pytest.mark.parametrize("batch", [*range(1, 15), 127, 128, 129, 300])
def test_every_number_of_rows(kernel: KernelLibrary, batch: int) -> None:
    of, x, bias = layer(3, 100, 300, 64), activations(batch, 300), activations(100, seed=2)
    got = run(kernel, of, x, bias)
    assert relative(got, of.reference(x, bias)) <= EXACT
    assert torch.equal(got[-1:], run(kernel, of, x[-1:], bias))  # whatever is beside a row


def test_threads_do_not_change_a_bit(kernel: KernelLibrary) -> None:
    of, x, before = layer(3, 500, 600, 64), activations(40, 600), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(kernel, of, x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)
    assert relative(results[0], of.reference(x)) <= EXACT


def test_calls_from_several_threads(kernel: KernelLibrary) -> None:
    of, before = layer(2, 300, 256, 64), torch.get_num_threads()
    inputs = [activations(9 + s, 256, seed=s) for s in range(24)]
    torch.set_num_threads(2)
    try:
        alone = [run(kernel, of, x) for x in inputs]
        with ThreadPoolExecutor(4) as executor:
            together = list(executor.map(lambda x: run(kernel, of, x), inputs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e25])
def test_what_is_not_finite_propagates(kernel: KernelLibrary, value: float) -> None:
    of, x = layer(2, 70, 100, 32), activations(9, 100)
    x[4, 57] = value
    got, expected = run(kernel, of, x), of.reference(x).float()
    torch.testing.assert_close(got[4], expected[4], equal_nan=True, rtol=1e-5, atol=0)
    others = [i for i in range(9) if i != 4]
    assert relative(got[others], expected[others]) <= EXACT


def test_no_rows(kernel: KernelLibrary) -> None:
    assert run(kernel, layer(2, 70, 100, 32), activations(0, 100)).shape == (0, 70)


def test_memory_that_is_not_there_is_said(kernel: KernelLibrary) -> None:
    packed = layer(2, 70, 8, 8).packed
    with pytest.raises(NativeError, match="no memory"):
        kernel.product(torch.zeros(1, 1).expand(1, 1 << 50), packed, None, isa=ISA)


def test_other_instruction_sets_have_none(kernel: KernelLibrary) -> None:
    packed = layer(2, 70, 100, 32).packed
    assert kernel.product(activations(9, 100), packed, None, isa="portable") is None


@pytest.mark.parametrize("exact", [True, False])
def test_layers_use_it_past_a_number_of_rows(kernel: KernelLibrary, exact: bool) -> None:
    of, most = layer(3, 70, 100, 32), GEMV_ROWS[ISA][0 if exact else 1]
    for batch, same in ((most, False), (most + 1, True)):
        x = activations(batch, 100)
        got = multiply(kernel, x, of.packed, exact=exact, isa=ISA)
        assert torch.equal(got, run(kernel, of, x)) == same
