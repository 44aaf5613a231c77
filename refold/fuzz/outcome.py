"""How a case is compiled, and what is found of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

WRONG, CRASH, ALARM, UNJUDGED, REFUSED = "wrong", "crash", "false alarm", "unjudged", "refused"


class Alarm(Exception):
    """Verification refuses what is right."""


@dataclass(frozen=True)
class Setting:
    """How a case is compiled.

    Attributes:
        way: ``graph``, or ``module`` for the whole way.
        pipeline: the passes, as a user names them.
        dtype: of the network.
        dynamic: whether sizes may vary.
        growth: as ``max_growth``.
        recorded: with a recipe; other weights are then tried.
        verified: whether verification runs as well, to count its false alarms.
        exact: whether the exact judge looks as well.
        target: where a module runs.
        options: for :func:`refold.compile_for_inference`.
    """

    way: str = "graph"
    pipeline: str = "default"
    dtype: torch.dtype = torch.float64
    dynamic: bool = False
    growth: float | None = None
    recorded: bool = False
    verified: bool = False
    exact: bool = False
    target: str = "torch"
    options: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What one case found.

    Attributes:
        seed: of the network.
        setting: how it was compiled.
        kind: what is wrong, or why nothing can be said; empty if all is right.
        what: the same, in a sentence.
        operators: the names of what the network called.
        rules: the rules that were applied.
        verified: whether verification ran.
        exact: what the exact judge said: equal, or why nothing.
    """

    seed: int
    setting: Setting
    kind: str = ""
    what: str = ""
    operators: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    verified: bool = False
    exact: str = ""
