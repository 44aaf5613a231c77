"""Target ``ncnn``: an ncnn network (.param with its .bin), made by pnnx, run on the CPU."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from refold.backends import flat
from refold.backends.base import Artifact, Capabilities, Runner, Target
from refold.backends.edge.static import StaticProgram, ThreadOptions, quiet
from refold.errors import BackendError, UsageError
from refold.rewrite import cost
from refold.scratch import Scratch

if TYPE_CHECKING:
    from refold.graph.program import Program

# How pnnx writes that it took no axis for the batch: no layer of the network, such as a
# convolution, says which one it is.
_NO_BATCH = 233

_ROUNDING = (
    "the numbers were verified without Winograd convolution, whose rounding is larger: set "
    "opt.use_winograd_convolution = false, and opt.use_fp16_* = false, to see the same"
)


@dataclass(frozen=True)
class NcnnContent:
    """A network in memory and how the model's own calls map onto it.

    Attributes:
        param: the layers, as text.
        weights: the weights.
        signature: of the model's own calls.
        batch_axes: for each input, the axis of size 1 that ncnn takes it without.
        sizes: for each result, its shape.
    """

    param: str
    weights: bytes
    signature: flat.Signature
    batch_axes: tuple[int | None, ...]
    sizes: tuple[tuple[int, ...], ...]


class NcnnTarget(Target):
    """Lowers through TorchScript and pnnx; ncnn runs one example at a time."""

    name = "ncnn"
    suffix = ".param"
    options = ThreadOptions
    capabilities = Capabilities(
        packages=("ncnn", "pnnx"),
        extra="ncnn",
        costs=cost.on_cpu("ncnn"),
        shares_weights=(),
        complex_calls=False,
        dtypes=("float32",),
        static=True,
        verified="run and compared on the CPU, without Winograd convolution",
    )

    def lower(self, program: Program, gm: fx.GraphModule, options: ThreadOptions) -> Artifact:
        static = StaticProgram.of(program, gm, "ncnn")
        _check_inputs(static)
        return Artifact(_convert(static), (*static.notes, _ROUNDING))

    def load(self, artifact: Artifact, options: ThreadOptions) -> Runner:
        return _runner(artifact.content, options.threads)

    def load_file(self, path: Path, program: Program) -> Runner:
        weights = path.with_suffix(".bin")
        if not weights.is_file():
            raise BackendError(f"{path} needs {weights.name} beside it: copy it too")
        static = StaticProgram.of(program, program.graph_module, "ncnn")
        _check_inputs(static)
        try:
            param = path.read_text()
        except UnicodeDecodeError as error:
            raise BackendError(f"{path} is no ncnn network: {error}") from error
        axes, sizes = _batch_axes(static), _sizes(static)
        return _runner(NcnnContent(param, weights.read_bytes(), static.signature, axes, sizes), 1)

    def save(self, artifact: Artifact, folder: Path, name: str) -> None:
        if not name.endswith(self.suffix):
            raise UsageError(f"ncnn has its weights beside it: call the file {name}.param")
        (folder / name).write_text(artifact.content.param)
        (folder / f"{name.removesuffix(self.suffix)}.bin").write_bytes(artifact.content.weights)

    def stats(self, artifact: Artifact) -> dict[str, int]:
        content: NcnnContent = artifact.content
        kinds = layer_kinds(content.param)
        nodes = sum(kind not in ("Input", "MemoryData") for kind in kinds)
        return {"nodes": nodes, "bytes": len(content.weights)}


def layer_kinds(param: str) -> list[str]:
    """The kind of each layer of a network."""
    return [line.split()[0] for line in param.splitlines()[2:]]


def _check_inputs(static: StaticProgram) -> None:
    for name, tensor in zip(static.signature.input_names, static.tensors, strict=True):
        if tensor.dtype != torch.float32:
            fix = (
                "convert the model with .float()" if tensor.is_floating_point()
                else "compute what depends on it before, and pass that"
            )  # fmt: skip
            raise BackendError(f"ncnn takes float32 inputs alone; {name} is {tensor.dtype}: {fix}")
        if tensor.dim() and tensor.shape[0] != 1:
            raise UsageError(
                f"ncnn runs one example at a time, and {name} is {list(tensor.shape)}: pass an "
                "example of batch 1"
            )


def _convert(static: StaticProgram) -> NcnnContent:
    import pnnx

    with Scratch() as folder:
        with quiet(), torch.no_grad():
            traced = torch.jit.trace(static.module.eval(), static.tensors, check_trace=False)
        traced.save(str(folder / "model.pt"))
        shapes = ",".join(f"[{','.join(map(str, t.shape))}]f32" for t in static.tensors)
        done = subprocess.run(
            [Path(pnnx.__file__).parent / "pnnx", "model.pt", f"inputshape={shapes}", "fp16=0"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not (folder / "model.ncnn.param").exists():
            last = ([*done.stderr.split("\n\n"), ""][0].strip().splitlines() or ["no reason"])[-1]
            raise BackendError(
                f"pnnx cannot convert the model (exit {done.returncode}): {last}"
                f"{static.hints(last)}"
            )
        param = (folder / "model.ncnn.param").read_text()
        # What pnnx does not know it leaves under its own name, without an error.
        strange = sorted({kind for kind in layer_kinds(param) if not kind.isidentifier()})
        if strange:
            kinds = ", ".join(strange)
            raise BackendError(f"ncnn has no layer for {kinds}{static.places(kinds)}")
        example = (folder / "model_ncnn.py").read_text()
        axes = [_batch_axis(example, i) for i in range(len(static.tensors))]
        data = (folder / "model.ncnn.bin").read_bytes()
    return NcnnContent(param, data, static.signature, tuple(axes), _sizes(static))


def _batch_axes(static: StaticProgram) -> tuple[int | None, ...]:
    """Where a file's inputs have their batch of 1, which the file does not say.

    It follows from what the network does with them, so the model is converted once more; of a
    model that cannot be converted before it is folded the first axis is taken.
    """
    try:
        return _convert(static).batch_axes
    except BackendError:
        return tuple(0 if t.dim() else None for t in static.tensors)


def _sizes(static: StaticProgram) -> tuple[tuple[int, ...], ...]:
    returned: Any = static.module.graph.output_node().args[0]
    return tuple(tuple(int(s) for s in n.meta["val"].shape) for n in returned)


def _runner(content: NcnnContent, threads: int) -> Runner:
    network = open_network(content, threads=threads)

    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = content.signature.tensors(args, kwargs)
        return content.signature.rebuild(run_network(network, content, tensors))

    return run


def _batch_axis(example: str, index: int) -> int | None:
    """The axis that pnnx took for an input's batch, as the program that it wrote beside says."""
    found = re.search(rf"\bin{index}\b.*(?:batch_index=|squeeze\()(\d+)", example)
    axis = int(found.group(1)) if found else _NO_BATCH
    return None if axis == _NO_BATCH else axis


