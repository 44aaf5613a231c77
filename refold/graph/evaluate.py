"""Evaluates graphs in float64: the constants that passes fold, and the oracle that judges them.

Every floating dtype counts as float64 (tensors, casts, factories, ``dtype=`` arguments, autocast),
so a baked ``x.to(float32)`` does not hide the error it makes. Constants upstream of a
discontinuity (round, sign, a comparison, topk, an integer cast, ...) are the exception: they are
evaluated in the model's own dtype, bit for bit, because float64 would move their steps. So are
constants of which the model's arithmetic makes something else than float64 does (a table of
``sin(5000 * f)``): they are what it was trained with.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx import _pytree as fx_pytree
from torch.utils import _pytree as pytree

from refold.graph import constants, ops
from refold.graph.nodes import is_tensor
from refold.graph.ops import op_name

WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
_ROUNDINGS = 16  # of its own dtype, by which the value of a constant may differ from the exact one
_MEASURED = 1 << 24  # elements of a constant up to which both are computed


def discontinuous(node: fx.Node) -> bool:
    """True if a small change of the node's inputs can move its value by a step."""
    if node.op != "call_function":
        return False
    if ops.has(node, ops.STEP):
        return True
    if op_name(node) == "div" and node.kwargs.get("rounding_mode") is not None:
        return True
    result = node.meta.get("val")
    if ops.has(node, ops.INDEXED) and isinstance(result, (tuple, list)):
        return any(u.args[1] == 1 for u in node.users if op_name(u) == "getitem")
    if not isinstance(result, torch.Tensor) or result.dtype in WIDE or result.dtype.is_complex:
        return False
    if result.dtype == torch.float64:
        return False
    # What turns floats into integers, booleans or float8 rounds.
    return any(is_tensor(a) and a.meta["val"].dtype.is_floating_point for a in node.all_input_nodes)


def evaluate_constants(
    nodes: Sequence[fx.Node], *, rounded: bool = True, own: Collection[fx.Node] = ()
) -> dict[fx.Node, torch.Tensor]:
    """Values of constant nodes: float64 downstream of the last discontinuity, rounded once.

    Args:
        nodes: constant nodes (see :func:`refold.graph.constants.constant_nodes`) of one graph.
        rounded: round each value to its node's dtype; otherwise leave it in float64.
        own: nodes to evaluate in the model's own dtype (see :func:`in_own_dtype`).

    Returns:
        A value for each of ``nodes``. A node that only moves values of one tensor gives a view.
    """
    wanted = set(nodes)
    needed = ancestors(wanted)
    if not needed:
        return {}
    graph = next(iter(needed)).graph
    ordered = [n for n in graph.nodes if n in needed]
    exact = _stepped_within(ordered, needed).union(own)
    last = _last_uses(ordered)
    values: dict[fx.Node, Any] = {}
    out: dict[fx.Node, torch.Tensor] = {}
    with torch.no_grad():
        for node in ordered:
            values[node] = _step(node, values, exact)
            if node in wanted:
                value = values[node]
                out[node] = value.to(node.meta["val"].dtype) if rounded else _wide(value)
            for dead in last.get(node, ()):
                del values[dead]
    return out


def in_own_dtype(graph: fx.Graph, constant: set[fx.Node]) -> set[fx.Node]:
    """The constants that are evaluated in the model's own dtype, bit for bit.

    Those upstream of a discontinuity, and those of which float64 makes something else than the
    model does: ``sin(5000 * f)`` in float32 is 1e-4 away from the exact one, a table of float32
    positions that cancel likewise. The model was trained with its own. Both are computed, and
    compared where something else than a constant reads them.
    """
    ordered = [n for n in graph.nodes if n in constant]
    stepped = _stepped_within(ordered, constant)
    read = [n for n in ordered if n.op != "get_attr" and any(u not in constant for u in n.users)]
    inside = ancestors(read)
    ordered = [n for n in ordered if n in inside]
    last = _last_uses(ordered)
    wide: dict[fx.Node, Any] = {}
    own: dict[fx.Node, Any] = {}
    differing: list[fx.Node] = []
    watched = set(read)
    with torch.no_grad():
        for node in ordered:
            _evaluate_both(node, wide, own, stepped)
            if node in watched and _parts(wide.get(node), own.get(node)):
                differing.append(node)
            for dead in last.get(node, ()):
                wide.pop(dead, None)
                own.pop(dead, None)
    return stepped | ancestors(differing)


