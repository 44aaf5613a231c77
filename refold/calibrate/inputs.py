"""Calibration inputs: what a user gives, read as calls of the model, and some of them held out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from refold.errors import UsageError
from refold.graph import constants
from refold.graph.program import Call, as_call

_HELD_OUT = 8  # one of so many calibration inputs is held out


def given(calibration: Iterable[Any], rule: str) -> tuple[Any, ...]:
    """What a user gives for calibration inputs, as a tuple: iterators end.

    Raises:
        UsageError: it is one input, not a list of them.
    """
    if isinstance(calibration, (torch.Tensor, dict)):
        raise UsageError(f"{rule}: calibration takes a list of inputs: calibration=[x]")
    return tuple(calibration)


def read(gm: fx.GraphModule, calibration: Iterable[Any], rule: str) -> list[Call]:
    """The inputs as calls of the graph.

    Raises:
        UsageError: one is given in another structure, or of another kind, than the trace had.
    """
    calls = [as_call(example) for example in calibration]
    info = getattr(gm.graph._codegen, "pytree_info", None)
    for call in calls:
        structure = pytree.tree_structure(call)
        if info is not None and structure != info.in_spec:
            raise UsageError(
                f"{rule}: a calibration input is given as {structure}, the model was traced with "
                f"{info.in_spec}: give both alike"
            )
        misfit = _misfit(gm, call)
        if misfit:
            raise UsageError(f"{rule}: a calibration input does not fit: {misfit}")
    return calls


def read_and_hold_out(
    gm: fx.GraphModule, calibration: Iterable[Any], rule: str
) -> tuple[list[Call], list[Call]]:
    """The calls to calibrate on, and those that are kept back: of eight or more every eighth.

    Raises:
        UsageError: as for :func:`read`; or the model writes its own state, so that a second run of
            it is another.
    """
    calls = read(gm, calibration, rule)
    if calls and any(n.op == "get_attr" for n in constants.written(gm.graph)):
        raise UsageError(
            f"{rule}: the model writes its own state, so it cannot be calibrated: leave "
            "calibration out"
        )
    return _without_every(calls), calls[_HELD_OUT - 1 :: _HELD_OUT]


def _without_every(calls: Sequence[Call]) -> list[Call]:
    return [call for at, call in enumerate(calls) if at % _HELD_OUT != _HELD_OUT - 1]


def _misfit(gm: fx.GraphModule, call: Call) -> str | None:
    """Which tensor of a call has another dtype, rank or fixed size than in the trace."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    for node, given in zip(placeholders, pytree.tree_leaves(call), strict=False):
        traced = node.meta.get("val")
        if not isinstance(traced, torch.Tensor) or not isinstance(given, torch.Tensor):
            continue
        fits = len(given.shape) == len(traced.shape) and all(
            have == size
            for have, size in zip(given.shape, traced.shape, strict=True)
            if isinstance(size, int)
        )
        if not fits or given.dtype != traced.dtype:
            takes = ", ".join(str(size) for size in traced.shape)
            return (
                f"{node.name} is {given.dtype} {list(given.shape)}, the model takes "
                f"{traced.dtype} [{takes}]"
            )
    return None
