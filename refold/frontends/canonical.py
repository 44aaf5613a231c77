"""One spelling an operator: the last step of every frontend.

PyTorch has several names for many operators (``concat`` and ``concatenate`` are ``cat``), and
several forms of some (``addmm`` with a ``beta``, a crop written as a pad with negative amounts).
Here each becomes the one that stands in the table of operators (:mod:`refold.graph.ops`), so that
no rule asks for spellings. A form that would be another value for some input stays as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from refold.errors import VerifierError
from refold.graph import constants, nodes, ops, subgraphs
from refold.graph.nodes import arguments, aten, is_tensor, shape

_RULE = "canonical"
_SMALL = (
    64 * 1024
)  # bytes of an integer constant; larger ones (masks) are not worth four times that
_NARROW = (torch.float16, torch.bfloat16)

# Other names of an operator whose overloads take the same arguments.
ALIASES = {
    "concat": "cat", "concatenate": "cat", "row_stack": "vstack",
    "multiply": "mul", "subtract": "sub", "divide": "div", "true_divide": "div", "negative": "neg",
    "positive": "alias",
    "absolute": "abs", "clip": "clamp", "fix": "trunc", "arccos": "acos", "arccosh": "acosh",
    "arcsin": "asin", "arcsinh": "asinh", "arctan": "atan", "arctanh": "atanh", "arctan2": "atan2",
    "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le", "not_equal": "ne",
    "moveaxis": "movedim", "swapaxes": "transpose", "swapdims": "transpose",
    "broadcast_to": "expand", "linalg_matmul": "matmul", "ger": "outer", "trapz": "trapezoid",
    "unsafe_split": "split", "unsafe_split_with_sizes": "split_with_sizes", "unsafe_chunk": "chunk",
    "special_expit": "sigmoid", "special_exp2": "exp2", "special_expm1": "expm1",
    "special_erf": "erf", "special_erfc": "erfc", "special_erfinv": "erfinv",
    "special_log1p": "log1p", "special_logit": "logit", "special_logsumexp": "logsumexp",
    "special_sinc": "sinc", "special_xlogy": "xlogy", "special_digamma": "digamma",
    "special_psi": "digamma", "special_gammaln": "lgamma", "special_i0": "i0",
    "special_polygamma": "polygamma", "special_multigammaln": "mvlgamma",
    "special_gammainc": "igamma", "special_gammaincc": "igammac", "special_softmax": "softmax",
    "special_log_softmax": "log_softmax", "inverse": "linalg_inv", "det": "linalg_det",
    "matrix_exp": "linalg_matrix_exp", "matrix_power": "linalg_matrix_power",
    "orgqr": "linalg_householder_product",
}  # fmt: skip
# Overloads that have another name under the name that is written.
_OVERLOADS = {
    "swapaxes.default": "int", "swapdims.default": "int", "special_xlogy.default": "Tensor",
    "special_xlogy.other_scalar": "Scalar_Other",
    "special_xlogy.self_scalar": "Scalar_Self", "special_softmax.default": "int",
    "special_log_softmax.default": "int",
}  # fmt: skip


def write_canonical(gm: fx.GraphModule) -> None:
    """Spells every call of a functional graph, and of its branches, in one way, in place."""
    for inner in subgraphs.walk(gm):
        constant = constants.constant_nodes(inner.graph)
        for node in list(inner.graph.nodes):
            if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
                _respell(node, constant)
        inner.recompile()


def check_dialect(gm: fx.GraphModule) -> None:
    """Checks what passes take for granted of a graph: canonical, functional, with fake values.

    Raises:
        VerifierError: a frontend left something else; the message names the call.
    """
    for inner in subgraphs.walk(gm):
        for node in inner.graph.nodes:
            if node.op in ("call_method", "call_module"):
                raise VerifierError(f"%{node.name}: {node.op} is no call of an operator")
            if node.op == "call_function" and "val" not in node.meta and node.users:
                raise VerifierError(f"%{node.name}: has no fake value")
            if constants.is_mutation(node) and not constants.targets_of(node):
                raise VerifierError(f"%{node.name}: writes a value that is no state and no input")
            if ops.op_name(node) in ALIASES and _renamed(node.target) is not None:
                raise VerifierError(f"%{node.name}: {node.target} is not canonical")


def _respell(node: fx.Node, constant: set[fx.Node]) -> None:
    renamed = _renamed(node.target)
    if renamed is not None:
        node.target = renamed
    if nodes.is_call(node, aten.unique_dim):
        _ask_for_all(node)
    if not is_tensor(node) or any("val" not in a.meta for a in node.all_input_nodes):
        return
    write = _FORMS.get(ops.op_name(node))
    if write is not None:
        with node.graph.inserting_before(node):
            new = write(node, constant)
        if new is not None:
            node.replace_all_uses_with(new, propagate_meta=False)
            node.graph.erase_node(node)
            return
    if ops.has(node, ops.ARITHMETIC):
        _widen_constants(node, constant)


@functools.cache
def _renamed(target: Any) -> Any:
    """The overload that a call of an alias becomes, or ``None``."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    name = target._schema.name.split("::")[-1]
    packet = getattr(aten, ALIASES.get(name, ""), None)
    if packet is None:
        return None
    overload = target._overloadname
    wanted = _OVERLOADS.get(f"{name}.{overload}", overload)
    return getattr(packet, wanted) if wanted in packet.overloads() else None


