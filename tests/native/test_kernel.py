"""The kernel against the operator's reference, on every instruction set that runs here."""

from __future__ import annotations

import copy
import mmap
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refold.native.interface import ISAS, KernelLibrary
from refold.native.layer import GEMV_ROWS, multiply, pack, unpack
from refold.ops import bcq_linear
from tests.native.layers import EXACT, LOOKUP, Layer, activations, layer, relative

SHAPES = [(1, 8, 8), (5, 77, 32), (64, 128, 64), (70, 320, 32), (130, 200, 128), (65, 264, 24)]
EITHER = pytest.mark.parametrize("exact", [True, False], ids=["exact", "lookup"])
EVERY_ISA = pytest.mark.parametrize("isa", ISAS)


def run(
    kernel: KernelLibrary,
    of: Layer,
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    exact: bool = True,
    isa: str | None = None,
) -> torch.Tensor:
    if isa is not None and isa not in kernel.isas:
        pytest.skip(f"no {isa} here")
    return multiply(kernel, x, of.packed, bias, exact=exact, isa=isa)


def allowed(exact: bool) -> float:
    return EXACT if exact else LOOKUP


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
def test_packing_loses_nothing(rows: int) -> None:
    of = layer(3, rows, 77, 32)
    planes, alpha = unpack(of.packed)
    assert torch.equal(planes, of.planes)
    assert torch.equal(alpha, of.alpha)


def test_packing_takes_no_more_bytes_than_the_planes() -> None:
    of = layer(3, 128, 256, 128, dtype=torch.float16)
    packed = of.packed
    assert packed.planes.nbytes == of.planes.nbytes == 3 * 128 * 256 // 8
    assert packed.scales.nbytes == of.alpha.nbytes == 3 * 128 * 2 * 2


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no large pages on this system")
def test_what_a_large_layer_stores_starts_at_a_large_page() -> None:
    of = layer(2, 4096, 2112, 64, dtype=torch.float16)
    packed = of.packed
    assert packed.planes.data_ptr() % (2 << 20) == 0
    assert packed.planes.untyped_storage().nbytes() == of.planes.nbytes > 2 << 20
    assert torch.equal(unpack(packed)[0], of.planes)
    assert torch.equal(unpack(copy.deepcopy(packed))[0], of.planes)


@EVERY_ISA
@EITHER
@pytest.mark.parametrize("q", [1, 2, 3, 4])
def test_it_computes_what_the_reference_computes(
    kernel: KernelLibrary, q: int, exact: bool, isa: str
) -> None:
    for rows, features, group_size in SHAPES:
        for uniform in (False, True):
            for dtype in (torch.float32, torch.float16):
                of = layer(q, rows, features, group_size, uniform=uniform, dtype=dtype)
                x, bias = activations(2, features), activations(rows, seed=2)
                got = run(kernel, of, x, bias, exact=exact, isa=isa)
                assert relative(got, of.reference(x, bias)) <= allowed(exact), of


@EVERY_ISA
@EITHER
@pytest.mark.parametrize("batch", [1, 3, 8, 40, 128, 300])
def test_batches(kernel: KernelLibrary, batch: int, exact: bool, isa: str) -> None:
    of = layer(3, 150, 300, 64)
    x = activations(batch, 300)
    got = run(kernel, of, x, exact=exact, isa=isa)
    assert relative(got, of.reference(x)) <= allowed(exact)


