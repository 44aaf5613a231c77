"""Formulas of what reduces over dimensions, by definition: norms, pools, softmax, attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from refold.fuzz import residues
from refold.fuzz.formulas import FORMULAS, Formula, Given, formula
from refold.fuzz.residues import (
    PAIRS,
    Residues,
    Unjudged,
    Unknown,
    bilinear,
    divided,
    inverse,
    largest,
    mod,
    multiplied,
    root,
    sign,
)

_PLACES = Unknown("where the largest of several stands depends on the order of numbers")


def _dims(x: Tensor, dims: Any) -> list[int]:
    """Dimensions as a list; none, or an empty list, are all. A number has none."""
    if not x.ndim or dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(x.ndim))
    return [d % x.ndim for d in (dims if isinstance(dims, (list, tuple)) else [dims])]


def _left(x: Tensor, dims: Sequence[int], keepdim: Any) -> Tensor:
    """A result that has its reduced dimensions, with or without them."""
    return x if keepdim or not x.ndim else x.squeeze(tuple(dims))


# --- means and norms ------------------------------------------------------------------------------


@formula("mean")
def _mean(field: Residues, given: Given) -> Tensor:
    x = given["self"]
    dims = _dims(x, given.get("dim"))
    return _left(residues.mean(x, dims), dims, given.get("keepdim"))


def _variance(given: Given) -> tuple[Tensor, Tensor]:
    x, dims = given["self"], _dims(given["self"], given.get("dim"))
    correction = given.get("correction", int(given.get("unbiased", True)))
    correction = 1 if correction is None else int(correction)
    kept = given.get("keepdim")
    variance = residues.variance(x, dims, correction)
    return _left(variance, dims, kept), _left(residues.mean(x, dims), dims, kept)


@formula("var")
def _var(field: Residues, given: Given) -> Tensor:
    return _variance(given)[0]


@formula("std")
def _std(field: Residues, given: Given) -> Tensor:
    return root(_variance(given)[0])


@formula("var_mean")
def _var_mean(field: Residues, given: Given) -> tuple[Tensor, Tensor]:
    return _variance(given)


@formula("std_mean")
def _std_mean(field: Residues, given: Given) -> tuple[Tensor, Tensor]:
    variance, mean = _variance(given)
    return root(variance), mean


@formula("norm linalg_vector_norm frobenius_norm")
def _norm(field: Residues, given: Given) -> Tensor:
    x, order = given["self"], given.get("p", given.get("ord", 2))
    dims = _dims(x, given.get("dim"))
    size = mod(x * sign(x))
    if order is None or order == 2:
        out = root(mod(multiplied(x, x).sum(dims, keepdim=True)))
    elif order == 1:
        out = mod(size.sum(dims, keepdim=True))
    elif order == math.inf:
        out = _largest_along(size, dims)
    else:
        raise Unjudged(f"a norm of order {order} has no formula over residues")
    return _left(out, dims, given.get("keepdim"))


def _over_rows(v: Tensor, dim: int) -> Tensor:
    """The norms over all dimensions but one, which stay."""
    dims = [d for d in range(v.ndim) if d != dim % v.ndim] if dim != -1 else list(range(v.ndim))
    return root(mod(multiplied(v, v).sum(dims, keepdim=True)))


@formula("norm_except_dim")
def _norm_except_dim(field: Residues, given: Given) -> Tensor:
    if given["pow"] != 2:
        raise Unjudged(f"a norm of order {given['pow']} has no formula over residues")
    return _over_rows(given["v"], given["dim"])


@formula("_weight_norm")
def _weight_norm(field: Residues, given: Given) -> Tensor:
    v, g = given["v"], given["g"]
    return multiplied(v, divided(g, _over_rows(v, given["dim"])))


@formula("_weight_norm_interface")
def _weight_norm_interface(field: Residues, given: Given) -> tuple[Tensor, Tensor]:
    return _weight_norm(field, given), _over_rows(given["v"], given["dim"])


def _normalised(
    field: Residues, x: Tensor, dims: Sequence[int], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    mean = residues.mean(x, dims)
    scale = inverse(root(mod(residues.variance(x, dims) + field.number(eps))))
    return multiplied(mod(x - mean), scale), mean, scale


def _scaled_and_shifted(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    out = x if weight is None else multiplied(x, weight)
    return out if bias is None else mod(out + bias)


@formula("layer_norm native_layer_norm")
def _layer_norm(field: Residues, given: Given) -> Any:
    x = given["input"]
    dims = list(range(x.ndim - len(given["normalized_shape"]), x.ndim))
    out, mean, scale = _normalised(field, x, dims, given["eps"])
    out = _scaled_and_shifted(out, given["weight"], given["bias"])
    return out if "cudnn_enable" in given else (out, mean, scale)


@formula("rms_norm")
def _rms_norm(field: Residues, given: Given) -> Tensor:
    x, eps = given["input"], given["eps"]
    dims = list(range(x.ndim - len(given["normalized_shape"]), x.ndim))
    square = residues.mean(multiplied(x, x), dims)
    eps = torch.finfo(torch.float64).eps if eps is None else eps
    scale = inverse(root(mod(square + field.number(eps))))
    return _scaled_and_shifted(multiplied(x, scale), given["weight"], None)


def _grouped(
    field: Residues, x: Tensor, groups: int, given: Given
) -> tuple[Tensor, Tensor, Tensor]:
    parts = x.reshape(x.shape[0], groups, -1)
    out, mean, scale = _normalised(field, parts, [2], given["eps"])
    along = (-1, *(1,) * (x.ndim - 2))
    weight, bias = (
        None if v is None else v.reshape(along) for v in (given["weight"], given["bias"])
    )
    return _scaled_and_shifted(out.reshape(x.shape), weight, bias), mean, scale


@formula("group_norm")
def _group_norm(field: Residues, given: Given) -> Tensor:
    return _grouped(field, given["input"], given["num_groups"], given)[0]


@formula("native_group_norm")
def _native_group_norm(field: Residues, given: Given) -> tuple[Tensor, Tensor, Tensor]:
    out, mean, scale = _grouped(field, given["input"], given["group"], given)
    return out, mean.squeeze(-1), scale.squeeze(-1)


@formula("instance_norm")
def _instance_norm(field: Residues, given: Given) -> Tensor:
    if not given["use_input_stats"]:
        return FORMULAS["batch_norm"](field, {**given, "training": False})
    return _grouped(field, given["input"], given["input"].shape[1], given)[0]


# --- the largest ----------------------------------------------------------------------------------


def _rows(x: Tensor, dims: Sequence[int]) -> Tensor:
    """What is reduced over, as one last dimension."""
    moved = x.movedim(tuple(dims), tuple(range(x.ndim - len(dims), x.ndim)))
    return moved.flatten(x.ndim - len(dims)) if dims else moved.unsqueeze(-1)


def _largest_along(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Over dimensions, which stay."""
    if not x.ndim:
        return x
    found = largest(_rows(x, dims))
    for dim in sorted(dims):
        found = found.unsqueeze(dim)
    return found