# --- forms ----------------------------------------------------------------------------------------


def _call(node: fx.Node, target: Any, *args: Any) -> fx.Node:
    return nodes.call(node.graph, target, args, rule=_RULE, sources=[node])


def _ask_for_all(node: fx.Node) -> None:
    """Unique slices give their inverse and counts unasked; a runtime's gives what it is asked."""
    asked = {"return_inverse": True, "return_counts": True}
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    args = nodes.arguments(node) | asked
    node.args, node.kwargs = tuple(args[a.name] for a in schema), {}


def _matrix_transposed(node: fx.Node, constant: set[fx.Node]) -> fx.Node | None:
    """``x.mT`` is ``transpose(-2, -1)``; of real numbers ``mH`` and ``adjoint`` are, too."""
    if ops.op_name(node) != "mT" and nodes.dtype(node).is_complex:
        return None
    return _call(node, aten.transpose.int, node.args[0], -2, -1)


def _all_reversed(node: fx.Node, constant: set[fx.Node]) -> fx.Node | None:
    """``x.T`` is ``permute`` in reverse order; ``t()`` of a matrix stays ``t``."""
    if ops.op_name(node) == "matrix_H" and nodes.dtype(node).is_complex:
        return None
    return _call(node, aten.permute.default, node.args[0], [*range(len(shape(node)))][::-1])


def _axes_moved(node: fx.Node, constant: set[fx.Node]) -> fx.Node | None:
    """``movedim`` is the ``permute`` that it makes."""
    x, *axes = node.args
    moved = node.target(torch.empty(tuple(range(len(shape(node)))), device="meta"), *axes)  # type: ignore[operator]
    return _call(node, aten.permute.default, x, list(moved.shape))


def _narrowed(node: fx.Node, constant: set[fx.Node]) -> fx.Node | None:
    """``narrow(x, axis, start, length)`` is ``slice(x, axis, start, start + length)``."""
    args = arguments(node)
    x, axis, start, length = (args[k] for k in ("self", "dim", "start", "length"))
    if not isinstance(start, int) or not isinstance(length, int):
        return None
    if start < 0:
        size = shape(x)[axis]
        if not isinstance(size, int):
            return None
        start += size
    return _call(node, aten.slice.Tensor, x, axis, start, start + length)


def _raveled(node: fx.Node, constant: set[fx.Node]) -> fx.Node:
    """``ravel`` is ``flatten`` of what is contiguous; of anything else it gives a copy."""
    x: Any = node.args[0]
    if not nodes.is_contiguous(x):
        x = _call(node, aten.contiguous.default, x)
    return _call(node, aten.flatten.using_ints, x)


def _extremum(node: fx.Node, constant: set[fx.Node]) -> fx.Node | None:
    """``max`` and ``min`` of two tensors are ``maximum`` and ``minimum``."""
    if node.target is aten.max.other:
        return _call(node, aten.maximum.default, *node.args)
    if node.target is aten.min.other:
        return _call(node, aten.minimum.default, *node.args)
    return None


def _rectified(node: fx.Node, constant: set[fx.Node]) -> fx.Node | None:
    """``clamp(x, min=0)`` of floats is ``relu``, for NaN too; ``-0.0`` gives zeros that sign."""
    args = arguments(node)
    x, low, dtype = args["self"], args["min"], nodes.dtype(node)
    bounded = type(low) in (int, float) and str(float(low)) == "0.0" and args.get("max") is None
    if not bounded or not dtype.is_floating_point or nodes.dtype(x) != dtype:
        return None
    return _call(node, aten.relu.default, x)


def _rounded(node: fx.Node, constant: set[fx.Node]) -> fx.Node | None:
    if node.kwargs.get("decimals", 0) == 0:
        return _call(node, aten.round.default, node.args[0])
    return nodes.call(
        node.graph, aten.round.decimals, node.args, dict(node.kwargs), rule=_RULE, sources=[node]
    )


def _flipped(node: fx.Node, constant: set[fx.Node]) -> fx.Node | None:
    return _call(node, aten.flip.default, node.args[0], [int(ops.op_name(node) == "fliplr")])


