"""Formulas of operators over residues: arithmetic, order, products, layers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from refold.fuzz.residues import (
    Residues,
    Unjudged,
    Unknown,
    bilinear,
    divided,
    inverse,
    mean,
    mod,
    multiplied,
    positive,
    power,
    root,
    sign,
    variance,
)

Given = dict[str, Any]  # the arguments of a call by name, defaults filled in
Formula = Callable[[Residues, Given], Any]

FORMULAS: dict[str, Formula] = {}
_STATISTICS = Unknown("a batch norm gives its statistics")


def formula(names: str) -> Callable[[Formula], Formula]:
    """Notes that a function is the formula of some operators."""

    def note(function: Formula) -> Formula:
        FORMULAS.update(dict.fromkeys(names.split(), function))
        return function

    return note


# --- values as they are ---------------------------------------------------------------------------


@formula("dropout feature_dropout alpha_dropout feature_alpha_dropout")
def _dropout(field: Residues, given: Given) -> Tensor:
    if given["train"] and given["p"]:
        raise Unjudged("a dropout draws random numbers")
    return field.read(given["input"])


@formula("conj _conj conj_physical _conj_physical resolve_conj resolve_neg real positive")
def _itself(field: Residues, given: Given) -> Tensor:
    return field.read(next(iter(given.values()))).clone()


@formula("to _to_copy type_as")
def _cast(field: Residues, given: Given) -> Tensor:
    """All floating dtypes are residues alike."""
    x, other = field.read(given["self"]), given.get("other")
    dtype = other.dtype if isinstance(other, Tensor) else given.get("dtype")
    if dtype is None or dtype.is_floating_point:
        return x.clone()
    if dtype is torch.bool:
        return x != 0
    raise Unjudged("an integer is made of a floating value")


# --- arithmetic -----------------------------------------------------------------------------------


def _sum(field: Residues, a: Any, b: Any, factor: Any) -> Tensor:
    return mod(field.read(a) + field.times(field.read(b), factor))


@formula("add")
def _add(field: Residues, given: Given) -> Tensor:
    return _sum(field, given["self"], given["other"], given["alpha"])


@formula("sub")
def _sub(field: Residues, given: Given) -> Tensor:
    return _sum(field, given["self"], given["other"], -given["alpha"])


@formula("rsub")
def _rsub(field: Residues, given: Given) -> Tensor:
    return _sum(field, given["other"], given["self"], -given["alpha"])


@formula("mul")
def _mul(field: Residues, given: Given) -> Tensor:
    return multiplied(field.read(given["self"]), field.read(given["other"]))


@formula("div")
def _div(field: Residues, given: Given) -> Tensor:
    quotient = divided(field.read(given["self"]), field.read(given["other"]))
    rounding = given.get("rounding_mode")
    return quotient if rounding is None else field.function(rounding, quotient)


@formula("addcmul")
def _addcmul(field: Residues, given: Given) -> Tensor:
    product = multiplied(field.read(given["tensor1"]), field.read(given["tensor2"]))
    return _sum(field, given["self"], product, given["value"])


@formula("addcdiv")
def _addcdiv(field: Residues, given: Given) -> Tensor:
    quotient = divided(field.read(given["tensor1"]), field.read(given["tensor2"]))
    return _sum(field, given["self"], quotient, given["value"])


@formula("lerp")
def _lerp(field: Residues, given: Given) -> Tensor:
    start, end = field.read(given["self"]), field.read(given["end"])
    return mod(start + multiplied(mod(end - start), field.read(given["weight"])))


@formula("square")
def _square(field: Residues, given: Given) -> Tensor:
    return multiplied(given["self"], given["self"])


@formula("reciprocal")
def _reciprocal(field: Residues, given: Given) -> Tensor:
    return inverse(given["self"])


@formula("sqrt")
def _sqrt(field: Residues, given: Given) -> Tensor:
    return root(given["self"])


@formula("rsqrt")
def _rsqrt(field: Residues, given: Given) -> Tensor:
    return inverse(root(given["self"]))


@formula("pow float_power")
def _pow(field: Residues, given: Given) -> Tensor:
    """Whole and half powers are what they say; of others nothing is known."""
    base, exponent = given["self"], given["exponent"]
    if isinstance(exponent, (int, float)) and float(exponent * 2).is_integer():
        base = field.read(base)
        whole = int(exponent * 2)
        return power(base, whole // 2) if whole % 2 == 0 else power(root(base), whole)
    return field.function("pow", field.read(base), field.read(exponent))


# --- order ----------------------------------------------------------------------------------------


def _greater(a: Tensor, b: Tensor) -> Tensor:
    a, b = torch.broadcast_tensors(a, b)
    return torch.where(positive(mod(a - b)), a, b)


def _lesser(a: Tensor, b: Tensor) -> Tensor:
    a, b = torch.broadcast_tensors(a, b)
    return torch.where(positive(mod(a - b)), b, a)


@formula("relu")
def _relu(field: Residues, given: Given) -> Tensor:
    x = given["self"]
    return torch.where(positive(x), x, 0.0)


@formula("leaky_relu")
def _leaky_relu(field: Residues, given: Given) -> Tensor:
    x = given["self"]
    return torch.where(positive(x), x, field.times(x, given["negative_slope"]))


@formula("prelu _prelu_kernel")
def _prelu(field: Residues, given: Given) -> Tensor:
    x, slope = given["self"], given["weight"]
    if slope.ndim == 1 and x.ndim != 1:
        slope = slope.reshape(-1, *(1,) * (x.ndim - 2)) if slope.numel() > 1 else slope
    return torch.where(positive(x), x, multiplied(x, slope))


@formula("abs")
def _abs(field: Residues, given: Given) -> Tensor:
    return mod(given["self"] * sign(given["self"]))


@formula("sign sgn")
def _sign(field: Residues, given: Given) -> Tensor:
    return mod(sign(given["self"]))


@formula("clamp clamp_min clamp_max hardtanh")
def _clamp(field: Residues, given: Given) -> Tensor:
    low = given.get("min", given.get("min_val"))
    high = given.get("max", given.get("max_val"))
    return _between(field, given["self"], low, high)


@formula("relu6")
def _relu6(field: Residues, given: Given) -> Tensor:
    return _between(field, given["self"], 0, 6)


@formula("hardsigmoid")
def _hardsigmoid(field: Residues, given: Given) -> Tensor:
    return _hard_gate(field, given["self"])


@formula("hardswish")
def _hardswish(field: Residues, given: Given) -> Tensor:
    return multiplied(given["self"], _hard_gate(field, given["self"]))


def _hard_gate(field: Residues, x: Tensor) -> Tensor:
    return divided(_between(field, mod(x + 3), 0, 6), field.read(6))


def _between(field: Residues, x: Tensor, low: Any, high: Any) -> Tensor:
    out = field.read(x)
    if low is not None:
        out = _greater(out, field.read(low))
    return out if high is None else _lesser(out, field.read(high))


@formula("maximum fmax")
def _maximum(field: Residues, given: Given) -> Tensor:
    return _greater(field.read(given["self"]), field.read(given["other"]))


@formula("minimum fmin")
def _minimum(field: Residues, given: Given) -> Tensor:
    return _lesser(field.read(given["self"]), field.read(given["other"]))


def _comparison(compare: Callable[..., Tensor]) -> Formula:
    def compared(field: Residues, given: Given) -> Tensor:
        other = given["other"]
        if isinstance(other, float) and not math.isfinite(other):  # which no residue is
            return compare(torch.zeros_like(field.read(given["self"])), other)
        return compare(sign(mod(field.read(given["self"]) - field.read(other))), 0)

    return compared


for _compare in (torch.eq, torch.ne, torch.gt, torch.ge, torch.lt, torch.le):
    FORMULAS[_compare.__name__] = _comparison(_compare)


@formula("logical_not")
def _logical_not(field: Residues, given: Given) -> Tensor:
    x: Tensor = given["self"]
    return x == 0


@formula("isnan isinf isposinf isneginf")
def _not_finite(field: Residues, given: Given) -> Tensor:
    return torch.zeros_like(given["self"], dtype=torch.bool)


@formula("isfinite")
def _finite(field: Residues, given: Given) -> Tensor:
    return torch.ones_like(given["self"], dtype=torch.bool)


# --- gates, and activations that are products -----------------------------------------------------


@formula("sigmoid")
def _sigmoid(field: Residues, given: Given) -> Tensor:
    return _gate(field, given["self"])


@formula("silu")
def _silu(field: Residues, given: Given) -> Tensor:
    return multiplied(given["self"], _gate(field, given["self"]))


@formula("glu")
def _glu(field: Residues, given: Given) -> Tensor:
    value, gate = given["self"].chunk(2, given["dim"])
    return multiplied(value, _gate(field, gate))


def _gate(field: Residues, x: Tensor) -> Tensor:
    """A positive function, which is 1 / 2 at zero."""
    value = field.function("sigmoid", x)
    return torch.where(x == 0, field.number(0.5), multiplied(value, value))


# --- products -------------------------------------------------------------------------------------


def _contracted(function: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    return bilinear(function, a, b, int(a.shape[-1]) if a.ndim else 1)


@formula("mm bmm matmul mv dot")
def _matmul(field: Residues, given: Given) -> Tensor:
    a, b = (field.read(v) for v in given.values())
    return _contracted(torch.matmul, a, b)


@formula("inner")
def _inner(field: Residues, given: Given) -> Tensor:
    return _contracted(torch.inner, field.read(given["self"]), field.read(given["other"]))


@formula("outer")
def _outer(field: Residues, given: Given) -> Tensor:
    return bilinear(torch.outer, field.read(given["self"]), field.read(given["vec2"]), 1)


@formula("einsum")
def _einsum(field: Residues, given: Given) -> Tensor:
    equation, tensors = given["equation"], [field.read(t) for t in given["tensors"]]
    if len(tensors) == 1:
        return mod(torch.einsum(equation, tensors))
    if len(tensors) > 2:
        raise Unjudged("an einsum of more than two operands has no formula over residues")
    terms = _contracted_in(equation, tensors)
    return bilinear(lambda a, b: torch.einsum(equation, a, b), tensors[0], tensors[1], terms)


def _contracted_in(equation: str, tensors: Sequence[Tensor]) -> int:
    """How many terms an einsum sums."""
    operands, _, result = equation.replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for letters, tensor in zip(operands.split(","), tensors, strict=True):
        before, _, after = letters.partition("...")
        sizes.update(zip(before, tensor.shape, strict=False))
        sizes.update(zip(reversed(after), reversed(tensor.shape), strict=False))
    return math.prod(size for letter, size in sizes.items() if letter not in result)


@formula("tensordot")
def _tensordot(field: Residues, given: Given) -> Tensor:
    a, b, dims = given["self"], given["other"], (given["dims_self"], given["dims_other"])
    return bilinear(lambda a, b: torch.tensordot(a, b, dims), a, b, a.numel())


@formula("kron")
def _kron(field: Residues, given: Given) -> Tensor:
    return bilinear(torch.kron, field.read(given["self"]), field.read(given["other"]), 1)


@formula("linear")
def _linear(field: Residues, given: Given) -> Tensor:
    product = _contracted(torch.nn.functional.linear, given["input"], given["weight"])
    return product if given["bias"] is None else mod(product + given["bias"])


@formula("addmm addmv baddbmm")
def _addmm(field: Residues, given: Given) -> Tensor:
    start, a, b, *_ = given.values()
    product = field.times(_contracted(torch.matmul, a, b), given["alpha"])
    return mod(product + field.times(field.read(start), given["beta"]))


# --- layers ---------------------------------------------------------------------------------------

_CONVS: dict[str, Callable[..., Tensor]] = {
    "conv1d": torch.conv1d, "conv2d": torch.conv2d, "conv3d": torch.conv3d,
    "conv_transpose1d": torch.conv_transpose1d, "conv_transpose2d": torch.conv_transpose2d,
    "conv_transpose3d": torch.conv_transpose3d,
    "convolution": functools.partial(torch.convolution, bias=None),
}  # fmt: skip


def _convolution(kernel: Callable[..., Tensor]) -> Formula:
    def computed(field: Residues, given: Given) -> Tensor:
        options = {k: v for k, v in given.items() if k not in ("input", "weight", "bias")}
        x, weight, bias = field.read(given["input"]), given["weight"], given["bias"]
        terms = weight.numel() // min(weight.shape[:2])  # of either layout of weights
        out = bilinear(lambda a, b: kernel(a, b, **options), x, weight, terms)
        return out if bias is None else mod(out + bias.reshape(-1, *(1,) * (weight.ndim - 2)))

    return computed


for _named, _kernel in _CONVS.items():
    FORMULAS[_named] = _convolution(_kernel)


@formula("batch_norm native_batch_norm _native_batch_norm_legit_no_training")
def _batch_norm(field: Residues, given: Given) -> Any:
    x = field.read(given["input"])
    along = (-1, *(1,) * (x.ndim - 2))
    center, spread = given["running_mean"], given["running_var"]
    if given.get("training"):
        if center is not None:
            raise Unjudged("a batch norm writes its statistics")
        dims = [d for d in range(x.ndim) if d != 1]
        center, spread = mean(x, dims).flatten(), variance(x, dims).flatten()
    scale = inverse(root(mod(spread + field.number(given["eps"]))))
    out = multiplied(mod(x - center.reshape(along)), scale.reshape(along))
    if given["weight"] is not None:
        out = multiplied(out, given["weight"].reshape(along))
    if given["bias"] is not None:
        out = mod(out + given["bias"].reshape(along))
    return out if "cudnn_enabled" in given else (out, _STATISTICS, _STATISTICS)
