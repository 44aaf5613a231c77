"""What a call of an operator gives over residues (:mod:`refold.fuzz.residues`).

Moves run as they are. Sums and products are PyTorch's own kernels, reduced modulo P
(:mod:`refold.fuzz.formulas`). Norms, pools, softmax and attention are written out by their
definitions (:mod:`refold.fuzz.reductions`). What has no formula is a random function if it works
element by element, and has no result otherwise.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from refold.fuzz import reductions  # which also notes its formulas
from refold.fuzz.formulas import FORMULAS, Given
from refold.fuzz.residues import Residues, Unjudged, Unknown, mod
from refold.graph import ops
from refold.graph.evaluate import WIDE

_UNWRITTEN = "empty empty_like empty_strided new_empty new_empty_strided empty_permuted"
# Every element of the result is one of an operand's, or a number among the arguments.
_COPIES = (
    "squeeze_copy cat stack gather take take_along_dim index index_put index_copy index_fill "
    "scatter masked_fill masked_select masked_scatter where diag diag_embed diagflat tril triu "
    "select_scatter slice_scatter diagonal_scatter copy fill pad_sequence block_diag im2col pad "
    "constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
    "replication_pad2d replication_pad3d _pad_circular meshgrid broadcast_tensors atleast_1d "
    "atleast_2d atleast_3d cartesian_prod full_like zeros_like ones_like new_zeros new_ones "
    "new_full embedding numel size dim sym_size sym_numel stride sym_stride sym_storage_offset "
    "_assert_tensor_metadata max_unpool2d max_unpool3d _unsafe_index _unsafe_index_put"
)
_SUMS = "sum cumsum diff trace col2im index_add scatter_add neg sum_to_size"
_POSITIVE = "exp exp2 softplus cosh erfc hypot"  # whatever they read

_KERNELS = ops.names(ops.MOVES | ops.NEAREST) | frozenset((*_COPIES.split(), *_SUMS.split()))


def call(field: Residues, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a call.

    Raises:
        Unjudged: it has no residue.
        NoInverse: it divides by zero.
    """
    leaves = _leaves([*args, *kwargs.values()])
    for leaf in leaves:
        if isinstance(leaf, Unknown):
            raise Unjudged(leaf.reason)
    if not isinstance(target, torch._ops.OpOverload):
        return target(*args, **kwargs)  # of sizes, or a part of a tuple
    args, kwargs = tuple(map(_widened, args)), {k: _widened(v) for k, v in kwargs.items()}
    name, written = _name(target)
    if ops.named(name, ops.DRAWS) and not ops.named(name, ops.DROPOUT):
        if name not in _UNWRITTEN.split():
            raise Unjudged(f"{name} draws random numbers")
        return torch.zeros_like(target(*args, **kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if any(t.is_complex() for t in tensors):
        raise Unjudged("complex numbers have no residues")
    if not any(t.is_floating_point() for t in tensors):
        return _read(field, target(*args, **kwargs))
    if written:
        return _write(field, target, name, args, kwargs)
    return _computed(field, target, name, args, kwargs)


def _leaves(values: Any) -> list[Any]:
    """What lists contain (PyTorch's pytrees take as long as the arithmetic)."""
    out: list[Any] = []
    for value in values:
        if isinstance(value, (list, tuple)):
            out += _leaves(value)
        else:
            out.append(value)
    return out


@functools.cache
def _name(target: Any) -> tuple[str, bool]:
    """The operator, without the underscore of one that writes, and whether it writes.

    With its overload where that has a row of its own: ``view.dtype`` reads bits, and moves nothing.
    """
    name, written = target._schema.name.split("::")[-1], target._schema.is_mutable
    overload = f"{name}.{target._overloadname}"
    if overload in ops.ROWS:
        return overload, written
    return (name.removesuffix("_") if written else name), written


def _widened(leaf: Any) -> Any:
    return WIDE.get(leaf, leaf) if isinstance(leaf, torch.dtype) else leaf


def _read(field: Residues, value: Any) -> Any:
    """What a call without residues gives: the numbers that it makes are read as residues."""
    if isinstance(value, (tuple, list)):
        return type(value)(_read(field, v) for v in value)
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return field.of(value) if floats else value


def _computed(
    field: Residues, target: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    formula = FORMULAS.get(name)
    if formula is not None:
        return formula(field, _given(target, args, kwargs))
    if name in _KERNELS:
        given = {k: _number(field, v) for k, v in kwargs.items()}
        result = target(*(_number(field, v) for v in args), **given)
        return result if ops.named(name, ops.MOVES) else _reduced(result)
    if ops.named(name, ops.RESIZE):
        return _resized(field, target, args, kwargs)
    if ops.named(name, ops.ELEMENTWISE) and len(target._schema.returns) == 1:
        return _any_function(field, target, name, _given(target, args, kwargs))
    raise Unjudged(f"{name} has no formula over residues")


def _number(field: Residues, value: Any) -> Any:
    return field.number(value) if isinstance(value, float) else value


def _reduced(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(map(_reduced, value))
    return mod(value) if isinstance(value, Tensor) and value.is_floating_point() else value


@functools.cache
def _parameters(target: Any) -> tuple[tuple[str, Any], ...]:
    return tuple((a.name, a.default_value) for a in target._schema.arguments)


def _given(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    found = {name: kwargs.get(name, default) for name, default in _parameters(target)}
    found.update(zip(found, args, strict=False))
    return found


def _write(
    field: Residues, target: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """An operator in place: what it computes, copied into what it writes."""
    into, *rest = args
    if not isinstance(into, Tensor) or not into.is_floating_point():
        raise Unjudged(f"{name} makes an integer of a floating value")
    if name in ("copy", "fill", "zero"):
        return into.copy_(field.read(rest[0] if rest else 0.0))
    if ops.named(name, ops.MOVES):
        return target(*args, **kwargs)  # it is seen in another shape
    return into.copy_(_computed(field, target, name, (into.clone(), *rest), kwargs))


def _resized(field: Residues, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """By the matrix of the interpolation, whose columns are what it makes of one element each."""
    x, *rest = args
    sizes = x.shape[2:]
    each = torch.eye(sizes.numel(), dtype=torch.float64).reshape(-1, 1, *sizes)
    columns = target(each, *rest, **kwargs)
    shape = (*x.shape[:2], *columns.shape[2:])
    return reductions.resized(field, columns.flatten(1).t(), x, shape)


def _any_function(field: Residues, target: Any, name: str, given: Given) -> Tensor:
    """A function that is known by its name, its other arguments, and its value at zero."""
    numbers = {k: v for k, v in given.items() if isinstance(v, (Tensor, float, int))}
    others = {k: v for k, v in given.items() if k not in numbers}
    label = f"{name} {others}" if others else name
    operands = [field.read(v) if isinstance(v, Tensor) else v for v in numbers.values()]
    if ops.named(name, ops.COMPARISON):
        return field.coin(label, *operands)
    out = field.function(label, *operands)
    if name in _POSITIVE.split():
        out = mod(out * out)
    _, *rest = given.items()
    zero = field.read(operands[0]) == 0
    if any(isinstance(v, Tensor) for _, v in rest) or not bool(zero.any()):
        return out
    at_zero = target(torch.zeros(1, dtype=torch.float64), **dict(rest))
    return torch.where(zero, field.number(float(at_zero)), out)