def _stacked(node: fx.Node, constant: set[fx.Node]) -> fx.Node | None:
    """``hstack``, ``vstack`` ... of tensors that have their axis already are ``cat``."""
    tensors: Any = node.args[0]
    axis, least = _STACKS[ops.op_name(node)]
    ranks = {len(shape(t)) for t in tensors}
    if ops.op_name(node) == "hstack" and ranks == {1}:
        axis, least = 0, 1
    if len(ranks) != 1 or min(ranks) < least:
        return None
    return _call(node, aten.cat.default, tensors, axis)


_STACKS = {"hstack": (1, 2), "vstack": (0, 2), "dstack": (2, 3), "column_stack": (1, 2)}


def _written_out(node: fx.Node, constant: set[fx.Node]) -> fx.Node | None:
    """``addmm(b, x, w, beta, alpha)`` is ``beta * b + alpha * (x @ w)``, where that can fold.

    A ``beta`` of zero leaves ``b`` out, whatever it holds, and so may an ``alpha`` of zero the
    product. Without a constant matrix the one call does in one kernel what would be three; of
    narrow floats it rounds once, and a product that leaves their range comes back by its ``alpha``.
    """
    args = arguments(node)
    batched = ops.op_name(node) == "baddbmm"
    left, right = (args[k] for k in (("batch1", "batch2") if batched else ("mat1", "mat2")))
    bias, alpha, beta = args["self"], args["alpha"], args["beta"]
    if (alpha == 1 and beta == 1) or alpha == 0:
        return None
    if not nodes.dtype(node).is_floating_point or nodes.dtype(node) in _NARROW:
        return None
    if left not in constant and right not in constant:
        return None
    if any(nodes.dtype(t) != nodes.dtype(node) for t in (bias, left, right)):
        return None
    product = _call(node, aten.bmm.default if batched else aten.mm.default, left, right)
    if alpha != 1:
        product = _call(node, aten.mul.Tensor, product, alpha)
    if beta == 0:
        return product
    if beta != 1:
        bias = _call(node, aten.mul.Tensor, bias, beta)
    return _call(node, aten.add.Tensor, product, bias)


def _batched(node: fx.Node, constant: set[fx.Node]) -> fx.Node | None:
    """A layer of one sample is one of a batch of one."""
    x = node.args[0]
    rank = 1 if ops.op_name(node) == "linear" else int(ops.op_name(node)[-2]) + 1
    if not is_tensor(x) or len(shape(x)) != rank or len(shape(node.args[1])) < 2:  # type: ignore[arg-type]
        return None
    one = _call(node, aten.unsqueeze.default, x, 0)
    made = nodes.call(
        node.graph, node.target, (one, *node.args[1:]), dict(node.kwargs),  # type: ignore[arg-type]
        rule=_RULE, sources=[node],
    )  # fmt: skip
    return _call(node, aten.squeeze.dim, made, 0)


_FORMS: dict[str, Callable[[fx.Node, set[fx.Node]], fx.Node | None]] = {
    "mT": _matrix_transposed, "mH": _matrix_transposed, "adjoint": _matrix_transposed,
    "numpy_T": _all_reversed, "matrix_H": _all_reversed, "movedim": _axes_moved,
    "narrow": _narrowed, "ravel": _raveled, "max": _extremum, "min": _extremum, "clamp": _rectified,
    "clamp_min": _rectified, "special_round": _rounded, "fliplr": _flipped, "flipud": _flipped,
    "addmm": _written_out, "baddbmm": _written_out, "linear": _batched,
    **dict.fromkeys(_STACKS, _stacked),
    **dict.fromkeys([f"conv{n}d" for n in (1, 2, 3)], _batched),
    **dict.fromkeys([f"conv_transpose{n}d" for n in (1, 2, 3)], _batched),
}  # fmt: skip


def forms() -> frozenset[str]:
    """The names that are written out in another form, some of them only where it is equal."""
    return frozenset(_FORMS)


# --- constants ------------------------------------------------------------------------------------


def _widen_constants(node: fx.Node, constant: set[fx.Node]) -> None:
    """Integer and boolean constants beside floats become floats, as the call makes them itself.

    A single number beside narrow floats stays: the call reads it in float32, where 70000 is finite.
    """
    if not nodes.dtype(node).is_floating_point:
        return
    tensors = [a for a in node.all_input_nodes if is_tensor(a)]
    if all(t in constant for t in tensors):
        return
    for source in tensors:
        if source not in constant or _bytes(source) > _SMALL:
            continue
        if nodes.dtype(source).is_floating_point:
            continue
        if nodes.dtype(node) in _NARROW and source.meta["val"].numel() == 1:
            continue
        with node.graph.inserting_before(node):
            wide = nodes.call(
                node.graph, aten._to_copy.default, (source,), {"dtype": nodes.dtype(node)},
                rule=_RULE, sources=[source],
            )  # fmt: skip
        constant.add(wide)
        node.replace_input_with(source, wide)


def _bytes(node: fx.Node) -> float:
    value = node.meta["val"]
    known = all(isinstance(s, int) for s in value.shape)
    return value.numel() * value.element_size() if known else float("inf")
