"""Makes an exported program functional: no in-place ops, no eval-time no-ops, one spelling of view.

The cheap way reads aliasing off the trace: fake tensors of views and of in-place results share
their storage. ``t.op_()`` becomes ``op(t)`` when no other live value shares the storage of ``t``;
a write into a slice of a live value becomes a scatter. Everything else (state, inputs, operators
whose aliasing is unknown) sends the whole program through ``run_decompositions({})``, which is
always right and costs a second trace.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind
from torch.utils import _pytree as pytree
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from refold.frontends.canonical import write_canonical
from refold.graph import aliasing, ops
from refold.graph.constants import (
    canonicalise,
    constant_nodes,
    drop_dead_code,
    is_mutation,
    is_transform,
    written,
)
from refold.graph.nodes import (
    aten,
    call,
    fake_execution,
    fake_mode,
    fake_result,
    is_call,
    is_tensor,
    same,
)
from refold.graph.ops import op_name

RULE = "functionalise"
_COPIES = ops.COPY | ops.CAST


class _NotLocal(Exception):
    """The program cannot be made functional node by node."""


def functional_module(
    program: ExportedProgram, *, aliasing_known: bool = True
) -> tuple[fx.GraphModule, bool]:
    """Unlifts an exported program into a functional graph module.

    Args:
        program: any ``ExportedProgram``; it is not changed.
        aliasing_known: whether the fake values of views share storage (they do not in a program
            that was loaded from a file).

    Returns:
        The graph module, and whether the program had to go through ``run_decompositions({})``.
    """
    gm = program.module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    transforms = any(map(is_transform, gm.graph.nodes))
    redone = transforms or not make_functional(gm, aliasing_known=aliasing_known)
    if redone:
        gm = _without_idle_calls(program).run_decompositions({}).module(check_guards=False)
        assert isinstance(gm, fx.GraphModule)
        _return_values(gm, program, aliasing_known=aliasing_known)
        _normalise(gm, scatters=True)
    canonicalise(gm)
    write_canonical(gm)
    gm.recompile()
    gm.validate_inputs = False  # type: ignore[assignment]  # calls are checked, see refold.inputs
    return gm, redone


def make_functional(gm: fx.GraphModule, *, aliasing_known: bool = True) -> bool:
    """Makes a graph functional in place, node by node; ``False`` where that cannot be done.

    After ``False`` the graph is in an undefined state.
    """
    mutates = _mutates(gm)
    if mutates:
        _drop_assertions(gm.graph)
        try:
            if not aliasing_known:
                _run_fake(gm)
            _localise(gm)
        except _NotLocal:
            return False
    _normalise(gm, scatters=mutates)
    return True


def _return_values(gm: fx.GraphModule, program: ExportedProgram, *, aliasing_known: bool) -> None:
    """Returns a value that is written into state, too, where the model does not return the state.

    Decomposing tells the two apart no longer: ``h = f(x); self.h.copy_(h); return h`` comes out as
    ``return self.h``, which the next call would overwrite.
    """
    returned = pytree.tree_leaves(gm.graph.output_node().args[0])
    if not any(is_call(n, aten.copy_.default) for n in returned):
        return
    before = program.module(check_guards=False)
    assert isinstance(before, fx.GraphModule)
    if not aliasing_known:
        try:
            _run_fake(before)
        except _NotLocal:
            return
    overwritten = {key for n in written(before.graph) for key in _storages(n.meta.get("val"))}
    models = pytree.tree_leaves(before.graph.output_node().args[0])
    new: list[Any] = []
    for ours, theirs in zip(returned, models, strict=True):
        while isinstance(theirs, fx.Node) and _returns_input(theirs):
            theirs = theirs.args[0]
        apart = isinstance(theirs, fx.Node) and not _storages(theirs.meta.get("val")) & overwritten
        new.append(ours.args[1] if apart and is_call(ours, aten.copy_.default) else ours)
    spec = pytree.tree_structure(gm.graph.output_node().args[0])
    gm.graph.output_node().args = (pytree.tree_unflatten(new, spec),)


def _normalise(gm: fx.GraphModule, *, scatters: bool) -> None:
    _drop_assertions(gm.graph)
    if scatters:
        _strip_scatters(gm)
    _spell_shapes(gm.graph)
    drop_no_ops(gm)
    drop_dead_code(gm.graph)
    _unstamp(gm.graph)


def _without_idle_calls(program: ExportedProgram) -> ExportedProgram:
    """The program without calls that do nothing, for decomposing.

    An inactive dropout would become a copy. Among what nobody reads are calls that fail, where the
    model caught the error: they would be run again.
    """
    graph, signature = copy.deepcopy(program.graph), copy.deepcopy(program.graph_signature)
    for node, copied in zip(list(program.graph.nodes), list(graph.nodes), strict=True):
        copied.name = node.name  # an input that is called like a builtin gets another in a copy
    for node in list(graph.nodes):
        if _returns_input(node):
            source = node.args[0]
            for spec in signature.output_specs:
                if getattr(spec.arg, "name", None) == node.name:
                    spec.arg.name = source.name  # type: ignore[union-attr]
            node.replace_all_uses_with(source, propagate_meta=False)
            graph.erase_node(node)
    drop_dead_code(graph)
    _drop_other_names(graph, signature, program)
    return ExportedProgram(
        root=program.graph_module,
        graph=graph,
        graph_signature=signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def _drop_other_names(
    graph: fx.Graph, signature: ExportGraphSignature, program: ExportedProgram
) -> None:
    """Lists a tensor that has several names once: its calls all use one, and one may write it."""
    known = {**program.state_dict, **program.constants}
    count = Counter(id(t) for t in known.values())
    inputs = {n.name: n for n in graph.find_nodes(op="placeholder")}
    kept = []
    for spec in signature.input_specs:
        node = inputs.get(getattr(spec.arg, "name", ""))
        tied = (
            spec.kind in (InputKind.BUFFER, InputKind.PARAMETER)
            and count[id(known.get(str(spec.target)))] > 1
        )
        if tied and node is not None and not node.users:
            graph.erase_node(node)
        else:
            kept.append(spec)
    signature.input_specs = kept


def _unstamp(graph: fx.Graph) -> None:
    """Nodes made here are originals to everything that follows: their own name is their origin."""
    for node in graph.nodes:
        custom = node.meta.get("custom")
        if custom and custom.get("refold", {}).get("rules") == [RULE]:
            node.meta["custom"] = {k: v for k, v in custom.items() if k != "refold"}


def _mutates(gm: fx.GraphModule) -> bool:
    graphs = [m.graph for m in gm.modules() if isinstance(m, fx.GraphModule)]
    return any(is_mutation(n) or _hidden_mutation(n) for g in graphs for n in g.nodes)


def _hidden_mutation(node: fx.Node) -> bool:
    """Normalisation that updates running statistics, which its schema does not say."""
    if not is_call(node, aten.batch_norm, aten.instance_norm) or len(node.args) < 6:
        return False
    return bool(node.args[5]) and node.args[3] is not None


def _drop_assertions(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if is_call(node, aten._assert_tensor_metadata):
            graph.erase_node(node)


def _run_fake(gm: fx.GraphModule) -> None:
    """Runs the graph on fake values again, so that views share storage as they do in a trace."""
    mode = fake_mode(gm.graph)
    if mode is None or any(n.op == "get_attr" and not is_tensor(n) for n in gm.graph.nodes):
        raise _NotLocal
    with fake_execution(mode):
        for node in gm.graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                node.meta["val"] = node.target(*args, **kwargs)


# --- in-place operators, one at a time ------------------------------------------------------------


def _storages(value: Any) -> set[int]:
    return {
        leaf.untyped_storage()._cdata
        for leaf in pytree.tree_leaves(value)
        if isinstance(leaf, torch.Tensor)
    }


def _returns_input(node: fx.Node) -> bool:
    """Dropout that does nothing, and so returns its input itself."""
    if node.op != "call_function" or not ops.named(op_name(node), ops.DROPOUT):
        return False
    train = node.args[2] if len(node.args) > 2 else node.kwargs.get("train")
    return bool(not train or node.args[1] == 0)


def _localise(gm: fx.GraphModule) -> None:
    """Rewrites each in-place call of ``gm`` in one sweep, or raises :class:`_NotLocal`."""
    if any(
        is_mutation(n) or _hidden_mutation(n)
        for m in gm.modules()
        if m is not gm and isinstance(m, fx.GraphModule)
        for n in m.graph.nodes
    ):
        raise _NotLocal
    graph = gm.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    last_use = {n: max((order[u] for u in n.users), default=-1) for n in order}
    merged: dict[int, int] = {}  # storage -> storage, where the trace does not show an alias

    def root(key: int) -> int:
        while key in merged:
            key = merged[key]
        return key

    members: dict[int, list[fx.Node]] = defaultdict(list)
    fresh: set[fx.Node] = set()  # lifted constants that only their own copy reads
    for node in list(order):
        keys = {root(k) for k in _storages(node.meta.get("val"))}
        if _returns_input(node):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            for theirs in {root(k) for k in _storages(source.meta.get("val"))}:
                for key in keys - {theirs}:
                    merged[key] = theirs
                    members[theirs].extend(members.pop(key, ()))
            keys = {root(k) for k in keys}
        if is_call(node, aten.lift_fresh_copy):
            source = node.args[0]
            if isinstance(source, fx.Node) and len(source.users) == 1:
                fresh.add(source)
        if node.op == "call_function" and (is_mutation(node) or _hidden_mutation(node)):
            replacement = _functional(gm, node, keys, members, fresh, order, last_use)
            for key in keys:
                members[key].extend(replacement)
            for made in replacement:  # it stands for what was written, where a dropout reads it
                for own in {root(k) for k in _storages(made.meta.get("val"))} - keys:
                    merged[own] = min(keys)
            continue
        for key in keys:
            members[key].append(node)


def _functional(
    gm: fx.GraphModule,
    node: fx.Node,
    keys: set[int],
    members: dict[int, list[fx.Node]],
    fresh: set[fx.Node],
    order: dict[fx.Node, int],
    last_use: dict[fx.Node, int],
) -> list[fx.Node]:
    """Replaces one in-place call; returns the nodes that now hold the written values."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not is_tensor(node):
        raise _NotLocal
    written, name = node.args[0], op_name(node)
    mutated = [a for a in target._schema.arguments if a.alias_info and a.alias_info.is_write]
    if not isinstance(written, fx.Node) or len(mutated) != 1:
        raise _NotLocal
    if name in ("detach_", "lift_fresh_") or _returns_input(node):  # these write nothing
        _redirect(node, written, -1, order, last_use)
        gm.graph.erase_node(node)
        return []
    if written.op != "call_function" and written not in fresh:  # a constant's alias may not show
        raise _NotLocal
    if not name.endswith("_") or torch.Tag.inplace_view in target.tags:
        raise _NotLocal
    now = order[node]
    alive = {m for k in keys for m in members[k] if m not in fresh and last_use[m] > now}
    if any(
        m.op in ("placeholder", "get_attr") and m not in fresh for k in keys for m in members[k]
    ):
        raise _NotLocal
    chain = _view_chain(written, alive - {written})
    with gm.graph.inserting_before(node):
        value = _call_functional(gm.graph, node, written)
        order[value], last_use[value] = now, -1
        _redirect(written, value, now, order, last_use)
        _redirect(node, value, -1, order, last_use)
        produced = [value]
        for view, base in chain:
            value = _scatter(gm.graph, view, base, value)
            order[value], last_use[value] = now, -1
            _redirect(base, value, now, order, last_use)
            produced.append(value)
    gm.graph.erase_node(node)
    return produced


