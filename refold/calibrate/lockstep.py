"""Runs a graph on several inputs in lockstep, and says how far two runs' outputs are apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from refold.graph import constants, ops
from refold.graph.evaluate import flat_inputs
from refold.graph.program import Call
from refold.graph.records import products

Environment = dict[fx.Node, Any]
Compute = Callable[[Sequence[Environment]], list[Any]]


class Lockstep:
    """A graph over several inputs, node by node: all inputs of a node are there before it runs.

    Holds the values that later nodes still read, for every input, and no second copy of a weight.

    Args:
        gm: the graph module; it must not write its own state.
        calls: the inputs.
        instead: what computes the values of some nodes, of all inputs at once, in their place; it
            may be changed for nodes that have not run.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        calls: Sequence[Call],
        instead: Mapping[fx.Node, Compute] | None = None,
    ) -> None:
        self._gm = gm
        self._ordered = list(gm.graph.nodes)
        self._next = 0
        self.instead = dict(instead or {})
        self._written = constants.written(gm.graph)
        self._last: dict[fx.Node, list[fx.Node]] = {}
        for node, at in _last_readers(self._ordered).items():
            self._last.setdefault(at, []).append(node)
        self._environments: list[Environment] = []
        inputs = [n for n in self._ordered if n.op == "placeholder"]
        for args, kwargs in calls:
            flat = flat_inputs(gm.graph, args, kwargs)
            self._environments.append(dict(zip(inputs, flat, strict=True)))

    @property
    def inputs(self) -> int:
        """How many inputs there are."""
        return len(self._environments)

    def advance(self, until: fx.Node) -> None:
        """Runs what stands before ``until``."""
        while self._ordered[self._next] is not until:
            self._run(self._ordered[self._next], self._environments, self.instead)
            self._next += 1

    def values(self, node: fx.Node) -> list[Any]:
        """The value of a node that has run, for each input."""
        return [environment[node] for environment in self._environments]

    def outputs(self, but: Mapping[fx.Node, Compute] | None = None) -> list[list[Any]]:
        """What the graph returns from here on; the lockstep itself stays where it is.

        Args:
            but: what computes some nodes this time.
        """
        own = [dict(environment) for environment in self._environments]
        instead = {**self.instead, **(but or {})}
        for node in self._ordered[self._next : -1]:
            self._run(node, own, instead)
        returned = self._ordered[-1].args[0]
        return [pytree.tree_leaves(fx.map_arg(returned, e.__getitem__)) for e in own]

    def _run(
        self,
        node: fx.Node,
        environments: Sequence[Environment],
        instead: Mapping[fx.Node, Compute],
    ) -> None:
        with torch.no_grad():
            compute = instead.get(node)
            if compute is not None:
                values = compute(environments)
            else:
                values = [self._value(node, environment) for environment in environments]
        for environment, value in zip(environments, values, strict=True):
            environment[node] = value
            for dead in self._last.get(node, ()):
                environment.pop(dead, None)

    def _value(self, node: fx.Node, environment: Environment) -> Any:
        if node.op == "placeholder":  # one that is written is the caller's own tensor
            return environment[node].clone() if node in self._written else environment[node]
        if node.op == "get_attr":
            if constants.is_get_attr(node):
                return constants.tensor(node)
            return self._gm.get_submodule(str(node.target))
        args, kwargs = fx.map_arg((node.args, node.kwargs), environment.__getitem__)
        if node.op == "call_module":
            return self._gm.get_submodule(str(node.target))(*args, **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _last_readers(ordered: Iterable[fx.Node]) -> dict[fx.Node, fx.Node]:
    last: dict[fx.Node, fx.Node] = {}
    for node in ordered:
        last[node] = node
        for source in node.all_input_nodes:
            last[source] = node
    return last


# --- how far outputs are apart --------------------------------------------------------------------


@dataclass(frozen=True)
class Divergence:
    """How far outputs are from others, over all of several inputs.

    Attributes:
        error: the norm of the difference, relative to the norm, over all floating outputs.
        kl: mean Kullback-Leibler divergence of the softmax over the last axis of what is
            logits-like, in nats; NaN if no output is.
        top1: share of positions whose largest entry stays the largest; NaN likewise.
    """

    error: float
    kl: float
    top1: float

    def __str__(self) -> str:
        text = f"relative error {self.error:.1e}"
        return text if math.isnan(self.kl) else f"{text}, KL {self.kl:.1e}, top-1 {self.top1:.1%}"

    @property
    def loss(self) -> float:
        """What to minimise: the KL divergence where there is one, else the squared error."""
        return self.error**2 if math.isnan(self.kl) else self.kl


_KEEPS_LOGITS = ops.COPY | ops.ALIAS | ops.CAST | ops.PART


def logits(gm: fx.GraphModule) -> list[bool]:
    """For each output: is it what a dense layer computes, so that its last axis may be scores?"""
    return [_is_logits(leaf) for leaf in pytree.tree_leaves(gm.graph.output_node().args[0])]


def _is_logits(node: Any) -> bool:
    while isinstance(node, fx.Node) and ops.has(node, _KEEPS_LOGITS):
        node = node.args[0]
    return products.linear(node) is not None


def divergence(expected: Sequence[Any], got: Sequence[Any], scores: Sequence[bool]) -> Divergence:
    """Compares outputs, each a structure of tensors, over several inputs.

    Args:
        expected: what the reference returns for each input.
        got: what the other returns.
        scores: for each output, whether it is logits-like.
    """
    apart = size = total = 0.0
    equal = positions = 0
    for a, b in zip(expected, got, strict=True):
        leaves = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), scores, strict=True)
        for want, have, scored in leaves:
            if not isinstance(want, torch.Tensor) or not want.is_floating_point():
                continue
            want, have = want.detach().cpu().double(), have.detach().cpu().double()
            apart += float((have - want).square().sum())
            size += float(want.square().sum())
            if scored and want.dim() > 1:
                p, q = want.log_softmax(-1), have.log_softmax(-1)
                total += float((p.exp() * (p - q)).sum())
                equal += int((want.argmax(-1) == have.argmax(-1)).sum())
                positions += want.shape[:-1].numel()
    return Divergence(
        math.sqrt(apart / size) if size else math.sqrt(apart),
        total / positions if positions else math.nan,
        equal / positions if positions else math.nan,
    )
