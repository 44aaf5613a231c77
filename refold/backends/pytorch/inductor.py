"""Target ``inductor``: the folded graph compiled by Inductor, in this process.

The folded graph owns its constants, so Inductor may freeze them: it packs weights for its kernels
and evaluates what depends on them alone.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx import _pytree as fx_pytree
from torch.utils import _pytree as pytree

from refold.backends.base import Artifact, Capabilities, Runner, Target, places
from refold.backends.pytorch.eager import constant_bytes
from refold.backends.pytorch.own_outputs import OwnOutputs
from refold.errors import BackendError, UsageError, did_you_mean, first_line
from refold.graph import constants, nodes
from refold.graph.ops import census
from refold.native.lower import lower
from refold.rewrite import cost

if TYPE_CHECKING:
    from collections.abc import Iterator

    from refold.graph.program import Program

log = logging.getLogger(__name__)

Flat = Callable[..., Any]


@dataclass(frozen=True)
class InductorOptions:
    """Options of the ``inductor`` target.

    Attributes:
        mode: of ``torch.compile``: ``default``, ``reduce-overhead``, ``max-autotune``, ...
    """

    mode: str = "default"

    def __post_init__(self) -> None:
        mode_settings(self.mode)


@dataclass(frozen=True)
class _InductorContent:
    graph_module: fx.GraphModule
    settings: dict[str, Any]


class InductorTarget(Target):
    """Compiles the folded graph with Inductor; there is no file of it, see ``aoti``."""

    name = "inductor"
    suffix = ""
    options = InductorOptions
    capabilities = Capabilities(
        costs=cost.on_cpu("inductor"),
    )

    def available(self) -> str | None:
        return missing_compiler()

    def lower(self, program: Program, gm: fx.GraphModule, options: InductorOptions) -> Artifact:
        notes = lower(gm, exact=True)
        return Artifact(_InductorContent(gm, mode_settings(options.mode)), notes)

    def load(self, artifact: Artifact, options: InductorOptions) -> Runner:
        from torch._inductor.exc import InductorError

        gm, settings = artifact.content.graph_module, artifact.content.settings
        info = gm.graph._codegen.pytree_info
        flat, rebuild = _flat_graph(gm)
        sizes = _name_sizes(flat)
        fakes = [n.meta["val"] for n in flat.graph.find_nodes(op="placeholder")]
        try:
            with torch.no_grad():
                compiled, guards = compile_outside(
                    flat, fakes, lambda g, f: compile_graph(g, f, settings)
                )
        except InductorError as error:
            first = first_line(error)[:300]
            raise BackendError(
                f"Inductor cannot compile the graph: {first}{places(gm.graph, str(error))}"
            ) from error
        conform, own = Layouts.of(gm), OwnOutputs(gm)

        def run(*args: Any, **kwargs: Any) -> Any:
            leaves = fx_pytree.tree_flatten_spec((args, kwargs), info.in_spec)
            named = [leaves[i].shape[axis] for i, axis in sizes]
            chosen = compiled if guards.hold([*leaves, *named]) else flat
            results = conform.call(lambda *inputs: own(chosen(*inputs, *named), inputs), leaves)
            return pytree.tree_unflatten(rebuild(results), info.out_spec)

        return run

    def save(self, artifact: Artifact, folder: Path, name: str) -> None:
        raise BackendError(
            "target 'inductor' compiles into this process and writes no file: "
            "use target='aoti' for a package, or target='torch' for an exported program"
        )

    def stats(self, artifact: Artifact) -> dict[str, int]:
        gm = artifact.content.graph_module
        return {"nodes": sum(census(gm.graph).values()), "bytes": constant_bytes(gm)}


def missing_compiler() -> str | None:
    """Why Inductor cannot build kernels here, or ``None``."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return "Inductor finds no C++ compiler: install g++ or clang, or name one in CXX"
    return None


