"""The exact judge: compares a folded graph with the original over residues, without a tolerance.

Both graphs run on the same random residues (:mod:`refold.fuzz.residues`), the original with the
residues of its weights, the folded one with what the tape of its recipe
(:mod:`refold.refit.tape`) makes of them: the same sums and products that made its constants, and
none of their rounding. Where a rewrite is an identity of arithmetic, of order, and of functions of
which nothing else is known, the two agree in every element. Where it is none, they differ with
probability ``1 - 1 / P`` an element, however small the difference is in float64.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from refold.fuzz import operators
from refold.fuzz.residues import NoInverse, P, Residues, Unjudged, Unknown
from refold.graph import constants, ops
from refold.graph.evaluate import flat_inputs
from refold.refit.tape import Tape, filled

if TYPE_CHECKING:
    from refold.compilation import Compilation
    from refold.graph.program import Call

_TRIES = 3  # inputs that are drawn until none divides by zero

EQUAL, DIFFERENT, UNJUDGED = "equal", "different", "unjudged"


@dataclass(frozen=True)
class Judgement:
    """What the exact judge found.

    Attributes:
        kind: ``"equal"``, ``"different"`` or ``"unjudged"``.
        reason: where the two differ, or why nobody knows.
    """

    kind: str
    reason: str = ""


def judge(done: Compilation, call: Call, *, seed: int = 0) -> Judgement:
    """Compares what was compiled with ``recipe=True`` with the program that it was made of.

    Args:
        done: the compilation.
        call: inputs of sizes at which to compare; the values of floating ones do not count.
        seed: of the residues.
    """
    kept = done.kept
    if kept is None:
        return Judgement(UNJUDGED, "no recipe says how the constants are made")
    return judge_graphs(kept.original, done.graph_module, kept.recipe.tape, call, seed=seed)


def judge_graphs(
    original: fx.GraphModule, folded: fx.GraphModule, tape: Tape, call: Call, *, seed: int = 0
) -> Judgement:
    """:func:`judge` for two graphs and the tape that makes the constants of one of the other's.

    Numbers first have their signs, for the rules that need those; if the graphs differ, sums of
    numbers are exact instead. A rewrite that is wrong differs in both.
    """
    found = _judged(original, folded, tape, call, signed=True, seed=seed)
    if found.kind != DIFFERENT:
        return found
    other = _judged(original, folded, tape, call, signed=False, seed=seed)
    return found if other.kind == DIFFERENT else other


def _judged(
    original: fx.GraphModule, folded: fx.GraphModule, tape: Tape, call: Call, *,
    signed: bool, seed: int,
) -> Judgement:  # fmt: skip
    for attempt in range(_TRIES):
        field = Residues(signed=signed, seed=seed + attempt)
        try:
            found = _compared(field, original, folded, tape, call)
        except NoInverse:
            continue
        except Unjudged as reason:
            return Judgement(UNJUDGED, str(reason))
        if found.kind == DIFFERENT and field.limits:
            return Judgement(UNJUDGED, "the arithmetic of infinities has no residues")
        return found
    return Judgement(UNJUDGED, "something is divided by zero")


def _compared(
    field: Residues, original: fx.GraphModule, folded: fx.GraphModule, tape: Tape, call: Call
) -> Judgement:
    stored = {name: _read(field, t) for name, t in constants.stored(original).items()}
    made = run_tape(field, tape, stored)
    inputs = _drawn(call, field)
    expected = _Run(field, original, stored)(inputs)
    found = _Run(field, folded, made)(inputs)
    return _difference(expected, found)


def _read(field: Residues, tensor: Tensor) -> Tensor:
    """A stored tensor: residues of its own, or the integers that it has."""
    tensor = tensor.detach()
    if tensor.is_complex() or type(tensor) not in (Tensor, torch.nn.Parameter):
        raise Unjudged("a weight is no plain tensor of real numbers")
    return field.of(tensor) if tensor.is_floating_point() else tensor.clone()


def _drawn(call: Call, field: Residues) -> Call:
    """Random residues for floating inputs; others are what they are."""
    generator = torch.Generator().manual_seed(field.seed)

    def draw(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return torch.randint(P, leaf.shape, generator=generator).double()

    drawn: Call = pytree.tree_map(draw, call)
    return drawn


# Rules that an order of the numbers makes right; residues have signs, but no order.
ORDERED = frozenset({"clean-up/clamps", "clean-up/rounded"})
# Of numbers they give fractions of them, which have residues.
_EXACT = ("reciprocal", "square", "pow", "relu", "abs", "clamp", "clamp_min", "clamp_max")


# --- the tape -------------------------------------------------------------------------------------


def run_tape(field: Residues, tape: Tape, sources: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a tape makes of residues; what Python saw while it was recorded does not count.

    What depends on no source (an order of elements, found by moving ``arange``) is computed as it
    was, and read as residues where it meets one that does, unless a function has rounded it: the
    graph may have computed that beside a weight, and so in residues.
    """
    values: dict[int, Any] = {}
    rounded: set[int] = set()
    for name, slot in tape.sources.items():
        values[slot] = sources.get(name, Unknown(f"{name} has no residue"))
    steps, dependent = tape.arithmetic
    for slot, literal in tape.literals.items():
        values[slot] = _read(field, literal) if slot in dependent else literal.clone()

    def operand(slot: int) -> Any:
        if slot in rounded and slot not in dependent and _is_float(values[slot]):
            return Unknown("a function of numbers alone was rounded")
        return values[slot] if slot in dependent else _read(field, values[slot])

    for step in steps:
        if any(slot in dependent for slot in step.out):
            args, kwargs = filled((step.args, step.kwargs), operand)
            result = _called(field, step.op, args, kwargs)
        else:
            read: set[int] = set()

            def plain(slot: int, read: set[int] = read) -> Any:
                read.add(slot)
                return values[slot]

            args, kwargs = filled((step.args, step.kwargs), plain)
            result = step.op(*args, **kwargs)
            name = step.op.__name__.partition(".")[0]
            if rounded & read or (ops.named(name, ops.NONLINEAR) and name not in _EXACT):
                rounded.update(step.out)
        several = isinstance(result, (tuple, list))
        results = result if several else (result,) * len(step.out)
        values.update({s: v for s, v in zip(step.out, results, strict=False) if s >= 0})
    made = {name: operand(slot) for name, slot in tape.results.items()}
    unseen = Unknown("a constant was made where nobody recorded it")
    return {**dict.fromkeys(tape.unknown, unseen), **made}


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _called(field: Residues, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a call, or why there is none."""
    try:
        return operators.call(field, target, args, kwargs)
    except Unjudged as reason:
        if getattr(getattr(target, "_schema", None), "is_mutable", False):
            raise  # what it was to write has other names
        return Unknown(str(reason))
    except RuntimeError as error:  # of how many are zero: floats lose some that residues keep
        raise Unjudged(f"a recorded size is another over residues: {error}") from error


# --- graphs ---------------------------------------------------------------------------------------


class _Run:
    """One run of a graph over residues.

    What depends on no weight and no floating input (positions, masks) is computed as it is, and
    read as residues where it meets what does.
    """

    def __init__(self, field: Residues, gm: fx.GraphModule, stored: Mapping[str, Any]) -> None:
        self._field, self._gm = field, gm
        self._stored = {n: v.clone() if isinstance(v, Tensor) else v for n, v in stored.items()}

    def __call__(self, call: Call) -> tuple[Any, dict[str, Any]]:
        """Outputs, and what the graph left in the tensors that it writes."""
        with torch.no_grad():
            outputs = self.run(flat_inputs(self._gm.graph, *pytree.tree_map(_copied, call)))
        written = constants.written(self._gm.graph)
        state = {str(n.target): self._stored[str(n.target)] for n in written if n.op == "get_attr"}
        return outputs, state

    def run(self, inputs: list[Any]) -> Any:
        """The outputs for residues, integers and other values of the placeholders."""
        values: dict[fx.Node, Any] = {}
        plain: dict[fx.Node, Any] = {}  # of these, floats are no residues
        supply = iter(inputs)

        def residue(node: fx.Node) -> Any:
            if node not in values:
                values[node] = _read_all(self._field, plain[node])
            return values[node]

        for node in self._gm.graph.nodes:
            if node.op == "output":
                return fx.map_arg(node.args[0], residue)
            if node.op == "placeholder":
                values[node] = next(supply)
            elif node.op == "get_attr":
                values[node] = self._attribute(str(node.target))
            elif _is_plain(node, plain):
                args, kwargs = fx.map_arg((node.args, node.kwargs), plain.__getitem__)
                plain[node] = node.target(*args, **kwargs)
                if not _is_real_of_complex(node, plain):
                    continue
                values[node] = Unknown("a real number of complex ones is rounded")
                del plain[node]
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), residue)
                values[node] = self._call(node, args, kwargs)
            if not _has_residues(values[node]):
                plain[node] = values[node]
        raise AssertionError("a graph ends with its output")

    def _attribute(self, name: str) -> Any:
        if name in self._stored:
            return self._stored[name]
        found = operator.attrgetter(name)(self._gm)
        return Unknown(f"{name} has no residue") if isinstance(found, Tensor) else found

    def _call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.op != "call_function":
            return Unknown(f"{node.op} is no call of an operator")
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return self._inner(node.target, args)
        return _called(self._field, node.target, args, kwargs)

    def _inner(self, target: Any, args: tuple[Any, ...]) -> Any:
        """A graph inside the graph: one under a context, or the branch that is chosen."""
        name = target.name()
        if name in ("wrap_with_autocast", "wrap_with_set_grad_enabled"):
            at = next(i for i, a in enumerate(args) if isinstance(a, fx.GraphModule))
            return self._inside(args[at], args[at + 1 :])
        if name == "cond" and not isinstance(args[0], Unknown):
            return self._inside(args[1] if bool(args[0]) else args[2], args[3])
        return Unknown(f"{name} has no formula over residues")

    def _inside(self, gm: fx.GraphModule, inputs: Any) -> Any:
        stored = {name: _read(self._field, t) for name, t in constants.stored(gm).items()}
        return _Run(self._field, gm, stored).run(list(inputs))


def _is_plain(node: fx.Node, plain: Mapping[fx.Node, Any]) -> bool:
    return (
        node.op == "call_function"
        and not isinstance(node.target, torch._ops.HigherOrderOperator)
        and not ops.has(node, ops.DRAWS)
        and all(source in plain for source in node.all_input_nodes)
    )


def _is_real_of_complex(node: fx.Node, plain: Mapping[fx.Node, Any]) -> bool:
    sources = [plain[n] for n in node.all_input_nodes]
    is_complex = any(isinstance(v, Tensor) and v.is_complex() for v in sources)
    return is_complex and _has_residues(plain[node])


def _has_residues(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_has_residues, value))
    return isinstance(value, Unknown) or (isinstance(value, Tensor) and value.is_floating_point())


def _read_all(field: Residues, value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_read_all(field, v) for v in value)
    return _read(field, value) if isinstance(value, Tensor) else value


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


# --- what differs ---------------------------------------------------------------------------------


def _difference(expected: Any, found: Any) -> Judgement:
    """The first difference between two runs; without one, what nobody could compare."""
    unknown = ""
    (here, state), (there, other) = expected, found
    pairs = [
        *(
            (f"output {i}", *pair)
            for i, pair in enumerate(zip(_leaves(here), _leaves(there), strict=True))
        ),
        *((f"the state {n}", state[n], other.get(n)) for n in state),
    ]
    for where, a, b in pairs:
        for value in (a, b):
            if isinstance(value, Unknown):
                unknown = unknown or value.reason
        if not isinstance(a, Unknown) and not isinstance(b, Unknown):
            apart = _apart(a, b)
            if apart:
                return Judgement(DIFFERENT, f"{where} {apart}")
    return Judgement(UNJUDGED, unknown) if unknown else Judgement(EQUAL)


def _leaves(outputs: Any) -> list[Any]:
    return pytree.tree_leaves(outputs, is_leaf=lambda v: isinstance(v, Unknown))


def _apart(a: Any, b: Any) -> str:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return "" if a == b else f"is {a} and {b}"
    if a.shape != b.shape:
        return f"is of shape {list(a.shape)} and {list(b.shape)}"
    differs = (a != b).flatten()
    if not bool(differs.any()):
        return ""
    return f"differs in {int(differs.sum())} of {differs.numel()} elements"
