"""Where the model's own rounding moves its discrete choices, both graphs are held to the same ones.

A model that picks its best 300 of 8,000 candidates is as far from a float64 run of itself as its
outputs are large: the rule would accept anything. So both graphs run again with the choices
(topk, argmax, round, comparisons) that float64 makes, in the model's dtype and, where even that is
past the ceiling, in float64. A choice is held only where it is the original's own operator on
inputs that agree, so that a wrong choice still shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from refold.errors import VerificationError
from refold.graph import constants
from refold.graph.evaluate import Oracle, discontinuous
from refold.graph.program import Call, fresh
from refold.verify.locate import name_of, stands_for, too_far
from refold.verify.references import OwnRun, one_rounding_away, rounded_otherwise
from refold.verify.samples import shapes_of
from refold.verify.tolerance import Leaf, collect, measure, widen


def judge(
    original: fx.GraphModule, folded: fx.GraphModule, call: Call, allowed: float
) -> tuple[Leaf, str] | None:
    """Compares two graphs on a call, their discrete choices held.

    Returns:
        The worst output, and how it was compared; ``None`` if one rounding of inputs and weights
        moves the result past the ceiling even so.

    Raises:
        VerificationError: they differ by more than rounding explains.
    """
    choices = _choices(original)
    exact: dict[str, _Choice] = {}
    reference = Oracle(original).run(*fresh(call), hold=_Overrides(choices, recorded=exact))
    for run, run_original, by in (
        (_natively, _natively, "both graphs held to the same discrete choices"),
        (_widely, _rounded, "float64 against float64, held to the same discrete choices"),
    ):
        own_inputs: dict[str, _Choice] = {}
        own = run_original(original, call, _Overrides(choices, exact, recorded=own_inputs))
        held = _Overrides(choices, exact, own_inputs, allowed=allowed, call=call)
        leaves: dict[int, Leaf] = {}
        collect(leaves, run(folded, call, held), own, reference, call)
        if run_original is _natively:
            for other in rounded_otherwise(original, call, _Overrides(choices, exact)):
                widen(leaves, 0, other, reference)
        for leaf, traced in zip(leaves.values(), _traced(original, leaves), strict=True):
            leaf.dtype = traced
            leaf.settle(allowed)
        worst = max(leaves.values(), key=lambda x: x.error / (x.tolerance or 1.0))
        if not worst.error <= worst.tolerance:
            raise too_far(worst, original, folded, [call])
        blind = [leaf for leaf in leaves.values() if leaf.blind]
        if not blind:
            return worst, by
        if all(leaf.dtype in (torch.float64, torch.complex128) for leaf in blind):
            break  # the other way is the same
    return None


def rounded(original: fx.GraphModule, call: Call) -> list[Any]:
    """A few results of a graph that rounds otherwise, and chooses what float64 chooses.

    Rounding is all that is left of an output that is zero in exact arithmetic, whatever the inputs:
    ``(W - W.mean(1, keepdim=True)) @ torch.ones_like(x)``.
    """
    choices, exact = _choices(original), dict[str, _Choice]()
    Oracle(original).run(*fresh(call), hold=_Overrides(choices, recorded=exact))
    return rounded_otherwise(original, call, _Overrides(choices, exact))


@dataclass
class _Choice:
    """The value of a discrete operator, and the floats that it was chosen from."""

    value: Any
    inputs: list[torch.Tensor]


@dataclass
class _Overrides:
    """Replaces the values of discrete operators by those of another run.

    Attributes:
        choices: the discrete operators of the original, by name.
        exact: what they chose in float64; empty in the run that finds that out.
        own: their inputs in the original's own run: how far rounding moves them.
        recorded: filled with what the run itself sees.
        allowed: relative error accepted for approximations.
        call: what is judged, for messages; ``None`` in runs of the original.
    """

    choices: dict[str, fx.Node]
    exact: dict[str, _Choice] = field(default_factory=dict)
    own: dict[str, _Choice] = field(default_factory=dict)
    recorded: dict[str, _Choice] = field(default_factory=dict)
    allowed: float = 0.0
    call: Call | None = None

    def __call__(self, node: fx.Node, value: Any, given: Any) -> Any:
        name = stands_for(node, self.choices)
        if name is None:
            return value
        inputs = [
            t
            for t in pytree.tree_leaves(given)
            if isinstance(t, torch.Tensor) and t.is_floating_point()
        ]
        self.recorded[name] = _Choice(value, inputs)
        if name not in self.exact or not _same_call(node, self.choices[name]):
            return value
        if self.call is not None:
            self._check_inputs(name, inputs, self.call)
        return _chosen(value, self.exact[name].value)

    def _check_inputs(self, name: str, inputs: list[torch.Tensor], call: Call) -> None:
        exact, own = self.exact[name].inputs, self.own[name].inputs
        for a, b, r in zip(inputs, own, exact, strict=True):
            leaf = Leaf(0, name_of(self.choices[name]), _float_dtype(self.choices[name]))
            if a.shape == r.shape:
                measure(leaf, a, b, r, call)
                leaf.settle(self.allowed)
            if a.shape != r.shape or not leaf.error <= leaf.tolerance:
                raise VerificationError(
                    f"what {leaf.name} chooses from is {leaf.error:.2e} from the float64 "
                    f"reference, allowed are {leaf.tolerance:.2e}; the original itself is "
                    f"{leaf.own_error:.2e} from it. Inputs {shapes_of(call)}",
                    leaf.name,
                )


def _chosen(value: Any, exact: Any) -> Any:
    """The choice of another run; of several results the floats stay (the values of a topk)."""
    if isinstance(value, torch.Tensor):
        return exact.to(value.dtype) if value.shape == exact.shape else value
    return type(value)(
        v if v.is_floating_point() or v.shape != e.shape else e.to(v.dtype)
        for v, e in zip(value, exact, strict=True)
    )


def _float_dtype(node: fx.Node) -> torch.dtype:
    """The dtype of the floats that a discrete operator reads."""
    values = (n.meta.get("val") for n in node.all_input_nodes)
    found = (v.dtype for v in values if isinstance(v, torch.Tensor) and v.is_floating_point())
    return next(found, torch.float32)


def _choices(original: fx.GraphModule) -> dict[str, fx.Node]:
    constant = constants.constant_nodes(original.graph)
    return {n.name: n for n in original.graph.nodes if n not in constant and discontinuous(n)}


def _same_call(node: fx.Node, other: fx.Node) -> bool:
    """The same operator with the same settings; which nodes they read does not matter."""

    def settings(n: fx.Node) -> Any:
        return pytree.tree_flatten(fx.map_arg((n.args, n.kwargs), lambda _: "node"))

    return node.target == other.target and settings(node) == settings(other)


def _traced(original: fx.GraphModule, leaves: dict[int, Leaf]) -> list[torch.dtype]:
    outputs = pytree.tree_leaves(original.graph.output_node().args[0])
    return [outputs[i].meta["val"].dtype for i in leaves]


def _natively(gm: fx.GraphModule, call: Call, held: _Overrides) -> Any:
    return OwnRun(gm, held).of(call)


def _widely(gm: fx.GraphModule, call: Call, held: _Overrides) -> Any:
    return Oracle(gm).run(*fresh(call), hold=held)


def _rounded(gm: fx.GraphModule, call: Call, held: _Overrides) -> Any:
    """A float64 run in which every input and constant is one rounding of its dtype off."""
    generator = torch.Generator().manual_seed(2)
    constant = constants.constant_nodes(gm.graph)

    def off(tensor: torch.Tensor) -> torch.Tensor:
        return one_rounding_away(tensor, generator)

    def hold(node: fx.Node, value: Any, given: Any) -> Any:
        if node in constant and isinstance(value, torch.Tensor):
            value = off(value.to(node.meta["val"].dtype)).to(value.dtype)
        return held(node, value, given)

    args, kwargs = pytree.tree_map_only(torch.Tensor, off, fresh(call))
    return Oracle(gm, stored=off).run(args, kwargs, hold=hold)
