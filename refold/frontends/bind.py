"""Inputs that are declared constant (``bind=``): they vanish from the model's signature.

What depends on them alone is then a constant like any other, and folds: a network that makes the
weights of another one from a condition is gone once the condition is known.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from refold.errors import UsageError, did_you_mean
from refold.graph import constants
from refold.graph.program import BoundInput, Program

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def install(model: nn.Module, bind: Mapping[str, Any]) -> dict[str, str]:
    """Gives a module of our own a forward without the bound parameters; the values are buffers.

    Returns:
        The input's name by the name of the buffer that holds it.

    Raises:
        UsageError: a name that ``forward`` does not take, or a value that is no input.
    """
    forward = model.forward
    signature = inspect.signature(forward)
    free = free_signature(signature, bind)
    buffers: dict[str, str] = {}
    values = {name: _register(model, name, value, buffers) for name, value in bind.items()}

    def with_bound(*args: Any, **kwargs: Any) -> Any:
        given = dict(free.bind(*args, **kwargs).arguments)
        for name, value in values.items():
            _insert(given, signature, name, value())
        ordered = {name: given[name] for name in signature.parameters if name in given}
        call = inspect.BoundArguments(signature, ordered)  # type: ignore[arg-type]
        return forward(*call.args, **call.kwargs)

    with_bound.__signature__ = free  # type: ignore[attr-defined]
    model.forward = with_bound
    return buffers


def free_signature(signature: inspect.Signature, bind: Iterable[str]) -> inspect.Signature:
    """The signature that is left once some inputs are bound.

    Raises:
        UsageError: a name that the signature does not have.
    """
    kept = dict(signature.parameters)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in kept.values())
    for name in bind:
        first, _, inner = name.partition(".")
        parameter = signature.parameters.get(first)
        if parameter is None or parameter.kind in _VARIADIC:
            if takes_any and not inner:
                continue
            named = [n for n, p in signature.parameters.items() if p.kind not in _VARIADIC]
            raise UsageError(f"bind: the model has no input {first!r}{did_you_mean(first, named)}")
        if not inner:
            kept.pop(first, None)
    return signature.replace(parameters=list(kept.values()))


def _register(
    model: nn.Module, name: str, value: Any, buffers: dict[str, str]
) -> Callable[[], Any]:
    """Keeps the tensors of a value as buffers; returns what reads them back."""
    leaves, spec = pytree.tree_flatten(value)
    kept: list[Any] = []
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, torch.Tensor):
            if not isinstance(leaf, (bool, int, float, str, type(None))):
                raise UsageError(
                    f"bind: {name!r} is a {type(leaf).__name__}: expected a tensor, a number, or "
                    "a list or dict of them"
                )
            kept.append(leaf)
            continue
        label = f"bound_{name}_{i}" if len(leaves) > 1 else f"bound_{name}"
        label = label.replace(".", "_")
        while hasattr(model, label):
            label += "_"
        # A copy: what the caller does to the tensor later must not change the compiled model.
        model.register_buffer(label, leaf.detach().clone())
        buffers[label] = f"{name}[{i}]" if len(leaves) > 1 else name
        kept.append(_BufferName(label))

    def read() -> Any:
        # A copy in the graph too: a forward may write into its inputs, at every call anew.
        return pytree.tree_unflatten(
            [getattr(model, k.name).clone() if isinstance(k, _BufferName) else k for k in kept],
            spec,
        )

    return read


@dataclass(frozen=True)
class _BufferName:
    name: str


def _insert(given: dict[str, Any], signature: inspect.Signature, name: str, value: Any) -> None:
    first, *path = name.split(".")
    if first not in signature.parameters:
        extra = next(p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD)
        given[extra] = {**given.get(extra, {}), first: value}
    elif not path:
        given[first] = value
    else:
        given[first] = _with_leaf(given.get(first, {}), path, value, name)


def _with_leaf(container: Any, path: Sequence[str], value: Any, name: str) -> Any:
    """A copy of nested dicts with one more leaf."""
    if not path:
        return value
    if not isinstance(container, dict):
        raise UsageError(
            f"bind: {name!r} leads through a {type(container).__name__}; only keys of dicts can be "
            f"bound one by one: bind the whole of {name.partition('.')[0]!r}"
        )
    inner = _with_leaf(container.get(path[0], {}), path[1:], value, name)
    return {**container, path[0]: inner}


def replace_inputs(
    gm: fx.GraphModule,
    bind: Mapping[str, Any],
    whole: tuple[tuple[Any, ...], dict[str, Any]] | None,
) -> tuple[dict[str, str], tuple[tuple[Any, ...], dict[str, Any]] | None]:
    """Makes inputs of a graph constant: what :func:`install` does, after the trace.

    Args:
        gm: a graph as ``torch.export`` unlifts it.
        bind: values by name of a whole input.
        whole: inputs with the bound ones among them.

    Returns:
        The inputs' names by buffer, and ``whole`` without the bound ones.

    Raises:
        UsageError: a name that is no input, or a value that is not of its shape and dtype.
    """
    info: Any = gm.graph._codegen.pytree_info  # type: ignore[attr-defined]
    nodes = pytree.tree_unflatten(gm.graph.find_nodes(op="placeholder"), info.in_spec)
    args, kwargs = list(nodes[0]), dict(nodes[1])
    names = list(info.orig_args)
    for name in bind:
        if name not in names:
            raise UsageError(f"bind: the program has no input {name!r}{did_you_mean(name, names)}")
    buffers: dict[str, str] = {}
    for name, value in zip(names, [*args, *kwargs.values()], strict=True):
        if name in bind:
            _replace_leaves(gm, name, value, bind[name], buffers)
    kept = [i for i, name in enumerate(names[: len(args)]) if name not in bind]

    def without(call: tuple[Sequence[Any], Mapping[str, Any]]) -> Any:
        return tuple(call[0][i] for i in kept), {k: v for k, v in call[1].items() if k not in bind}

    spec = pytree.tree_structure(without((args, kwargs)))
    gm.graph._codegen.pytree_info = info._replace(  # type: ignore[attr-defined]
        orig_args=[n for n in names if n not in bind], in_spec=spec
    )
    constants.canonicalise(gm)
    gm.recompile()
    return buffers, None if whole is None else without(whole)


def _replace_leaves(
    gm: fx.GraphModule, name: str, inputs: Any, value: Any, buffers: dict[str, str]
) -> None:
    nodes, spec = pytree.tree_flatten(inputs)
    leaves, given = pytree.tree_flatten(value)
    if given != spec:
        raise UsageError(f"bind: {name!r} is nested as {spec}, the value as {given}")
    before = set(buffers)
    _register(gm, name, value, buffers)
    labels = iter([label for label in buffers if label not in before])
    for leaf, node in zip(leaves, nodes, strict=True):
        fake = node.meta["val"]
        _check_leaf(name, leaf, fake)
        if isinstance(leaf, torch.Tensor):
            with gm.graph.inserting_before(node):
                stored = gm.graph.get_attr(next(labels))
                own = gm.graph.call_function(torch.ops.aten.clone.default, (stored,))
            stored.meta["val"] = own.meta["val"] = fake
            for user in [u for u in node.users if constants.is_mutation(u) and u.args[0] is node]:
                user.replace_all_uses_with(user.args[1])  # nobody holds the input it writes back
                gm.graph.erase_node(user)
            node.replace_all_uses_with(own, propagate_meta=False)
        gm.graph.erase_node(node)


def _check_leaf(name: str, leaf: Any, traced: Any) -> None:
    if not isinstance(leaf, torch.Tensor) or not isinstance(traced, torch.Tensor):
        if type(leaf) is type(traced) and leaf == traced:
            return
        raise UsageError(f"bind: {name!r} was exported as {traced!r}, the value is {leaf!r}")
    wanted = [s if isinstance(s, int) else str(s) for s in traced.shape]
    if list(leaf.shape) == wanted and leaf.dtype == traced.dtype:
        return
    varies = any(isinstance(s, str) for s in wanted)
    raise UsageError(
        f"bind: {name!r} is {traced.dtype} {wanted} in the program, the value is {leaf.dtype} "
        f"{list(leaf.shape)}"
        + (": a size that varies cannot be bound, export it with a fixed one" if varies else "")
    )


def warnings_of(bind: Mapping[str, Any]) -> list[str]:
    """Sentences about values that a user would not want."""
    out = []
    for name, value in bind.items():
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, torch.Tensor) and not bool(leaf.isfinite().all()):
                out.append(f"the bound input {name} has values that are not finite")
                break
    return out


def unread(gm: fx.GraphModule, bound: Mapping[str, str]) -> list[str]:
    """Sentences about bound inputs that the model makes nothing of."""
    needed: set[fx.Node] = set()
    for node in reversed(gm.graph.nodes):
        if node.op == "output" or constants.is_mutation(node) or needed.intersection(node.users):
            needed.add(node)
    read = {str(n.target) for n in needed if n.op == "get_attr"}
    return [
        f"the model does not read the bound input {name}"
        for label, name in bound.items()
        if label not in read
    ]


def records(program: Program) -> tuple[BoundInput, ...]:
    """The tensor inputs that vanished; a graph does not hold those that it does not read."""
    held = dict(program.state) | dict(program.graph_module.named_buffers())
    out = []
    for label, name in program.bound.items():
        value = held[label]
        dtype = str(value.dtype).removeprefix("torch.")
        size = value.numel() * value.element_size()
        out.append(BoundInput(name, tuple(value.shape), dtype, size))
    return tuple(out)


def generator(gm: fx.GraphModule, bound: Iterable[str]) -> dict[str, int]:
    """Bytes of each parameter that serves only to make constants of bound inputs."""
    labels = set(bound)
    constant = constants.constant_nodes(gm.graph)
    inside: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node in constant and (
            any(a in inside for a in node.all_input_nodes)
            or (node.op == "get_attr" and str(node.target) in labels)
        ):
            inside.add(node)
    for node in reversed(gm.graph.nodes):
        if node in constant and node.users and all(u in inside for u in node.users):
            inside.add(node)
    return {
        str(n.target): constants.size_in_bytes(n)
        for n in gm.graph.nodes
        if n in inside and n.op == "get_attr" and str(n.target) not in labels
    }