def _evaluate_both(
    node: fx.Node, wide: dict[fx.Node, Any], own: dict[fx.Node, Any], stepped: set[fx.Node]
) -> None:
    """A constant in float64 and in its own dtype: one object where they cannot differ."""
    inputs = node.all_input_nodes
    if any(a not in wide for a in inputs) or not _is_affordable(node):
        return
    try:
        wide[node] = _step(node, wide, stepped)
        alike = node.op == "get_attr" or node in stepped or ops.has(node, ops.MOVES)
        if alike and all(wide[a] is own[a] for a in inputs):
            own[node] = wide[node]
        else:
            args, kwargs = _arguments(node, own, native=True)
            own[node] = _call(node.target, args, kwargs)
    except (RuntimeError, NotImplementedError, AssertionError):  # where it is folded, it is said
        wide.pop(node, None)


def _is_affordable(node: fx.Node) -> bool:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return all(
        isinstance(v, torch.Tensor)
        and v.layout == torch.strided
        and all(isinstance(s, int) for s in v.shape)
        and (node.op == "get_attr" or v.numel() <= _MEASURED)
        for v in leaves
    )


def _parts(wide: Any, own: Any) -> bool:
    """True if the model's own arithmetic gave something else than rounding explains."""
    for a, b in zip(pytree.tree_leaves(wide), pytree.tree_leaves(own), strict=True):
        if a is b or not isinstance(b, torch.Tensor) or b.dtype not in WIDE or not b.numel():
            continue
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()):
            return True
        a, b = torch.where(finite, a, 0), torch.where(finite, b, 0)
        if bool((a - b).abs().max() > _ROUNDINGS * torch.finfo(b.dtype).eps * a.abs().max()):
            return True
    return False


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes, and all that they are computed from."""
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen


def _stepped_within(ordered: Sequence[fx.Node], inside: set[fx.Node]) -> set[fx.Node]:
    exact: set[fx.Node] = set()
    for node in reversed(ordered):
        if discontinuous(node) or any(u in exact and u in inside for u in node.users):
            exact.add(node)
    return exact


def _last_uses(ordered: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For each node, what nothing after it reads (nodes that nobody reads die at once)."""
    last: dict[fx.Node, fx.Node] = {}
    for node in ordered:
        last[node] = node
        for source in node.all_input_nodes:
            last[source] = node
    out: dict[fx.Node, list[fx.Node]] = {}
    for node, at in last.items():
        out.setdefault(at, []).append(node)
    return out


# --- one node -------------------------------------------------------------------------------------


def _step(node: fx.Node, values: dict[fx.Node, Any], exact: set[fx.Node]) -> Any:
    """The value of one node: native where it is stepped or only moves values, else in float64."""
    if node.op == "get_attr":
        return constants.tensor(node)
    if node in exact:
        args, kwargs = _arguments(node, values, native=True)
        return _call(node.target, args, kwargs)
    if ops.has(node, ops.MOVES):
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
        return _call(node.target, args, kwargs)
    return wide_call(node, values)


def _call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return target(*args, **kwargs)


