"""Reading and making FX nodes: arguments by name, shapes, hints, users, new calls with metadata."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from refold.graph import provenance

aten = torch.ops.aten
Size = int | torch.SymInt


def is_call(node: object, *targets: Any) -> bool:
    """True if ``node`` calls one of ``targets`` (overload packets match every overload)."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    target = node.target
    return target in targets or getattr(target, "overloadpacket", targets) in targets


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of an operator call by schema name, defaults filled in."""
    args, kwargs = node.args, node.kwargs
    bound: dict[str, Any] = {}
    for index, (name, kwarg_only, default) in enumerate(_parameters(node.target)):
        if kwarg_only or index >= len(args):
            bound[name] = kwargs.get(name, default)
        else:
            bound[name] = args[index]
    return bound


@functools.cache
def _parameters(target: Any) -> tuple[tuple[str, bool, Any], ...]:
    """Name, whether by keyword alone, and default of each; a schema makes them anew every time."""
    return tuple((a.name, a.kwarg_only, a.default_value) for a in target._schema.arguments)


def value(node: fx.Node) -> Any:
    """The fake value of a node (``meta["val"]``)."""
    return node.meta.get("val")


def is_tensor(node: object) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def shape(node: fx.Node) -> tuple[Size, ...]:
    return tuple(node.meta["val"].shape)


def dtype(node: fx.Node) -> torch.dtype:
    return node.meta["val"].dtype


def hint(size: Size) -> int:
    """The size that the trace saw: for costs and for running layouts, never for proofs."""
    if isinstance(size, torch.SymInt):
        known = size.node.hint
        return int(known) if known is not None else 8
    return int(size)


def hints(node: fx.Node) -> tuple[int, ...]:
    return tuple(hint(s) for s in shape(node))


def same(a: Any, b: Any) -> bool:
    """True if two sizes (or size sequences) are provably equal."""
    if isinstance(a, Sequence) or isinstance(b, Sequence):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    symbolic = isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt)
    if symbolic and a.node.expr == b.node.expr:
        return True
    return bool(statically_known_true(a == b))


def known(condition: bool | torch.SymBool) -> bool:
    """True if a condition on sizes is provably true for every size the trace allows."""
    return bool(statically_known_true(condition))


def is_empty(node: fx.Node) -> bool:
    """True if a tensor has no elements, whatever the sizes that are not known."""
    for size in node.meta["val"].shape:  # noqa: SIM110  (no generator: every reader asks this)
        if type(size) is int and size == 0:
            return True
    return False


def is_contiguous(node: fx.Node) -> bool:
    """True if the trace proved a tensor to be contiguous."""
    value = node.meta["val"]
    strides: list[Any] = [1]
    for size in reversed(value.shape[1:]):
        strides.insert(0, strides[0] * size)
    return same(value.stride(), strides[: value.ndim])


def only_user(node: fx.Node, user: fx.Node) -> bool:
    """True if ``user`` is the one node that reads ``node`` (however many times)."""
    return len(node.users) == 1 and user in node.users


def fake_mode(graph: fx.Graph) -> Any:
    for node in graph.nodes:
        v = node.meta.get("val")
        if isinstance(v, torch.Tensor) and hasattr(v, "fake_mode"):
            return v.fake_mode
    return None


def call(
    graph: fx.Graph,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    rule: str,
    sources: Iterable[fx.Node],
    like: fx.Node | None = None,
) -> fx.Node:
    """Appends a call at the graph's insertion point, with its fake value and its provenance.

    Args:
        graph: the graph, positioned with ``graph.inserting_before(...)``.
        target: an ATen overload.
        args: positional arguments; nodes must carry ``meta["val"]``.
        kwargs: keyword arguments.
        rule: the id of the rule that makes the node.
        sources: the nodes that the new node stands for, the most telling one last.
        like: a node whose fake value the new one has (shape, dtype, strides), where that is known.
    """
    node = graph.call_function(target, args, kwargs or {})
    provenance.derive(node, list(sources), rule)
    node.meta["val"] = fake_result(node) if like is None else like.meta["val"]
    return node


def fake_result(node: fx.Node) -> Any:
    """Runs a call on the fake values of its arguments."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    tensors = [
        a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if hasattr(a, "fake_mode")
    ]
    mode = tensors[0].fake_mode if tensors else fake_mode(node.graph)
    with fake_execution(mode):
        return node.target(*args, **kwargs)  # type: ignore[operator]


def fake_like(graph: fx.Graph, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A fake of a tensor, in the graph's own mode, without dispatching an operator."""
    mode = fake_mode(graph)
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return meta if mode is None else FakeTensor(mode, meta, device)


@contextmanager
def fake_execution(mode: Any) -> Iterator[None]:
    """Runs operators on fake tensors without letting them decide anything about sizes.

    Some operators' shape functions ask about symbolic sizes; outside of a trace the answer would
    be recorded as a guard and would specialise the graph's inputs. Composite operators are taken
    apart in Python: in torch 2.11 some of those in C++ take no symbolic sizes.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(enable_python_dispatcher())
        if mode is not None:
            stack.enter_context(mode)
            if mode.shape_env is not None:
                stack.enter_context(mode.shape_env.suppress_guards())
        yield


def replace(old: fx.Node, new: fx.Node) -> None:
    """Lets every user of ``old`` read ``new``; ``old`` stays until dead code is removed."""
    old.replace_all_uses_with(new, propagate_meta=False)


def is_output(node: fx.Node) -> bool:
    return any(u.op == "output" for u in node.users)


def pinned(node: fx.Node) -> bool:
    """True for nodes of module paths that the user excluded: no pass removes or rewrites them."""
    return bool(node.meta.get("refold_pinned"))


def symbolic_dims(node: fx.Node) -> list[int]:
    """The dimensions of an input that the trace left free."""
    value: Any = node.meta["val"]
    return [i for i, size in enumerate(value.shape) if isinstance(size, torch.SymInt)]


def but_for(node: fx.Node, data: Mapping[fx.Node, object]) -> Any:
    """A call but for its data, which has names: equal ones compute alike, of the same constants."""

    def frozen(value: Any) -> Any:
        if isinstance(value, fx.Node):
            if value in data:
                return data[value]
            return value.target if value.op == "get_attr" else value
        if isinstance(value, (list, tuple)):
            return tuple(map(frozen, value))
        return type(value), value

    kwargs = tuple((name, frozen(value)) for name, value in sorted(node.kwargs.items()))
    return node.target, frozen(node.args), kwargs
