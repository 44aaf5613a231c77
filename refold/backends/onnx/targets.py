"""Targets ``onnx`` and ``ort``: a standard ONNX file, and the same in ONNX Runtime, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from refold.backends.base import Artifact, Capabilities, Checked, Runner, Target
from refold.backends.onnx import export, recipe_file, session
from refold.backends.onnx.shift_add import check
from refold.backends.onnx.shift_add import choice as shift_add
from refold.errors import UsageError
from refold.rewrite import cost

if TYPE_CHECKING:
    from refold.graph.program import Program
    from refold.refit.recipe import Recipe
    from refold.verify.references import References

# The exporter turns a request below 18 into 18 without a word.
_OPSETS = range(18, 24)
_ANY_RUNTIME = "what a call takes depends on the runtime of the file; target 'ort' knows its own"
_ACCURACY_LEVEL = 4  # of ONNX Runtime's sessions, where nobody tells them otherwise


@dataclass(frozen=True)
class OnnxOptions:
    """Options of the ``onnx`` target.

    Attributes:
        opset: version of the standard operator set, 18 to 23; shift-add layers in 2 or 4 bits raise
            it where they must.
        requantise: width, 4 or 8 bits, that shift-add layers are rounded to where their scales are
            no integer grid; by default they keep their planes.
    """

    opset: int = 20
    requantise: int | None = None

    def __post_init__(self) -> None:
        if self.requantise not in (None, 4, 8):
            raise UsageError(f"requantise {self.requantise!r}: choose 4 or 8 bits, or None")
        if self.opset not in _OPSETS:
            raise UsageError(
                f"opset {self.opset} cannot be written: choose {_OPSETS[0]} to {_OPSETS[-1]}"
            )


class _WritesOnnx(Target):
    """What the targets that write ``.onnx`` files have in common."""

    suffix = ".onnx"

    def accuracy_level(self, options: Any) -> int:
        """How the runtime behind the file multiplies by 2, 4 and 8-bit weights."""
        return _ACCURACY_LEVEL

    def lower(self, program: Program, gm: fx.GraphModule, options: Any) -> Artifact:
        return self._lower(program, gm, options)

    def lower_to_refit(self, program: Program, gm: fx.GraphModule, options: Any) -> Artifact:
        return self._lower(program, gm, options, refits=True)

    def _lower(
        self, program: Program, gm: fx.GraphModule, options: Any, *, refits: bool = False
    ) -> Artifact:
        kernels = shift_add.onnx_runtime(self.accuracy_level(options), options.requantise)
        return export.lower(program, gm, options.opset, kernels, refits=refits)

    def check(
        self, artifact: Artifact, gm: fx.GraphModule, known: References, options: Any
    ) -> Checked:
        return check.check(artifact.content, gm, known, self.accuracy_level(options))

    def load(self, artifact: Artifact, options: Any) -> Runner:
        return session.load(artifact.content, later=True)

    def save(self, artifact: Artifact, folder: Path, name: str) -> None:
        export.save(artifact.content.model, folder, name)

    def save_recipe(self, artifact: Artifact, recipe: Recipe, folder: Path, name: str) -> bool:
        return recipe_file.write_beside(artifact.content.initializers, recipe, folder, name)

    def refit(
        self, artifact: Artifact, gm: fx.GraphModule, tensors: Mapping[str, torch.Tensor]
    ) -> Artifact:
        return export.refit(artifact, tensors)

    def stats(self, artifact: Artifact) -> dict[str, int]:
        return export.stats(artifact.content.model)


class OnnxTarget(_WritesOnnx):
    """Writes ONNX; calls of the compiled model run in ONNX Runtime where that is installed."""

    name = "onnx"
    options = OnnxOptions
    capabilities = Capabilities(
        packages=("onnx", "onnxscript"),
        extra="onnx",
        costs=cost.on_cpu("onnx", _ANY_RUNTIME),
        shares_weights=("files",),
        complex_calls=False,
    )


@dataclass(frozen=True)
class OnnxRuntimeOptions(OnnxOptions):
    """Options of the ``ort`` target.

    Attributes:
        opset: version of the standard operator set, 18 to 23.
        requantise: as for the ``onnx`` target.
        threads: threads inside one operator; 0 lets ONNX Runtime choose.
        accuracy_level: of products with 2, 4 and 8-bit weights. 4 rounds their activations to int8
            and is fast; 0 computes in float32, twice as fast as float32 weights at batch 1.
    """

    threads: int = 0
    accuracy_level: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threads < 1 << 31:
            raise UsageError(
                f"threads must be 0 (ONNX Runtime chooses) or more, got {self.threads}"
            )
        if self.accuracy_level not in (0, 4):
            raise UsageError(
                f"accuracy_level must be 0 (float32) or 4 (int8 activations), got "
                f"{self.accuracy_level}"
            )


class OnnxRuntimeTarget(_WritesOnnx):
    """Lowers through ONNX and runs the model in ONNX Runtime."""

    name = "ort"
    options = OnnxRuntimeOptions
    capabilities = Capabilities(
        packages=("onnx", "onnxscript", "onnxruntime"),
        extra="ort",
        costs=cost.on_cpu("onnxruntime"),
        shares_weights=("files",),
        complex_calls=False,
        dtypes=("float32", "float16"),
    )

    def accuracy_level(self, options: OnnxRuntimeOptions) -> int:
        return options.accuracy_level

    def load(self, artifact: Artifact, options: OnnxRuntimeOptions) -> Runner:
        level = self.accuracy_level(options)
        return session.load(artifact.content, threads=options.threads, accuracy_level=level)

    def load_file(self, path: Path, program: Program) -> Runner:
        return session.load_file(path, program)
