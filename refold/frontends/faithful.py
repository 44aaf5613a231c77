"""Whether a trace is the model: both run on the same inputs, at sizes that the trace did not see.

A trace follows one path, at sizes of two and more. Where the path depends on a size, the model's
own result at a few other sizes tells whether the trace holds there as well; nothing is guessed.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from refold.frontends.tracer import Tracer
from refold.graph import constants
from refold.graph.constants import draws_random
from refold.graph.evaluate import Oracle, discontinuous
from refold.graph.guards import DerivedSize, Guard, Guards, evaluate
from refold.graph.program import InputSpec, traced_sizes

_PATHS_APART = 2e-2  # of the largest value: more than rounding explains in any dtype
_ROUNDING = 1e-4  # two runs of the same kernels; float64 decides beyond
_DOUBLE = 1e-6
_RUNS = 12  # sizes at which one trace is compared with its model
_COMBINATIONS = 4096
_GROWTH = 4.0  # how many times larger than the example's the inputs of a comparison may be
_SMALL = 1 << 20  # elements that inputs may always have
_STRETCH = -100.0  # values far from the example's, where clamps and thresholds show

AGREES, REFUSED, DIFFERS, UNKNOWN = "agrees", "refused", "differs", "unknown"


@dataclass(frozen=True)
class Finding:
    """What a comparison says of one size.

    Attributes:
        outcome: the two agree; the model refuses; they differ; or nothing could be compared.
        reason: how they differ, or what the model raises.
        line: the user's line that raises.
    """

    outcome: str
    reason: str = ""
    line: str = ""


class SideBySide:
    """A trace beside the model that it is of, at any sizes of its inputs."""

    def __init__(
        self,
        tracer: Tracer,
        gm: fx.GraphModule,
        traced: Any,
        inputs: Sequence[InputSpec],
        derived: Sequence[DerivedSize],
    ) -> None:
        self._tracer, self._gm, self._traced = tracer, gm, traced
        self.inputs, self.derived = inputs, derived
        self._known: dict[tuple[tuple[str, int], ...], Finding] = {}
        self.hints = traced_sizes(inputs, traced, Guards(derived=tuple(derived)))
        self._possible = not constants.written(gm.graph) and not any(
            map(draws_random, gm.graph.nodes)
        )

    def _leaves(self) -> list[Any]:
        return pytree.tree_leaves(self._traced)

    @property
    def runs(self) -> int:
        """At how many sizes the two were compared."""
        return len(self._known)

    def knows(self, sizes: Mapping[str, int]) -> bool:
        """Whether the two were compared at these sizes already."""
        return tuple(sorted({**self.hints, **sizes}.items())) in self._known

    def at(self, sizes: Mapping[str, int], *, stretched: bool = False) -> Finding:
        """Compares at these sizes of symbols; others stay as they were traced.

        Args:
            sizes: by symbol.
            stretched: also with values far from the example's.
        """
        key = tuple(sorted({**self.hints, **sizes}.items()))
        if key not in self._known:
            self._known[key] = self._compared(dict(key), stretched)
        return self._known[key]

    def fits(self, sizes: Mapping[str, int]) -> bool:
        """Whether inputs of these sizes are no larger than a comparison may cost."""
        elements = sum(math.prod(shape) for shape in self._shapes({**self.hints, **sizes}))
        own = sum(leaf.numel() for leaf in self._leaves() if isinstance(leaf, torch.Tensor))
        return elements <= max(_GROWTH * own, _SMALL)

    def _shapes(self, sizes: Mapping[str, int]) -> Iterator[list[int]]:
        for spec in self.inputs:
            yield [s if isinstance(s, int) else int(evaluate(s, sizes)) for s in spec.sizes]

    def _compared(self, sizes: Mapping[str, int], stretched: bool) -> Finding:
        if not self._possible:
            return Finding(UNKNOWN, "it draws random numbers or writes state")
        leaves, spec = pytree.tree_flatten(self._traced)
        shapes = self._shapes(sizes)
        resized = [
            _resized(leaf, shape) if isinstance(leaf, torch.Tensor) else leaf
            for leaf, shape in zip(leaves, shapes, strict=True)
        ]
        verdict = self._on(pytree.tree_unflatten(resized, spec))
        if verdict.outcome != AGREES or not stretched:
            return verdict
        far = self._on(pytree.tree_unflatten([_stretched(leaf) for leaf in resized], spec))
        return far if far.outcome == DIFFERS else verdict

    def _on(self, inputs: Any) -> Finding:
        try:
            expected = self._tracer.run(inputs)
        except Exception as error:
            return Finding(REFUSED, _first_line(error), self._tracer.line_of(error))
        apart = difference(self._gm, inputs, expected, _ROUNDING)
        if apart is None or self._decided_in_float64(inputs):
            return Finding(AGREES)
        return Finding(DIFFERS, apart)

    def _decided_in_float64(self, inputs: Any) -> bool:
        """Whether the trace computes what the model does, where rounding flips no choice.

        Behind a topk, near ties of float32 may come out in another order: no other path. The model
        is traced at the very sizes, and both traces run in float64, which tells ties apart.
        """
        if not any(map(discontinuous, self._gm.graph.nodes)):
            return False
        try:
            there, _ = self._tracer.functional(self._tracer.export(inputs, None))
            expected, got = (
                pytree.tree_leaves(Oracle(g).run(*_copied(inputs))) for g in (there, self._gm)
            )
        except Exception:  # float64 cannot run it: the difference stands
            return False
        return len(got) == len(expected) and all(
            _same_in_float64(a, b) for a, b in zip(got, expected, strict=True)
        )


def difference(gm: fx.GraphModule, inputs: Any, expected: Any, bound: float) -> str | None:
    """How the results of a graph differ from what the model returned, if they do."""
    args, kwargs = _copied(inputs)
    try:
        with torch.no_grad():
            got = gm.forward(*args, **kwargs)  # a call would print where it fails
    except Exception as error:
        return f"it fails ({_first_line(error)})"
    ours, theirs = pytree.tree_leaves(got), pytree.tree_leaves(expected)
    if len(ours) != len(theirs):
        return f"it returns {len(ours)} values instead of {len(theirs)}"
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if not _close(a, b, bound):
            return f"output {i} of {len(ours)} is {_how(a, b)}"
    return None


def apart(tracer: Tracer, gm: fx.GraphModule, inputs: Any) -> str | None:
    """How the results of the trace differ from the model's own, if both run and they do."""
    if constants.written(gm.graph) or any(map(draws_random, gm.graph.nodes)):
        return None
    try:
        expected = tracer.call(inputs)
    except Exception:  # the model itself refuses these inputs: nothing to compare
        return None
    return difference(gm, inputs, expected, _PATHS_APART)


