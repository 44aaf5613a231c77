"""The command line: ``refold export | explain | verify | refit | check | build | ...``."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import shutil
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from refold._version import __version__
from refold.errors import ExpectationError, RefoldError, UsageError, VerificationError, did_you_mean

if TYPE_CHECKING:
    import torch

    from refold.frontends.model_spec import InputText, NamedModel
    from refold.report import Report

OK, ERROR, USAGE, NUMBERS, EXPECTATION, INTERRUPTED = 0, 1, 2, 3, 4, 130
_PROGRAM = ".pt2"  # of torch.export
# Work shorter than this needs no sign of life.
_QUIET_SECONDS = 2.0
_SPINNER = "|/-\\"

_DESCRIPTION = """\
Folds a trained PyTorch network into the smallest equal one, checks the numbers against float64,
and writes it for an inference runtime.
"""
_EXAMPLES = """\
examples:
  refold explain timm:repvgg_a0
  refold export timm:repvgg_a0 --target onnx -o repvgg.onnx --randomize-bn
  refold export timm:repvgg_a0 --shape Nx3xH=224xW=224 -o repvgg.onnx
  refold export mynets.detector:build --input int64:1x77:0..49407 --shape 1x3x224x224 -o net.onnx
  refold verify timm:repvgg_a0 repvgg.onnx

a MODEL is timm:NAME (random weights, nothing is downloaded; add --checkpoint FILE for yours),
package.module:callable (a module, or a class or function that makes one), or a .pt2 file.

