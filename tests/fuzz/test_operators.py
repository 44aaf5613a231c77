"""What each operator gives over residues is the residue of what it gives over numbers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from refold.fuzz import calls
from refold.fuzz import operators as over_residues
from refold.fuzz.calls import DATA
from refold.fuzz.formulas import FORMULAS
from refold.fuzz.residues import P, Residues, Unjudged, Unknown, mod, multiplied, root
from refold.graph import ops

aten = torch.ops.aten
_DENOMINATOR = 2**7 * 3**2 * 5**2 * 7**2  # of fractions that are told from their roundings
# Their values are no fractions of small integers; what is known of them is tested below.
_IRRATIONAL = (
    "float_power pow sqrt rsqrt silu sigmoid glu softmax log_softmax _softmax _log_softmax "
    "_safe_softmax var std var_mean std_mean norm norm_except_dim frobenius_norm _weight_norm "
    "linalg_vector_norm layer_norm native_layer_norm group_norm native_group_norm rms_norm "
    "instance_norm batch_norm _native_batch_norm_legit_no_training upsample_bicubic2d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_lanczos2d_aa "
    "scaled_dot_product_attention"
)


def over(field: Residues, target: Any, *args: Any, **kwargs: Any) -> Any:
    """A call whose floating tensors are read as residues."""
    args, kwargs = pytree.tree_map(lambda v: field.of(v) if _is_floating(v) else v, (args, kwargs))
    return over_residues.call(field, target, args, kwargs)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _residue(field: Residues, value: Tensor) -> Tensor:
    """Of a number that may have been rounded."""
    if not value.is_floating_point():
        return value
    fraction = (value * _DENOMINATOR).round() / _DENOMINATOR
    assert torch.allclose(fraction, value, rtol=1e-12, atol=1e-12)
    return field.of(fraction)


_UNLIKE = ("to.dtype", "view.dtype")  # whose code no trace has; that reads bits


def _exact() -> list[str]:
    names = {*FORMULAS, *over_residues._KERNELS, *ops.names(ops.RESIZE)} - {*_IRRATIONAL.split()}
    return [
        label
        for label in calls.operators()[0]
        if label.partition(".")[0] in names and label not in _UNLIKE
    ]


def _calls(label: str) -> Iterator[tuple[Any, Any, Any]]:
    operator = calls.operators()[0][label]
    for call in calls.calls_of(operator):
        data = torch.randint(1, 9, call.shape, generator=torch.Generator().manual_seed(3)).double()
        args, kwargs = pytree.tree_map(
            lambda v, data=data: data if v is DATA else _quarters(v), (call.args, call.kwargs)
        )
        yield operator, args, kwargs


def _quarters(value: Any) -> Any:
    return (value.double() * 4).round() / 4 if _is_floating(value) else value


def _compare(label: str) -> int:
    """Compares each call that the operators' own table has; says how many results."""
    field, compared = Residues(signed=False), 0
    for operator, args, kwargs in _calls(label):
        wanted = pytree.tree_leaves(operator(*args, **kwargs))
        found = over(field, operator, *args, **kwargs)
        leaves = pytree.tree_leaves(found, is_leaf=lambda v: isinstance(v, Unknown))
        for want, have in zip(wanted, leaves, strict=True):
            if isinstance(have, Tensor):
                assert torch.equal(have, _residue(field, want)), (label, args)
                compared += 1
    return compared


def test_bits_read_as_another_type_have_no_residue() -> None:
    with pytest.raises(Unjudged, match=r"view\.dtype has no formula"):
        over(
            Residues(signed=False),
            aten.view.dtype,
            torch.ones(2, 4, dtype=torch.float64),
            torch.float32,
        )


@pytest.mark.sweep
def test_every_formula_gives_the_residue_of_the_value() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compared = {label: _compare(label) for label in _exact()}
    assert sum(compared.values()) > 500
    assert sum(n > 0 for n in compared.values()) > 150


