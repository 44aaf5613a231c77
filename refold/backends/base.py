"""The contract between a folded program and the runtimes that execute it."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import fx

from refold.graph import provenance
from refold.graph.kinds import op_name
from refold.rewrite.cost import CostModel

if TYPE_CHECKING:
    from refold.graph.program import Program
    from refold.verify.references import References

Runner = Callable[..., Any]

LEFT_ALONE = "the artifact leaves it alone"  # how a note on an input that the model writes ends


@dataclasses.dataclass(frozen=True)
class Artifact:
    """What a target made of a folded program.

    Attributes:
        content: the target's own object (a graph module, an ONNX model, ...).
        notes: sentences for the report (what had to be spelled differently, what became static).
    """

    content: Any
    notes: tuple[str, ...] = ()

    @property
    def leaves_inputs(self) -> bool:
        """Whether inputs that the model writes are not written, which a note says."""
        return any(note.endswith(LEFT_ALONE) for note in self.notes)


@runtime_checkable
class Target(Protocol):
    """A runtime that folded programs are lowered to.

    Attributes:
        name: what users write in ``target=``.
        suffix: file name suffix of a saved artifact, with the dot.
        options: frozen dataclass of the target's options; its fields are the accepted keywords.
    """

    name: str
    suffix: str
    options: type

    def available(self) -> str | None:
        """``None`` if the target can be used here, else the reason and the fix."""

    def lower(self, program: Program, gm: fx.GraphModule, options: Any) -> Artifact:
        """Lowers the folded graph; ``program`` says what it was traced with."""

    def load(self, artifact: Artifact, options: Any) -> Runner:
        """Makes the artifact callable over torch tensors, with the model's own signature.

        Raises:
            MissingDependencyError: it can be written here, but not run.
        """

    def save(self, artifact: Artifact, folder: Path, name: str) -> None:
        """Writes ``name`` (and files beside it) into an empty folder."""

    def stats(self, artifact: Artifact) -> dict[str, int]:
        """Counts for the report: ``nodes``, ``bytes``."""


def is_static(target: Target) -> bool:
    """Whether a target fixes every shape when it lowers; it says so in an attribute ``static``."""
    return bool(getattr(target, "static", False))


def shares_weights(target: Target) -> tuple[str, ...]:
    """What of a target reads the folded graph's own tensors: ``calls``, ``files``.

    A target whose runtime, or whose artifact, has a copy of the weights says less in an attribute
    ``shares_weights``.
    """
    return tuple(getattr(target, "shares_weights", ("calls", "files")))


def ranks_follow_sizes(target: Target) -> bool:
    """Whether a target's results may have another rank at batch 1.

    One that runs call by call says so in an attribute ``ranks_follow_sizes``.
    """
    return bool(getattr(target, "ranks_follow_sizes", False))


def computes_complex(target: Target) -> bool:
    """Whether a target has complex tensors; one without says ``complex_calls = False``."""
    return bool(getattr(target, "complex_calls", True))


def costs_of(target: Target) -> CostModel:
    """What calls cost on a target; it says so in an attribute ``costs``, where that is known."""
    return getattr(target, "costs", None) or CostModel(target.name)


def verification_of(target: Target) -> str:
    """How far a target's artifacts are verified; it says so in an attribute ``verified``."""
    return str(getattr(target, "verified", "run and compared where it is compiled"))


def dtypes_of(target: Target) -> tuple[str, ...]:
    """Float dtypes of models that a target takes, or none where it takes what PyTorch computes.

    It says so in an attribute ``dtypes``.
    """
    return tuple(getattr(target, "dtypes", ()))


@runtime_checkable
class KeepsRecord(Protocol):
    """A target whose artifact is verified on another machine, later."""

    def record(
        self, artifact: Artifact, known: References, weights: dict[str, dict[str, Any]]
    ) -> References:
        """Adds to an artifact what the original computes, and where its weights came from.

        Returns:
            The references that the artifact is judged by here.
        """


@dataclasses.dataclass(frozen=True)
class Checked:
    """What a comparison of an artifact with its graph found.

    Attributes:
        notes: sentences for the report.
        known: what the results are judged by from now on, where that is not the graph: the weights
            as they were written, and, of kernels that round their activations, a run of the graph
            that rounds them likewise, whose error is their yardstick.
    """

    notes: tuple[str, ...] = ()
    known: References | None = None


@runtime_checkable
class ChecksLowering(Protocol):
    """A target that compares its artifact with the graph that it was lowered from.

    It is for what the comparison with the original cannot see: where an approximate pass changed
    the numbers, an error of the lowering hides behind them.
    """

    def check(
        self, artifact: Artifact, gm: fx.GraphModule, known: References, options: Any
    ) -> Checked:
        """Compares on the calls of ``known``.

        Raises:
            VerificationError: the artifact does not compute what the graph does.
        """


@runtime_checkable
class Refits(Protocol):
    """A target whose artifacts can take new weights without being lowered again."""

    def refit(
        self, artifact: Artifact, gm: fx.GraphModule, tensors: Mapping[str, torch.Tensor]
    ) -> Artifact:
        """The artifact with other constants; the given one stays as it is.

        Args:
            artifact: what :meth:`Target.lower` made.
            gm: the folded graph over the new constants.
            tensors: the new constants by name.

        Raises:
            RefitError: lowering anew would leave another program.
        """


@runtime_checkable
class LoadsFile(Protocol):
    """A target that loads a file that it, or another tool, has written."""

    suffix: str

    def load_file(self, path: Path, program: Program) -> Runner:
        """Makes a file callable with the signature of the traced model.

        Raises:
            BackendError: it is damaged, or has other inputs or results than the model.
        """


def places(graph: fx.Graph, text: str) -> str:
    """Where in the model lies what a message of a runtime or converter names: lines, or nothing.

    Args:
        graph: that was to be lowered.
        text: the message; it names nodes (``%amax``) or operators (``aten::foo_copy.out``,
            ``aten_foo_default``, ``torch.ops.aten.foo.default``).
    """
    calls = [n for n in graph.nodes if n.op == "call_function"]
    named = re.search(r"%(\w+)", text)  # what follows the first are its operands
    found = [n for n in calls if named and n.name == named.group(1)]
    operators = {_operator(w) for w in re.findall(r"aten(?:::|[._])(\w+)", text)}
    found = found or [n for n in calls if op_name(n).split(".")[0] in operators]
    if not found:
        words = {_operator(w) for w in re.findall(r"[a-z]\w*", text)}
        found = [n for n in calls if op_name(n).split(".")[0] in words]
    lines = []
    for node in found[:3]:
        module, source = provenance.module_path(node), provenance.source_line(node)
        where = f" of module {module!r}" if module else ""
        lines.append(f"\n  {node.name}{where}{f' at {source}' if source else ''}")
    return "".join(lines)


def _operator(word: str) -> str:
    return word.removeprefix("aten_").removesuffix("_default").removesuffix("_copy")


def missing(packages: tuple[str, ...], extra: str) -> str | None:
    """The sentence for packages that are not installed, or ``None``."""
    absent = [p for p in packages if importlib.util.find_spec(p) is None]
    if not absent:
        return None
    verb = "is" if len(absent) == 1 else "are"
    return f"{' and '.join(absent)} {verb} not installed: pip install 'refold[{extra}]'"