# --- guards ---------------------------------------------------------------------------------------


def lowest(
    comparison: SideBySide,
    batches: Sequence[str],
    texts: Mapping[str, str],
    recorded: Sequence[Guard] = (),
) -> dict[str, Guard]:
    """What holds below two, by symbol: a trace takes every size for two or more.

    Args:
        comparison: the trace beside its model.
        batches: symbols of leading dimensions, which a call changes together.
        texts: the symbols whose lower bound is the tracer's own, in the user's names.
        recorded: what the trace recorded: where that refuses a size, nothing is asked about it.
    """

    def admitted(group: Sequence[str], size: int) -> bool:
        sizes = {**comparison.hints, **dict.fromkeys(group, size)}
        return Guards(tuple(recorded)).admits(sizes)

    found: dict[str, Guard] = {}
    together = [s for s in batches if s in texts]
    if not admitted(together, 1):  # they may not be alike
        groups = [[s] for s in texts]
    else:
        groups = [together, *([s] for s in texts if s not in batches)]
    for group in filter(None, groups):
        asked = admitted(group, 1)
        one = comparison.at(dict.fromkeys(group, 1)) if asked else Finding(AGREES)
        if one.outcome == UNKNOWN:
            continue
        if one.outcome != AGREES:
            low, reason = 2, _against(one)
        elif asked and group[0] in batches:
            none = comparison.at(dict.fromkeys(group, 0))
            if none.outcome == AGREES:
                continue
            low, reason = 1, _against(none)
        else:
            low, reason = 1, "nothing is known of an empty one"
        for symbol in group:
            text = f"{texts[symbol]} >= {low}"
            found[symbol] = Guard(f"{symbol} >= {low}", text, one.line, reason)
    return found


def _against(verdict: Finding) -> str:
    if verdict.outcome == REFUSED:
        return f"the model raises {verdict.reason}"
    return f"the model takes another path: {verdict.reason}"


def settle(
    guards: Sequence[Guard], comparison: SideBySide, given: Sequence[Guard]
) -> tuple[list[Guard], list[Guard]]:
    """Keeps the guards that matter, drops those that the model shows to be spurious.

    A guard goes only where sizes that break it were tried, and the model took and the trace
    computed all of them. An equality of two sizes stays in any case: rewrites rely on it.

    Args:
        guards: what the trace recorded.
        comparison: the trace beside its model.
        given: other conditions that sizes fulfil.

    Returns:
        The guards that are kept, with what was seen, those of the user's lines first; and the
        spurious ones.
    """
    users = [g for g in guards if g.source]
    ordered = [*users, *(g for g in guards if not g.source)]
    spurious: list[Guard] = []
    seen: dict[Guard, Finding] = {}
    for guard in sorted(ordered, key=lambda g: not _may_go(g)):  # those that may go come first
        others = [*given, *(g for g in ordered if g is not guard and g not in spurious)]
        verdicts = [
            comparison.at(sizes, stretched=bool(guard.source))
            for sizes in _witnesses(guard, others, comparison)
        ]
        against = next((v for v in verdicts if v.outcome in (REFUSED, DIFFERS)), None)
        if against is not None:
            seen[guard] = against
        elif verdicts and _may_go(guard) and all(v.outcome == AGREES for v in verdicts):
            spurious.append(guard)
    kept = [_explained(g, seen[g]) if g in seen else g for g in ordered if g not in spurious]
    return kept, spurious


