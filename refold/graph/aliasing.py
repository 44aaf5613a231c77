"""Which values may share storage: what no rewrite may change between inputs, state and outputs."""

from __future__ import annotations

import functools
import heapq
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from refold.errors import first_line
from refold.graph import constants, nodes, ops
from refold.graph.ops import op_name

_KNOWN = frozenset({"aten", "prim", "refold"})  # what others compute from strides is not known

_NORMS_OF_BATCH = frozenset({"batch_norm", "_native_batch_norm_legit", "native_batch_norm"})

_SETTLE_LIMIT = 64
_REACH_LIMIT = 256


@functools.cache
def _may_pass(target: Any) -> bool:
    if target is operator.getitem:
        return True
    if not isinstance(target, torch._ops.OpOverload):
        return True
    declared = any(r.alias_info is not None for r in target._schema.returns)
    return declared or ops.named(target._schema.name.split("::")[-1], ops.MAY_ALIAS)


def storage(value: object) -> int | None:
    """An identity of the storage behind a tensor, or ``None`` where there is none."""
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return None
    return int(value.untyped_storage()._cdata)


def _storages(node: fx.Node) -> set[int]:
    found = {storage(leaf) for leaf in pytree.tree_leaves(node.meta.get("val"))}
    return {s for s in found if s is not None}


def passes(node: fx.Node) -> list[fx.Node]:
    """The inputs whose storage the result of ``node`` may share."""
    if node.op != "call_function":
        return []
    inputs = [n for n in node.all_input_nodes if _storages(n)]
    if not inputs:
        return []
    if not _may_pass(node.target):
        # Composite operators may hand their input through without saying so; the trace saw it.
        own = _storages(node)
        return [n for n in inputs if own & _storages(n)]
    if isinstance(node.target, torch._ops.OpOverload):
        declared = [
            nodes.arguments(node)[a.name]
            for a in node.target._schema.arguments
            if a.alias_info is not None
        ]
        leaves = [v for v in pytree.tree_leaves(declared) if isinstance(v, fx.Node)]
        if leaves:
            return leaves
    return inputs


def roots(node: fx.Node) -> set[fx.Node]:
    """The nodes whose storage ``node`` may share, as far up as possible (at the top: itself)."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        sources = passes(current)
        stack.extend(sources)
        if not sources:
            found.add(current)
    return found


def outputs(graph: fx.Graph) -> list[fx.Node]:
    """The output leaves that are nodes, in order, with repetitions."""
    leaves = pytree.tree_leaves(graph.output_node().args)
    return [leaf for leaf in leaves if isinstance(leaf, fx.Node)]


def reached_outputs(node: fx.Node) -> set[fx.Node]:
    """The output leaves that may share the storage of ``node``."""
    found: set[fx.Node] = set()
    seen = {node}
    stack = [node]
    while stack:
        current = stack.pop()
        if nodes.is_output(current):
            found.add(current)
        for user in current.users:
            if user not in seen and user.op == "call_function" and current in passes(user):
                seen.add(user)
                stack.append(user)
    return found


def mutated(graph: fx.Graph) -> set[fx.Node]:
    """The owners of all storage that the graph writes."""
    found: set[fx.Node] = set()
    for node in constants.mutations(graph):
        bound = nodes.arguments(node)
        for argument in node.target._schema.arguments:  # type: ignore[union-attr]
            if argument.alias_info is not None and argument.alias_info.is_write:
                for leaf in pytree.tree_leaves(bound[argument.name]):
                    if isinstance(leaf, fx.Node):
                        found |= roots(leaf)
    return found


def new_sharing(old: fx.Node, new: fx.Node) -> str | None:
    """Why ``new`` may not take the place of ``old``: an output would share storage it did not.

    ``new`` is an existing node, or was just made; ``old`` still has its users.
    """
    own = _storages(old)
    return shares_more(old, {r for r in roots(old) if own & _storages(r)}, lambda: roots(new))


def shares_more(
    node: fx.Node, before: set[fx.Node], after: Callable[[], set[fx.Node]]
) -> str | None:
    """Why the value of ``node`` may not come to lie in other storage, or ``None``.

    Args:
        node: a node with its users.
        before: the owners of the storage in which its value lies.
        after: finds the owners of the storage in which it would lie.
    """
    reached = reached_outputs(node)
    if not reached:
        return None
    others = [o for o in outputs(node.graph) if o not in reached]
    for root in sorted(after() - before):  # a reason is the same in each run
        if root.op == "placeholder":
            return f"an output would share the storage of the input {root.name}"
        if root.op == "get_attr":
            return f"an output would share the storage of the constant {root.target}"
        shared = next((o for o in others if root in roots(o)), None)
        if shared is not None:
            return f"two outputs would share the storage of {shared.name}"
    return None


def reads_strides(graph: fx.Graph) -> bool:
    """True if some call's result depends on the strides of what it reads."""
    return any(_stride_sensitive(node) for node in graph.nodes if node.op == "call_function")