@pytest.mark.parametrize("tiles", [1, 2, 3])
def test_weights_are_formed_some_tiles_at_a_time(
    kernel: KernelLibrary, tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refold.native.layer._FORMED", tiles * 64 * 100)
    of = layer(3, 300, 100, 32)  # five tiles
    x = activations(300, 100)
    assert relative(run(kernel, of, x, isa="portable"), of.reference(x)) <= EXACT


@EITHER
@pytest.mark.parametrize("group_size", [32, 64, 128, 8, 512, 1024])
def test_group_sizes(kernel: KernelLibrary, group_size: int, exact: bool) -> None:
    of = layer(2, 64, 512, group_size)
    x = activations(2, 512)
    assert relative(run(kernel, of, x, exact=exact), of.reference(x)) <= allowed(exact)


@pytest.mark.parametrize("batch", [2, 40])
@EITHER
def test_threads_do_not_change_a_bit(kernel: KernelLibrary, batch: int, exact: bool) -> None:
    of, before = layer(3, 500, 256, 64), torch.get_num_threads()
    isa = kernel.isas[-1]
    formed = isa != "avx2" and batch > GEMV_ROWS[isa][0 if exact else 1]  # torch's may change
    x = activations(batch, 256)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(kernel, of, x, exact=exact))
    finally:
        torch.set_num_threads(before)
    if not formed:
        assert all(torch.equal(r, results[0]) for r in results)
    assert all(relative(r, of.reference(x)) <= allowed(exact) for r in results)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_layer(library_path: Path, data: st.DataObject) -> None:
    kernel = KernelLibrary(library_path)
    q, batch = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 2, 5, 17, 33]))
    rows, features = data.draw(st.integers(1, 140)), data.draw(st.integers(1, 400))
    of = layer(
        q, rows, features, 8 * data.draw(st.integers(1, 60)),
        uniform=data.draw(st.booleans()),
        dtype=data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32])),
        seed=data.draw(st.integers(0, 1000)),
    )  # fmt: skip
    x = activations(batch, features, seed=data.draw(st.integers(0, 1000)))
    bias = activations(rows) if data.draw(st.booleans()) else None
    exact = data.draw(st.booleans())
    isa = data.draw(st.sampled_from(kernel.isas))
    expected = of.reference(x, bias)
    got = multiply(kernel, x, of.packed, bias, exact=exact, isa=isa)
    # Outputs may cancel, so errors are judged by their terms: a look-up is off by half a step.
    terms = torch.full((batch, features // 4 + 2), 4 * float(x.abs().max()) / 127 / 2)
    if exact:
        terms = x.double().abs() * EXACT
    sizes = of.alpha.double().abs().sum(0).amax(-1) * (2**q - 1 if of.alpha.shape[0] < q else 1)
    limit = terms.double().sum(-1, keepdim=True) * sizes + EXACT * expected.abs()
    assert ((got - expected).abs() <= 1.01 * limit).all()


@EVERY_ISA
@EITHER
def test_scales_that_are_all_zero_give_the_bias(
    kernel: KernelLibrary, exact: bool, isa: str
) -> None:
    of = layer(3, 70, 128, 32)
    of.alpha.zero_()
    bias = activations(70)
    got = run(kernel, of, activations(2, 128), bias, exact=exact, isa=isa)
    assert torch.equal(got, bias.expand(2, -1))


@EVERY_ISA
@EITHER
def test_one_sign_each(kernel: KernelLibrary, exact: bool, isa: str) -> None:
    """Every bit has its own column, row and plane."""
    planes = torch.zeros(2, 64, 64, dtype=torch.int8)
    for i in range(64):
        planes[i % 2, i, (7 * i) % 64] = 1
    signs = torch.where(planes > 0, 1, -1)
    alpha = activations(2, 64, 1).abs() + 0.5
    of = Layer(bcq_linear.pack(signs), alpha, 64, 64)
    x = activations(1, 64)
    got = run(kernel, of, x, exact=exact, isa=isa)
    # Rows that are nearly equal have nearly equal errors, which do not cancel; a wrong sign is 0.1.
    assert relative(got, of.reference(x)) <= 2 * allowed(exact)


@EVERY_ISA
@EITHER
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e25])
def test_what_is_not_finite_goes_where_the_reference_sends_it(
    kernel: KernelLibrary, value: float, exact: bool, isa: str
) -> None:
    of = layer(2, 70, 100, 32)
    x = activations(2, 100)
    x[1, 57] = value
    got = run(kernel, of, x, exact=exact, isa=isa)
    expected = of.reference(x).float()
    torch.testing.assert_close(got[1], expected[1], equal_nan=True, rtol=1e-5, atol=0)
    assert relative(got[0], expected[0]) <= EXACT