IMAGE = torch.arange(2 * 4 * 5 * 6).reshape(2, 4, 5, 6).remainder(7).double()
KERNEL = torch.arange(4 * 2 * 3 * 3).reshape(4, 2, 3, 3).remainder(5).double() / 4


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.conv2d.default, (IMAGE, KERNEL, IMAGE[0, :, 0, 0], [2, 1], [1, 2], [1, 2], 2)),
        (aten.conv2d.padding, (IMAGE, KERNEL, None, [1, 1], "same", [1, 1], 2)),
        (aten.conv_transpose2d.input, (IMAGE, KERNEL, None, [2, 1], [1, 0], [1, 0], 2)),
        (aten.convolution.default,
         (IMAGE, KERNEL, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 2)),
        (aten.avg_pool2d.default, (IMAGE, [3, 2], [2, 2], [1, 1], True, True)),
        (aten.avg_pool2d.default, (IMAGE, [3, 2], [2, 2], [1, 1], True, False)),
        (aten.avg_pool2d.default, (IMAGE, [3, 2], [2, 2], [1, 1], False, True, 5)),
        (aten.avg_pool1d.default, (IMAGE[0], [3], [2], [1], True, False)),
        (aten.adaptive_avg_pool2d.default, (IMAGE, [3, 4])),
        (aten.max_pool2d.default, (IMAGE, [3, 2], [2, 1], [1, 1], [1, 2], True)),
        (aten.max_pool1d.default, (IMAGE[0], [3], [2], [1])),
        (aten.upsample_bilinear2d.vec, (IMAGE, [10, 3], False, None)),
        (aten.upsample_nearest2d.vec, (IMAGE, [10, 3], None)),
        (aten.linear.default, (IMAGE, IMAGE[0, 0], IMAGE[0, 0, :, 0])),
        (aten.addmm.default, (IMAGE[0, 0], IMAGE[0, 1], IMAGE[0, 2, :, :6].new_ones(6, 6))),
        (aten.einsum.default, ("bchw, cd -> bdhw", [IMAGE, IMAGE[0, :, 0, :4]])),
        (aten.mean.dim, (IMAGE, [1, 3], True)),
        (aten.var.correction, (IMAGE[..., :3], [3])),
        (aten.amax.default, (IMAGE, [1, 2])),
        (aten.clamp.default, (IMAGE, 1.5, 4)),
        (aten.hardswish.default, (IMAGE - 3,)),
        (aten.leaky_relu.default, (IMAGE - 3, 0.25)),
        (aten.div.Tensor, (IMAGE, IMAGE + 1)),
        (aten.addcmul.default, (IMAGE, IMAGE, IMAGE)),
        (aten.pow.Tensor_Scalar, (IMAGE + 1, -2)),
        (aten.constant_pad_nd.default, (IMAGE, [1, 2], 0.75)),
        (aten.index_add.default, (IMAGE, 1, torch.tensor([0, 0, 3]), IMAGE[:, :3])),
        (aten.cumsum.default, (IMAGE, 1)),
        (aten.gt.Scalar, (IMAGE, 2.5)),
        (aten.ne.Scalar, (IMAGE, float("inf"))),
        (aten.ge.Scalar, (IMAGE, float("-inf"))),
        (aten.ne.Scalar, (IMAGE, float("nan"))),
    ],
)  # fmt: skip
def test_formulas(target: Any, args: tuple[Any, ...]) -> None:
    field = Residues(signed=False)
    assert torch.equal(over(field, target, *args), _residue(field, target(*args)))


def test_addmm_scales_its_terms() -> None:
    field, x = Residues(signed=False), IMAGE[0, 0, :, :5]
    found = over(field, aten.addmm.default, x, x, x, beta=0.5, alpha=3)
    assert torch.equal(found, _residue(field, torch.addmm(x, x, x, beta=0.5, alpha=3)))


def _spread() -> Tensor:
    """Rows whose mean is 3 and whose deviation is 2, so that norms of them are whole numbers."""
    return torch.tensor([1.0, 5.0, 5.0, 1.0]).double().expand(2, 4, 4).contiguous()


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.layer_norm.default, (_spread(), [4], IMAGE[0, 0, 0, :4], IMAGE[0, 1, 0, :4], 0.0)),
        (aten.native_layer_norm.default, (_spread(), [4], None, None, 0.0)),
        (aten.group_norm.default, (_spread(), 2, IMAGE[0, 0, 0, :4], IMAGE[0, 1, 0, :4], 0.0)),
        (aten.instance_norm.default,
         (_spread(), None, None, None, None, True, 0.1, 0.0, False)),
        (aten.batch_norm.default,
         (_spread(), IMAGE[0, 0, 0, :4], IMAGE[0, 1, 0, :4], IMAGE[0, 0, 1, :4],
          IMAGE[0, 0, 0, :4] * 0 + 3.75, False, 0.1, 0.25, False)),
        (aten.rms_norm.default, (_spread() * 0 + 4, [4], IMAGE[0, 0, 0, :4], 0.0)),
        (aten.std.dim, (_spread(), [2], False)),
        (aten.linalg_vector_norm.default, (_spread() * 0 + 3, 2, [2])),
        (aten.norm.ScalarOpt_dim, (_spread() - 3, 1, [2])),
        (aten.linalg_vector_norm.default, (_spread() - 3, float("inf"), [2])),
        (aten.pow.Tensor_Scalar, (_spread() * 0 + 4, -1.5)),
    ],
)  # fmt: skip
def test_norms_of_what_has_roots(target: Any, args: Any) -> None:
    field = Residues(signed=False)
    wanted = pytree.tree_leaves(target(*args))
    found = pytree.tree_leaves(over(field, target, *args))
    for want, have in zip(wanted, found, strict=True):
        assert torch.equal(have, _residue(field, want))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, P, shape, generator=torch.Generator().manual_seed(seed)).double()