def _stride_sensitive(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return target is not operator.getitem and bool(node.all_input_nodes) and _takes_tensor(node)
    namespace = target._schema.name.partition("::")[0]
    return namespace not in _KNOWN or ops.has(node, ops.READS_STRIDES)


def reads_format(node: fx.Node) -> bool:
    """True if the memory format of what a call reads chooses how exactly it computes."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if op_name(node) in _NORMS_OF_BATCH:
        return nodes.arguments(node)["training"] is not False
    return ops.has(node, ops.READS_FORMAT)


def chooses_kernel(node: fx.Node) -> fx.Node | None:
    """The call whose kernel a copy may choose, if any: the copy gives what it reads its format.

    What the trace saw does not tell: the strides of inputs may differ from call to call, and all
    that is not settled by a layer on the way follows them.
    """
    source = node.args[0]
    if _keeps_format(node):
        return None
    settled = ops.has(source, ops.CONTIGUOUS)
    if settled and _same_strides(source.meta["val"], node.meta["val"]):  # type: ignore[union-attr]
        return None
    seen, stack = {node}, [node]
    while stack:
        for user in stack.pop().users:
            if user in seen or user.op != "call_function":
                continue
            if reads_format(user) or len(seen) > _REACH_LIMIT:
                return user
            seen.add(user)
            if not ops.has(user, ops.CONTIGUOUS):
                stack.append(user)
    return None


def _keeps_format(node: fx.Node) -> bool:
    """True for a copy that has the strides of what it reads, whatever they are."""
    asked = nodes.arguments(node).get("memory_format")
    if nodes.is_call(node, torch.ops.aten.contiguous) or asked not in (None, torch.preserve_format):
        return False
    source = node.args[0]
    return isinstance(source, fx.Node) and _same_strides(source.meta["val"], node.meta["val"])


def _takes_tensor(node: fx.Node) -> bool:
    return any(nodes.is_tensor(n) for n in node.all_input_nodes)


OUTPUT_STRIDES = "the strides of an output would change"


def unsettled_strides(
    old: fx.Node,
    new: fx.Node,
    also: Mapping[fx.Node, Any] | None = None,
    moved: dict[fx.Node, Any] | None = None,
) -> str | None:
    """Why users of ``old`` cannot read ``new`` if its strides differ, or ``None``.

    ``also`` holds the values of other nodes that are replaced with it. ``moved`` takes up the
    fake values that later calls have from now on, where their strides are others.

    The users are run on fake values with the new strides, onwards until every stride is again
    what it was. An output whose strides would change, a call that reads strides, and a view that
    does not work any more are reasons to decline.
    """
    return unsettled(old, old.meta.get("val"), new.meta.get("val"), also, moved)


def unsettled(
    node: fx.Node,
    before: Any,
    after: Any,
    also: Mapping[fx.Node, Any] | None = None,
    moved: dict[fx.Node, Any] | None = None,
) -> str | None:
    """Why a node's value may not have the strides of ``after``; see :func:`unsettled_strides`."""
    if _same_strides(before, after):
        return None
    shadow: dict[fx.Node, Any] = {**(also or {}), node: after}
    heap = list(node.users)
    heapq.heapify(heap)
    seen = set(heap)
    visited = 0
    while heap:
        user = heapq.heappop(heap)
        visited += 1
        if user.op == "output":
            return OUTPUT_STRIDES
        if visited > _SETTLE_LIMIT:
            return "too many later calls would see other strides"
        if _stride_sensitive(user) or reads_format(user) or constants.is_mutation(user):
            return f"{user.name} depends on the strides that it reads"
        try:
            value = run_fake(user, shadow)
        except Exception as error:  # whatever a view raises is the reason
            return f"{user.name} does not accept other strides ({first_line(error)})"
        if not _same_strides(user.meta.get("val"), value):
            shadow[user] = value
            if moved is not None:
                moved[user] = value
            for following in user.users:
                if following not in seen:
                    seen.add(following)
                    heapq.heappush(heap, following)
    return None


def _same_strides(a: Any, b: Any) -> bool:
    if a is b:
        return True
    left, right = pytree.tree_leaves(a), pytree.tree_leaves(b)
    if len(left) != len(right):
        return False
    for x, y in zip(left, right, strict=True):
        if isinstance(x, torch.Tensor) != isinstance(y, torch.Tensor):
            return False
        if isinstance(x, torch.Tensor):
            if x.layout is not torch.strided or y.layout is not torch.strided:
                if x.layout is not y.layout:
                    return False
            elif not nodes.same(x.shape, y.shape) or not nodes.same(x.stride(), y.stride()):
                return False
        elif not nodes.same(x, y):
            return False
    return True


def run_fake(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """Runs one call on fake values: those of ``values``, else ``meta["val"]``."""
    args, kwargs = fx.map_arg(
        (node.args, node.kwargs), lambda n: values[n] if n in values else n.meta["val"]
    )
    with nodes.fake_execution(nodes.fake_mode(node.graph)):
        return node.target(*args, **kwargs)  # type: ignore[operator]


def may_alias(node: fx.Node) -> bool:
    """True if the result of a call may share storage with one of its inputs."""
    return node.op != "call_function" or _may_pass(node.target)


def leaking(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose storage an output may share: nothing may be substituted under them."""
    out: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        for user in node.users:
            if (
                user.op == "output"
                or constants.is_mutation(user)
                or (user in out and may_alias(user))
            ):
                out.add(node)
                break
    return out
