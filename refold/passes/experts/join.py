"""Finds mixtures of experts, and makes one network of a mixture's experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from refold.algebra.lazy import Lazy
from refold.errors import Declined
from refold.graph import constants, provenance
from refold.graph.evaluate import WIDE
from refold.graph.nodes import aten, call, is_tensor, same
from refold.graph.ops import op_name
from refold.passes.experts.read import (
    INPUT,
    SPLITS,
    ExpertStep,
    Mixture,
    Ref,
    Slot,
    ensemble,
    loop,
    named,
    partition,
)
from refold.passes.experts.read_axis import selected, stacked
from refold.rewrite.edit import GraphSnapshot


def find(graph: fx.Graph) -> Iterator[Mixture | Declined]:
    """The outermost mixtures of a graph, the last one first."""
    inside: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        if node in inside or node.op != "call_function" or not is_tensor(node):
            continue
        for reader in _READERS.get(named(node), ()):
            try:
                found = reader(node)
            except Declined:
                continue
            if found is not None:
                yield found
                if isinstance(found, Mixture):
                    inside |= between(found.root, found.x)
                break


_SUMS = (selected, stacked, ensemble)
# Which readers of mixtures to try at a call: each begins at another end of one.
_READERS: dict[str, tuple[Callable[[fx.Node], Mixture | Declined | None], ...]] = {
    **dict.fromkeys(("index", "index_select", "index_put", "index_copy", "scatter"), (partition,)),
    **dict.fromkeys(("add", "mul", "div", "mean", "sum", "einsum"), _SUMS),
    "index_add": (loop,),
}


def between(root: fx.Node, x: fx.Node) -> set[fx.Node]:
    """What computes ``root`` and comes after ``x``."""
    seen: set[fx.Node] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if node not in seen and node is not x and node.op == "call_function":
            seen.add(node)
            stack.extend(n for n in node.all_input_nodes if not (n < x))
    return seen


def evaluate(
    steps: Sequence[ExpertStep], operands: Sequence[torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """The value of an expert in float64."""
    values: list[Any] = []

    def argument(value: Any) -> Any:
        if isinstance(value, Ref):
            return x if value == INPUT else values[value.step]
        if isinstance(value, Slot):
            return operands[value.index]
        if isinstance(value, torch.dtype):
            return WIDE.get(value, value)
        return value

    with torch.no_grad():
        for step in steps:
            values.append(step.target(*_mapped(step.args, argument),
                                      **_mapped(step.kwargs, argument)))  # fmt: skip
    out: torch.Tensor = values[-1]
    return out


def emit(
    graph: fx.Graph,
    steps: Sequence[ExpertStep],
    operands: Sequence[fx.Node],
    x: fx.Node,
    *,
    rule: str,
) -> list[fx.Node]:
    """Writes an expert at the graph's insertion point; the last node has its value."""
    values: list[fx.Node] = []

    def argument(value: Any) -> Any:
        if isinstance(value, Ref):
            return x if value == INPUT else values[value.step]
        return operands[value.index] if isinstance(value, Slot) else value

    for step in steps:
        args, kwargs = _mapped(step.args, argument), _mapped(step.kwargs, argument)
        node = call(graph, step.target, args, kwargs, rule=rule, sources=[step.node])
        # It stands for all experts, and has the value of none.
        provenance.derive(node, [step.node], rule, value=None)
        values.append(node)
    return values


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, tuple):
        return tuple(_mapped(v, function) for v in value)
    if isinstance(value, list):
        return [_mapped(v, function) for v in value]
    if isinstance(value, dict):
        return {k: _mapped(v, function) for k, v in value.items()}
    return function(value)


# --- one network of all experts -------------------------------------------------------------------


@dataclass(frozen=True)
class Constant:
    """A constant of the joined network: its numbers, and a constant with its name and dtype.

    Attributes:
        value: its numbers in float64.
        like: a constant that it stands for.
        kept: it is ``like`` itself.
    """

    value: Lazy
    like: fx.Node
    kept: bool = False