def _may_go(guard: Guard) -> bool:
    """Whether a guard may turn out to be spurious; rewrites rely on sizes that are equal."""
    return "==" not in guard.code or bool(guard.source and "%" in guard.code)


def _explained(guard: Guard, verdict: Finding) -> Guard:
    return replace(guard, source=guard.source or verdict.line, reason=_against(verdict))


def _witnesses(
    guard: Guard, others: Sequence[Guard], comparison: SideBySide
) -> list[dict[str, int]]:
    """Sizes that break a guard and keep all others, or as many as possible; the nearest first."""
    names = guard.symbols
    hints = comparison.hints
    if any(n not in hints for n in names):
        return []
    choices = [_candidates(guard, hints[n], hints) for n in names]
    found: list[tuple[int, float, dict[str, int]]] = []
    for values in itertools.islice(itertools.product(*choices), _COMBINATIONS):
        sizes = dict(zip(names, values, strict=True))
        full = {**hints, **sizes}
        if evaluate(guard.code, full) or not comparison.fits(sizes):
            continue
        broken = sum(not evaluate(other.code, full) for other in others)
        distance = sum(abs(math.log(max(v, 1) / max(hints[n], 1))) for n, v in sizes.items())
        found.append((broken, distance, sizes))
    if not found:
        return []
    least = min(broken for broken, _, _ in found)
    if least and guard.source:
        return []  # another guard would be at fault as well
    nearest = sorted((f for f in found if f[0] == least), key=lambda f: f[1])
    chosen = [nearest[0]]
    if guard.source:  # a branch of the model's own, not one inside of an operator
        chosen += [*nearest[1:2], *nearest[2:][-1:]]  # the farthest one, too
    return [s for _, _, s in chosen if comparison.knows(s) or comparison.runs < _RUNS]


def _candidates(guard: Guard, hint: int, hints: Mapping[str, int]) -> list[int]:
    """Sizes worth trying for one symbol, those near the traced one first."""
    numbers = [int(n) for n in re.findall(r"(?<![\w.])\d+(?![\w.])", guard.code)]
    found = {1, 2, 3, 4, 5, 7, 8, hint, hint - 1, hint + 1, 2 * hint, hint // 2, *hints.values()}
    found |= {n + d for n in numbers for d in (-1, 0, 1)}
    return sorted((n for n in found if n > 0), key=lambda n: abs(n - hint))


# --- values ---------------------------------------------------------------------------------------


def _copied(inputs: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), inputs)


def _resized(leaf: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A tensor of another size with the values of this one: its rows repeated, or some of them."""
    for axis, size in enumerate(shape):
        if leaf.shape[axis] != size:
            rows = torch.arange(size, device=leaf.device) % max(leaf.shape[axis], 1)
            leaf = leaf.index_select(axis, rows)
    return leaf


def _stretched(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
        return leaf * _STRETCH
    return leaf


def _first_line(error: BaseException) -> str:
    name = type(error).__name__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{name}: {lines[0][:160]}" if lines else name


def _describe(leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
    return type(leaf).__name__


def _how(a: Any, b: Any) -> str:
    if _describe(a) != _describe(b):
        return f"{_describe(a)} instead of {_describe(b)}"
    if not isinstance(a, torch.Tensor):
        return f"{a!r} instead of {b!r}"
    size = float((a - b).abs().max() / b.abs().max())
    return f"off by {size:.1g} of its largest value"


def _close(a: Any, b: Any, bound: float) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and (isinstance(a, float) or bool(a == b))
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return bound >= _PATHS_APART or bool(torch.equal(a, b))
    if torch.finfo(a.dtype).bits < 32:
        bound = _PATHS_APART
    return _within(a, b, bound)


def _within(a: torch.Tensor, b: torch.Tensor, bound: float) -> bool:
    a, b = a.detach().to(torch.complex128), b.detach().to(torch.complex128)
    finite = b[b.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 1.0
    return bool(torch.allclose(a, b, rtol=0, atol=bound * scale, equal_nan=True))


def _same_in_float64(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return bool(torch.equal(a, b))
    return _within(a, b, _DOUBLE)