def test_softmax_adds_up_to_one_and_forgets_shifts() -> None:
    field, x, shift = Residues(signed=True), drawn(3, 5), drawn(3, 1, seed=1)
    shares = over_residues.call(field, aten.softmax.int, (x, 1), {})
    assert (mod(shares.sum(1)) == 1).all()
    assert torch.equal(over_residues.call(field, aten.softmax.int, (mod(x + shift), 1), {}), shares)
    assert not torch.equal(over_residues.call(field, aten.softmax.int, (mod(x * 2), 1), {}), shares)
    turned = over_residues.call(field, aten.softmax.int, (x.t(), 0), {})
    assert torch.equal(turned, shares.t())


def test_attention_is_what_it_is_made_of() -> None:
    field = Residues(signed=True)
    query, key, value = (drawn(2, 3, 4, seed=s) for s in range(3))
    call = lambda target, *args: over_residues.call(field, target, args, {})
    scores = call(aten.mul.Tensor, call(aten.matmul.default, query, key.mT), 0.5)
    expected = call(aten.matmul.default, call(aten.softmax.int, scores, -1), value)
    attention = aten.scaled_dot_product_attention.default
    assert torch.equal(call(attention, query, key, value), expected)
    mask = torch.tensor([[True, True, False]])
    apart = call(attention, query, key, value, mask)
    assert not torch.equal(apart, expected)
    assert torch.equal(apart, call(attention, query, key, value, mask.expand(2, 3, 3).contiguous()))


def test_functions_agree_with_what_they_are_made_of() -> None:
    field, x = Residues(signed=True), drawn(40)
    call = lambda target, *args: over_residues.call(field, target, args, {})
    sigmoid = call(aten.sigmoid.default, x)
    assert torch.equal(call(aten.silu.default, x), multiplied(x, sigmoid))
    assert torch.equal(call(aten.rsqrt.default, x), call(aten.pow.Tensor_Scalar, x, -0.5))
    assert torch.equal(call(aten.sqrt.default, x), root(x))
    assert torch.equal(call(aten.gelu.default, x), call(aten.gelu.default, x.clone()))
    tanh_of_x = over_residues.call(field, aten.gelu.default, (x,), {"approximate": "tanh"})
    assert not torch.equal(call(aten.gelu.default, x), tanh_of_x)
    assert call(aten.tanh.default, torch.zeros(2).double()).tolist() == [0.0, 0.0]
    assert call(aten.sigmoid.default, torch.zeros(1).double()) * 2 % P == 1


@pytest.mark.parametrize("target", [aten.mul_.Tensor, aten.add_.Tensor, aten.copy_.default])
def test_what_is_written_is_seen_in_all_views(target: Any) -> None:
    field, x = Residues(signed=True), drawn(3, 4)
    base, plain = x.clone(), getattr(aten, target._schema.name[6:-1])
    over_residues.call(field, target, (base[1], drawn(4, seed=1)), {})
    expected = over_residues.call(field, plain.Tensor, (x[1], drawn(4, seed=1)), {}) if (
        plain is not aten.copy
    ) else drawn(4, seed=1)  # fmt: skip
    assert torch.equal(base[1], expected)
    assert torch.equal(base[0], x[0])


@pytest.mark.parametrize(
    ("target", "args", "reason"),
    [
        (aten.rand_like.default, (IMAGE,), "rand_like draws random numbers"),
        (aten.bernoulli.default, (IMAGE,), "bernoulli draws random numbers"),
        (aten.fft_fft.default, (IMAGE,), "fft_fft has no formula over residues"),
        (aten.mul.Tensor, (IMAGE + 1j, IMAGE), "complex numbers have no residues"),
        (aten._to_copy.default, (IMAGE,), "an integer is made of a floating value"),
        (aten.dropout.default, (IMAGE, 0.5, True), "a dropout draws random numbers"),
        (aten.norm.Scalar, (IMAGE, 3), "a norm of order 3 has no formula over residues"),
        (aten.softmax.int, (torch.zeros(5000).double(), 0),
         "a softmax of 5000 elements takes too many comparisons"),
    ],
)  # fmt: skip
def test_what_has_no_formula_says_so(target: Any, args: tuple[Any, ...], reason: str) -> None:
    kwargs = {"dtype": torch.int64} if target is aten._to_copy.default else {}
    with pytest.raises(Unjudged, match=reason):
        over(Residues(signed=True), target, *args, **kwargs)
