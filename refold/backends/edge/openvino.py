"""Target ``openvino``: OpenVINO's intermediate representation (.xml with its .bin), on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from refold.backends import flat
from refold.backends.base import Artifact, Capabilities, Runner, Target
from refold.backends.onnx import export
from refold.backends.onnx.targets import OnnxOptions
from refold.errors import BackendError, UsageError
from refold.rewrite import cost
from refold.scratch import Scratch

if TYPE_CHECKING:
    from refold.graph.program import Program

_DATA = frozenset({"Constant", "Parameter", "Result"})
_HINT = (
    "OpenVINO may compute in bfloat16 or float16 where the processor can: set "
    "INFERENCE_PRECISION_HINT=f32, as here, for the numbers that were verified"
)


@dataclass(frozen=True)
class OpenVinoOptions:
    """Options of the ``openvino`` target.

    Attributes:
        threads: threads of one inference; 0 lets OpenVINO choose.
    """

    threads: int = 0

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise UsageError(f"threads must be 0 (OpenVINO chooses) or more, got {self.threads}")


@dataclass(frozen=True)
class OpenVinoContent:
    """A model in memory (``openvino.Model``) and how the model's own calls map onto it."""

    model: Any
    signature: flat.Signature


class OpenVinoTarget(Target):
    """Lowers through ONNX and runs the model in OpenVINO's CPU plugin."""

    name = "openvino"
    suffix = ".xml"
    options = OpenVinoOptions
    capabilities = Capabilities(
        packages=("onnx", "onnxscript", "openvino"),
        extra="openvino",
        costs=cost.on_cpu("openvino", "merged layers are slower in OpenVINO"),
        shares_weights=(),
        complex_calls=False,
        dtypes=("float32", "float16"),
        verified="run and compared on the CPU",
    )

    def lower(self, program: Program, gm: fx.GraphModule, options: OpenVinoOptions) -> Artifact:
        lowered = export.lower(program, gm, OnnxOptions().opset)
        content: export.OnnxContent = lowered.content
        return Artifact(
            OpenVinoContent(_read(content.model), content.signature), (*lowered.notes, _HINT)
        )

    def load(self, artifact: Artifact, options: OpenVinoOptions) -> Runner:
        content: OpenVinoContent = artifact.content
        signature = content.signature
        for port in (*content.model.inputs, *content.model.outputs):
            if port.element_type.get_type_name() == "bf16":
                raise BackendError(
                    f"{_name(port)} is bfloat16, which NumPy and so OpenVINO's Python API cannot "
                    "hold: compile a float32 or float16 model for this target"
                )
        compiled = compile_model(content.model, threads=options.threads)

        def run(*args: Any, **kwargs: Any) -> Any:
            return signature.rebuild(run_compiled(compiled, signature.tensors(args, kwargs)))

        return run

    def save(self, artifact: Artifact, folder: Path, name: str) -> None:
        import openvino

        if not name.endswith(self.suffix):
            raise UsageError(f"OpenVINO finds the weights by the suffix: call the file {name}.xml")
        # The default rounds the weights to float16 without a word.
        try:
            openvino.save_model(artifact.content.model, str(folder / name), compress_to_fp16=False)
        except RuntimeError as error:
            # It says no more, whatever the cause.
            reason = "OpenVINO cannot write it (is the disk full?)"
            raise BackendError(f"{reason}: {_last_line(error)}; nothing was written") from error

    def load_file(self, path: Path, program: Program) -> Runner:
        compiled = compile_model(str(path))
        _, signature = flat.flatten(program.graph_module, program)
        inputs, outputs = flat.match(
            path, signature, *([_name(p) for p in ports] for ports in
            (compiled.inputs, compiled.outputs)),
        )  # fmt: skip

        def run(*args: Any, **kwargs: Any) -> Any:
            tensors = signature.tensors(args, kwargs)
            results = run_compiled(compiled, [tensors[i] for i in inputs])
            return signature.rebuild([results[outputs.index(i)] for i in range(len(results))])

        return run

    def stats(self, artifact: Artifact) -> dict[str, int]:
        operations = artifact.content.model.get_ops()
        sizes = [op.get_byte_size() for op in operations if op.get_type_name() == "Constant"]
        nodes = sum(op.get_type_name() not in _DATA for op in operations)
        return {"nodes": nodes, "bytes": sum(sizes)}


def _read(model: Any) -> Any:
    import openvino
    from openvino.passes import ConstantFolding, Manager

    from refold._version import __version__

    with Scratch() as folder:
        export.save(model, folder, "model.onnx")
        try:
            read = openvino.Core().read_model(str(folder / "model.onnx"))
        except RuntimeError as error:
            text = _last_line(error)
            raise BackendError(
                f"OpenVINO cannot read the model: {text}{export.places(model, text)}"
            ) from error
    # The ONNX reader computes shapes of biases that are known.
    folding = Manager()
    folding.register_pass(ConstantFolding())
    folding.run_passes(read)
    read.set_rt_info(__version__, ["refold", "version"])
    return read


def compile_model(model: Any, *, threads: int = 0) -> Any:
    """Compiles a model or an .xml file for the CPU, in the model's own precision."""
    import openvino

    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    try:
        return openvino.Core().compile_model(model, "CPU", settings)
    except RuntimeError as error:
        raise BackendError(f"OpenVINO cannot compile the model: {_last_line(error)}") from error


def run_compiled(compiled: Any, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Runs a compiled model over torch tensors, in the order of its inputs."""
    feeds = [t.detach().cpu().contiguous().numpy() for t in tensors]
    try:
        results = compiled(feeds)
    except RuntimeError as error:
        raise BackendError(f"OpenVINO failed to run the model: {_last_line(error)}") from error
    # The results are views of buffers that the next run writes to.
    return [torch.tensor(results[i]) for i in range(len(compiled.outputs))]


def executed_layers(compiled: Any) -> int:
    """Layers that OpenVINO executes after its own fusions."""
    operations = compiled.get_runtime_model().get_ops()
    kinds = [str(op.get_rt_info()["layerType"].astype(str)) for op in operations]
    return sum(kind not in ("Const", "Input", "Output") for kind in kinds)


def _name(port: Any) -> str:
    return str(port.any_name) if port.names else ""


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
