"""Makes the casts of autocast explicit.

A pre-dispatch trace records ``autocast`` as calls that switch it, and no casts; where the region is
inside of the graph, its fake values do not know of it either. What each operator
casts is found by observation: it runs on fake tensors with autocast and without, and what is
dispatched is compared. No list of operators is needed, and one that casts inside is noticed.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from refold.errors import Declined
from refold.graph import nodes
from refold.graph.nodes import aten

_ENTER = torch.amp.autocast_mode._enter_autocast
_EXIT = torch.amp.autocast_mode._exit_autocast

Step = tuple[Any, tuple[torch.dtype, ...]]


def make_explicit(gm: fx.GraphModule) -> int:
    """Replaces switches of autocast by casts; ambient autocast counts as switched on.

    Returns:
        How many casts were added.

    Raises:
        Declined: an operator casts values inside; the message names it.
    """
    active: dict[fx.Node, tuple[Any, ...]] = {}
    stale: set[fx.Node] = set()
    added = 0
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is _ENTER:
            active[node] = node.args
            continue
        if node.target is _EXIT:
            active.pop(node.args[0])
            gm.graph.erase_node(node)
            continue
        count = 0
        if active or torch._C._is_any_autocast_enabled():
            count = _cast(gm.graph, node, list(active.values()))
        if count or not stale.isdisjoint(node.all_input_nodes):
            stale.add(node)
            with torch._C._DisableAutocast():
                node.meta["val"] = nodes.fake_result(node)
        added += count
    for node in reversed(list(gm.graph.nodes)):
        if node.op == "call_function" and node.target is _ENTER:
            gm.graph.erase_node(node)
    return added


def _cast(graph: fx.Graph, node: fx.Node, regions: list[tuple[Any, ...]]) -> int:
    """Adds the casts of one operator's arguments."""
    inputs = [n for n in node.all_input_nodes if nodes.is_tensor(n)]
    results = pytree.tree_leaves(node.meta.get("val"))
    if not any(n.meta["val"].is_floating_point() for n in inputs) or not any(
        isinstance(r, torch.Tensor) for r in results
    ):
        return 0
    if not isinstance(node.target, torch._ops.OpOverload):
        raise Declined(f"{node.name} is called under autocast")
    with_casts, dtypes = _observe(node, regions, {})
    without, _ = _observe(node, None, dtypes)
    if with_casts != without:
        raise Declined(f"{node.name} casts inside under autocast")
    made: dict[fx.Node, fx.Node] = {}
    for source, dtype in dtypes.items():
        with graph.inserting_before(node):
            cast = graph.call_function(aten._to_copy.default, (source,), {"dtype": dtype})
        cast.meta = {k: v for k, v in node.meta.items() if k != "val"}
        with torch._C._DisableAutocast():
            cast.meta["val"] = nodes.fake_result(cast)
        made[source] = cast
    node.args = fx.map_arg(node.args, lambda n: made.get(n, n))
    node.kwargs = fx.map_arg(node.kwargs, lambda n: made.get(n, n))
    return len(made)


def _observe(
    node: fx.Node, regions: list[tuple[Any, ...]] | None, cast: dict[fx.Node, torch.dtype]
) -> tuple[list[Step], dict[fx.Node, torch.dtype]]:
    """Runs a call on new fake values.

    Args:
        node: the call.
        regions: autocast's arguments, outermost first; ``None`` for no autocast at all.
        cast: dtypes to give to some arguments.

    Returns:
        What was dispatched after the leading casts, and what those cast to, by argument.
    """
    mode = nodes.fake_mode(node.graph)
    with ExitStack() as stack:
        stack.enter_context(nodes.fake_execution(mode))
        made: dict[fx.Node, Any] = {}
        for source in node.all_input_nodes:
            value = source.meta["val"]
            made[source] = value
            if isinstance(value, torch.Tensor):
                made[source] = torch.empty_strided(
                    value.shape,
                    value.stride(),
                    dtype=cast.get(source, value.dtype),
                    device=value.device,
                )
        args, kwargs = fx.map_arg((node.args, node.kwargs), made.__getitem__)
        if regions is None:
            stack.enter_context(torch._C._DisableAutocast())
        for device, dtype, enabled, *_ in regions or ():
            stack.enter_context(torch.autocast(device, dtype, enabled, cache_enabled=False))
        recorder = stack.enter_context(_Recorder())
        node.target(*args, **kwargs)  # type: ignore[operator]
    owner = {id(v): n for n, v in made.items()}
    steps, dtypes = list(recorder.steps), dict[fx.Node, torch.dtype]()
    while regions is not None and steps and steps[0][0] is aten._to_copy.default:
        if recorder.sources[0] not in owner:
            break
        dtypes[owner[recorder.sources.pop(0)]] = recorder.results.pop(0)
        steps.pop(0)
    return steps, dtypes


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.sources: list[int] = []  # of the casts, by identity
        self.results: list[torch.dtype] = []
        self._kept: list[Any] = []  # an identity must not be used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # a query, such as a tensor's device
            return result
        leaves = pytree.tree_leaves((args, kwargs, result))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self.steps.append((func, tuple(t.dtype for t in tensors)))
        if func is aten._to_copy.default:
            self.sources.append(id(args[0]))
            self.results.append(result.dtype)
        self._kept.append(tensors)
        return result
