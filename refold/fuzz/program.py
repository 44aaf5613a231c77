"""A drawn network as the graph that tracing would leave, made without tracing."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from refold.frontends.canonical import check_dialect, write_canonical
from refold.frontends.functionalise import settle_squeezes
from refold.fuzz.network import DrawnNetwork, Held, Value, leaves, mapped
from refold.graph import constants
from refold.graph.program import InputSpec, Program


class Unsuited(Exception):
    """The network is none of those that can be written as a graph at once."""


def program_of(network: DrawnNetwork, *, dynamic: bool) -> Program:
    """The network as the graph that tracing would leave, made without tracing.

    Args:
        network: calls that write nothing.
        dynamic: whether the batch, and the sizes that the network says, are symbols.

    Raises:
        Unsuited: a call fixes a size that was to vary, or it writes.
    """
    if not network.pure:
        raise Unsuited("it writes, or chooses")
    shapes = ShapeEnv()
    fake = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=False)
    inputs, held = network.example(), network.weights()
    root = nn.Module()
    graph = fx.Graph()
    nodes: list[Any] = []
    for at, value in enumerate(inputs):
        node = graph.placeholder(f"x{at}")
        node.meta["val"] = fake.from_tensor(
            value, symbolic_context=_symbols(network, at, value, dynamic)
        )
        nodes.append(node)
    reading: dict[str, fx.Node] = {}
    for name, value in held.items():
        if network.held[name].buffer or not value.is_floating_point():
            root.register_buffer(name, value)
        else:
            root.register_parameter(name, nn.Parameter(value, requires_grad=False))
        with graph.inserting_before(nodes[0]):
            reading[name] = graph.get_attr(name)
        reading[name].meta["val"] = fake.from_tensor(value, static_shapes=True)

    def node_of(leaf: Any) -> Any:
        if isinstance(leaf, Value):
            return nodes[leaf.index]
        return reading[leaf.name] if isinstance(leaf, Held) else leaf

    with fake, torch.no_grad(), enable_python_dispatcher():  # as a trace runs them
        for step in network.steps:
            args, kwargs = mapped(step.args, node_of), mapped(dict(step.kwargs), node_of)
            node = graph.call_function(step.target, args, kwargs)
            value = node.meta["val"] = _faked(step.target, args, kwargs)
            if isinstance(value, int):  # a size that does not vary: a trace has the number
                graph.erase_node(node)
                nodes.append(value)
            else:
                nodes.append(node)
    if shapes.guards:
        raise Unsuited("a call fixes a size")
    outputs = leaves(network.outputs)
    graph.output(tuple(node_of(v) for v in outputs))
    gm = fx.GraphModule(root, graph)
    constants.own_written(gm)
    write_canonical(gm)
    ranges: dict[str, tuple[int, int | None]] = {str(s): (2, None) for s in shapes.var_to_range}
    settle_squeezes(gm, dict.fromkeys(ranges, 1))
    check_dialect(gm)
    return Program(
        graph_module=gm,
        args=tuple(inputs),
        kwargs={},
        example=(tuple(inputs), {}),
        inputs=tuple(_spec(n) for n in graph.find_nodes(op="placeholder")),
        specialised=(),
        notes=(),
        ranges=ranges,
        names={},
        node_count=sum(n.op == "call_function" for n in gm.graph.nodes),
        state=held,
    )


def _symbols(
    network: DrawnNetwork, at: int, value: torch.Tensor, dynamic: bool
) -> StatelessSymbolicContext:
    kinds = [DimDynamic.STATIC] * value.dim()
    if dynamic and network.batched[at] and value.dim():
        kinds[0] = DimDynamic.DYNAMIC
    for axis in network.sizes if dynamic and at == 0 else ():
        kinds[axis] = DimDynamic.DYNAMIC
    return StatelessSymbolicContext(dynamic_sizes=kinds)


def _faked(target: Any, args: Any, kwargs: Any) -> Any:
    def value(leaf: Any) -> Any:
        return leaf.meta["val"] if isinstance(leaf, fx.Node) else leaf

    try:
        return target(*mapped(args, value), **mapped(kwargs, value))
    except Exception as error:  # whatever its shape function raises: tracing fails on it too
        raise Unsuited(f"{target}: {type(error).__name__}") from error


def _spec(node: fx.Node) -> InputSpec:
    value = node.meta["val"]
    sizes = tuple(int(s) if isinstance(s, int) else str(s) for s in value.shape)
    batch = 0 if sizes and isinstance(sizes[0], str) else None
    return InputSpec(node.name, sizes, value.dtype, batch, None, value.device)
