"""What a system of a paper is, how it is examined, and the registry that the modules fill."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

import refold
from refold.rewrite.result import Decline
from tests.compare import EXACT, SINGLE, call, double, relative_error
from tests.models.case import CONV_LIKE, ModelCase
from tests.randomise import randomise

Check = Literal["structure", "numbers", "onnxruntime"]
CHECKS: tuple[Check, ...] = ("structure", "numbers", "onnxruntime")


@dataclass(frozen=True)
class System(ModelCase):
    """A network of a paper in its training form, with what folding must leave of it.

    Kinds are those of reports (``conv``, ``batch-norm``, ``layout``), and ``conv-like`` for the sum
    of convolutions, transposed convolutions and linears.

    Attributes:
        paper: the paper's name.
        there: calls by kind in the traced graph, exactly.
        left: calls by kind in the folded graph, at most; kinds of ``there`` that it does not name
            must be gone.
        passes: ids of the passes that must have applied something.
        declines: expressions, each of which the reason of a declined record must match.
        dead: the parameters, or parts ``name[:, 0]``, that the report must name as dead.
        warns: expressions, each of which a warning of the report must match.
        noted: sentences that the notes of the report for ONNX Runtime must hold.
        bound: largest error in float64, relative to the output.
        settings: what ``refold.fold`` is given besides the model and the inputs.
        example: makes the inputs, where normal tensors of ``shapes`` will not do.
        prepared: whether the builder brings its weights; they are drawn anew otherwise.
        fails: the checks that do not hold yet, each with its reason; such a check must fail.
        slow: whether it takes seconds, and so is left to the sweep.
        requires: packages without which it cannot be built.
        refused: an expression that the error of compiling it must match; nothing else is checked.
        bind: makes the values of the inputs that are bound, by name.
        fixed_batch: whether the network runs at the inputs' own batch size alone.
    """

    paper: str = ""
    there: Mapping[str, int] = field(default_factory=dict)
    left: Mapping[str, int] = field(default_factory=dict)
    passes: tuple[str, ...] = ()
    declines: tuple[str, ...] = ()
    dead: tuple[str, ...] = ()
    warns: tuple[str, ...] = ()
    noted: tuple[str, ...] = ()
    bound: float = EXACT
    settings: Mapping[str, Any] = field(default_factory=dict)
    example: Callable[[], tuple[Any, ...]] | None = None
    prepared: bool = False
    fails: Mapping[Check, str] = field(default_factory=dict)
    slow: bool = False
    requires: tuple[str, ...] = ()
    refused: str = ""
    bind: Callable[[], Mapping[str, Any]] | None = None
    fixed_batch: bool = False

    def inputs(self, seed: int = 1) -> tuple[Any, ...]:
        return super().inputs(seed) if self.example is None else self.example()

    def model(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = self.build().eval()
        if not self.prepared:
            bind = {} if self.bind is None else self.bind()
            randomise(_Completed(model, bind), self.inputs(), seed)
        return model


class _Completed(nn.Module):
    """A network that is called with its free inputs alone."""

    def __init__(self, model: nn.Module, bind: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.bind = model, bind

    def forward(self, *args: Any) -> Any:
        return self.model(*args, **self.bind)


@dataclass(frozen=True)
class Outcome:
    """What folding a system in float64 gave.

    Attributes:
        there: calls by kind before.
        left: calls by kind after.
        error: largest error, relative to the output, over two batch sizes.
        passes: ids of the passes that applied something, in the order of their first run.
        declined: every declined record.
        report: the whole record.
    """

    there: dict[str, int]
    left: dict[str, int]
    error: float
    passes: tuple[str, ...]
    declined: tuple[Decline, ...]
    report: refold.Report


class Systems(dict[str, System]):
    """Systems by name, filled by the decorator :meth:`add`; ``title`` heads them in the table."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title

    def add(
        self, name: str, *shapes: tuple[int, ...], **facts: Any
    ) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
        """Registers a builder under a name; ``facts`` are the other fields of :class:`System`."""

        def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
            assert name not in self, f"two systems are called {name!r}"
            self[name] = System(build, shapes, **facts)
            return build

        return register