def _negated(x: Tensor) -> Tensor:
    return mod(-x)


def _extreme(x: Tensor, given: Given, *, least: bool) -> Tensor:
    dims = _dims(x, given.get("dim"))
    found = _largest_along(_negated(x) if least else x, dims)
    return _left(_negated(found) if least else found, dims, given.get("keepdim"))


@formula("amax")
def _amax(field: Residues, given: Given) -> Tensor:
    return _extreme(given["self"], given, least=False)


@formula("amin")
def _amin(field: Residues, given: Given) -> Tensor:
    return _extreme(given["self"], given, least=True)


def _of_all_or_along(least: bool) -> Formula:
    def computed(field: Residues, given: Given) -> Any:
        if "other" in given:
            return FORMULAS["minimum" if least else "maximum"](field, given)
        found = _extreme(given["self"], given, least=least)
        return (found, _PLACES) if "dim" in given else found

    return computed


FORMULAS["max"] = _of_all_or_along(least=False)
FORMULAS["min"] = _of_all_or_along(least=True)


def _each(value: Any, axes: int) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return [int(v) for v in (values * axes if len(values) == 1 else values)]


def _max_pool(axes: int) -> Formula:
    def computed(field: Residues, given: Given) -> Tensor:
        x = given["self"]
        kernel = _each(given["kernel_size"], axes)
        stride = _each(given["stride"] or given["kernel_size"], axes)
        padding, dilation = _each(given["padding"], axes), _each(given["dilation"], axes)
        pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[axes - 1]
        shaped = pool(
            torch.zeros_like(x), kernel, stride, padding, dilation, given["ceil_mode"]
        ).shape
        valid = torch.ones_like(x[:1] if x.ndim == axes + 2 else x)
        sizes = x.shape
        for axis in range(axes):
            at, reach = axis - axes, dilation[axis] * (kernel[axis] - 1) + 1
            after = (shaped[at] - 1) * stride[axis] + reach - sizes[at] - padding[axis]
            steps = (padding[axis], after, reach, stride[axis], dilation[axis])
            x, valid = (_windows(t, at - axis, *steps) for t in (x, valid))
        return largest(x.flatten(-axes), valid.flatten(-axes) > 0)

    return computed


def _windows(
    x: Tensor, at: int, before: int, after: int, reach: int, stride: int, dilation: int
) -> Tensor:
    """The windows of one axis, as a last dimension."""
    edges = [0, 0] * (-at - 1) + [before, after]
    return F.pad(x, edges).unfold(at, reach, stride)[..., ::dilation]


for _axes in (1, 2, 3):
    FORMULAS[f"max_pool{_axes}d"] = _max_pool(_axes)


def _with_places(name: str) -> Formula:
    return lambda field, given: (FORMULAS[name](field, given), _PLACES)


for _axes in (1, 2, 3):
    FORMULAS[f"max_pool{_axes}d_with_indices"] = _with_places(f"max_pool{_axes}d")