@EVERY_ISA
@pytest.mark.parametrize(("exact", "limit"), [(True, 1e-3), (False, 3e-2)])
@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-36, 1e-30, 1e17])
def test_small_and_large_activations(
    kernel: KernelLibrary, scale: float, exact: bool, limit: float, isa: str
) -> None:
    of = layer(3, 70, 100, 32)
    x = activations(2, 100) * scale
    x[:, 40:60] = 0
    got = run(kernel, of, x, exact=exact, isa=isa)
    expected = of.reference(x)
    assert (got - expected).norm() <= limit * expected.norm()


@EITHER
def test_a_block_of_tiny_activations_beside_large_ones(kernel: KernelLibrary, exact: bool) -> None:
    of = layer(3, 70, 256, 64)
    x = activations(1, 256)
    x[:, 64:128] *= 1e-42
    x[:, 128:192] = 0
    assert relative(run(kernel, of, x, exact=exact), of.reference(x)) <= allowed(exact)


@pytest.mark.parametrize("batch", [2, 30])
def test_strides_and_leading_axes(kernel: KernelLibrary, batch: int) -> None:
    of = layer(3, 70, 100, 32)
    for x in (
        activations(100, batch).T,
        activations(batch, 200)[:, ::2],
        activations(100).expand(batch, 100),
        activations(batch, 1, 3, 100).transpose(0, 2),
    ):
        got = run(kernel, of, x)
        assert got.shape == (*x.shape[:-1], 70)
        assert relative(got, of.reference(x)) <= EXACT
    assert run(kernel, of, activations(0, 100)).shape == (0, 70)


@pytest.mark.parametrize("batch", [2, 30])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(
    kernel: KernelLibrary, dtype: torch.dtype, batch: int
) -> None:
    of = layer(3, 70, 100, 32)
    x = activations(batch, 100).to(dtype)
    got = run(kernel, of, x, activations(70).to(dtype))
    expected = of.reference(x, activations(70).to(dtype))
    assert got.dtype == dtype
    # Half a unit in the last place, and what summation may carry over the edge.
    limit = torch.finfo(dtype).eps * 0.51 * expected.abs() + 1e-5
    assert ((got.double() - expected).abs() <= limit).all()


def test_calls_from_several_threads(kernel: KernelLibrary) -> None:
    of = layer(3, 300, 256, 64)
    packed = of.packed
    inputs = [activations(1, 256, seed=s) for s in range(24)]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        alone = [multiply(kernel, x, packed) for x in inputs]
        with ThreadPoolExecutor(4) as executor:
            together = list(executor.map(lambda x: multiply(kernel, x, packed), inputs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted as Linux lists them")
def test_a_forked_process_starts_threads_of_its_own(kernel: KernelLibrary) -> None:
    of = layer(2, 300, 64, 64)
    packed, x, before = of.packed, activations(1, 64), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = multiply(kernel, x, packed)
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)  # ends the child where it would wait for threads that it has not
            same = torch.equal(multiply(kernel, x, packed), expected)
            threads = len(os.listdir("/proc/self/task"))  # a fork has one
            os._exit(0 if same and threads == 2 else 1)
        assert os.waitpid(pid, 0)[1] == 0
    finally:
        torch.set_num_threads(before)


def test_packing_keeps_half_scales_and_widens_others() -> None:
    for dtype, kept in [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
    ]:
        of = layer(2, 10, 16, 8, dtype=dtype)
        assert pack(of.planes, of.alpha, 8).scales.dtype == kept
