"""Target ``coreml``: a Core ML package (.mlpackage), written here, run by Apple's systems alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import fx

from refold.backends.base import Artifact, Capabilities, Runner, Target
from refold.backends.edge.static import StaticProgram, quiet
from refold.errors import BackendError, MissingDependencyError, UsageError

if TYPE_CHECKING:
    from refold.graph.program import Program

_DEBUG_FILE = "executorch_debug_handle_mapping.json"


class CoreMlTarget(Target):
    """Converts to an ML program with float32 arithmetic; nothing here can run it."""

    name = "coreml"
    suffix = ".mlpackage"
    capabilities = Capabilities(
        packages=("coremltools",),
        extra="coreml",
        shares_weights=(),
        complex_calls=False,
        dtypes=("float32", "float16"),
        marker="Manifest.json",
        static=True,
        verified="converted, never run",
    )

    def lower(self, program: Program, gm: fx.GraphModule, options: Any) -> Artifact:
        static = StaticProgram.of(program, gm, "Core ML")
        return Artifact(_convert(static), static.notes)

    def load(self, artifact: Artifact, options: Any) -> Runner:
        raise MissingDependencyError(
            "this target converts only: compare the package's predictions with the model's on macOS"
        )

    def save(self, artifact: Artifact, folder: Path, name: str) -> None:
        if not name.endswith(self.suffix):
            raise UsageError(f"Core ML knows packages by their suffix: call it {name}.mlpackage")
        artifact.content.save(str(folder / name))
        # Names of nodes for another tool's debugger; no part of the package's manifest.
        (folder / name / _DEBUG_FILE).unlink(missing_ok=True)

    def stats(self, artifact: Artifact) -> dict[str, int]:
        model = artifact.content
        (block,) = model.get_spec().mlProgram.functions["main"].block_specializations.values()
        weights = Path(model.weights_dir) / "weight.bin"
        return {
            "nodes": sum(op.type != "const" for op in block.operations),
            "bytes": weights.stat().st_size if weights.exists() else 0,
        }


def _convert(static: StaticProgram) -> Any:
    with quiet():
        import coremltools

        names = static.signature.output_names
        try:
            return coremltools.convert(
                static.export().run_decompositions({}),
                outputs=[coremltools.TensorType(name=name) for name in names],
                convert_to="mlprogram",
                # The default rounds every constant and every sum to float16.
                compute_precision=coremltools.precision.FLOAT32,
                minimum_deployment_target=coremltools.target.iOS16,
                skip_model_load=True,
            )
        except Exception as error:
            # The converter raises whatever its translation of an operator raises.
            text = " ".join(str(error).split())[:300] or type(error).__name__
            raise BackendError(
                f"coremltools cannot convert the model: {text}{static.hints(str(error))}"
            ) from error
