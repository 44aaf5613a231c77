from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from refold.ops.bcq_linear import dequantise, pack, reference, unpack
from tests.compare import EXACT, relative_error

OP = torch.ops.refold.bcq_linear.default
# Sums of a few hundred float32 products, each rounded to 6e-8.
SINGLE = 2e-6


def layer(bits: int, rows: int, features: int, group: int, *, uniform: bool = False):
    """Random planes and scales, and the weight that they stand for, spelled out."""
    signs = torch.randint(0, 2, (bits, rows, features)) * 2 - 1
    groups = -(-features // group)
    alpha = torch.rand(1 if uniform else bits, rows, groups, dtype=torch.float64) + 0.1
    weight = torch.zeros(rows, features, dtype=torch.float64)
    for plane in range(bits):
        for column in range(features):
            scale = alpha[0 if uniform else plane, :, column // group]
            scale = scale * 2 ** (bits - 1 - plane) if uniform else scale
            weight[:, column] += scale * signs[plane, :, column]
    return signs, alpha, weight


@given(
    bits=st.integers(1, 4), rows=st.integers(1, 5), features=st.integers(1, 40),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_packing_is_undone_bit_for_bit(bits: int, rows: int, features: int) -> None:
    signs = torch.randint(0, 2, (bits, rows, features)) * 2 - 1
    planes = pack(signs)
    assert planes.dtype == torch.uint8
    assert planes.shape == (bits, rows, -(-features // 8))
    assert torch.equal(unpack(planes, features), signs.to(torch.int8))
    past_the_end = unpack(planes, planes.shape[-1] * 8)[..., features:]
    assert (past_the_end == -1).all()


def test_bits_lie_least_significant_first() -> None:
    signs = torch.tensor([[[1, -1, -1, 1, -1, -1, -1, -1, -1, 1]]])
    assert pack(signs).flatten().tolist() == [0b1001, 0b10]


@given(
    bits=st.integers(1, 4),
    rows=st.integers(1, 4),
    features=st.integers(1, 70),
    group=st.sampled_from((16, 32, 128)),
    uniform=st.booleans(),
    bias=st.booleans(),
    lead=st.sampled_from(((), (3,), (2, 3), (0,))),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_it_is_the_product_with_the_weight(bits, rows, features, group, uniform, bias, lead, seed):
    torch.manual_seed(seed)
    signs, alpha, weight = layer(bits, rows, features, group, uniform=uniform)
    shift = torch.randn(rows, dtype=torch.float64) if bias else None
    x = torch.randn(*lead, features, dtype=torch.float64)
    planes = pack(signs)
    assert relative_error(dequantise(planes, alpha, features, group, torch.float64), weight) < EXACT
    expected = x @ weight.T + (0 if shift is None else shift)
    assert relative_error(OP(x, planes, alpha, shift, group), expected) <= EXACT
    single = None if shift is None else shift.float()
    got = OP(x.float(), planes, alpha.float(), single, group)
    assert got.dtype == torch.float32
    # what is added up may cancel, within a weight, too
    plus = pack(torch.ones_like(signs))
    whole = dequantise(plus, alpha.abs(), features, group, torch.float64)
    terms = x.abs() @ whole.T + (0 if shift is None else shift.abs())
    assert bool(((got - expected).abs() <= SINGLE * terms).all())


def test_scales_in_half_precision_are_widened_first() -> None:
    signs, alpha, _ = layer(3, 4, 40, 16)
    half, x = alpha.half(), torch.randn(2, 40)
    exact = dequantise(pack(signs), half.double(), 40, 16, torch.float64)
    got = OP(x, pack(signs), half, None, 16)
    assert relative_error(got.double(), x.double() @ exact.T) <= SINGLE
    assert OP(x.bfloat16(), pack(signs), half, None, 16).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_fake_kernel_promises_what_the_reference_gives(dtype: torch.dtype) -> None:
    signs, alpha, _ = layer(2, 4, 40, 16)
    given = (torch.randn(2, 3, 40, dtype=dtype), pack(signs), alpha.half(), torch.randn(4))
    out = OP(*given, 16)
    with FakeTensorMode() as mode:
        fake = OP(*(mode.from_tensor(t) for t in given), 16)
    promised = (fake.shape, fake.dtype, fake.device, fake.stride())
    assert promised == (out.shape, out.dtype, out.device, out.stride())


def test_export_keeps_the_batch_dynamic() -> None:
    signs, alpha, _ = layer(2, 4, 40, 16)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("planes", pack(signs))
            self.register_buffer("alpha", alpha.float())

        def forward(self, x):
            return OP(x, self.planes, self.alpha, None, 16)

    x, shapes = torch.randn(2, 40), ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(Net(), (x,), dynamic_shapes=shapes)
    more = torch.randn(5, 40)
    assert torch.equal(program.module()(more), OP(more, pack(signs), alpha.float(), None, 16))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.ones(2, 40, dtype=torch.int64)}, "floating x"),
        ({"alpha": torch.ones(2, 4, 3, dtype=torch.int8)}, "uint8 planes"),
        ({"group_size": 12}, "multiple of 8"),
        ({"group_size": 0}, "multiple of 8"),
        ({"x": torch.ones(2, 48)}, r"expected \[q, N, 6\]"),
        ({"alpha": torch.ones(2, 4, 2)}, r"4, 3\]"),
        ({"alpha": torch.ones(3, 4, 3)}, r"\[1 or 2"),
        ({"bias": torch.ones(5)}, r"expected \[4\]"),
    ],
)
def test_arguments_that_do_not_fit(change, words: str) -> None:
    fitting = {
        "x": torch.ones(2, 40), "planes": torch.zeros(2, 4, 5, dtype=torch.uint8),
        "alpha": torch.ones(2, 4, 3), "bias": None, "group_size": 16,
    }  # fmt: skip
    reference(**fitting)
    with pytest.raises(ValueError, match=words):
        reference(**{**fitting, **change})
