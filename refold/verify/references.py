"""What the original computes, in float64 and in its own dtype: all that a judge needs of it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from refold.graph import constants, provenance
from refold.graph.evaluate import Oracle, flat_inputs
from refold.graph.program import Call, Program, fresh
from refold.verify.given import Factory, Given, state_kept
from refold.verify.manners import Manners, observe
from refold.verify.randomness import first_draw
from refold.verify.samples import calls_like, shapes_of

_NEIGHBOURS = 4  # runs of the original beside each of them
_LARGEST = 1 << 24  # elements of what is a rounding off: float64 of larger ones takes gigabytes


@dataclass
class References:
    """What the original computes: inputs, float64 results and the model's own, for comparisons.

    They outlive the original, so that a compilation may release its weights. ``allowed`` is the
    relative error that the user accepts for approximations asked for by name. ``manners`` is how
    the original treats memory on the first input; ``module`` makes the module that was traced.
    """

    calls: list[Call] = field(default_factory=list)
    exact: list[Any] = field(default_factory=list)
    own: list[Any] = field(default_factory=list)
    nearby: list[list[Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    allowed: float = 0.0
    manners: Manners | None = None
    module: Factory | None = None

    def leaving_inputs(self) -> References:
        """The same for a candidate that may leave alone what the original writes into inputs."""
        kept = None if self.manners is None else replace(self.manners, may_leave=True)
        return replace(self, manners=kept)


def references(
    original: fx.GraphModule,
    program: Program,
    *,
    runs: int = 4,
    most: int | None = None,
    module: Factory | None = None,
) -> References:
    """Runs the original in float64 and in its own dtype on at least ``runs`` inputs.

    A graph that draws random numbers gives no references, and a note.

    Args:
        original: the trace, which float64 runs.
        program: what the trace promised of its inputs.
        runs: how many inputs there are at least.
        most: how many there are at most.
        module: makes the module that was traced, which runs in its own dtype; without it the
            trace does.
    """
    found = References(module=module)
    drawn = first_draw(original, program.example)
    if drawn is not None:
        where = provenance.source_line(drawn)
        place = f"{drawn.name}{f' at {where}' if where else ''}"
        found.notes.append(f"{place} {constants.impurity(drawn)}: two runs cannot be compared")
        return found
    oracle, given = Oracle(original), Given(original, module)
    with given.kept():
        for call, generated in itertools.islice(calls_like(program, runs), most):
            _add(found, call, oracle, given, generated=generated)
    return found


def _add(found: References, call: Call, oracle: Oracle, given: Given, *, generated: bool) -> None:
    """Takes in a call; one that was generated may be nothing for the model."""
    try:
        exact = oracle.run(*fresh(call))
        if found.calls:
            own = given.run([fresh(call)], exact)[0]
        else:
            own, found.manners = observe(given, call, exact)
    except Exception as error:
        if not generated:
            raise
        found.notes.append(f"{shapes_of(call)}: the original fails on it ({first_line(error)})")
        return
    found.calls.append(call)
    found.exact.append(exact)
    found.own.append(own)
    found.nearby.append([])


def add_nearby(original: fx.GraphModule, found: References) -> None:
    """Adds what the original makes of inputs that are one rounding away."""
    generator = torch.Generator().manual_seed(1)
    given = Given(original, found.module)
    with given.kept():
        for call, exact, results in zip(found.calls, found.exact, found.nearby, strict=True):
            for _ in range(_NEIGHBOURS):
                beside = pytree.tree_map_only(
                    torch.Tensor, lambda t: one_rounding_away(t, generator), fresh(call)
                )
                results += given.run([beside], exact)


class OwnRun(fx.Interpreter):
    """Runs a graph in its own dtype; its state stays as it is.

    Args:
        gm: the graph.
        hold: gives the value that a call has from now on, for its node, value and arguments.
        noise: a seed: inputs, weights and all results are a rounding or two off. What a graph
            writes would be lost, so it may write nothing.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        hold: Callable[[fx.Node, Any, Any], Any] | None = None,
        noise: int | None = None,
    ) -> None:
        super().__init__(gm)
        self._gm, self._hold = gm, hold
        self._generator = None if noise is None else torch.Generator().manual_seed(noise)

    def of(self, call: Call) -> Any:
        inputs = flat_inputs(self.graph, *fresh(call))
        with state_kept(self._gm), torch.no_grad():
            result = self.run(*inputs, enable_io_processing=False)
        return self.graph.process_outputs(result)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if self._hold is not None and n.op == "call_function":
            value = self._hold(n, value, self.fetch_args_kwargs_from_env(n))
        generator = self._generator
        if generator is None or n.op == "output":
            return value
        return pytree.tree_map_only(
            torch.Tensor,
            lambda t: one_rounding_away(t, generator, 2.0) if t.numel() <= _LARGEST else t,
            value,
        )


def rounded_otherwise(
    gm: fx.GraphModule, call: Call, hold: Callable[[fx.Node, Any, Any], Any] | None = None
) -> list[Any]:
    """A few results of a graph whose every value is a rounding or two off.

    There is none if it writes, or calls kernels other than PyTorch's: those may be what is judged.
    """
    results: list[Any] = []
    if constants.mutations(gm.graph) or any(map(_is_foreign, gm.graph.nodes)):
        return results
    for seed in range(_NEIGHBOURS):
        # A model may refuse numbers that are a rounding off, with an error of any kind.
        with contextlib.suppress(Exception):
            results.append(OwnRun(gm, hold, seed).of(call))
    return results


def _is_foreign(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace != "aten"


def one_rounding_away(
    leaf: torch.Tensor, generator: torch.Generator, roundings: float = 1.0
) -> torch.Tensor:
    if not leaf.is_floating_point():
        return leaf
    drawn = torch.rand(leaf.shape, generator=generator, dtype=torch.float64) * 2 - 1
    factor = 1 + roundings * torch.finfo(leaf.dtype).eps * drawn
    return (leaf.double().cpu() * factor).to(leaf.device, leaf.dtype)


def outputs(gm: fx.GraphModule, calls: list[Call]) -> list[Any]:
    """What a graph returns for each call, in its own dtype; its state stays as it is."""
    found = []
    for call in calls:
        args, kwargs = fresh(call)
        with state_kept(gm), torch.no_grad():
            found.append(gm(*args, **kwargs))
    return found


def first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