# --- means of windows -----------------------------------------------------------------------------


def _avg_pool(axes: int) -> Formula:
    def computed(field: Residues, given: Given) -> Tensor:
        x = given["self"]
        kernel = _each(given["kernel_size"], axes)
        stride = _each(given["stride"] or given["kernel_size"], axes)
        padding, whole = _each(given["padding"], axes), given["count_include_pad"]
        if axes == 1:  # which takes no divisor
            x, kernel, stride, padding = x.unsqueeze(-1), [*kernel, 1], [*stride, 1], [*padding, 0]
        pool = F.avg_pool3d if axes == 3 else F.avg_pool2d

        def pooled(values: Tensor, divisor: int | None) -> Tensor:
            return pool(values, kernel, stride, padding, given["ceil_mode"], whole, divisor)

        ones = torch.ones_like(x[:1])
        inside = pooled(ones, 1)
        share = pooled(ones, given.get("divisor_override"))
        divisor = torch.where(share > 0, inside / share, 1.0).round()
        out = divided(mod(pooled(x, 1)), divisor)
        return out.squeeze(-1) if axes == 1 else out

    return computed


def _adaptive_avg_pool(axes: int) -> Formula:
    def computed(field: Residues, given: Given) -> Tensor:
        x = given["self"]
        sizes = given["output_size"]
        for axis, size in enumerate(_each(sizes, axes)):
            x = _averaged(x, axis - axes, size)
        return x

    return computed


def _averaged(x: Tensor, axis: int, size: int) -> Tensor:
    have = x.shape[axis]
    matrix = torch.zeros(size, have, dtype=torch.float64)
    for i in range(size):
        matrix[i, i * have // size : -((-(i + 1) * have) // size)] = 1.0
    matrix = divided(matrix, matrix.sum(1, keepdim=True))
    moved = x.movedim(axis, -1)
    return bilinear(torch.matmul, moved, matrix.t(), have).movedim(-1, axis)


for _axes in (1, 2, 3):
    FORMULAS[f"avg_pool{_axes}d"] = _avg_pool(_axes)
    FORMULAS[f"adaptive_avg_pool{_axes}d"] = _adaptive_avg_pool(_axes)
    FORMULAS[f"_adaptive_avg_pool{_axes}d"] = _adaptive_avg_pool(_axes)


def resized(field: Residues, matrix: Tensor, x: Tensor, shape: Sequence[int]) -> Tensor:
    """An interpolation by its matrix in float64, whose rows add up to 1 whatever they round to.

    Args:
        field: of the residues.
        matrix: a column for each position of ``x``.
        x: what is resized, ``[batch, channels, ...]``.
        shape: of the result.
    """
    weights = field.of(matrix)
    first = matrix.abs().argmax(1, keepdim=True)
    rest = mod(weights.sum(1, keepdim=True) - weights.gather(1, first))
    weights = weights.scatter(1, first, mod(1 - rest))
    flat = x.reshape(-1, matrix.shape[1])
    return bilinear(torch.matmul, flat, weights.t(), matrix.shape[1]).reshape(tuple(shape))


# --- softmax and attention ------------------------------------------------------------------------


def _shares(field: Residues, x: Tensor, dim: int) -> Tensor:
    """Shares that follow from the differences of the elements alone, and add up to 1."""
    if not x.ndim:
        return torch.ones_like(x)
    rows = x.movedim(dim, -1)
    if rows.numel() * rows.shape[-1] > PAIRS:
        raise Unjudged(f"a softmax of {rows.shape[-1]} elements takes too many comparisons")
    apart = mod(rows[..., :, None] - rows[..., None, :])
    score = mod(field.function("exp", apart).sum(-1))
    return divided(score, mod(score.sum(-1, keepdim=True))).movedim(-1, dim)


@formula("softmax _softmax _safe_softmax")
def _softmax(field: Residues, given: Given) -> Tensor:
    return _shares(field, given["self"], given["dim"])


@formula("log_softmax _log_softmax")
def _log_softmax(field: Residues, given: Given) -> Tensor:
    return field.function("log", _shares(field, given["self"], given["dim"]))


@formula("scaled_dot_product_attention")
def _attention(field: Residues, given: Given) -> Tensor:
    query, key, value = given["query"], given["key"], given["value"]
    if given["dropout_p"]:
        raise Unjudged("an attention draws random numbers")
    if given["enable_gqa"]:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    width = query.shape[-1]
    scale = 1 / math.sqrt(width) if given["scale"] is None else given["scale"]
    scores = bilinear(torch.matmul, query, key.transpose(-2, -1), width)
    scores = field.times(scores, scale)
    mask = given["attn_mask"]
    if given["is_causal"]:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None and mask.dtype is torch.bool:
        scores = torch.where(mask, scores, field.number(-math.inf))
    elif mask is not None:
        scores = mod(scores + mask)
    return bilinear(torch.matmul, _shares(field, scores, -1), value, value.shape[-2])
