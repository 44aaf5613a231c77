"""Judges a compiled model by its numbers: its distance from a float64 oracle of the original.

The candidate may be as far from the oracle as rounding explains: four times as far as the original
model in its own dtype, or 64 units of the output's dtype (8 in half precision), relative to the
output's scale and pooled over several inputs. Integer and boolean outputs are compared exactly,
except where floats within that tolerance flipped them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from refold.errors import VerificationError
from refold.frontends.export import Program, fresh
from refold.verify.flips import settle_flips
from refold.verify.locate import too_far
from refold.verify.references import References, add_nearby, first_line, references, state_kept
from refold.verify.result import Numerics
from refold.verify.samples import Call, shapes_of
from refold.verify.tolerance import Leaf, measure

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
    for call, exact, own, nearby in zip(
        found.calls, found.exact, found.own, found.nearby, strict=True
    ):
        _compare(leaves, _run_candidate(candidate, graphs, call), own, exact, call)
        for other in nearby:
            _widen(leaves, other, exact)
    for leaf in leaves.values():
        leaf.settle(found.allowed)
    ranked = sorted(leaves.values(), key=lambda x: x.error / x.tolerance if x.tolerance else 0.0)
    if ranked:
        worst = ranked[-1]
        result.error, result.own_error = worst.error, worst.own_error
        result.tolerance, result.worst_output = worst.tolerance, worst.name
        if not worst.error <= worst.tolerance:
            raise too_far(worst, original, folded_gm, found.calls)
    settle_flips(result, leaves, original, folded_gm, found.calls, found.allowed)
    return result


def verify_widely(
    original: fx.GraphModule | None,
    candidate: Callable[..., Any],
    program: Program,
    known: References,
) -> tuple[Numerics, References]:
    """Compares a candidate with its original; more inputs decide where the first do not.

    Few inputs may miss the original's own worst rounding, which is heavy-tailed; so may a single
    run where the candidate happens to have its worst. More inputs are drawn then, and the
    original is also run one rounding beside each of them.

    Returns:
        The verdict, and the references that it was reached with.

    Raises:
        VerificationError: as :func:`verify`.
    """
    folded = candidate if isinstance(candidate, fx.GraphModule) else None
    try:
        return verify(original, candidate, known, folded_gm=folded), known
    except VerificationError:
        if original is None:
            raise
    known = replace(references(original, program, runs=MORE_RUNS), allowed=known.allowed)
    add_nearby(original, known)
    return verify(original, candidate, known, folded_gm=folded), known


def _run_candidate(candidate: Callable[..., Any], graphs: list[fx.GraphModule], call: Call) -> Any:
    args, kwargs = fresh(call)
    try:
        with state_kept(*graphs), torch.no_grad():
            return candidate(*args, **kwargs)
    except Exception as error:
        raise VerificationError(
            f"the compiled model fails on inputs that the original takes ({shapes_of(call)}): "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


def _compare(leaves: dict[int, Leaf], got: Any, own: Any, reference: Any, call: Call) -> None:
    ours, spec = pytree.tree_flatten(got)
    theirs, expected = pytree.tree_flatten(own)
    exact = pytree.tree_leaves(reference)
    if spec != expected:
        raise VerificationError(
            f"the compiled model returns {spec}, the original {expected}: the structure differs"
        )
    for index, (a, b, r) in enumerate(zip(ours, theirs, exact, strict=True)):
        name = f"output {index}" if len(ours) > 1 else "the output"
        if not isinstance(b, torch.Tensor):
            if a != b:
                raise VerificationError(f"{name} is {a!r}, the original's is {b!r}")
            continue
        if not isinstance(a, torch.Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            raise VerificationError(
                f"{name} is {_describe(a)}, the original's is {_describe(b)} for {shapes_of(call)}"
            )
        leaf = leaves.setdefault(index, Leaf(index, name, b.dtype))
        if b.dtype.is_floating_point or b.dtype.is_complex:
            measure(leaf, a, b, r, call)
        elif not torch.equal(a.cpu(), b.cpu()):
            leaf.differing.append((leaf.count, a, b, r))
        leaf.count += 1


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return f"a {type(value).__name__}"


def _widen(leaves: dict[int, Leaf], nearby: Any, reference: Any) -> None:
    """Takes another run of the original as a measure of its own rounding."""
    results, exact = pytree.tree_leaves(nearby), pytree.tree_leaves(reference)
    for leaf in leaves.values():
        b, r = results[leaf.index], exact[leaf.index]
        if leaf.dtype.is_floating_point and b.shape == r.shape:
            distance = (b.detach().cpu().double() - r.detach().cpu().double()).abs()
            finite = distance[distance.isfinite()]
            if finite.numel():
                leaf.own_distance = max(leaf.own_distance, float(finite.max()))
