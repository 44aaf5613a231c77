"""The command line: ``refold export | explain | verify | passes | targets``."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from refold import __version__
from refold.errors import ExpectationError, RefoldError, UsageError, VerificationError

if TYPE_CHECKING:
    import torch

    from refold.frontends.model_spec import InputText, NamedModel
    from refold.report import Report

OK, ERROR, USAGE, NUMBERS, EXPECTATION, INTERRUPTED = 0, 1, 2, 3, 4, 130
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
    from refold.backends.base import check_output, find_target, require
    from refold.compiler import compile_for_inference

    target = find_target(arguments.target)
    require(target)
    output = Path(arguments.output or f"model{target.suffix}")
    # Said before minutes of work, and checked again when the file is written.
    check_output(output, force=arguments.force)
    expect = dict(_expected(e) for e in arguments.expect)
    options = {}
    if arguments.opset is not None:
        options["opset"] = arguments.opset
    named, inputs, shapes = _prepare(arguments, progress)
    compiled = compile_for_inference(
        named.model,
        inputs,
        target=arguments.target,
        dynamic_shapes=shapes,
        pipeline=arguments.pipeline,
        verify=not arguments.no_verify,
        expect=expect,
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
    check = f"refold verify {arguments.model} {path}"
    print(f" {'wrote':<10}{path}   check it again: {_with_inputs(check, arguments)}")
    return OK


def _explain(arguments: argparse.Namespace, progress: _Progress) -> int:
    from refold.compiler import explain

    named, inputs, shapes = _prepare(arguments, progress)
    report = explain(
        named.model,
        inputs,
        dynamic_shapes=shapes,
        pipeline=arguments.pipeline,
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
    from refold import numerics
    from refold.frontends.export import trace

    named, inputs, shapes = _prepare(arguments, progress)
    progress("trace")
    program = trace(named.model, inputs or (), {}, dynamic_shapes=shapes, trust=arguments.trust)
    progress("load")
    candidate = _load_artifact(Path(arguments.artifact), program, trust=arguments.trust)
    progress("verify")
    known = numerics.references(program.graph_module, program)
    result = numerics.verify(program.graph_module, candidate, known)
    progress.close()
    if arguments.json:
        print(json.dumps({"artifact": arguments.artifact, **result.to_dict()}, indent=2))
    else:
        print(f"{arguments.artifact}: {result.summary}")
    return OK


def _load_artifact(path: Path, program: Any, *, trust: bool) -> Callable[..., Any]:
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    if path.suffix == ".onnx":
        from refold.backends.onnxruntime import load_file

        return load_file(path, program)
    if path.suffix == ".pt2":
        from refold.frontends import archive

        runner: Callable[..., Any] = archive.load(path, trust=trust).module()
        return runner
    raise UsageError(f"{path}: can verify .onnx and .pt2 files")


def _passes(arguments: argparse.Namespace, progress: _Progress) -> int:
    from refold.passes import PASSES, PIPELINES

    passes = [
        {
            "name": name,
            "exactness": str(getattr(cls, "exactness", "")),
            "summary": _summary(cls),
        }
        for name, cls in PASSES.items()
    ]
    pipelines = {name: list(p.names) for name, p in PIPELINES.items()}
    if arguments.json:
        print(json.dumps({"passes": passes, "pipelines": pipelines}, indent=2))
        return OK
    width = max(len(p["name"]) for p in passes)
    for p in passes:
        print(f"{p['name']:<{width}}  {p['exactness']:<13}  {p['summary']}")
    print()
    for name, names in pipelines.items():
        print(f"pipeline {name}: {', '.join(names)}")
    return OK


def _summary(cls: type) -> str:
    # One rule a file: the module's docstring opens with what the rule does.
    text = inspect.getdoc(inspect.getmodule(cls)) or inspect.getdoc(cls) or ""
    return text.split("\n\n")[0].replace("\n", " ").rstrip(".")


def _targets(arguments: argparse.Namespace, progress: _Progress) -> int:
    from refold.backends.base import find_target, target_names

    rows: list[dict[str, Any]] = []
    for name in target_names():
        target = find_target(name)
        options = {f.name: f.default for f in dataclasses.fields(target.options)}
        rows.append(
            {"name": name, "suffix": target.suffix, "missing": target.available(),
             "options": options}
        )  # fmt: skip
    if arguments.json:
        print(json.dumps({"targets": rows}, indent=2, default=str))
        return OK
    for row in rows:
        given = ", ".join(f"{k}={v}" for k, v in row["options"].items())
        state = row["missing"] or "available"
        print(
            f"{row['name']:<6} {row['suffix']:<6} {state}{f'   options: {given}' if given else ''}"
        )
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
        "--randomize-bn --expect batch-norm=27\n",
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

    explain = commands.add_parser(
        "explain", help="dry run: what folds, what does not, and why", formatter_class=raw,
        epilog="example:\n  refold explain mynets.detector:build --shape 1x3x640x640\n",
    )  # fmt: skip
    _model_arguments(explain)
    _fold_arguments(explain)
    explain.set_defaults(run=_explain)

    verify = commands.add_parser(
        "verify", help="compare a written file with the model in float64", formatter_class=raw,
        epilog="example:\n  refold verify timm:repvgg_a0 repvgg.onnx --randomize-bn\n\n"
        "the model must be the one the file was made of: same checkpoint, or same --seed\n",
    )  # fmt: skip
    _model_arguments(verify)
    verify.add_argument("artifact", metavar="FILE", help=".onnx or .pt2")
    verify.set_defaults(run=_verify)

    for name, text, run in (
        ("passes", "list the passes and pipelines", _passes),
        ("targets", "list the targets and what they miss", _targets),
    ):
        command = commands.add_parser(name, help=text)
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="machine-readable output")
    return parser


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
        "--trust", action="store_true", help="load a .pt2 that asks for pickle: it can run code"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def _fold_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pipeline", default="default", help="refold passes lists them")
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="GLOB",
        help="module paths that no pass touches; repeatable",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