@dataclass(frozen=True)
class Network:
    """Steps over a common input, with their constants."""

    steps: tuple[ExpertStep, ...]
    constants: tuple[Constant, ...]

    @property
    def parameters(self) -> int:
        return sum(c.value.numel() for c in self.constants)

    @property
    def flops(self) -> int:
        """Floating point operations of the products, per token."""
        return sum(2 * c.value.numel() for c in self.constants if len(c.value.shape) >= 2)


def expert(mixture: Mixture, index: int) -> Network:
    """One expert as it is."""
    operands = mixture.operands[index]
    return Network(mixture.steps, tuple(Constant(o.value, o.node, o.whole) for o in operands))


def equal(mixture: Mixture) -> bool:
    """True if all experts hold the same numbers, bit for bit."""
    for slot in zip(*mixture.operands, strict=True):
        if all(o.node is slot[0].node and o.whole for o in slot):
            continue
        first = slot[0].value.get()
        if any(not torch.equal(o.value.get(), first) for o in slot[1:]):
            return False
    return True


def average(mixture: Mixture, weights: Sequence[float]) -> Network:
    """The network whose constants are the weighted means of the experts' (weights add up to 1)."""
    made = []
    for slot in zip(*mixture.operands, strict=True):
        if all(o.node is slot[0].node and o.whole for o in slot):
            made.append(Constant(slot[0].value, slot[0].node, kept=True))
            continue
        made.append(Constant(_weighted_sum([o.value for o in slot], weights), slot[0].node))
    return Network(mixture.steps, tuple(made))


def _weighted_sum(values: Sequence[Lazy], weights: Sequence[float]) -> Lazy:
    def compute() -> torch.Tensor:
        total = torch.zeros(values[0].shape, dtype=torch.float64)
        for value, weight in zip(values, weights, strict=True):
            total.add_(value.get(), alpha=weight)
        return total

    return Lazy(values[0].shape, compute, fresh=True, parents=values)


def scaled(network: Network, factor: float) -> Network | None:
    """The network times a number, where its last step is a product that can take it in."""
    last = network.steps[-1]
    if last.target is not aten.linear.default:
        return None
    own = [a.index for a in last.args if isinstance(a, Slot)]
    others = {a.index for s in network.steps[:-1] for a in _leaves(s) if isinstance(a, Slot)}
    if others & set(own):
        return None
    made = list(network.constants)
    for index in own:
        constant = made[index]
        made[index] = Constant(
            constant.value.times(torch.tensor(factor, dtype=torch.float64)), constant.like
        )
    return Network(network.steps, tuple(made))


def _leaves(step: ExpertStep) -> list[Any]:
    found: list[Any] = []
    _mapped((step.args, step.kwargs), lambda a: found.append(a))
    return found


def side_by_side(mixture: Mixture) -> Network:
    """All experts as one: their hidden units side by side, their outputs added with the gates.

    ``W1 = [W1_1; W1_2; ...]``, ``W2 = [g_1 W2_1, g_2 W2_2, ...]``, ``b2 = sum of g_i b2_i``.

    Raises:
        Declined: an expert is no product, elementwise operations on its hidden units, product.
    """
    return _SideBySide(mixture).network()


