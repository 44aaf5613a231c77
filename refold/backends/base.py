"""The contract between a folded program and the runtimes that execute it."""

from __future__ import annotations

import abc
import dataclasses
import importlib.util
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from refold.errors import BackendError, RefitError
from refold.graph import provenance
from refold.graph.ops import op_name
from refold.rewrite.cost import CostModel

if TYPE_CHECKING:
    from refold.graph.program import Program
    from refold.refit.recipe import Recipe
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


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What is to be known of a target before it lowers anything; the defaults are a plain one's.

    Attributes:
        packages: what must be installed to use it.
        extra: of refold, that installs them; without one they are installed by their names.
        dtypes: float dtypes of models that it takes; none where it takes what PyTorch computes.
        static: it fixes every shape when it lowers.
        ranks_follow_sizes: its results may have another rank at batch 1, as where it runs call by
            call.
        complex_calls: it computes complex numbers.
        shares_weights: what of it reads the folded graph's own tensors: ``calls``, ``files``. Less
            where the runtime, or the artifact, has a copy of the weights.
        marker: the file that marks a saved artifact where that is a directory.
        verified: how far its artifacts are verified, in words.
        costs: what calls cost on it, where that was measured (:mod:`refold.rewrite.cost`).
    """

    packages: tuple[str, ...] = ()
    extra: str = ""
    dtypes: tuple[str, ...] = ()
    static: bool = False
    ranks_follow_sizes: bool = False
    complex_calls: bool = True
    shares_weights: tuple[str, ...] = ("calls", "files")
    marker: str | None = None
    verified: str = "run and compared where it is compiled"
    costs: CostModel | None = None


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """Of a target that has none."""


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


class Target(abc.ABC):
    """A runtime that folded programs are lowered to.

    A target is a subclass that says what it can do (``capabilities``), and writes the four methods
    that every runtime needs; those behind them have a default that is right for most. It is a base
    class, not a protocol, so that the defaults are code in one place, not questions that the
    compiler asks of each target; and so that a method that is missing or misspelled is an error
    where the target is made, not a feature that it silently does not have.

    Attributes:
        name: what users write in ``target=``.
        suffix: file name suffix of a saved artifact, with the dot.
        options: frozen dataclass of the target's options; its fields are the accepted keywords,
            and on the command line ``-O name=value``.
        capabilities: what is known of it before it lowers anything.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    options: ClassVar[type] = NoOptions
    capabilities: ClassVar[Capabilities] = Capabilities()

    @abc.abstractmethod
    def lower(self, program: Program, gm: fx.GraphModule, options: Any) -> Artifact:
        """Lowers the folded graph; ``program`` says what it was traced with."""

    def lower_to_refit(self, program: Program, gm: fx.GraphModule, options: Any) -> Artifact:
        """Lowers the folded graph such that :meth:`refit` can take new weights."""
        return self.lower(program, gm, options)

    @abc.abstractmethod
    def load(self, artifact: Artifact, options: Any) -> Runner:
        """Makes the artifact callable over torch tensors, with the model's own signature.

        Raises:
            MissingDependencyError: it can be written here, but not run.
        """

    @abc.abstractmethod
    def save(self, artifact: Artifact, folder: Path, name: str) -> None:
        """Writes ``name`` (and files beside it) into an empty folder."""

    @abc.abstractmethod
    def stats(self, artifact: Artifact) -> dict[str, int]:
        """Counts for the report: ``nodes``, ``bytes``."""

    def available(self) -> str | None:
        """``None`` if the target can be used here, else the reason and the fix."""
        return missing(self.capabilities.packages, self.capabilities.extra)

    @property
    def costs(self) -> CostModel:
        """What calls cost on it; where nobody measured, a model that says so."""
        return self.capabilities.costs or CostModel(self.name)

    def record(
        self, artifact: Artifact, known: References, weights: dict[str, dict[str, Any]]
    ) -> References:
        """Adds to an artifact what the original computes, and where its weights came from.

        It is for artifacts that are verified on another machine, later.

        Returns:
            The references that the artifact is judged by here.
        """
        return known

    def check(
        self, artifact: Artifact, gm: fx.GraphModule, known: References, options: Any
    ) -> Checked:
        """Compares an artifact with the graph that it was lowered from, on the calls of ``known``.

        It is for what the comparison with the original cannot see: where an approximate pass
        changed the numbers, an error of the lowering hides behind them.

        Raises:
            VerificationError: the artifact does not compute what the graph does.
        """
        return Checked()

    def refit(
        self, artifact: Artifact, gm: fx.GraphModule, tensors: Mapping[str, torch.Tensor]
    ) -> Artifact:
        """The artifact with other constants; the given one stays as it is.

        A target that does not write this method takes no new weights.

        Args:
            artifact: what :meth:`Target.lower` made.
            gm: the folded graph over the new constants.
            tensors: the new constants by name.

        Raises:
            RefitError: lowering anew would leave another program.
        """
        raise RefitError(f"target {self.name!r} cannot take new weights: compile again")

    def save_recipe(self, artifact: Artifact, recipe: Recipe, folder: Path, name: str) -> bool:
        """Writes, beside a saved artifact, how its constants follow from the model's weights.

        Without this method the recipe lives as long as the compiled model.

        Returns:
            Whether it wrote one.
        """
        return False

    def load_file(self, path: Path, program: Program) -> Runner:
        """Makes a file, of this target or another tool, callable as the traced model is.

        A target that does not write this method loads no files.

        Raises:
            BackendError: it is damaged, or has other inputs or results than the model.
        """
        raise BackendError(f"target {self.name!r} loads no files")

    @property
    def refits(self) -> bool:
        """Whether its artifacts take new weights."""
        return type(self).refit is not Target.refit

    @property
    def loads_files(self) -> bool:
        """Whether it loads files."""
        return type(self).load_file is not Target.load_file


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
    """The sentence for packages that are not installed, or ``None``.

    Without an extra of refold that installs them they are installed by name.
    """
    absent = [p for p in packages if importlib.util.find_spec(p) is None]
    if not absent:
        return None
    verb = "is" if len(absent) == 1 else "are"
    wanted = f"'refold[{extra}]'" if extra else " ".join(absent)
    return f"{' and '.join(absent)} {verb} not installed: pip install {wanted}"