def _redirect(
    old: fx.Node, new: fx.Node, after: int, order: dict[fx.Node, int], last_use: dict[fx.Node, int]
) -> None:
    """Lets the users of ``old`` that stand after position ``after`` read ``new``."""
    for user in list(old.users):
        if user is not new and order.get(user, -1) > after:
            user.replace_input_with(old, new)
            last_use[new] = max(last_use[new], order[user])
    last_use[old] = max((order[u] for u in old.users if u in order), default=-1)


def _view_chain(written: fx.Node, alive: set[fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
    """The (view, base) steps from ``written`` up to the outermost value that is still needed."""
    chain: list[tuple[fx.Node, fx.Node]] = []
    view = written
    while alive:
        if not is_call(view, aten.select.int, aten.slice.Tensor, aten.detach, aten.alias):
            raise _NotLocal
        base = view.args[0]
        if not isinstance(base, fx.Node):
            raise _NotLocal
        chain.append((view, base))
        alive = alive - {base}
        view = base
    return chain


def _scatter(graph: fx.Graph, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
    if is_call(view, aten.detach, aten.alias):
        return call(graph, aten.clone.default, (value,), rule=RULE, sources=[view])
    scatter = (
        aten.select_scatter.default
        if is_call(view, aten.select.int)
        else aten.slice_scatter.default
    )
    args = (base, value, *view.args[1:])
    return call(graph, scatter, args, dict(view.kwargs), rule=RULE, sources=[value])


def _call_functional(graph: fx.Graph, node: fx.Node, written: fx.Node) -> fx.Node:
    """Inserts the functional twin of an in-place call, of the written tensor's dtype and shape."""
    name, val = op_name(node), written.meta["val"]
    rest = node.args[1:]
    if name == "copy_":
        return _expanded(graph, node, rest[0], val)
    if name == "zero_":
        return call(graph, aten.zeros_like.default, (written,), rule=RULE, sources=[node])
    if name == "fill_" and isinstance(rest[0], fx.Node):
        return _expanded(graph, node, rest[0], val)
    if name == "fill_":
        return call(graph, aten.full_like.default, (written, *rest), rule=RULE, sources=[node])
    assert isinstance(node.target, torch._ops.OpOverload)
    packet = getattr(getattr(torch.ops, node.target.namespace), name[:-1], None)
    overload = getattr(packet, node.target._overloadname, None)
    if not isinstance(overload, torch._ops.OpOverload) or overload._schema.is_mutable:
        raise _NotLocal
    new = graph.call_function(overload, node.args, dict(node.kwargs))
    new.meta.update(node.meta)
    new.meta["val"] = torch.empty_like(val)  # the trace's value shares the written storage
    if _keeps_dtype(node, name, val.dtype):
        return new
    new.meta["val"] = fake_result(new)
    if new.meta["val"].dtype == val.dtype:
        return new
    return call(graph, aten.to.dtype, (new, val.dtype), rule=RULE, sources=[new])


def _keeps_dtype(node: fx.Node, name: str, dtype: torch.dtype) -> bool:
    """True if the functional twin certainly has the written tensor's dtype (no need to run it)."""
    operands = [a for a in node.all_input_nodes if is_tensor(a)]
    return (
        dtype.is_floating_point
        and not ops.named(name, ops.COMPARISON)
        and all(a.meta["val"].dtype == dtype for a in operands)
    )


def _expanded(graph: fx.Graph, node: fx.Node, source: Any, like: torch.Tensor) -> fx.Node:
    """``source`` as a new value with the shape and dtype of ``like``."""
    if not isinstance(source, fx.Node):
        raise _NotLocal
    value, fresh = source, False
    have = value.meta["val"]
    if have.dtype != like.dtype or have.device != like.device:
        kwargs = {"dtype": like.dtype, "device": like.device}
        value = call(graph, aten._to_copy.default, (value,), kwargs, rule=RULE, sources=[node])
        fresh = True
    if not same(list(value.meta["val"].shape), list(like.shape)):
        sizes = _sizes(graph, node)
        value = call(graph, aten.expand.default, (value, sizes), rule=RULE, sources=[node])
        fresh = False
    if fresh:
        return value
    return call(graph, aten.clone.default, (value,), rule=RULE, sources=[node])


def _sizes(graph: fx.Graph, node: fx.Node) -> list[Any]:
    """The sizes of ``node``'s first argument as literals, or as calls where they are symbolic."""
    written = node.args[0]
    assert isinstance(written, fx.Node)
    sizes: list[Any] = []
    for axis, size in enumerate(written.meta["val"].shape):
        if isinstance(size, int):
            sizes.append(size)
        else:
            size_of = aten.sym_size.int
            sizes.append(call(graph, size_of, (written, axis), rule=RULE, sources=[node]))
    return sizes


# --- after run_decompositions({}) ----------------------------------------------------------------


def _strip_scatters(gm: fx.GraphModule) -> None:
    """Removes full slices and full scatters, and turns ``copy(_, v)`` into ``v``."""
    graph = gm.graph
    for node in list(graph.nodes):
        if not is_tensor(node):
            continue
        if is_call(node, aten.slice.Tensor) and _same_shape(node, node.args[0]):
            if _is_forward_slice(node, 3):
                node.replace_all_uses_with(node.args[0], propagate_meta=False)
                graph.erase_node(node)
        elif is_call(node, aten.slice_scatter):
            if _is_forward_slice(node, 4) and _same_shape(node, node.args[1]):
                _substitute(graph, node, node.args[1])
        elif is_call(node, aten.copy.default):
            source = node.args[1]
            if _same_shape(node, source) and _same_dtype(node, source):
                _substitute(graph, node, node.args[1])
    graph.eliminate_dead_code()


def _spell_shapes(graph: fx.Graph) -> None:
    """``reshape_as(x, y)`` reads only the shape of ``y``, but counts as a user of its value."""
    for node in list(graph.nodes):
        if not is_call(node, aten.reshape_as.default, aten.view_as.default):
            continue
        sizes = [s if isinstance(s, int) else -1 for s in node.meta["val"].shape]
        if sizes.count(-1) <= 1:
            with graph.inserting_before(node):
                new = call(
                    graph, aten.reshape.default, (node.args[0], sizes), rule=RULE, sources=[node]
                )
            node.replace_all_uses_with(new, propagate_meta=False)
            graph.erase_node(node)


def _is_forward_slice(node: fx.Node, first: int) -> bool:
    return bool(all(a == 1 for a in node.args[first + 1 :]) and node.kwargs.get("step", 1) == 1)


def _same_dtype(node: fx.Node, other: fx.Node) -> bool:
    return bool(node.meta["val"].dtype == other.meta["val"].dtype)


def _same_shape(node: fx.Node, other: Any) -> bool:
    return is_tensor(other) and same(tuple(node.meta["val"].shape), tuple(other.meta["val"].shape))


def _substitute(graph: fx.Graph, node: fx.Node, value: Any) -> None:
    """Replaces ``node`` by a copy of ``value`` (the sweep for no-ops removes it where it may)."""
    with graph.inserting_before(node):
        new = call(graph, aten.clone.default, (value,), rule=RULE, sources=[node])
    node.replace_all_uses_with(new, propagate_meta=False)
    graph.erase_node(node)


# --- squeezes of sizes that vary ------------------------------------------------------------------


def settle_squeezes(gm: fx.GraphModule, lowest: Mapping[str, int]) -> None:
    """Says of each ``squeeze`` which dimensions it drops, where their sizes vary.

    ``x.squeeze()`` of ``[s0, 4, 1, 1]`` is ``[s0, 4]`` in the trace and ``[4]`` at batch 1. To
    every rewrite it is a reshape of fixed rank, which it is not:

        squeeze(x) = squeeze_copy(squeeze(x, fixed sizes of 1), sizes that may be 1)

    The first is a reshape like any other. The second stays where it is: no rule knows it. A
    reshape behind it is one of what it reads.

    Args:
        gm: a functional graph.
        lowest: the smallest size of each symbol that calls may bring; 1 where it is not given.
    """
    settled = False
    for node in list(gm.graph.nodes):
        dims = _varying_squeeze(node)
        if dims is not None:
            _settle_squeeze(gm.graph, node, dims, lowest)
            settled = True
    if settled:
        _unstamp(gm.graph)
        gm.recompile()


def fix_ranks(gm: fx.GraphModule) -> list[tuple[Any, fx.Node]]:
    """Takes it that no size is 1 that :func:`settle_squeezes` left to be dropped in calls.

    Returns:
        Those sizes, as expressions of symbols, and the calls that would drop them.
    """
    found: list[tuple[Any, fx.Node]] = []
    for node in gm.graph.find_nodes(op="call_function", target=aten.squeeze_copy.dims):
        sizes = node.args[0].meta["val"].shape
        varying = [sizes[d].node.expr for d in node.args[1] if _is_symbolic(sizes[d])]
        if len(varying) == len(node.args[1]):
            found += [(size, node) for size in varying]
            node.target, node.args = aten.squeeze.dims, (node.args[0], [])
    gm.recompile()
    return found


def ranks_matter(gm: fx.GraphModule) -> bool:
    """Whether a constant meets what a varying squeeze makes, or rewrites may join two into one.

    They give the constants that they make the rank of the trace: at batch 1 the result would have
    it, too. What a layer reads by its last dimension is as good in any rank.
    """
    constant = constant_nodes(gm.graph)
    behind = set(gm.graph.find_nodes(op="call_function", target=aten.squeeze_copy.dims))
    scaled = 0
    for node in gm.graph.nodes:
        inputs = node.all_input_nodes
        if not any(n in behind for n in inputs):
            continue
        behind.add(node)
        scaled += ops.has(node, ops.ARITHMETIC) and len(inputs) == 1
        if op_name(node) not in _BY_LAST_DIMENSION and any(n in constant for n in inputs):
            return True
    return scaled > 1


_BY_LAST_DIMENSION = frozenset({"linear", "layer_norm", "rms_norm", "matmul"})


def _is_symbolic(size: Any) -> bool:
    return not isinstance(size, int)


def _varying_squeeze(node: fx.Node) -> list[int] | None:
    """The dimensions that a squeeze names, if the size of one varies."""
    source = node.args[0] if node.args else None
    squeezes = (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
    if not is_call(node, *squeezes) or not isinstance(source, fx.Node) or not is_tensor(source):
        return None
    sizes = source.meta["val"].shape
    if not sizes:
        return None  # a number may be squeezed at 0 and -1, of which it has none
    asked: Any = node.args[1] if len(node.args) > 1 else list(range(len(sizes)))
    dims = sorted({d % len(sizes) for d in ([asked] if isinstance(asked, int) else asked)})
    return dims if any(_is_symbolic(sizes[d]) for d in dims) else None


def _settle_squeeze(
    graph: fx.Graph, node: fx.Node, dims: list[int], lowest: Mapping[str, int]
) -> None:
    source: Any = node.args[0]
    sizes = source.meta["val"].shape
    varying = [d for d in dims if _may_be_one(sizes[d], lowest)]
    ones = [d for d in dims if isinstance(sizes[d], int) and sizes[d] == 1]
    value: fx.Node = source
    with graph.inserting_before(node):
        if ones or not varying:
            value = call(graph, aten.squeeze.dims, (value, ones), rule=RULE, sources=[node])
        if varying:
            for user in list(node.users):  # a reshape counts elements, not dimensions
                if is_call(user, aten.reshape.default) and user.args[0] is node:
                    user.args = (value, *user.args[1:])
            left = [d - sum(one < d for one in ones) for d in varying]
            value = call(graph, aten.squeeze_copy.dims, (value, left), rule=RULE, sources=[node])
    node.replace_all_uses_with(value, propagate_meta=False)
    graph.erase_node(node)
    if not value.users:
        graph.erase_node(value)


def _may_be_one(size: Any, lowest: Mapping[str, int]) -> bool:
    if isinstance(size, int):
        return False
    expression = size.node.expr
    ranges = {s: ValueRanges(lowest.get(str(s), 1), sympy.oo) for s in expression.free_symbols}
    return bool(bound_sympy(expression, ranges).lower <= 1)


# --- no-ops ---------------------------------------------------------------------------------------


def drop_no_ops(gm: fx.GraphModule) -> None:
    """Removes what does nothing in eval mode, and spells every ``view`` as ``reshape``.

    Two outputs, or an output and an input or parameter, never start to share storage.
    """
    graph = gm.graph
    leaks = aliasing.leaking(graph)
    sensitive = any(_reads_strides(n) for n in graph.nodes)
    formats = any(map(aliasing.reads_format, graph.nodes))
    for node in graph.nodes:
        if node.op == "call_function" and node.target in (
            aten.view.default, aten._unsafe_view.default,
        ):  # fmt: skip
            node.target = aten.reshape.default  # also where a copy before it is dropped
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        source = node.args[0] if node.args else None
        if not is_tensor(node) or not isinstance(source, fx.Node) or not is_tensor(source):
            continue
        if not _is_no_op(node, source, leaks, sensitive):
            continue
        if formats and ops.has(node, _COPIES) and aliasing.chooses_kernel(node) is not None:
            continue
        moved: dict[fx.Node, Any] = {}
        if aliasing.unsettled_strides(node, source, moved=moved) == aliasing.OUTPUT_STRIDES:
            continue  # the caller sees the layout that it asks for
        for other, value in moved.items():
            other.meta["val"] = value
        node.replace_all_uses_with(source, propagate_meta=False)
        graph.erase_node(node)
        if node in leaks:
            leaks.add(source)
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)


def _is_no_op(node: fx.Node, source: fx.Node, leaks: set[fx.Node], sensitive: bool) -> bool:
    before, after = source.meta["val"], node.meta["val"]
    if (
        before.dtype != after.dtype
        or before.device != after.device
        or before.layout != after.layout
    ):
        return False
    name = op_name(node)
    if _returns_input(node):
        return not _is_boundary(node, source)
    if ops.has(node, ops.ALIAS):
        return not _is_boundary(node, source)
    if name in ("contiguous", "to") and _storages(before) == _storages(after):
        return not _is_boundary(node, source)
    if not ops.has(node, _COPIES):
        return False
    if sensitive and not same(list(before.stride()), list(after.stride())):
        return False
    # A copy protects an output from sharing storage with something else.
    return node not in leaks


def _is_boundary(node: fx.Node, source: fx.Node) -> bool:
    """A no-op between an output and a constant stays: the output is then a tensor of its own."""
    return source.op == "get_attr" and any(u.op == "output" for u in node.users)


def _reads_strides(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target is operator.getitem:
        return node.op == "call_module"
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return isinstance(target, torch._ops.HigherOrderOperator)
    return target.namespace != "aten" or ops.has(node, ops.READS_STRIDES)