def examine(system: System) -> Outcome:
    """Folds a float64 copy of a system's network and compares it with the original."""
    original = system.model().double()
    inputs, settings = double((system.inputs(), settings_of(system)))
    folded = refold.fold(deepcopy(original), inputs, verify=False, **settings)
    report = folded.report
    error = max(
        relative_error(call(folded, given), call_unbound(deepcopy(original), given, settings))
        for given in (inputs, inputs if system.fixed_batch else _another_batch(inputs))
    )
    return Outcome(
        there=_with_sum(report.before.census),
        left=_with_sum(report.after.census),
        error=error,
        passes=tuple(dict.fromkeys(run.name for run in report.passes if run.applied)),
        declined=tuple(record for run in report.passes for record in run.declined),
        report=report,
    )


def structure_faults(system: System, found: Outcome) -> list[str]:
    """What the folding of a system did not do as stated, a sentence each."""
    faults = []
    there = {kind: found.there.get(kind, 0) for kind in system.there}
    if there != system.there:
        faults.append(f"there are {there}, stated {dict(system.there)}")
    kinds = {*system.there, *system.left}
    left = {kind: found.left.get(kind, 0) for kind in kinds}
    if any(count > system.left.get(kind, 0) for kind, count in left.items()):
        faults.append(f"left are {left}, stated {dict(system.left)}: {found.left}")
    if set(system.passes) - set(found.passes):
        faults.append(f"only {', '.join(found.passes)} applied something")
    reasons = [record.reason for record in found.declined]
    for words in system.declines:
        if not any(re.search(words, reason) for reason in reasons):
            faults.append(f"no reason matches {words!r}: {reasons}")
    dead = [parameter.name + parameter.where for parameter in found.report.dead]
    if set(system.dead) - set(dead):
        faults.append(f"dead are {dead}, stated {system.dead}")
    for words in system.warns:
        if not any(re.search(words, warning) for warning in found.report.warnings):
            faults.append(f"no warning matches {words!r}: {found.report.warnings}")
    return faults


def settings_of(system: System) -> dict[str, Any]:
    """What ``refold.fold`` is given besides the model and its free inputs."""
    bind = {} if system.bind is None else {"bind": dict(system.bind())}
    return {**system.settings, **bind}


def call_unbound(model: nn.Module, inputs: tuple[Any, ...], settings: Mapping[str, Any]) -> Any:
    """The original's output, which takes the bound inputs too."""
    return call(functools.partial(model, **settings.get("bind", {})), inputs)


def onnxruntime_error(system: System) -> tuple[float, float]:
    """Error of the float32 artifact against the float64 original, and the largest allowed."""
    model, inputs = system.model(), system.inputs()
    settings = settings_of(system)
    exact = call_unbound(deepcopy(model).double(), double(inputs), double(settings))
    own = relative_error(call_unbound(deepcopy(model), inputs, settings), exact)
    compiled = refold.compile_for_inference(model, inputs, target="ort", **settings)
    assert set(system.noted) <= set(compiled.report.notes), compiled.report.notes
    error = relative_error(call(compiled, inputs), exact)
    return error, 4 * own + max(SINGLE, system.bound)


def _another_batch(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same inputs with one row less, where all lead with the same size and have two."""
    sizes = {value.shape[0] if isinstance(value, Tensor) and value.ndim else 0 for value in inputs}
    if len(sizes) != 1 or min(sizes) < 2:
        return inputs
    return tuple(value[1:] for value in inputs)


def _with_sum(census: Mapping[str, int]) -> dict[str, int]:
    return {**census, "conv-like": sum(census.get(kind, 0) for kind in CONV_LIKE)}
