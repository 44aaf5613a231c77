"""Constants of a graph: tensors behind ``get_attr`` nodes, what is constant, what is written.

Parameters are the caller's own tensors: nothing here, and no pass, ever writes into one.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from refold.algebra.lazy import Lazy
from refold.graph import nodes, ops
from refold.graph.ops import op_name


def tensor(node: fx.Node) -> torch.Tensor:
    """The tensor behind a ``get_attr`` node; a pending constant is computed and rounded now."""
    if "refold_lazy" in node.meta:
        materialise(node)
    return attribute(node).detach()


def attribute(node: fx.Node) -> torch.Tensor:
    """The parameter or buffer itself."""
    *path, name = str(node.target).split(".")
    owner: Any = node.graph.owning_module
    for part in path:
        owner = owner._modules[part]  # several times as fast as getattr, for every constant read
    found = getattr(owner, name)
    assert isinstance(found, torch.Tensor)
    return found


def stored(gm: fx.GraphModule) -> dict[str, torch.Tensor]:
    """The parameters and buffers that the graph reads, by name."""
    return {
        str(n.target): attribute(n) for n in gm.graph.find_nodes(op="get_attr") if is_get_attr(n)
    }


def exact(node: object) -> Lazy | None:
    """A constant operand in float64, unrounded where a pass made it; ``None`` if not constant.

    Reads through layout operations over a constant, and has the shape of the operand. ``None`` for
    one that is expanded to a size which only the call knows; :func:`compact` reads that.
    """
    found = compact(node)
    if found is None:
        return None
    assert isinstance(node, fx.Node)
    sizes = tuple(node.meta["val"].shape)
    if any(not isinstance(s, int) for s in sizes):
        return None
    return found if found.shape == sizes else found.map(sizes, lambda t: t.expand(sizes))


def compact(node: object) -> Lazy | None:
    """:func:`exact` for readers that broadcast: an ``expand`` reads as what it expands."""
    if not is_get_attr(node):
        return _compact_layout(node)
    assert isinstance(node, fx.Node)
    if not is_fixed(node) or not node.meta["val"].is_floating_point():
        return None
    pending: Lazy | None = node.meta.get("refold_exact")
    return pending if pending is not None else Lazy.of(tensor(node))


def _compact_layout(node: object) -> Lazy | None:
    if not isinstance(node, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
        return None
    repeats = ops.has(node, ops.EXPAND | ops.ALIAS | ops.COPY)
    if not repeats and not ops.has(node, ops.VIEW | ops.PERMUTE):
        return None
    source = node.args[0] if node.args else None
    if repeats:
        return compact(source)
    rest = node.args[1:]
    if len(node.all_input_nodes) != 1:
        return None
    base = exact(source)
    if base is None or not nodes.same(base.shape, source.meta["val"].shape):  # type: ignore[union-attr]
        return None
    target = node.target
    return base.map(tuple(node.meta["val"].shape), lambda t: target(t, *rest, **node.kwargs))


def is_get_attr(node: object) -> bool:
    return (
        isinstance(node, fx.Node)
        and node.op == "get_attr"
        and isinstance(node.meta.get("val"), torch.Tensor)
    )


def is_fixed(node: object) -> bool:
    """True for a stored tensor that the graph never writes: the door to reading it as a constant.

    A buffer that a call writes, itself or a view of it, has other numbers on the next call.
    """
    return is_get_attr(node) and not _is_written(node)  # type: ignore[arg-type]


def _is_written(node: fx.Node) -> bool:
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        for user in current.users:
            if user.op != "call_function":
                continue
            if is_mutation(user) and current in _written_by(user):
                return True
            if _views(user) and user not in seen:
                seen.add(user)
                stack.append(user)
    return False


def _views(node: fx.Node) -> bool:
    return node.op == "call_function" and _returns_views(node.target)


@functools.cache
def _returns_views(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return target is operator.getitem
    return any(result.alias_info is not None for result in target._schema.returns)


def add(
    gm: fx.GraphModule,
    name: str,
    data: torch.Tensor | Lazy,
    like: torch.Tensor | None = None,
) -> fx.Node:
    """Registers a new constant at the graph's insertion point.

    Args:
        gm: the graph module; its graph is positioned where the node shall stand.
        name: a telling name, made unique; dots become underscores.
        data: a tensor, stored as it is, or a float64 :class:`Lazy` that stays pending (a fold upon
            a fold starts from it, so everything is rounded once) until :func:`materialise`.
        like: for a lazy constant, a tensor that has the dtype and device to round to.
    """
    base = "folded_" + name.replace(".", "_").removeprefix("folded_")
    unique, count = base, 0
    while hasattr(gm, unique):
        count += 1
        unique = f"{base}_{count}"
    if isinstance(data, Lazy):
        assert like is not None
        stored = torch.empty(
            data.shape, dtype=like.dtype, device="meta", memory_format=data.memory_format
        )
        device = like.device
    else:
        stored, device = data.detach(), data.device
    gm.register_buffer(unique, stored)
    node = gm.graph.get_attr(unique)
    node.meta["refold_name"] = name.replace(".", "_").removeprefix("folded_")
    node.meta["val"] = nodes.fake_like(gm.graph, stored, device)
    if isinstance(data, Lazy):
        node.meta["refold_lazy"] = device
        node.meta["refold_exact"] = data
    return node


def materialise(node: fx.Node) -> None:
    """Computes a pending constant in float64 and rounds it to its dtype, once."""
    device = node.meta.get("refold_lazy")
    if device is None:
        return
    value: Lazy = node.meta["refold_exact"]
    gm = node.graph.owning_module
    computed = value.evaluate().to(dtype=node.meta["val"].dtype, device=device).contiguous()
    if value.memory_format != torch.contiguous_format:
        laid_out = torch.empty_like(computed, memory_format=value.memory_format)
        computed = laid_out.copy_(computed)  # to() leaves a 1x1 kernel as it is
    setattr(gm, str(node.target), computed)
    del node.meta["refold_lazy"]  # not before: where it fails, it is still to be computed


def release(gm: fx.GraphModule, owner: nn.Module) -> None:
    """Empties the tensors of ``owner`` that no constant of the graph reads as they are.

    What pending constants are made of lives on inside them, and goes with the last of them.
    """
    kept = {
        tensor(n).untyped_storage().data_ptr()
        for n in gm.graph.find_nodes(op="get_attr")
        if is_get_attr(n) and "refold_lazy" not in n.meta
    }
    for t in [*owner.parameters(), *owner.buffers()]:
        if t.untyped_storage().data_ptr() not in kept:
            t.data = t.data.new_empty(0)


def materialise_all(
    gm: fx.GraphModule, *, forget: bool = True, largest_first: bool = False
) -> None:
    """Computes every pending constant that is still read.

    Args:
        gm: the graph module.
        forget: drop how the constants were made.
        largest_first: the float64 of the largest is then in memory with the fewest results; in
            the graph's order released weights and results of one size follow each other.
    """
    found = gm.graph.find_nodes(op="get_attr")
    if largest_first:
        found = sorted(found, key=lambda n: -_numel(n))
    for node in found:
        if node.users:
            materialise(node)
        if forget:
            node.meta.pop("refold_exact", None)


def _numel(node: fx.Node) -> int:
    value = node.meta.get("val")
    return int(value.numel()) if isinstance(value, torch.Tensor) else 0


def copied(value: torch.Tensor, memory: dict[int, torch.UntypedStorage]) -> torch.Tensor:
    """A copy of a tensor; copies made with one ``memory`` share it where the originals do."""
    value = value.detach()
    if type(value) is not torch.Tensor or value.layout is not torch.strided or value.is_conj():
        return value.clone()
    storage = value.untyped_storage()
    copy = memory.get(storage._cdata)
    if copy is None:
        copy = memory[storage._cdata] = storage.clone()
    new = torch.empty(0, dtype=value.dtype, device=value.device)
    return new.set_(copy, value.storage_offset(), value.size(), value.stride())


def written(graph: fx.Graph) -> set[fx.Node]:
    """``get_attr`` and placeholder nodes that the graph writes (state, copy-backs)."""
    return {target for node in mutations(graph) for target in targets_of(node)}


def targets_of(mutation: fx.Node) -> list[fx.Node]:
    """The constants and inputs that a call writes, themselves or a view of them.

    What it copies from is only read.
    """
    found: dict[fx.Node, None] = {}
    stack = _written_by(mutation)
    while stack:
        node = stack.pop()
        if node.op in ("get_attr", "placeholder"):
            found[node] = None
        elif _views(node):
            stack.extend(node.all_input_nodes)
    return list(found)


def _written_by(mutation: fx.Node) -> list[fx.Node]:
    assert isinstance(mutation.target, torch._ops.OpOverload)
    given = nodes.arguments(mutation)
    writes = [
        given.get(a.name)
        for a in mutation.target._schema.arguments
        if a.alias_info is not None and a.alias_info.is_write
    ]
    return [leaf for leaf in pytree.tree_leaves(writes) if isinstance(leaf, fx.Node)]


def own_written(gm: fx.GraphModule) -> None:
    """Gives a graph copies of the tensors that it writes."""
    for node in written(gm.graph):
        if node.op != "get_attr":
            continue
        path, _, name = str(node.target).rpartition(".")
        owner = gm.get_submodule(path)
        copy = getattr(owner, name).detach().clone()
        if name in owner._parameters:
            copy = nn.Parameter(copy, requires_grad=False)
        setattr(owner, name, copy)


def mutations(graph: fx.Graph) -> list[fx.Node]:
    """The calls of a graph that write, in its order; each operator is looked at once."""
    table = graph._find_nodes_lookup_table.table
    found = [
        node
        for (op, target), held in table.items()
        if op == "call_function" and held and _is_mutable(target)
        for node in held
    ]
    return sorted(found)


def is_mutation(node: fx.Node) -> bool:
    return node.op == "call_function" and _is_mutable(node.target)


@functools.cache
def _is_mutable(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def impurity(node: fx.Node) -> str | None:
    """Why a call is not a deterministic function of its inputs, or ``None``."""
    if node.op == "get_attr" or node.target is operator.getitem:
        return None
    if node.op != "call_function":
        return f"{node.op} is not a pure call"
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return f"{target} is not an ATen operator"
    name = op_name(node)
    if ops.has(node, ops.DRAWS) or torch.Tag.nondeterministic_seeded in target.tags:
        if _is_switched_off(node):
            return None
        if name.startswith(("empty", "new_empty")):
            return "reads uninitialised memory"
        return f"{name} draws random numbers"
    if _is_mutable(target):
        return f"{name} writes one of its inputs"
    return None


def draws_random(node: fx.Node) -> bool:
    """Whether a call draws random numbers."""
    reason = impurity(node) if node.op == "call_function" else None
    return bool(reason and "random" in reason)


def _is_switched_off(node: fx.Node) -> bool:
    """True for dropout, attention and recurrent layers whose probability or mode draws nothing."""
    given = nodes.arguments(node)
    if "train" in given or "training" in given:
        switch = given.get("train", given.get("training"))
        probability = given.get("p", given.get("dropout", 1.0))
        return switch is False or probability == 0
    return "dropout_p" in given and given["dropout_p"] == 0


def constant_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on parameters, buffers and literals alone, deterministically.

    A buffer that the graph writes is not constant. Nodes of symbolic sizes are not constant.
    """
    state = written(graph)
    constant: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            if node not in state and isinstance(node.meta.get("val"), torch.Tensor):
                constant.add(node)
        elif node.op != "call_function" or impurity(node) is not None:
            continue
        elif all(a in constant for a in node.all_input_nodes):
            constant.add(node)
    return constant


