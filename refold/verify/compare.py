"""Judges a compiled model by its numbers: its distance from a float64 oracle of the original.

The candidate may be as far from the oracle as rounding explains: four times as far as the original
model in its own dtype, or 64 units of the output's dtype (8 in half precision), relative to the
output's scale in that call, as a whole and in each slice along its axes. Where the original itself
is further off than a ceiling, both are held to the same discrete choices (:mod:`.choices`).
Integer and boolean outputs are compared exactly, except where floats within that tolerance flipped
them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from refold.errors import VerificationError
from refold.graph.program import Call, Program, fresh
from refold.verify import choices
from refold.verify.flips import settle_flips
from refold.verify.given import copied, state_kept
from refold.verify.locate import too_far
from refold.verify.manners import Manners, MannersError, run_twice
from refold.verify.references import References, add_nearby, first_line, references
from refold.verify.result import Numerics
from refold.verify.samples import shapes_of
from refold.verify.tolerance import Leaf, collect, widen

_MOST_HELD = 2  # calls that both graphs run again for, held to the same choices
MORE_RUNS = 16  # inputs that decide where the first ones are past the tolerance


def verify(
    original: fx.GraphModule | None,
    candidate: Callable[..., Any],
    found: References,
    *,
    folded_gm: fx.GraphModule | None = None,
) -> Numerics:
    """Compares a candidate with the float64 oracle of the original graph.

    Args:
        original: the IR before any pass, to find the first node that deviates; ``None`` where its
            weights were released.
        candidate: anything with the model's signature.
        found: what the original computes (:func:`references`).
        folded_gm: the IR after the passes, to find the first node that deviates.

    Raises:
        VerificationError: structure, shape, dtype, NaN pattern or numbers differ.
    """
    result = Numerics(inputs=len(found.calls), notes=list(found.notes))
    graphs = [g for g in (original, folded_gm, candidate) if isinstance(g, fx.GraphModule)]
    leaves: dict[int, Leaf] = {}
    for at, (call, exact, own, nearby) in enumerate(
        zip(found.calls, found.exact, found.own, found.nearby, strict=True)
    ):
        manners = found.manners if at == 0 else None
        collect(leaves, _run_candidate(candidate, graphs, call, manners), own, exact, call)
        for other in nearby:
            widen(leaves, at, other, exact)
    for leaf in leaves.values():
        leaf.settle(found.allowed)
    worst = max(leaves.values(), key=_badness, default=None)
    if worst is not None:
        result.take(worst)
        if not worst.error <= worst.tolerance:
            raise too_far(worst, original, folded_gm, found.calls)
    settle_flips(result, leaves, original, folded_gm, found.calls, found.allowed)
    _judge_blind(result, leaves, original, folded_gm, found)
    _note_empty(result, leaves)
    return result


def _badness(leaf: Leaf) -> float:
    return leaf.error / leaf.tolerance if leaf.tolerance else 0.0


def _judge_blind(
    result: Numerics,
    leaves: dict[int, Leaf],
    original: fx.GraphModule | None,
    folded: fx.GraphModule | None,
    found: References,
) -> None:
    """Judges the calls in which the original's own error would hide any other."""
    for at in list(dict.fromkeys(at for leaf in leaves.values() for at in leaf.blind))[:_MOST_HELD]:
        call, held = found.calls[at], None
        if original is not None and folded is not None:
            held = choices.judge(original, folded, call, found.allowed)
        if held is None:
            told = _count_apart([x for x in leaves.values() if at in x.blind], at, call)
        else:
            worst, told = held
            if _badness(worst) > result.badness or all(
                leaf.is_blind for leaf in leaves.values() if leaf.parts
            ):
                result.take(worst)
        result.notes.append(
            f"{shapes_of(call)}: the model's own error is past what a comparison can bear; {told}"
        )


def _count_apart(leaves: list[Leaf], at: int, call: Call) -> str:
    """Compares how many elements are far off, where that is all that can be compared."""
    verdicts = [leaf.few_apart(at) for leaf in leaves]
    for leaf, verdict in zip(leaves, verdicts, strict=True):
        if verdict is False:
            ours, theirs = leaf.shares[at]
            raise VerificationError(
                f"{leaf.name}: {ours:.0%} of the elements are off by more than rounding, in the "
                f"original itself {theirs:.0%} are. Inputs {shapes_of(call)}"
            )
    if None in verdicts:
        return "not compared but for its size"
    return "compared by how many elements are far off"


def _note_empty(result: Numerics, leaves: dict[int, Leaf]) -> None:
    """Says which outputs had no finite number; if none had one, nothing was compared."""
    empty = [leaf for leaf in leaves.values() if leaf.count and leaf.is_void]
    for leaf in empty:
        result.notes.append(
            f"nothing could be compared: {leaf.name} is NaN or infinite everywhere, for every input"
        )
    if empty and len(empty) == len(leaves):
        result.inputs = 0


def verify_widely(
    original: fx.GraphModule | None,
    candidate: Callable[..., Any],
    program: Program,
    known: References,
) -> tuple[Numerics, References]:
    """Compares a candidate with its original; more inputs decide where the first do not.

    Few inputs may miss the original's own worst rounding, which is heavy-tailed; so may a single
    run where the candidate happens to have its worst. More inputs are drawn then, and the
    original is also run one rounding beside each of them, and with each result a rounding off.

    Returns:
        The verdict, and the references that it was reached with.

    Raises:
        VerificationError: as :func:`verify`.
    """
    folded = candidate if isinstance(candidate, fx.GraphModule) else None
    try:
        return verify(original, candidate, known, folded_gm=folded), known
    except MannersError:
        raise
    except VerificationError:
        if original is None:
            raise
    known = replace(
        references(original, program, runs=MORE_RUNS, module=known.module),
        allowed=known.allowed,
        manners=known.manners,
    )
    add_nearby(original, known)
    for call, results in zip(known.calls, known.nearby, strict=True):
        results += choices.rounded(original, call)
    return verify(original, candidate, known, folded_gm=folded), known


def _run_candidate(
    candidate: Callable[..., Any],
    graphs: list[fx.GraphModule],
    call: Call,
    manners: Manners | None,
) -> Any:
    args, kwargs = fresh(call)
    try:
        if manners is not None:
            return run_twice(candidate, graphs, call, manners)
        with state_kept(*graphs), torch.no_grad():
            return copied(candidate(*args, **kwargs))  # it may hand out the state
    except VerificationError:
        raise
    except Exception as error:
        raise VerificationError(
            f"the compiled model fails on inputs that the original takes ({shapes_of(call)}): "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