class _SideBySide:
    """Carries each value as *shared* (the same for all experts), *wide* (side by side) or *out*."""

    def __init__(self, mixture: Mixture) -> None:
        assert mixture.gates is not None
        self._mixture, self._gates = mixture, mixture.gates
        self._states: list[str] = []
        self._steps: list[ExpertStep] = []
        self._constants: list[Constant] = []

    def network(self) -> Network:
        for index, step in enumerate(self._mixture.steps):
            self._states.append(self._step(index, step))
        if self._states[-1] != "out":
            raise Declined("an expert does not end in a product with its hidden units")
        return Network(tuple(self._steps), tuple(self._constants))

    def _step(self, index: int, step: ExpertStep) -> str:
        leaves = _leaves(step)
        states = {
            "shared" if a == INPUT else self._states[a.step] for a in leaves if isinstance(a, Ref)
        }
        if len(states) != 1:
            raise Declined("an expert joins its hidden units with its input")
        state = states.pop()
        slots = [a.index for a in leaves if isinstance(a, Slot)]
        if state == "shared" and all(map(self._alike, slots)):
            made = {i: self._add(Constant(o.value, o.node, o.whole))
                    for i, o in ((i, self._mixture.operands[0][i]) for i in slots)}  # fmt: skip
            return self._append(step, lambda a: made[a.index] if isinstance(a, Slot) else a, state)
        name = op_name(step.node) if step.target is not aten.linear.default else "linear"
        if name == "linear":
            if state == "shared":
                return self._first(index, step)
            if state == "wide":
                return self._last(step)
        if state == "wide" and name == "getitem":
            return self._append(step, lambda a: a, state)
        if state == "wide" and name in SPLITS:
            sizes = [len(self._gates) * size for size in self._pieces(step)]
            self._steps.append(
                ExpertStep(aten.split_with_sizes.default, (step.args[0], sizes, -1), {}, step.node)
            )
            return state
        pointwise = torch.Tag.pointwise in getattr(step.target, "tags", ())
        if state == "wide" and pointwise:
            width = self._width(step)
            made = {i: self._units(i, width) for i in slots}
            return self._append(step, lambda a: made[a.index] if isinstance(a, Slot) else a, state)
        if state == "out" and step.target is aten.add.Tensor and len(slots) == 1:
            made = {slots[0]: self._summed(slots[0])}
            return self._append(step, lambda a: made[a.index] if isinstance(a, Slot) else a, state)
        raise Declined(f"{step.node.name} of an expert does not work on each hidden unit alone")

    def _append(self, step: ExpertStep, function: Callable[[Any], Any], state: str) -> str:
        args, kwargs = _mapped(step.args, function), _mapped(step.kwargs, function)
        self._steps.append(ExpertStep(step.target, args, kwargs, step.node))
        return state

    def _add(self, constant: Constant) -> Slot:
        self._constants.append(constant)
        return Slot(len(self._constants) - 1)

    def _values(self, slot: int) -> list[Lazy]:
        return [operands[slot].value for operands in self._mixture.operands]

    def _like(self, slot: int) -> fx.Node:
        return self._mixture.operands[0][slot].node

    def _alike(self, slot: int) -> bool:
        first, *rest = self._values(slot)
        return all(torch.equal(first.get(), other.get()) for other in rest)

    def _first(self, index: int, step: ExpertStep) -> str:
        pieces = self._split_sizes(index)

        def join(slot: int) -> Slot:
            values = self._values(slot)
            rows = values[0].shape[0]
            sizes = pieces or [rows]
            shape = (rows * len(values), *values[0].shape[1:])

            def compute() -> torch.Tensor:
                parts = [torch.split(v.get(), sizes) for v in values]
                return torch.cat([p[k] for k in range(len(sizes)) for p in parts])

            return self._add(Constant(Lazy(shape, compute, parents=values), self._like(slot)))

        return self._append(step, lambda a: join(a.index) if isinstance(a, Slot) else a, "wide")

    def _last(self, step: ExpertStep) -> str:
        weight, *bias = [a.index for a in step.args if isinstance(a, Slot)]
        values = self._values(weight)
        out, width = values[0].shape

        def compute() -> torch.Tensor:
            return torch.cat([v.get() * g for v, g in zip(values, self._gates, strict=True)], 1)

        wide = Lazy((out, width * len(values)), compute, fresh=True, parents=values)
        made = {weight: self._add(Constant(wide, self._like(weight)))}
        if bias:
            made[bias[0]] = self._summed(bias[0])
        return self._append(step, lambda a: made[a.index] if isinstance(a, Slot) else a, "out")

    def _summed(self, slot: int) -> Slot:
        return self._add(Constant(_weighted_sum(self._values(slot), self._gates), self._like(slot)))

    def _units(self, slot: int, width: int) -> Slot:
        """A constant with one number for all hidden units, or one for each."""
        values = self._values(slot)
        if values[0].numel() not in (1, width) or values[0].shape[-1:] not in ((), (1,), (width,)):
            raise Declined("a constant of an expert is not one number per hidden unit")

        def compute() -> torch.Tensor:
            return torch.cat([v.get().reshape(-1).expand(width) for v in values])

        joined = Lazy((width * len(values),), compute, parents=values)
        return self._add(Constant(joined, self._like(slot)))

    def _width(self, step: ExpertStep) -> int:
        """Hidden units of one expert at an elementwise step, whose operands all have as many."""
        sizes = {self._mixture.steps[a.step].node for a in _leaves(step) if isinstance(a, Ref)}
        last = [n.meta["val"].shape[-1:] for n in sizes if is_tensor(n)]
        width = last[0][0] if last and len(last[0]) else None
        if not isinstance(width, int) or not all(same(size, (width,)) for size in last):
            raise Declined("an expert's hidden units are not known by number")
        return width

    def _split_sizes(self, index: int) -> list[int] | None:
        """How the one reader of a wide value splits it; ``None`` if nothing splits it."""
        steps = self._mixture.steps
        readers = [s for s in steps if Ref(index) in _leaves(s)]
        splits = [s for s in readers if op_name(s.node) in SPLITS]
        if not splits:
            return None
        if len(readers) > 1:
            raise Declined("an expert reads its hidden units split and whole")
        return self._pieces(splits[0])

    def _pieces(self, step: ExpertStep) -> list[int]:
        values = step.node.meta["val"]
        source = self._mixture.steps[_leaves(step)[0].step]
        whole = source.node.meta["val"].shape
        sizes = [v.shape[-1] if v.dim() else None for v in values]
        if any(not isinstance(s, int) for s in sizes) or not same(sum(sizes), whole[-1]):
            raise Declined("an expert splits something else than its hidden units")
        if op_name(source.node) in SPLITS or source.target is not aten.linear.default:
            raise Declined("an expert splits its hidden units later than at its first product")
        return sizes  # type: ignore[return-value]