def _arguments(
    node: fx.Node, values: dict[fx.Node, Any], *, native: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def value(source: fx.Node) -> Any:
        have = values[source]
        return _as_traced(have, source.meta.get("val")) if native else _widened(have)

    return fx.map_arg((node.args, node.kwargs), value)


def _as_traced(value: Any, traced: Any) -> Any:
    """``value`` in the dtypes that the trace saw."""
    if isinstance(value, torch.Tensor) and isinstance(traced, torch.Tensor):
        return value if value.dtype == traced.dtype else value.to(traced.dtype)
    if isinstance(value, (tuple, list)) and isinstance(traced, (tuple, list)):
        return type(value)(_as_traced(v, t) for v, t in zip(value, traced, strict=True))
    return value


def _wide(value: torch.Tensor) -> torch.Tensor:
    wider = WIDE.get(value.dtype)
    return value if wider is None else value.to(wider)


def _widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _wide(value)
    if isinstance(value, (tuple, list)):
        return pytree.tree_map(lambda v: _wide(v) if isinstance(v, torch.Tensor) else v, value)
    return value


def wide_call(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """Runs a call with every floating dtype promoted; in its own dtype where float64 is missing."""
    args, kwargs = _arguments(node, values, native=False)
    target, args, kwargs = _promoted(node, args, kwargs)
    if constants.is_mutation(node) and isinstance(args[0], torch.Tensor):
        args = (args[0].clone(), *args[1:])
    try:
        return _widened(_call(target, args, kwargs))
    except (NotImplementedError, RuntimeError, AssertionError):  # quantisers assert their dtypes
        args, kwargs = _arguments(node, values, native=True)
        return _widened(_call(node.target, args, kwargs))


def _promoted(
    node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Promotes dtype arguments, default dtypes of factories, and integers that become floats."""
    target: Any = node.target
    args = tuple(WIDE.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
    kwargs = {k: WIDE.get(a, a) if isinstance(a, torch.dtype) else a for k, a in kwargs.items()}
    result = node.meta.get("val")
    if not isinstance(result, torch.Tensor) or result.dtype not in WIDE:
        return target, args, kwargs
    schema = getattr(target, "_schema", None)
    names = [a.name for a in schema.arguments] if schema is not None else []
    if "out_dtype" in names:  # a dequantiser: integers come in, its scales say nothing
        return target, args, {**kwargs, "out_dtype": WIDE[result.dtype]}
    tensors = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
    if any(t.is_floating_point() or t.is_complex() for t in tensors):
        return target, args, kwargs
    wide = WIDE[result.dtype]
    if "dtype" in names:
        if names.index("dtype") >= len(args) and kwargs.get("dtype") is None:
            kwargs["dtype"] = wide
        return target, args, kwargs
    if op_name(node) == "where":
        sides = [torch.as_tensor(a, dtype=wide, device=tensors[0].device) for a in args[1:]]
        return torch.ops.aten.where.self, (args[0], *sides), kwargs
    integers = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
    args, kwargs = pytree.tree_map(
        lambda a: a.to(wide) if isinstance(a, torch.Tensor) and a.dtype in integers else a,
        (args, kwargs),
    )
    return target, args, kwargs


# --- the oracle -----------------------------------------------------------------------------------


def flat_inputs(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The graph's own inputs for a user's call (``process_inputs`` takes no keywords)."""
    codegen: Any = graph._codegen
    if getattr(codegen, "pytree_info", None) is None:
        return list(args)
    leaves: list[Any] = fx_pytree.tree_flatten_spec((args, kwargs), codegen.pytree_info.in_spec)
    return leaves


class Oracle:
    """Runs a graph of the IR in float64, with constants as :func:`evaluate_constants` has them.

    Args:
        gm: the graph module; it is not changed and its state is not written.
        stored: what stands for each tensor that the graph stores; itself unless given.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        stored: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self._gm = gm
        self._stored = stored
        self._ordered = list(gm.graph.nodes)
        constant = constants.constant_nodes(gm.graph)
        self._constant = constant
        self._exact = in_own_dtype(gm.graph, constant)
        self._last = _last_uses(self._ordered)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(args, kwargs)

    def run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        *,
        watch: Callable[[fx.Node, Any], None] | None = None,
        hold: Callable[[fx.Node, Any, Any], Any] | None = None,
    ) -> Any:
        """Runs the graph on the user's arguments.

        Args:
            args: positional arguments.
            kwargs: keyword arguments.
            watch: sees each node's value.
            hold: gives the value that a call has from now on, for its node, value and arguments.
        """
        flat = flat_inputs(self._gm.graph, args, kwargs or {})
        with torch.no_grad():
            result = self._run_flat(list(flat), watch, hold)
        return self._gm.graph.process_outputs(result)

    def _run_flat(
        self,
        inputs: list[Any],
        watch: Callable[[fx.Node, Any], None] | None,
        hold: Callable[[fx.Node, Any, Any], Any] | None,
    ) -> Any:
        values: dict[fx.Node, Any] = {}
        supply = iter(inputs)
        for node in self._ordered:
            if node.op == "placeholder":
                values[node] = _widened(next(supply))
            elif node.op == "output":
                return fx.map_arg(node.args[0], lambda n: _widened(values[n]))
            else:
                values[node] = self._value(node, values)
            if hold is not None and node.op == "call_function":
                given = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
                values[node] = hold(node, values[node], given)
            if watch is not None:
                watch(node, values[node])
            for dead in self._last.get(node, ()):
                del values[dead]
        raise AssertionError("a graph ends with its output")

    def _value(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            attribute = self._attribute(node)
            if not isinstance(attribute, torch.Tensor):
                return attribute
            return attribute.detach() if self._stored is None else self._stored(attribute.detach())
        if node.op == "call_module":
            module = self._gm.get_submodule(str(node.target))
            args, kwargs = _arguments(node, values, native=True)
            return _widened(module(*args, **kwargs))
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return self._higher_order(node, values)
        if node in self._constant:
            return _step(node, values, self._exact)
        return wide_call(node, values)

    def _attribute(self, node: fx.Node) -> Any:
        owner: Any = self._gm
        for part in str(node.target).split("."):
            owner = getattr(owner, part)
        return owner

    def _higher_order(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        name = str(getattr(node.target, "__name__", node.target))
        args, kwargs = _arguments(node, values, native=False)
        if name in ("wrap_with_autocast", "wrap_with_set_grad_enabled"):
            at = next(i for i, a in enumerate(args) if isinstance(a, fx.GraphModule))
            return Oracle(args[at]).run(tuple(args[at + 1 :]))
        if name == "cond":
            predicate, yes, no, operands = args
            branch = yes if bool(predicate) else no
            return Oracle(branch).run(tuple(operands))
        args, kwargs = _arguments(node, values, native=True)
        return _widened(_call(node.target, args, kwargs))
