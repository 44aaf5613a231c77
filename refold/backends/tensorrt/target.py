"""Target ``trt``: a portable artifact directory, and an engine where there is a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from refold.backends.base import Artifact, Capabilities, Runner, Target
from refold.backends.onnx import export
from refold.backends.onnx.shift_add import choice as shift_add
from refold.backends.onnx.shift_add.check import as_written, rebase
from refold.backends.onnx.targets import OnnxOptions
from refold.backends.tensorrt import artifact as directory
from refold.backends.tensorrt import check, precision, reference
from refold.errors import BackendError, MissingDependencyError, UsageError
from refold.rewrite import cost
from refold.scratch import Scratch

if TYPE_CHECKING:
    from refold.graph.program import Program
    from refold.verify.references import References

Profile = tuple[int, int, int]

_PRECISIONS = (None, *precision.DTYPES)
# On by default, TF32 rounds the inputs of float32 layers to 10 bits: no tolerance would hold.
_FLAGS = {"TF32": False}
_BATCH_MAX = 8  # largest batch of an engine where nothing else is said
_COMMANDS = (
    "write the portable artifact here, then build and verify it on the machine with the GPU:\n"
    "  refold export MODEL --target trt -o DIR\n"
    "  refold build DIR && refold verify DIR\n"
    "(in Python: build=False, then .save(DIR))"
)

_NOT_EXECUTED = (
    "not executed by TensorRT: what was verified here is its ONNX file in ONNX Runtime; run "
    "`refold build` and `refold verify` on the machine with the GPU"
)


@dataclass(frozen=True)
class TensorRTOptions:
    """Options of the ``trt`` target.

    Attributes:
        opset: version of the ONNX operator set, 18 to 23; by default 20, and 22 for bfloat16,
            which the operators of earlier ones do not have.
        precision: ``fp16`` or ``bf16`` casts what is float32; by default nothing is cast.
        profile: smallest, expected and largest size by the name of the dynamic dimension.
        build: build the engine here and run it. False: write the artifact only.
        cuda_graph: record the engine's launches and replay them, where it runs here.
        refittable: the engine can be given other weights; some optimizations are off then.
        requantise: 4 rounds shift-add layers whose scales are no integer grid to INT4; by default
            their weights are stored as floats.
    """

    opset: int | None = None
    precision: str | None = None
    profile: Mapping[str, Profile] | None = None
    build: bool = True
    cuda_graph: bool = False
    refittable: bool = False
    requantise: int | None = None

    def __post_init__(self) -> None:
        OnnxOptions(_opset(self))
        if self.requantise not in (None, 4):
            raise UsageError(f"requantise {self.requantise!r}: TensorRT takes 4 bits, or None")
        if self.precision not in _PRECISIONS:
            known = ", ".join(map(repr, _PRECISIONS))
            raise UsageError(f"precision {self.precision!r}: choose one of {known}")
        for name, sizes in (self.profile or {}).items():
            if len(sizes) != 3 or not 0 < sizes[0] <= sizes[1] <= sizes[2]:
                raise UsageError(
                    f"profile of {name!r}: expected (smallest, expected, largest), got {sizes}"
                )
        if self.cuda_graph and not self.build:
            raise UsageError("cuda_graph=True is for an engine that runs here: leave build out")
        if self.build and not torch.cuda.is_available():
            raise MissingDependencyError(
                f"TensorRT runs on a GPU, none is visible here: {_COMMANDS}"
            )


@dataclass
class EngineContent:
    """What will be the directory; ``verification`` comes once the original's results are known."""

    onnx: export.OnnxContent
    graph_module: fx.GraphModule
    build: directory.Build
    layers: list[precision.LayerRange]
    verification: reference.Verification | None = None
    weights: dict[str, dict[str, Any]] = field(default_factory=dict)
    folder: Scratch | None = None