def mode_settings(mode: str | None) -> dict[str, Any]:
    """Inductor's settings behind a mode of ``torch.compile``.

    Raises:
        UsageError: there is no such mode.
    """
    import torch._inductor

    modes: dict[str, dict[str, Any]] = torch._inductor.list_mode_options()
    if mode is not None and mode not in modes:
        raise UsageError(f"unknown mode {mode!r}{did_you_mean(mode, modes)}")
    return dict(modes[mode]) if mode else {}


def compile_graph(
    gm: fx.GraphModule, fakes: Sequence[Any], settings: dict[str, Any], *, freeze: bool = True
) -> Flat:
    """Compiles a flat graph on fake inputs, in the context of the compilation that made them.

    Args:
        gm: flat inputs, a tuple of outputs, constants as ``get_attr``; it is not changed.
        fakes: one fake value for each placeholder.
        settings: Inductor's configuration, by name.
        freeze: nobody but this graph writes its constants, so that they may be packed.
    """
    from torch._inductor.exc import InductorError

    if not freeze or not may_freeze(gm):
        return _compile(gm, fakes, settings)
    try:
        return _compile(gm, fakes, {**settings, "freezing": True})
    except InductorError as error:
        # With constants in line Inductor takes other paths, and a few of them fail.
        log.info("compiling without freezing: %s", first_line(error))
        return _compile(gm, fakes, settings)


def may_freeze(gm: fx.GraphModule) -> bool:
    """Whether Inductor freezes such constants: it packs float64 for a kernel that has none."""
    return not any(t.dtype == torch.float64 for t in [*gm.parameters(), *gm.buffers()])


def _compile(gm: fx.GraphModule, fakes: Sequence[Any], settings: dict[str, Any]) -> Flat:
    from torch._inductor.compile_fx import compile_fx

    owned = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    owned.meta.update(gm.meta)
    compiled: Any = compile_fx(owned, list(fakes), config_patches=settings or None)
    return compiled  # a callable, unless Inductor is asked for files


def compile_outside(
    gm: fx.GraphModule, fakes: Sequence[Any], compiler: Callable[..., Flat]
) -> tuple[Flat, SizeGuards]:
    """Compiles outside of the compilation that made the fakes.

    Returns:
        The compiled graph, and what it took for granted about the sizes of its inputs.
    """
    mode = nodes.fake_mode(gm.graph)
    env = getattr(mode, "shape_env", None)
    with _open(env) as made:
        context = torch._guards.tracing(torch._guards.TracingContext(mode))
        with context if mode is not None else nullcontext():
            compiled = compiler(gm, list(fakes))
        return compiled, SizeGuards.of(fakes, made())


@contextmanager
def _open(env: Any) -> Iterator[Callable[[], list[Any]]]:
    """Lets a shape environment record guards again, and gives those that are new."""
    if env is None:
        yield list
        return
    count, frozen = len(env.guards), env.frozen
    env.frozen = False
    try:
        yield lambda: [g.expr for g in env.guards[count:]]
    finally:
        env.frozen = frozen


@dataclass(frozen=True)
class SizeGuards:
    """Conditions on the sizes of the inputs, compiled to one Python expression."""

    sources: dict[str, tuple[int, int | None]]
    code: CodeType | None

    @classmethod
    def of(cls, fakes: Sequence[Any], conditions: Sequence[Any]) -> SizeGuards:
        from torch.utils._sympy.printers import PythonPrinter

        if not conditions:
            return cls({}, None)
        symbols = {str(s) for c in conditions for s in c.free_symbols}
        sources: dict[str, tuple[int, int | None]] = {}
        for i, fake in enumerate(fakes):
            sizes = (
                list(enumerate(fake.shape)) if isinstance(fake, torch.Tensor) else [(None, fake)]
            )
            for axis, size in sizes:
                name = str(size.node.expr) if isinstance(size, torch.SymInt) else ""
                if name in symbols:
                    sources.setdefault(name, (i, axis))
        printer = PythonPrinter()
        text = " and ".join(f"({printer.doprint(c)})" for c in conditions)
        # A condition on something that no input tells cannot be checked: it never holds.
        return cls(sources, compile(text if symbols <= set(sources) else "False", "guards", "eval"))

    def hold(self, inputs: Sequence[Any]) -> bool:
        """Whether the inputs of a call are as they were taken to be."""
        if self.code is None:
            return True
        scope = {
            name: inputs[i] if axis is None else inputs[i].shape[axis]
            for name, (i, axis) in self.sources.items()
        }
        return bool(eval(self.code, {"math": math, "__builtins__": {}, **_FUNCTIONS}, scope))


