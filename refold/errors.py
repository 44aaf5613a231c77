"""The errors of refold: each says what was expected, what came, where, and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import fx


class RefoldError(Exception):
    """Base of all errors that refold raises on purpose."""


class Declined(Exception):
    """Something stays as it is: raised where that is found out, whoever tries the fold says it.

    It is no error of anybody, so that it never leaves a compilation: what tries a candidate makes a
    record of it (:class:`refold.rewrite.result.Decline`).

    Attributes:
        reason: why, in one sentence without a full stop.
        node: where, if that is another node than the one that is tried.
        hint: what the user can do about it, or ``""``.
    """

    def __init__(self, reason: str, node: fx.Node | None = None, hint: str = "") -> None:
        super().__init__(reason)
        self.reason, self.node, self.hint = reason, node, hint


class UsageError(RefoldError, ValueError):
    """An argument, option, pass or target that does not exist or does not fit."""


class FrontendError(RefoldError):
    """The model could not be brought into the IR."""


class VerificationError(RefoldError):
    """The compiled model's numbers are past the tolerance.

    Attributes:
        layer: the first node whose value deviates, with its module path, if it could be located.
    """

    def __init__(self, message: str, layer: str | None = None) -> None:
        super().__init__(message)
        self.layer = layer


class ExpectationError(RefoldError):
    """A fold that the caller expected did not happen (``expect=``)."""


class VerifierError(RefoldError):
    """A pass left an invalid graph: a bug in the pass, addressed to its developer."""


class BackendError(RefoldError):
    """A target could not lower or load the folded graph."""


class RefitError(RefoldError):
    """New weights do not fit the folded model as it is: compile again with them."""


class MissingDependencyError(BackendError, ImportError):
    """An optional package that a target needs is not installed."""


def first_line(error: BaseException) -> str:
    """What an error says first, or its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns `` (did you mean 'x'?)`` for the nearest known name, else the list of known names."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return f" (did you mean {near[0]!r}?)"
    return f" (known: {', '.join(names)})" if names else ""