class TensorRTTarget(Target):
    """Writes the artifact directory anywhere; builds and runs an engine where there is a GPU."""

    name = "trt"
    suffix = ".trt"
    options = TensorRTOptions
    capabilities = Capabilities(
        packages=("onnx", "onnxscript"),
        extra="onnx",
        costs=cost.CostModel("TensorRT", apart="TensorRT merges products of one input itself"),
        shares_weights=("files",),
        complex_calls=False,
        dtypes=("float32", "float16", "bfloat16"),
        marker=directory.MARKER,
        verified="its ONNX file is compared here, the engine by refold verify on the target",
    )

    def lower(self, program: Program, gm: fx.GraphModule, options: TensorRTOptions) -> Artifact:
        opset = _opset(options)
        layers: list[precision.LayerRange] = []
        notes: list[str] = [] if options.build else [_NOT_EXECUTED]
        if options.precision:
            gm, layers, kept = _cast(program, gm, precision.DTYPES[options.precision])
            notes += kept
        lowered = export.lower(program, gm, opset, shift_add.tensorrt(options.requantise))
        model = lowered.content.model
        opset = model.opset_imports[""]
        from refold.backends.tensorrt.rewrite import rewrite

        notes += rewrite(model)
        inputs, told = _inputs(model, program, options.profile or {})
        build = directory.Build(
            inputs=inputs,
            outputs=tuple(_tensor(v) for v in model.graph.outputs),
            precision={
                "asked": options.precision or "as the model has it",
                "kept_float32": {x.node: x.kept for x in layers if x.kept},
            },
            opset=opset,
            flags={**_FLAGS, "REFIT": True} if options.refittable else _FLAGS,
            # 10.3 reads operator sets up to 20, 10.15 up to 24.
            minimum_version="10.3" if opset <= 20 else "10.15",
            verify=None,
            versions=_versions(),
            trtexec=_trtexec(inputs, refittable=options.refittable),
        )
        content = EngineContent(lowered.content, gm, build, layers)
        return Artifact(content, (*lowered.notes, *notes, *told))

    def record(
        self, artifact: Artifact, known: References, weights: dict[str, dict[str, Any]]
    ) -> References:
        """Takes what another machine judges the engine by, and what a refit starts from.

        Returns:
            The references with the results of the cast model in place of the original's own:
            what a lower precision costs is no error of the engine.
        """
        content: EngineContent = artifact.content
        content.weights = weights
        if not known.calls:
            return known
        if content.onnx.shift_add:
            # What the substitution costs is no error of the engine either.
            layers = [w.layer for w in content.onnx.shift_add]
            known = rebase(as_written(content.graph_module, layers), known)
        dtype = precision.DTYPES.get(content.build.precision["asked"])
        if dtype is not None:
            known = reference.at_precision(content.graph_module, known)
        content.verification = reference.make(content.onnx.signature, known, dtype)
        return known

    def load(self, artifact: Artifact, options: TensorRTOptions) -> Runner:
        content: EngineContent = artifact.content
        if not options.build:
            return _load_onnx(content)
        from refold.backends.tensorrt import build, runner

        content.folder = Scratch()
        folder = content.folder.path / "artifact"
        write(content, folder)
        engine = runner.Engine(build.build(folder), cuda_graph=options.cuda_graph)
        signature = content.onnx.signature

        def run(*args: Any, **kwargs: Any) -> Any:
            return signature.rebuild(engine(*signature.tensors(args, kwargs)))

        return run

    def save(self, artifact: Artifact, folder: Path, name: str) -> None:
        write(artifact.content, folder / name)

    def stats(self, artifact: Artifact) -> dict[str, int]:
        return export.stats(artifact.content.onnx.model)


def write(content: EngineContent, folder: Path) -> None:
    """Writes the directory, ``build.json`` last: it states the sums of all other files."""
    folder.mkdir()
    export.save(content.onnx.model, folder, directory.MODEL)
    directory.write_json(folder / "provenance.json", check.provenance(content.onnx.model))
    directory.write_json(folder / "refit.json", _recipe(content))
    if content.layers:
        directory.write_json(folder / "precision.json", [x.to_dict() for x in content.layers])
    verify = None
    if content.verification is not None:
        verify = reference.write(content.verification, folder / "verify")
    files = directory.describe_files(folder)
    build = replace(content.build, files=files, verify=verify)
    directory.write_json(folder / directory.MARKER, asdict(build))


def _load_onnx(content: EngineContent) -> Runner:
    """The ONNX file in ONNX Runtime: it computes what an engine is made of, and is no engine."""
    from refold.backends.onnx import session

    try:
        return session.load(content.onnx, accuracy_level=0)
    except BackendError as error:
        raise MissingDependencyError(
            f"not executed by TensorRT, nor in ONNX Runtime: {error}"
        ) from error


def _cast(
    program: Program, gm: fx.GraphModule, dtype: torch.dtype
) -> tuple[fx.GraphModule, list[precision.LayerRange], list[str]]:
    layers = precision.survey(gm, (program.args, program.kwargs), dtype)
    kept = {x.node: x.kept for x in layers if x.kept}
    notes = [f"{name} stays float32: {reason}" for name, reason in kept.items()]
    return precision.cast(gm, dtype, kept), layers, notes


def _opset(options: TensorRTOptions) -> int:
    if options.opset is not None:
        return options.opset
    return 22 if options.precision == "bf16" else 20