_FUNCTIONS = {"max": max, "min": min, "abs": abs, "int": int, "float": float, "round": round}


@dataclass(frozen=True)
class Layouts:
    """The order of the dimensions in memory that a compiled graph takes of each input."""

    orders: tuple[tuple[int, ...] | None, ...]
    written: frozenset[int]

    @classmethod
    def of(cls, gm: fx.GraphModule) -> Layouts:
        written = constants.written(gm.graph)
        placeholders = gm.graph.find_nodes(op="placeholder")
        return cls(
            tuple(_order(n) for n in placeholders),
            frozenset(i for i, n in enumerate(placeholders) if n in written),
        )

    def call(self, function: Flat, leaves: Sequence[Any]) -> Any:
        """Calls with inputs laid out as they were traced; copies are written back."""
        inputs = [
            leaf if order is None else _laid_out(leaf, order)
            for leaf, order in zip(leaves, self.orders, strict=True)
        ]
        results = function(*inputs)
        for i in self.written:
            if inputs[i] is not leaves[i]:
                leaves[i].copy_(inputs[i])
        return results


def _order(node: fx.Node) -> tuple[int, ...] | None:
    if not nodes.is_tensor(node):
        return None
    value = node.meta["val"]
    strides = [nodes.hint(s) for s in value.stride()]
    return tuple(sorted(range(value.dim()), key=lambda d: -strides[d]))


def _laid_out(leaf: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    if order == tuple(range(len(order))):
        return leaf.contiguous()
    permuted = leaf.permute(order)
    if permuted.is_contiguous():
        return leaf
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return permuted.contiguous().permute(inverse)


def _flat_graph(gm: fx.GraphModule) -> tuple[fx.GraphModule, Callable[..., list[Any]]]:
    """The graph over its flattened inputs, sharing its tensors, and what completes its results.

    Freezing takes every output for a computed value: Python constants are put back afterwards.
    """
    graph = fx.Graph()
    returned = graph.graph_copy(gm.graph, {})
    leaves = list(returned) if isinstance(returned, (list, tuple)) else [returned]
    graph.output(tuple(leaf for leaf in leaves if isinstance(leaf, fx.Node)))

    def rebuild(results: Sequence[Any]) -> list[Any]:
        computed = iter(results)
        return [next(computed) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]

    return fx.GraphModule(gm, graph), rebuild


def _name_sizes(flat: fx.GraphModule) -> list[tuple[int, int]]:
    """Gives every symbolic size an input of its own, as dynamo does; returns where each is found.

    A pass of AOTAutograd looks sizes that floats depend on up among the inputs
    (``interpolate`` with a dynamic height and a scale factor).
    """
    inputs = flat.graph.find_nodes(op="placeholder")
    found: dict[Any, tuple[int, int]] = {}
    for i, node in enumerate(inputs):
        for axis, size in enumerate(nodes.shape(node) if nodes.is_tensor(node) else ()):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                found.setdefault(size.node.expr, (i, axis))
    last = inputs[-1] if inputs else None
    for i, axis in found.values():
        with flat.graph.inserting_after(last):
            last = flat.graph.placeholder(f"size_{i}_{axis}")
        last.meta["val"] = nodes.shape(inputs[i])[axis]
    flat.recompile()
    return list(found.values())