def size_in_bytes(node: fx.Node) -> int:
    """Bytes that the constant behind a ``get_attr`` (or its fake value) takes."""
    value = node.meta["val"]
    return int(value.numel()) * value.element_size()


def stored_bytes(gm: fx.GraphModule) -> int:
    """Bytes of all constants that the graph reads."""
    return sum(
        size_in_bytes(n)
        for n in gm.graph.find_nodes(op="get_attr")
        if n.users and isinstance(n.meta.get("val"), torch.Tensor)
    )


def canonicalise(gm: fx.GraphModule) -> int:
    """Lets aliases of one tensor (tied weights) share one ``get_attr`` node; returns how many went.

    Non-strict export lists a tied tensor under each of its names, with its users on the last one.
    """
    first: dict[tuple[Any, ...], fx.Node] = {}
    merged = 0
    for node in list(gm.graph.nodes):
        if node.op != "get_attr" or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        t = tensor(node)
        # An empty tensor has no address: the parameter itself tells it from others.
        memory = t.data_ptr() if t.numel() else id(attribute(node))
        key = (memory, t.dtype, tuple(t.shape), t.stride(), t.device)
        if not node.users:
            gm.graph.erase_node(node)
            continue
        kept = first.setdefault(key, node)
        if kept is not node:
            node.replace_all_uses_with(kept, propagate_meta=False)
            gm.graph.erase_node(node)
            merged += 1
    return merged