exit codes: 0 ok, 1 error, 2 usage, 3 numbers past the tolerance, 4 an expected fold is missing
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return USAGE
    progress = _Progress(sys.stderr)
    try:
        code: int = arguments.run(arguments, progress)
    except RefoldError as error:
        progress.close()
        return _fail(error, as_json=arguments.json)
    except KeyboardInterrupt:
        progress.close()
        print("refold: interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has seen enough; Python must not complain at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    finally:
        progress.close()
    return code


def _fail(error: RefoldError, *, as_json: bool) -> int:
    code = ERROR
    if isinstance(error, UsageError):
        code = USAGE
    elif isinstance(error, VerificationError):
        code = NUMBERS
    elif isinstance(error, ExpectationError):
        code = EXPECTATION
    if as_json:
        record = {"type": type(error).__name__, "message": str(error), "exit_code": code}
        print(json.dumps({"error": record}, indent=2))
    print(f"refold: {error}", file=sys.stderr)
    return code


# --- commands -------------------------------------------------------------------------------------


def _export(arguments: argparse.Namespace, progress: _Progress) -> int:
    from refold.backends.registry import file_targets, find_target, require
    from refold.backends.write import check_output, marker_of
    from refold.compiler import compile_for_inference

    target = find_target(arguments.target)
    require(target)
    output = Path(arguments.output or f"model{target.suffix}")
    # Said before minutes of work, and checked again when the file is written.
    check_output(output, force=arguments.force, marker=marker_of(target))
    expect = dict(_expected(e) for e in arguments.expect)
    options = _target_options(arguments)
    if arguments.target == "trt":
        options["build"] = False  # the engine is built where it will run
    named, inputs, shapes = _prepare(arguments, progress)
    compiled = compile_for_inference(
        named.model,
        inputs,
        target=arguments.target,
        dynamic_shapes=shapes,
        bind=_bind(arguments),
        pipeline=arguments.pipeline,
        max_growth=arguments.max_growth,
        verify=not arguments.no_verify,
        expect=expect,
        recipe=arguments.recipe,
        exclude=arguments.exclude,
        trust=arguments.trust,
        progress=progress,
        **options,
    )
    progress("write")
    path = compiled.save(output, force=arguments.force)
    progress.close()
    report = compiled.report
    report.model = named.name
    if arguments.json:
        print(json.dumps({**report.to_dict(), "output": str(path)}, indent=2))
        return OK
    _show(report)
    if arguments.target == "trt":
        then = f"on the machine with the GPU: refold build {path} && refold verify {path}"
    elif path.suffix not in file_targets() and (target.name, path.suffix) != ("torch", _PROGRAM):
        then = ""  # nothing here can load it
    else:
        then = f"refold verify {arguments.model} {path}"
        then = f"check it again: {_with_inputs(then, arguments)}"
    print(f" {'wrote':<10}{path}   {then}".rstrip())
    return OK


def _target_options(arguments: argparse.Namespace) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for name in ("opset", "precision"):
        if getattr(arguments, name) is not None:
            given[name] = getattr(arguments, name)
    if arguments.refittable:
        given["refittable"] = True
    if arguments.profile:
        given["profile"] = dict(_profile(text) for text in arguments.profile)
    return given


def _profile(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, sizes = text.partition("=")
    parts = sizes.split(":")
    if not name or len(parts) != 3 or not all(p.isdigit() for p in parts):
        raise UsageError(f"--profile {text!r}: write NAME=MIN:OPT:MAX, as in batch=1:8:32")
    return name, tuple(int(p) for p in parts)


def _explain(arguments: argparse.Namespace, progress: _Progress) -> int:
    from refold.compiler import explain

    named, inputs, shapes = _prepare(arguments, progress)
    report = explain(
        named.model,
        inputs,
        dynamic_shapes=shapes,
        bind=_bind(arguments),
        pipeline=arguments.pipeline,
        max_growth=arguments.max_growth,
        exclude=arguments.exclude,
        trust=arguments.trust,
        progress=progress,
    )
    progress.close()
    report.model = named.name
    if arguments.json:
        print(report.to_json())
    else:
        _show(report)
    return OK


def _verify(arguments: argparse.Namespace, progress: _Progress) -> int:
    if arguments.artifact is None:
        return _verify_directory(arguments, progress)
    from refold.backends.base import is_static
    from refold.frontends.export import trace
    from refold.verify.compare import verify_widely
    from refold.verify.references import references

    path = Path(arguments.artifact)
    loader = _loader(path)
    named, inputs, shapes = _prepare(arguments, progress)
    static = loader is not None and is_static(loader)
    if static and shapes is not None:
        raise UsageError(f"{path} has fixed shapes: write them in --shape as numbers alone")
    progress("trace")
    program = trace(
        named.model,
        inputs or (),
        {},
        dynamic_shapes=shapes,
        dynamic_batch=not static,
        bind=_bind(arguments),
        trust=arguments.trust,
    )
    progress("load")
    candidate = _load_artifact(path, loader, program, trust=arguments.trust)
    progress("verify")
    known = references(program.graph_module, program, module=program.module).leaving_inputs()
    result, _ = verify_widely(program.graph_module, candidate, program, known)
    progress.close()
    if arguments.json:
        print(json.dumps({"artifact": arguments.artifact, **result.to_dict()}, indent=2))
    else:
        print(f"{arguments.artifact}: {result.summary}")
    return OK


def _verify_directory(arguments: argparse.Namespace, progress: _Progress) -> int:
    from refold.backends.tensorrt import verify

    folder = Path(arguments.model)
    if not folder.is_dir():
        raise UsageError(f"{folder}: give a MODEL and a FILE, or a directory of the trt target")
    progress("verify")
    if arguments.onnx:
        signed = verify.verify_onnx(folder)
    else:
        signed = verify.verify_engine(folder, arguments.library)
    progress.close()
    if arguments.json:
        print(json.dumps({"artifact": str(folder), **signed.to_dict()}, indent=2))
    else:
        print(f"{folder}: {signed.summary}")
    return OK


def _check(arguments: argparse.Namespace, progress: _Progress) -> int:
    from refold.backends.registry import find_target, require
    from refold.backends.tensorrt import artifact, check, library, ops

    name, _, number = arguments.target.partition(":")
    if name != "trt":
        raise UsageError(f"--target {arguments.target}: trt, or trt:VERSION, can be checked")
    version = ops.Version.parse(number)
    require(find_target(name))
    given = Path(arguments.model)
    with tempfile.TemporaryDirectory(prefix="refold-") as folder:
        if given.is_dir():
            model = given / artifact.MODEL
        elif given.suffix == ".onnx":
            model = given
        else:
            model = _lowered(arguments, progress, Path(folder)) / artifact.MODEL
        if not model.is_file():
            raise UsageError(f"{model}: no such file")
        progress("check")
        found = check.preflight(model, version, library.find(arguments.library))
    progress.close()
    if arguments.json:
        print(json.dumps(found.to_dict(), indent=2))
        return ERROR if found.rejections else OK
    for rejection in found.rejections:
        print(rejection)
    looked = f"the table of {found.version}"
    looked += f" and the parser of {found.parser}" if found.parser else (
        " (no parser: neither tensorrt nor tensorrt_rtx is installed)"
    )  # fmt: skip
    count = len(found.rejections) or "none"
    print(f"{arguments.model}: {count} of {found.nodes} nodes rejected, by {looked}")
    return ERROR if found.rejections else OK


def _lowered(arguments: argparse.Namespace, progress: _Progress, folder: Path) -> Path:
    from refold.compiler import compile_for_inference

    named, inputs, shapes = _prepare(arguments, progress)
    compiled = compile_for_inference(
        named.model,
        inputs,
        target="trt",
        dynamic_shapes=shapes,
        bind=_bind(arguments),
        pipeline=arguments.pipeline,
        max_growth=arguments.max_growth,
        verify=False,
        exclude=arguments.exclude,
        trust=arguments.trust,
        progress=progress,
        build=False,
        **_target_options(arguments),
    )
    return compiled.save(folder / "model.trt")


def _refit(arguments: argparse.Namespace, progress: _Progress) -> int:
    from refold.frontends.model_spec import read_tensors
    from refold.recipe_file import refit_file

    progress("refit")
    weights: dict[str, torch.Tensor] = {}
    for file in arguments.weights:
        weights.update(read_tensors(Path(file)))
    path = refit_file(
        arguments.model,
        weights,
        arguments.output,
        bind=_bind(arguments),
        recipe=arguments.recipe,
        force=arguments.force,
    )
    progress.close()
    if arguments.json:
        print(json.dumps({"output": str(path)}, indent=2))
    else:
        print(f"{path}: written with the new weights; compare it with the model: refold verify")
    return OK


def _build(arguments: argparse.Namespace, progress: _Progress) -> int:
    from refold.backends.tensorrt import build

    folder = Path(arguments.directory)
    if arguments.refit is not None:
        from refold.backends.tensorrt import refit

        progress("refit")
        built = refit.refit(folder, Path(arguments.refit), library=arguments.library)
    else:
        built = build.build(
            folder, library=arguments.library, progress=progress, rebuild=arguments.rebuild
        )
    progress.close()
    record = built.record
    if arguments.json:
        print(
            json.dumps(
                {"engine": str(built.path), "cached": built.cached, **dataclasses.asdict(record)},
                indent=2,
            )
        )
        return OK
    how = "is there already" if built.cached else f"built in {record.seconds:.1f} s"
    layers = f", {record.layers} layers" if record.layers is not None else ""
    print(f"{built.path}: {how} with {record.library} {record.version} for {record.device}{layers}")
    print(f"not executed until it is verified on this machine: refold verify {folder}")
    return OK


def _loader(path: Path) -> Any:
    """The target that loads a file; None for an exported program, which needs none."""
    from refold.backends.registry import file_targets, require

    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    if path.suffix == _PROGRAM:
        return None
    known = file_targets()
    if path.suffix not in known:
        names = ", ".join([_PROGRAM, *known])
        raise UsageError(f"{path}: can verify {names} files, and directories of the trt target")
    require(known[path.suffix])
    return known[path.suffix]


def _load_artifact(path: Path, loader: Any, program: Any, *, trust: bool) -> Callable[..., Any]:
    runner: Callable[..., Any]
    if loader is not None:
        runner = loader.load_file(path, program)
        return runner
    from refold.frontends import archive

    runner = archive.load(path, trust=trust).module()
    return runner


def _passes(arguments: argparse.Namespace, progress: _Progress) -> int:
    from refold.passes import PASSES, PIPELINES

    passes = [
        {
            "name": name,
            "exactness": cls().exactness,
            "summary": _summary(cls),
        }
        for name, cls in PASSES.items()
    ]
    pipelines = {name: list(p.names) for name, p in PIPELINES.items()}
    if arguments.json:
        print(json.dumps({"passes": passes, "pipelines": pipelines}, indent=2))
        return OK
    width = min(shutil.get_terminal_size().columns, 100)
    for p in passes:
        print(f"{p['name']} ({p['exactness']})")
        for line in textwrap.wrap(p["summary"], width - 4):
            print(f"    {line}")
    for name, names in pipelines.items():
        print(f"\npipeline {name}")
        for line in textwrap.wrap(", ".join(names), width - 4, break_on_hyphens=False):
            print(f"    {line}")
    return OK


def _summary(cls: type) -> str:
    # One rule a file: the module's docstring opens with what the rule does.
    text = inspect.getdoc(inspect.getmodule(cls)) or inspect.getdoc(cls) or ""
    return text.split("\n\n")[0].replace("\n", " ").rstrip(".")


def _targets(arguments: argparse.Namespace, progress: _Progress) -> int:
    from refold import native
    from refold.backends.base import dtypes_of, is_static, verification_of
    from refold.backends.registry import file_targets, find_target, target_names

    kernel = native.status() or "available"
    rows: list[dict[str, Any]] = []
    for name in target_names():
        target = find_target(name)
        options = {f.name: f.default for f in dataclasses.fields(target.options)}
        rows.append(
            {"name": name, "suffix": target.suffix, "missing": target.available(),
             "shapes": "fixed" if is_static(target) else "dynamic",
             "dtypes": list(dtypes_of(target)), "verified": verification_of(target),
             "options": options}
        )  # fmt: skip
    if arguments.json:
        print(json.dumps({"targets": rows, "native_kernel": kernel}, indent=2, default=str))
        return OK
    names, suffixes = (max(len(row[key]) for row in rows) for key in ("name", "suffix"))
    width = min(shutil.get_terminal_size().columns, 100)
    for row in rows:
        first = f"{row['name']:<{names}}  {row['suffix']:<{suffixes}}  "
        print("\n    ".join(textwrap.wrap(first + (row["missing"] or "available"), width - 4)))
        given = ", ".join(f"{k}={v}" for k, v in row["options"].items())
        dtypes = ", ".join(row["dtypes"]) or "any dtype"
        for line in (
            f"{row['shapes']} shapes; {dtypes}", row["verified"], f"options: {given}" * bool(given),
        ):  # fmt: skip
            for part in textwrap.wrap(line, width - 4, subsequent_indent="  "):
                print(f"    {part}")
    print(f"refold verify reads {', '.join([_PROGRAM, *file_targets()])}")
    print(f"native kernel of binary planes, for torch: {kernel}")
    return OK


# --- models and inputs ----------------------------------------------------------------------------


def _prepare(
    arguments: argparse.Namespace, progress: _Progress
) -> tuple[NamedModel, tuple[torch.Tensor, ...] | None, Any]:
    """The model, its example inputs and, if any dimension was named, its dynamic shapes."""
    progress("load model")
    import torch

    from refold.frontends import model_spec

    torch.manual_seed(arguments.seed)
    named = model_spec.load_model(arguments.model)
    texts: list[InputText] = list(arguments.inputs or [])
    if isinstance(named.model, Path):
        if arguments.checkpoint or arguments.randomize_bn or arguments.dtype:
            raise UsageError(f"{named.name} is a file: its weights and dtype are in it already")
        if not texts:
            return named, None, None
    elif not texts:
        if named.input_sizes is None:
            raise UsageError(f"{named.name}: give its input shapes, e.g. --shape 1x3x224x224")
        texts = [model_spec.InputText(named.input_sizes)]
    dtype = model_spec.parse_dtype(arguments.dtype) if arguments.dtype else torch.float32
    inputs = tuple(t.example(dtype) for t in texts)
    if not isinstance(named.model, Path):
        if arguments.checkpoint:
            model_spec.load_checkpoint(named.model, arguments.checkpoint)
        if arguments.randomize_bn:
            wide = [dataclasses.replace(t, sizes=(max(t.sizes[0], 4), *t.sizes[1:])) for t in texts]
            _randomize(named, [t.example(torch.float32) for t in wide])
        if arguments.dtype:
            named.model.to(dtype)
    return named, inputs, _dynamic_shapes(texts)


def _bind(arguments: argparse.Namespace) -> dict[str, Any]:
    from refold.frontends.model_spec import parse_binding

    return dict(parse_binding(text) for text in arguments.bind)


def _randomize(named: NamedModel, inputs: list[torch.Tensor]) -> None:
    from refold.frontends.model_spec import randomize_batch_norms

    assert not isinstance(named.model, Path)
    if not randomize_batch_norms(named.model, inputs):
        raise UsageError(f"--randomize-bn: {named.name} has no batch norm")


def _dynamic_shapes(texts: list[InputText]) -> Any:
    from torch.export import Dim

    # A named leading dimension alone is what happens by default, with more care.
    if not any(d for t in texts for d in t.dynamic):
        return None
    return tuple(dict.fromkeys(t.dynamic, Dim.AUTO) for t in texts)


def _expected(text: str) -> tuple[str, int]:
    kind, _, number = text.partition("=")
    if not kind or not number.isdigit():
        raise UsageError(f"--expect {text!r}: write KIND=NUMBER, as in batch-norm=61")
    return kind, int(number)


# --- output ---------------------------------------------------------------------------------------


def _show(report: Report) -> None:
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(report.render(color=color, width=min(shutil.get_terminal_size((100, 24)).columns, 120)))


def _with_inputs(command: str, arguments: argparse.Namespace) -> str:
    """The command with the options that decide the model's weights and inputs."""
    parts = [command]
    for flag, value in (("--checkpoint", arguments.checkpoint), ("--dtype", arguments.dtype)):
        if value:
            parts.append(f"{flag} {value}")
    parts += [f"--{'input' if ':' in t else 'shape'} {t}" for t in arguments.input_texts or []]
    parts += [f"--bind {text}" for text in arguments.bind]
    if arguments.randomize_bn:
        parts.append("--randomize-bn")
    if arguments.seed:
        parts.append(f"--seed {arguments.seed}")
    return " ".join(parts)


class _Progress:
    """Says what is being done once it takes long: a line each, or a spinner on a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._animated = stream.isatty()
        self._stop: threading.Event | None = None
        self._thread: threading.Thread | None = None

    def __call__(self, stage: str) -> None:
        self.close()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._tell, args=(stage, self._stop), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the present stage."""
        if self._stop is not None and self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._stop = self._thread = None

    def _tell(self, stage: str, stop: threading.Event) -> None:
        start = time.monotonic()
        if stop.wait(_QUIET_SECONDS):
            return
        if not self._animated:
            print(f"refold: {stage} ...", file=self._stream, flush=True)
            return
        frame = 0
        while not stop.wait(0.1):
            seconds = time.monotonic() - start
            self._stream.write(f"\r{_SPINNER[frame % 4]} {stage} {seconds:.0f} s ")
            self._stream.flush()
            frame += 1
        self._stream.write("\r\x1b[K")
        self._stream.flush()


# --- arguments ------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Takes options by their full names alone; an unknown one is an error with the nearest."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            options = [name for name in self._option_string_actions if name.startswith("--")]
            name = unknown[0].partition("=")[0]
            nearest = did_you_mean(name, options) if name.startswith("--") else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{nearest}")
        return found, unknown

    def error(self, message: str) -> Any:
        self.print_usage(sys.stderr)
        self.exit(USAGE, f"refold: {message}\n")


class _AddInput(argparse.Action):
    """Keeps --shape and --input in the order in which they were given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        from refold.frontends.model_spec import parse_input, parse_shape

        read = parse_shape if option_string == "--shape" else parse_input
        try:
            parsed = read(values)
        except UsageError as error:
            raise argparse.ArgumentError(self, str(error)) from error
        namespace.inputs = [*(namespace.inputs or []), parsed]
        namespace.input_texts = [*(namespace.input_texts or []), values]


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="refold", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"refold {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    export = commands.add_parser(
        "export", help="fold a model and write it for a runtime", formatter_class=raw,
        epilog="example:\n  refold export timm:repvgg_a0 --target onnx -o repvgg.onnx "
        "--randomize-bn --expect batch-norm=61\n",
    )  # fmt: skip
    _model_arguments(export)
    _fold_arguments(export)
    export.add_argument("--target", default="onnx", help="runtime (default onnx): refold targets")
    export.add_argument("-o", "--output", metavar="FILE", help="file to write (default model.onnx)")
    export.add_argument("--force", action="store_true", help="overwrite the file")
    export.add_argument("--opset", type=int, help="ONNX operator set (default 20)")
    export.add_argument("--no-verify", action="store_true", help="do not compare the numbers")
    export.add_argument(
        "--expect", action="append", default=[], metavar="KIND=N",
        help="fail with exit code 4 unless at least N calls of this kind go; repeatable",
    )  # fmt: skip
    export.set_defaults(run=_export)

    export.add_argument(
        "--recipe", action="store_true",
        help="write how each weight was folded beside the .onnx, for refold refit",
    )  # fmt: skip

    refit = commands.add_parser(
        "refit", help="new weights for an ONNX file that has a recipe", formatter_class=raw,
        epilog="example:\n  refold export mynets.detector:build --shape 1x3x64x64 --recipe "
        "-o net.onnx\n  refold refit net.onnx --weights new.safetensors -o new.onnx\n",
    )  # fmt: skip
    refit.add_argument("model", metavar="FILE", help="an .onnx that refold export --recipe wrote")
    refit.add_argument(
        "--weights", action="append", required=True, metavar="FILE",
        help=".safetensors, or .pt / .pth read without running code; repeatable, the last one wins",
    )  # fmt: skip
    refit.add_argument(
        "--bind", action="append", default=[], metavar="NAME=FILE",
        help="a new value of a bound input: an .npy or .safetensors file; repeatable",
    )  # fmt: skip
    refit.add_argument("--recipe", metavar="FILE", help="default: FILE.recipe")
    refit.add_argument("-o", "--output", required=True, metavar="FILE", help="file to write")
    refit.add_argument("--force", action="store_true", help="overwrite the file")
    refit.add_argument("--json", action="store_true", help="machine-readable output")
    refit.set_defaults(run=_refit)

    explain = commands.add_parser(
        "explain", help="dry run: what folds, what does not, and why", formatter_class=raw,
        epilog="example:\n  refold explain mynets.detector:build --shape 1x3x640x640\n",
    )  # fmt: skip
    _model_arguments(explain)
    _fold_arguments(explain)
    explain.set_defaults(run=_explain)

    _target_arguments(export)

    verify = commands.add_parser(
        "verify", help="compare a written file with the model in float64", formatter_class=raw,
        epilog="example:\n  refold verify timm:repvgg_a0 repvgg.onnx --randomize-bn\n\n"
        "the model must be the one the file was made of: same checkpoint, or same --seed\n",
    )  # fmt: skip
    _model_arguments(verify)
    verify.add_argument(
        "artifact", metavar="FILE", nargs="?",
        help=".onnx, .ort, .xml, .pte, .tflite, .param or .pt2; without it, MODEL is a directory "
        "of the trt target",
    )  # fmt: skip
    verify.add_argument(
        "--onnx", action="store_true",
        help="of a directory: run its ONNX file in ONNX Runtime, not its engine",
    )  # fmt: skip
    _library_argument(verify)
    verify.set_defaults(run=_verify)

    check = commands.add_parser(
        "check", help="say what a version of TensorRT would reject, and why", formatter_class=raw,
        epilog="example:\n  refold check timm:repvgg_a0 --target trt:10.3\n\n"
        "a MODEL may be an .onnx file, or a directory of the trt target, too\n",
    )  # fmt: skip
    _model_arguments(check)
    _fold_arguments(check)
    _target_arguments(check)
    _library_argument(check)
    check.add_argument("--target", default="trt", help="trt, trt:10.3, trt:11, trt:rtx")
    check.add_argument("--opset", type=int, help="ONNX operator set (default 20)")
    check.set_defaults(run=_check)

    build = commands.add_parser(
        "build", help="build the engine of a trt directory, for this machine", formatter_class=raw,
        epilog="example:\n  refold build repvgg.trt && refold verify repvgg.trt\n",
    )  # fmt: skip
    build.add_argument("directory", metavar="DIR", help="what `refold export --target trt` wrote")
    build.add_argument("--rebuild", action="store_true", help="build although there is an engine")
    build.add_argument(
        "--refit", metavar="BASE",
        help="take the engine of a directory with the same graph, and give it this one's weights",
    )  # fmt: skip
    _library_argument(build)
    build.add_argument("--json", action="store_true", help="machine-readable output")
    build.set_defaults(run=_build)

    for name, text, run in (
        ("passes", "list the passes and pipelines", _passes),
        ("targets", "list the targets and what they miss", _targets),
    ):
        command = commands.add_parser(name, help=text)
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="machine-readable output")
    return parser


def _target_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--precision", choices=("fp16", "bf16"), help="trt: cast what is float32")
    parser.add_argument(
        "--refittable", action="store_true",
        help="trt: an engine that `refold build --refit` can give other weights",
    )  # fmt: skip
    parser.add_argument(
        "--profile", action="append", default=[], metavar="NAME=MIN:OPT:MAX",
        help="trt: sizes of a dynamic dimension, as in batch=1:8:32; repeatable",
    )  # fmt: skip


def _library_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--library", choices=("tensorrt", "tensorrt_rtx"),
        help="which one, where both are installed (default: the first that is)",
    )  # fmt: skip


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="timm:NAME, package.module:callable, or a .pt2 file"
    )
    parser.add_argument(
        "--shape", "--input", dest="inputs", action=_AddInput, metavar="SHAPE", default=None,
        help="example input, repeatable: --shape 1x3x224x224 (the batch is dynamic anyway), "
        "--shape Nx3xH=224xW=224, --input int64:1x77:0..49407 (DTYPE:SHAPE:LOW..HIGH)",
    )  # fmt: skip
    parser.set_defaults(input_texts=None)
    parser.add_argument("--dtype", help="convert the model to this dtype (default: as it is)")
    parser.add_argument(
        "--checkpoint", metavar="FILE",
        help="load weights: .safetensors, or .pt / .pth read without running code",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of random weights and inputs")
    parser.add_argument(
        "--randomize-bn", action="store_true",
        help="random batch-norm statistics, so that a model without trained weights shows folding",
    )  # fmt: skip
    parser.add_argument(
        "--bind", action="append", default=[], metavar="NAME=VALUE",
        help="declare an input constant: a number, an .npy or a .safetensors file; repeatable; "
        "--shape then describes the other inputs alone",
    )  # fmt: skip
    parser.add_argument(
        "--trust", action="store_true", help="load a .pt2 that asks for pickle: it can run code"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def _fold_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pipeline", default="default", help="refold passes lists them")
    parser.add_argument(
        "--max-growth", type=float, metavar="FACTOR",
        help="how much larger the stored constants may become; inf folds every weight generator",
    )  # fmt: skip
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="GLOB",
        help="module paths that no pass touches; repeatable",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