# --- random partitions ----------------------------------------------------------------------------


def state_expectation(gm: fx.GraphModule) -> list[str]:
    """Replaces each random partition by the mean of its experts, in place; says so in sentences.

    Two runs of a random partition differ; what a conversion is compared with is its mean. Where
    this fails, the graph is what it was.
    """
    if not any(op_name(n) == "randperm" for n in gm.graph.nodes if n.op == "call_function"):
        return []
    snapshot = GraphSnapshot(gm)
    try:
        return _stated(gm)
    except BaseException:
        snapshot.restore()
        raise


def _stated(gm: fx.GraphModule) -> list[str]:
    notes: list[str] = []
    graph = gm.graph
    for mixture in list(find(graph)):
        if not isinstance(mixture, Mixture) or mixture.form != "random partition":
            continue
        count = len(mixture.operands)
        with graph.inserting_before(mixture.root):
            total: fx.Node | None = None
            for each in mixture.operands:
                one = emit(graph, mixture.steps, [o.node for o in each], mixture.x, rule="mean")[-1]
                total = one if total is None else call(
                    graph, aten.add.Tensor, (total, one), rule="mean", sources=[mixture.root]
                )  # fmt: skip
            mean = call(graph, aten.div.Tensor, (total, count), rule="mean", sources=[mixture.root])
        mixture.root.replace_all_uses_with(mean, propagate_meta=False)
        notes.append(
            f"{mixture.root.name}: {count} experts on a random partition of the tokens; two runs "
            "differ, so results are compared with the mean of the experts"
        )
    graph.eliminate_dead_code(
        lambda n: n.op in ("placeholder", "output") or (n.op == "call_function" and _effects(n))
    )
    gm.recompile()
    return notes


def _effects(node: fx.Node) -> bool:
    return constants.is_mutation(node) or (node.is_impure() and op_name(node) != "randperm")