def drop_dead_code(graph: fx.Graph) -> None:
    """Removes what nobody reads, an attention without dropout too (fx takes it for random)."""
    for node in reversed(graph.nodes):
        if node.users or node.op in ("placeholder", "output") or is_transform(node):
            continue
        if not node.is_impure() or _draws_nothing(node):
            graph.erase_node(node)
    for node in graph.find_nodes(op="get_attr"):
        if isinstance(node.meta.get("val"), torch.Tensor):
            continue
        branch = getattr(graph.owning_module, str(node.target), None)
        if isinstance(branch, fx.GraphModule):
            drop_dead_code(branch.graph)
            branch.recompile()


def is_transform(node: fx.Node) -> bool:
    """One of the calls of which ``torch.func.vmap`` and its like are traced.

    They open and close a level in which other calls mean something else: read or not, they stay.
    """
    return getattr(node.target, "__module__", "") == "torch._functorch.predispatch"


def _draws_nothing(node: fx.Node) -> bool:
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in target.tags
        and not _is_mutable(target)
        and _is_switched_off(node)
    )


def sweep(gm: fx.GraphModule) -> bool:
    """Removes dead code, and tensors and submodules that no node reads; whether there were any."""
    size = len(gm.graph.nodes)
    drop_dead_code(gm.graph)
    used: set[str] = set()
    above: set[str] = set()  # modules with something inside that is used
    for node in gm.graph.nodes:
        if node.op in ("get_attr", "call_module") and node.target not in used:
            path = str(node.target)
            used.add(path)
            while (path := path.rpartition(".")[0]) and path not in above:
                above.add(path)
    dropped = _drop_unused(gm, "", used, above)
    for name, value in list(vars(gm).items()):
        if isinstance(value, torch.Tensor) and name not in used:
            delattr(gm, name)
    return dropped or len(gm.graph.nodes) != size


def _drop_unused(module: nn.Module, prefix: str, used: set[str], above: set[str]) -> bool:
    """Drops what is not used inside a module; a module that is used itself stays as it is."""
    unread = [
        name
        for store in (module._parameters, module._buffers)
        for name, value in store.items()
        if value is not None and prefix + name not in used
    ]
    inside = {name: prefix + name for name in module._modules}
    unread += [n for n, path in inside.items() if path not in used and path not in above]
    for name in unread:
        delattr(module, name)
    found = bool(unread)
    for name, child in module._modules.items():
        if child is not None and inside[name] not in used:
            found |= _drop_unused(child, f"{inside[name]}.", used, above)
    return found
