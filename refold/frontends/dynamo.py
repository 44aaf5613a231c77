"""Brings a graph of ``torch.compile`` into the IR.

Dynamo hands over torch calls with the parameters as arguments. Traced again on the same fake
tensors before any dispatch, they are the ATen dialect that ``torch.export`` gives, and the passes
are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import fx
from torch._guards import TracingContext
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from refold.errors import Declined, FrontendError, first_line
from refold.frontends import autocast, functionalise, lifted
from refold.frontends.canonical import check_dialect, write_canonical
from refold.frontends.export import trains
from refold.graph import aliasing, constants, nodes, provenance
from refold.graph.program import InputSpec, Program

_MODES = (
    torch._C._set_grad_enabled,
    torch.autograd.grad_mode._enter_inference_mode,
    torch.autograd.grad_mode._exit_inference_mode,
)


class NotFoldable(FrontendError):
    """The graph has to run as it is; the message says why, and what the user can do about it.

    Attributes:
        avoidable: whether the user should hear of it.
    """

    def __init__(self, reason: str, fix: str = "") -> None:
        super().__init__(f"{reason}; fix: {fix}" if fix else reason)
        self.avoidable = bool(fix)


@dataclass(frozen=True)
class Captured:
    """A graph of ``torch.compile`` in pre-dispatch ATen, with its parameters still arguments.

    Attributes:
        graph: takes every argument of dynamo's graph; returns its outputs, then the new values
            of the inputs that it writes.
        parameters: names of the arguments that are constants, by position.
        inputs: positions of the other arguments.
        written: positions of the inputs that are written in place.
        echoed: outputs that are a written input itself: its place among ``written``, by output.
    """

    graph: fx.GraphModule
    parameters: dict[int, str]
    inputs: tuple[int, ...]
    written: tuple[int, ...]
    echoed: dict[int, int]

    @property
    def fakes(self) -> list[Any]:
        """The fake values of ``inputs``."""
        placeholders = self.graph.graph.find_nodes(op="placeholder")
        return [placeholders[i].meta["val"] for i in self.inputs]

    def bind(self, args: Sequence[Any]) -> fx.GraphModule:
        """The functional IR with the parameters of a call as constants.

        Raises:
            NotFoldable: an in-place operation cannot be made functional.
        """
        gm = lifted.bind(self.graph, {i: (n, args[i]) for i, n in self.parameters.items()})
        if not functionalise.make_functional(gm):
            raise NotFoldable("an in-place write cannot be made functional")
        constants.canonicalise(gm)
        write_canonical(gm)
        check_dialect(gm)
        gm.recompile()
        return gm

    def program(self, gm: fx.GraphModule, args: Sequence[Any]) -> Program:
        """A bound graph as a program, with the inputs of a call as its example."""
        example = tuple(_plain(args[i]) for i in self.inputs)
        placeholders = gm.graph.find_nodes(op="placeholder")
        specs = tuple(_spec(n, v) for n, v in zip(placeholders, example, strict=True))
        return Program(
            graph_module=gm,
            args=example,
            kwargs={},
            example=(example, {}),
            inputs=specs,
            specialised=(),
            notes=(),
            ranges={},
            names={},
            node_count=sum(n.op == "call_function" for n in gm.graph.nodes),
        )

    def restore(self, gm: fx.GraphModule) -> None:
        """Gives a folded graph the outputs, their strides and the in-place writes of dynamo's."""
        count = len(self.written)
        output = gm.graph.output_node()
        made = lifted.output_values(gm)
        leaves = list(cast(Any, output.args[0]))
        wanted = self.graph.graph.output_node().args[0]
        with gm.graph.inserting_before(output):
            for i, node in enumerate(cast(Any, wanted)[: len(leaves) - count]):
                if isinstance(node, fx.Node) and i not in self.echoed:
                    leaves[i] = _restride(gm.graph, leaves[i], made[i], node.meta["val"])
            placeholders = gm.graph.find_nodes(op="placeholder")
            writes = []
            for position, value in zip(self.written, leaves[len(leaves) - count :], strict=True):
                target = placeholders[self.inputs.index(position)]
                write = gm.graph.call_function(torch.ops.aten.copy_.default, (target, value))
                write.meta["val"] = target.meta["val"]
                writes.append(write)
        leaves = leaves[: len(leaves) - count]
        for i, which in self.echoed.items():
            leaves[i] = writes[which]
        output.args = (tuple(leaves),)
        gm.recompile()