def open_network(content: NcnnContent, *, threads: int = 1) -> Any:
    """Loads a network for float32 arithmetic without Winograd convolution."""
    import ncnn

    network = ncnn.Net()
    for name in dir(network.opt):
        if name.startswith(("use_fp16", "use_bf16")) or name == "use_winograd_convolution":
            setattr(network.opt, name, False)
    network.opt.num_threads = threads
    with Scratch() as folder:
        param, data = folder / "model.param", folder / "model.bin"
        param.write_text(content.param)
        data.write_bytes(content.weights)
        if network.load_param(str(param)) or network.load_model(str(data)):
            raise BackendError(
                "ncnn cannot load the network: its .param or .bin is damaged, or they are not of "
                "one conversion"
            )
    return network


def run_network(
    network: Any, content: NcnnContent, tensors: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Runs a network over torch tensors."""
    import ncnn
    import numpy as np

    extractor = network.create_extractor()
    kept = []  # ncnn reads the arrays where they are
    for index, (tensor, axis) in enumerate(zip(tensors, content.batch_axes, strict=True)):
        row = tensor if axis is None else tensor.squeeze(axis)
        array = row.detach().cpu().contiguous().numpy()
        kept.append(array)
        extractor.input(f"in{index}", ncnn.Mat(array))
    results = []
    for index, sizes in enumerate(content.sizes):
        code, value = extractor.extract(f"out{index}")
        if code:
            raise BackendError(f"ncnn failed to compute result {index} (code {code})")
        results.append(torch.from_numpy(np.array(value)).reshape(sizes))
    return results