def _versions() -> dict[str, str]:
    from refold._version import __version__

    return {"refold": __version__, "torch": str(torch.__version__)}


# --- inputs ---------------------------------------------------------------------------------------


def _tensor(value: Any) -> directory.Tensor:
    shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape or ())
    return directory.Tensor(str(value.name), str(value.dtype.name), shape)


def _inputs(
    model: Any, program: Program, given: Mapping[str, Profile]
) -> tuple[tuple[directory.Tensor, ...], list[str]]:
    """The inputs with their profiles, and notes on sizes that nobody stated."""
    specs = [s for s in program.inputs if s.dtype is not None]
    leaves = pytree.tree_leaves(program.example)
    examples = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    tensors = [_tensor(v) for v in model.graph.inputs]
    ranges: dict[str, Profile] = {}
    notes: list[str] = []
    for tensor, spec, example in zip(tensors, specs, examples, strict=True):
        for axis, name in enumerate(tensor.shape):
            symbol = spec.sizes[axis]
            if isinstance(name, int) or not str(symbol).isidentifier() or symbol in ranges:
                continue
            sizes = given.get(name, given.get(str(symbol)))
            if sizes is None:
                sizes, note = _default_profile(
                    name, int(example.shape[axis]), program.ranges.get(str(symbol), (0, None)),
                    batch=axis == spec.batch,
                )  # fmt: skip
                notes.append(note)
            ranges[str(symbol)] = sizes
    known = {str(n) for t in tensors for n in t.shape if isinstance(n, str)} | set(ranges)
    for name in given:
        if name not in known:
            dynamic = ", ".join(sorted(known)) or "none"
            raise UsageError(f"profile names the dimension {name!r}; dynamic are: {dynamic}")
    profiled = []
    for tensor, spec in zip(tensors, specs, strict=True):
        shapes = [
            tuple(
                size if isinstance(size, int) else _size(spec.sizes[axis], ranges, which)
                for axis, size in enumerate(tensor.shape)
            )
            for which in range(3)
        ]
        low, best, high = shapes
        profile = (low, best, high) if tensor.dynamic else None
        profiled.append(replace(tensor, profile=profile))
    return tuple(profiled), notes


def _default_profile(
    name: str, size: int, bounds: tuple[int, int | None], *, batch: bool
) -> tuple[Profile, str]:
    low, high = bounds
    # A lower bound of 2 is the tracer's own, for want of a better one.
    known_low = low if low > 2 else None
    if batch:
        sizes = (known_low or 1, size, high or max(size, _BATCH_MAX))
    else:
        sizes = (known_low or size, size, high or size)
    text = f"the engine takes {name} from {sizes[0]} to {sizes[2]}"
    return sizes, f"{text}: profile={{{name!r}: (smallest, expected, largest)}} says otherwise"


def _size(expression: int | str, ranges: Mapping[str, Profile], which: int) -> int:
    """A size that may be computed from others, as in ``2*s0``."""
    if isinstance(expression, int):
        return expression
    if expression in ranges:
        return ranges[expression][which]
    import sympy

    value = sympy.sympify(expression).subs({name: sizes[which] for name, sizes in ranges.items()})
    if not value.is_number:
        raise BackendError(
            f"the size {expression} of an input cannot be bounded: give profile= for its dimension"
        )
    return int(value)


def _trtexec(inputs: Sequence[directory.Tensor], *, refittable: bool) -> dict[str, str]:
    """The same build without Python; version 11 has strong typing always, and no flag for it."""
    parts = ["trtexec", f"--onnx={directory.MODEL}"]
    dynamic = [t for t in inputs if t.profile is not None]
    for which, option in enumerate(("minShapes", "optShapes", "maxShapes")):
        shapes = [f"{t.name}:{'x'.join(map(str, t.profile[which]))}" for t in dynamic if t.profile]
        if shapes:
            parts.append(f"--{option}={','.join(shapes)}")
    parts += ["--noTF32", *["--refit"] * refittable, "--saveEngine=model.engine"]
    return {"10": " ".join([*parts, "--stronglyTyped"]), "11": " ".join(parts)}


def _recipe(content: EngineContent) -> dict[str, Any]:
    """What a refit needs: the folded weights, each with the checkpoint tensors it came from."""
    initializers = set(content.onnx.model.graph.initializers)
    weights = {
        name: {key: origin[key] for key in ("from", "rules", "modules")}
        for name, origin in content.weights.items()
        if name in initializers
    }
    return {
        "how": (
            "Fold the new checkpoint with the same refold and settings; the weights below keep "
            "their names and shapes. Set them in the engine by name with a Refitter."
        ),
        "precision": content.build.precision["asked"],
        "weights": weights,
    }