def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Captured:
    """Traces dynamo's graph; to be called by the backend, while dynamo compiles.

    Raises:
        NotFoldable: the graph has to run as it is.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    fakes = [n.meta.get("example_value") for n in placeholders]
    _check(gm, fakes, example_inputs)
    graph = _trace(gm, fakes, ())
    written = _written(graph)
    echoed: dict[int, int] = {}
    if written:
        graph = _trace(gm, fakes, written)
        echoed = _echoed(graph, len(written))
    stored = {_storage(example_inputs[i]) for i in written}
    parameters = {
        i: name
        for i, name in lifted.parameters(gm, example_inputs).items()
        if _storage(example_inputs[i]) not in stored
    }
    if not parameters:
        raise NotFoldable("it has no parameters")
    inputs = tuple(i for i in range(len(fakes)) if i not in parameters)
    return Captured(graph, parameters, inputs, written, echoed)


def hold(gm: fx.GraphModule, captured: Captured, example_inputs: Sequence[Any]) -> None:
    """Makes the parameters constants of dynamo's graph; to be called by the backend, at its end.

    Dynamo writes the code that collects the arguments of a call after its backend has returned, for
    the placeholders that it finds then: calls do not pass these parameters any more. What dynamo
    guards instead is that they are the same tensors; others make it compile again. The models that
    they belong to are guarded too, in a way that filters of module guards leave alone: two models
    of one class share their code, and so their compiled graphs.

    Outside of a compilation, or where a parameter has no known origin, calls go on passing them.
    """
    from torch._dynamo.guards import GuardBuilder  # loads all of dynamo

    context = TracingContext.try_get()
    placeholders = gm.graph.find_nodes(op="placeholder")
    arguments = [placeholders[i].meta.get("grapharg") for i in captured.parameters]
    sources = [getattr(argument, "source", None) for argument in arguments]
    if context is None or None in sources:
        return
    guards = context.guards_context.dynamo_guards
    for source in dict.fromkeys([*map(_owner, sources), *sources]):
        guards.add(source.make_guard(GuardBuilder.ID_MATCH), collect_debug_stack=False)
    lifted.bind_here(gm, {i: (n, example_inputs[i]) for i, n in captured.parameters.items()})


def _owner(source: Any) -> Any:
    """Where the outermost module comes from that a parameter belongs to."""
    from torch._dynamo.source import NNModuleSource

    owner = at = source
    while hasattr(at, "base"):
        owner = at.base if isinstance(at, NNModuleSource) else owner
        at = at.base
    return owner


def _check(gm: fx.GraphModule, fakes: list[Any], example_inputs: Sequence[Any]) -> None:
    for fake, value in zip(fakes, example_inputs, strict=True):
        if isinstance(value, torch.Tensor) != isinstance(fake, torch.Tensor):
            raise NotFoldable("an input has no fake value")
        if isinstance(fake, torch.Tensor):
            if type(fake) is not torch._subclasses.FakeTensor or isinstance(
                value, torch._subclasses.FakeTensor
            ):
                raise NotFoldable(f"an input is a {type(value).__name__}")
        elif not isinstance(fake, (int, float, torch.SymInt, torch.SymFloat)):
            raise NotFoldable(f"an input is a {type(fake).__name__}")
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        leaves = [v for v in pytree.tree_leaves(value) if isinstance(v, torch.Tensor)]
        if any(free_unbacked_symbols(v) for v in leaves):
            raise NotFoldable(f"the size of {node.name} depends on data")
        computed = torch.is_grad_enabled() and node.op != "placeholder"
        if computed and any(v.requires_grad for v in leaves):
            raise NotFoldable(
                f"gradients are required{_at(node)}",
                "call the model under torch.no_grad() or torch.inference_mode()",
            )


def _trace(gm: fx.GraphModule, fakes: list[Any], cloned: tuple[int, ...]) -> fx.GraphModule:
    """Traces ``gm``; the inputs at ``cloned`` are copied first, and the copies returned last."""

    def run(*args: Any) -> Any:
        inputs = list(args)
        for i in cloned:
            inputs[i] = inputs[i].clone()
        return (*fx.Interpreter(gm).run(*inputs), *(inputs[i] for i in cloned))

    mode = next((f.fake_mode for f in fakes if hasattr(f, "fake_mode")), None)
    if mode is None:
        raise NotFoldable("it has no tensors")
    try:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.fx.traceback.preserve_node_meta(),
            patch.object(mode, "allow_non_fake_inputs", True),
            mode,  # what the graph makes itself is fake too
        ):
            traced: fx.GraphModule = make_fx(run, pre_dispatch=True)(*fakes)
        autocast.make_explicit(traced)
    except Declined as reason:
        raise NotFoldable(str(reason)) from None
    except Exception as error:
        # Whatever a second trace cannot take, the first trace can still run.
        first = first_line(error)[:160]
        raise NotFoldable(f"it cannot be traced again ({type(error).__name__}: {first})") from error
    for node in reversed(list(traced.graph.nodes)):
        if node.op == "call_function" and node.target in _MODES:
            traced.graph.erase_node(node)
        elif trains(node):
            raise NotFoldable(
                f"{node.name} is in training mode{_at(node)}",
                "call model.eval() before the first call",
            )
        elif node.op == "get_attr" and "val" not in node.meta:
            value = getattr(traced, str(node.target))
            if isinstance(value, torch.Tensor):
                node.meta["val"] = mode.from_tensor(value, static_shapes=True)
    for node in traced.graph.nodes:
        _clean_path(node)
    return traced


def _clean_path(node: fx.Node) -> None:
    """Module paths from the root module, whatever the caller named its variable."""
    stack = node.meta.get("nn_module_stack")
    if stack:
        node.meta["nn_module_stack"] = {
            key: (lifted.module_path(str(path)), kind) for key, (path, kind) in stack.items()
        }


def _at(node: fx.Node) -> str:
    line = provenance.source_line(node)
    return f" at {line}" if line else ""


def _storage(value: Any) -> int:
    return int(value.untyped_storage()._cdata)


def _written(gm: fx.GraphModule) -> tuple[int, ...]:
    """Positions of the inputs that the graph writes."""
    mutated = aliasing.mutated(gm.graph)
    placeholders = gm.graph.find_nodes(op="placeholder")
    written = tuple(i for i, n in enumerate(placeholders) if n in mutated)
    stored = [_storage(n.meta["val"]) for n in placeholders if nodes.is_tensor(n)]
    for i in written:
        if stored.count(_storage(placeholders[i].meta["val"])) > 1:
            raise NotFoldable("it writes an input that shares its storage with another one")
    return written


def _echoed(gm: fx.GraphModule, count: int) -> dict[int, int]:
    """Finds outputs that are a written input itself, and takes them out of the graph."""
    output = gm.graph.output_node()
    leaves = list(cast(Any, output.args[0]))
    ordinary, new = leaves[: len(leaves) - count], leaves[len(leaves) - count :]
    owners = {_storage(n.meta["val"]): k for k, n in enumerate(new)}
    found: dict[int, int] = {}
    for i, leaf in enumerate(ordinary):
        if not nodes.is_tensor(leaf) or _storage(leaf.meta["val"]) not in owners:
            continue
        which = owners[_storage(leaf.meta["val"])]
        one, other = leaf.meta["val"], new[which].meta["val"]
        if not (
            nodes.same(one.shape, other.shape)
            and nodes.same(one.stride(), other.stride())
            and nodes.same(one.storage_offset(), other.storage_offset())
        ):
            raise NotFoldable("it returns a view of an input that it writes")
        found[i] = which
        leaves[i] = None
    output.args = (tuple(leaves),)
    return found


def _restride(graph: fx.Graph, node: Any, made: torch.Tensor, wanted: torch.Tensor) -> Any:
    """The output in the layout that dynamo saw: the code after the graph may depend on it."""
    if not isinstance(wanted, torch.Tensor) or nodes.same(made.stride(), wanted.stride()):
        return node
    for layout in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d):
        if layout is not torch.contiguous_format and wanted.dim() != _RANKS[layout]:
            continue
        with nodes.fake_execution(cast(Any, wanted).fake_mode):
            copy = torch.ops.aten.clone.default(made, memory_format=layout)
        if nodes.same(copy.stride(), wanted.stride()):
            new = graph.call_function(
                torch.ops.aten.clone.default, (node,), {"memory_format": layout}
            )
            new.meta["val"] = copy
            return new
    raise NotFoldable("the strides of an output would change")


_RANKS = {torch.channels_last: 4, torch.channels_last_3d: 5}


def _plain(value: Any) -> Any:
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value.node.hint
    return value


def _spec(node: fx.Node, value: Any) -> InputSpec:
    if not isinstance(value, torch.Tensor):
        return InputSpec(node.name, (), None, None, value)
    return InputSpec(node.name, tuple(value.shape), value.dtype, None, None, value.device)
