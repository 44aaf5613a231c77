"""Whether two graphs compute the same: rounding is told apart from a wrong rewrite.

What rounding may do is asked of the original itself: it runs again with every result a rounding or
two off, and the largest change of a few such runs is its own error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from refold.fuzz import contract
from refold.fuzz.contract import Breach, relative_error
from refold.verify.references import OwnRun

# Relative errors: of a float64 fold, and what rounding does to the original itself, times this.
EXACT = 1e-10
_ROUNDINGS = 100.0
_NOISES = 3
_ILL = 1e-2  # where rounding changes a result by more, nothing can be said


class Unclear(Exception):
    """Rounding alone changes the result so much that nothing can be said."""


def agree(original: fx.GraphModule, folded: fx.GraphModule, inputs: list[torch.Tensor]) -> None:
    """Compares two graphs on inputs.

    Raises:
        Breach: they differ by more than rounding.
    """
    try:
        want = original(*contract.copied(inputs))
    except (RuntimeError, ValueError, IndexError):
        return  # the network does not take these sizes
    given = contract.copied(inputs)
    got = folded(*given)
    if not all(map(torch.equal, given, inputs)):
        raise Breach("an input was written")
    exact = all(v.dtype in (torch.float64, torch.complex128) for v in contract.tensors(want)
                if v.is_floating_point() or v.is_complex())  # fmt: skip
    try:
        error = relative_error(got, want)
    except Breach as breach:
        if breach.error is None or exceeds_rounding(original, inputs, want, breach):
            raise
        return
    if error > (EXACT if exact else 0.0):
        found = Breach(f"relative error {error:.1e}", error)
        if exceeds_rounding(original, inputs, want, found):
            sizes = [tuple(v.shape) for v in inputs]
            raise Breach(f"{found} on {sizes}, more than rounding makes", error)


def exceeds_rounding(
    original: fx.GraphModule, inputs: Sequence[Any], want: Any, breach: Breach
) -> bool:
    """Whether a breach of numbers is more than rounding makes.

    Raises:
        Unclear: rounding changes the results so much that nothing can be said.
    """
    assert breach.error is not None
    own = noise(original, inputs, want)
    if own > _ILL:
        raise Unclear(f"rounding alone changes the results by {own:.0e}")
    return breach.error > max(EXACT, _ROUNDINGS * own)


def noise(gm: fx.GraphModule, inputs: Sequence[Any], want: Any) -> float:
    """How far roundings take the results of a graph: the largest relative error of a few runs."""
    worst = 0.0
    for seed in range(_NOISES):
        try:
            worst = max(worst, relative_error(OwnRun(gm, noise=seed).of((tuple(inputs), {})), want))
        except (Breach, RuntimeError):
            return float("inf")
    return worst
