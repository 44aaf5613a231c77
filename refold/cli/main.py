"""The command line itself: the parser of its arguments, and what an error ends with."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from refold._version import __version__
from refold.cli import arguments, commands
from refold.cli.exit_codes import ERROR, EXPECTATION, INTERRUPTED, NUMBERS, OK, USAGE
from refold.cli.progress import Progress
from refold.errors import ExpectationError, RefoldError, UsageError, VerificationError, did_you_mean

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


_FUZZ = """\
Draws random networks, folds each without verification, and compares it with the original in
float64, at several sizes, and modulo a prime. What is wrong is made smaller and printed as a module
that runs. A plugin's passes are tried with --pipeline. The same seed draws the same network.
"""
_FUZZ_EXAMPLES = """\
examples:
  refold fuzz --count 2000 --workers 2
  refold fuzz --pipeline default,my-pass --seconds 300
  refold fuzz --seed 71423 --count 1

exit codes: 0 all right, 1 an error or a false alarm too many, 3 a wrong number
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    parser = _parser()
    given = parser.parse_args(argv)
    if given.command is None:
        parser.print_help()
        return USAGE
    progress = Progress(sys.stderr)
    try:
        code: int = given.run(given, progress)
    except RefoldError as error:
        progress.close()
        return _fail(error, as_json=given.json)
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


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="refold", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"refold {__version__}")
    added = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    export = added.add_parser(
        "export", help="fold a model and write it for a runtime", formatter_class=raw,
        epilog="example:\n  refold export timm:repvgg_a0 --target onnx -o repvgg.onnx "
        "--randomize-bn --expect batch-norm=61\n",
    )  # fmt: skip
    arguments.model_arguments(export)
    arguments.fold_arguments(export)
    export.add_argument("--target", default="onnx", help="runtime (default onnx): refold targets")
    export.add_argument("-o", "--output", metavar="FILE", help="file to write (default model.onnx)")
    export.add_argument("--force", action="store_true", help="overwrite the file")
    export.add_argument("--opset", type=int, help="ONNX operator set (default 20)")
    export.add_argument("--no-verify", action="store_true", help="do not compare the numbers")
    export.add_argument(
        "--expect", action="append", default=[], metavar="KIND=N",
        help="fail with exit code 4 unless at least N calls of this kind go; repeatable",
    )  # fmt: skip
    export.set_defaults(run=commands.export)

    export.add_argument(
        "--recipe", action="store_true",
        help="write how each weight was folded beside the .onnx, for refold refit",
    )  # fmt: skip

    refit = added.add_parser(
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
    refit.set_defaults(run=commands.refit)

    explain = added.add_parser(
        "explain", help="dry run: what folds, what does not, and why", formatter_class=raw,
        epilog="example:\n  refold explain mynets.detector:build --shape 1x3x640x640\n",
    )  # fmt: skip
    arguments.model_arguments(explain)
    arguments.fold_arguments(explain)
    explain.set_defaults(run=commands.explain)

    arguments.target_arguments(export)

    verify = added.add_parser(
        "verify", help="compare a written file with the model in float64", formatter_class=raw,
        epilog="example:\n  refold verify timm:repvgg_a0 repvgg.onnx --randomize-bn\n\n"
        "the model must be the one the file was made of: same checkpoint, or same --seed\n",
    )  # fmt: skip
    arguments.model_arguments(verify)
    verify.add_argument(
        "artifact", metavar="FILE", nargs="?",
        help=".onnx, .ort, .xml, .pte, .tflite, .param or .pt2; without it, MODEL is a directory "
        "of the trt target",
    )  # fmt: skip
    verify.add_argument(
        "--onnx", action="store_true",
        help="of a directory: run its ONNX file in ONNX Runtime, not its engine",
    )  # fmt: skip
    arguments.library_argument(verify)
    verify.set_defaults(run=commands.verify)

    check = added.add_parser(
        "check", help="say what a version of TensorRT would reject, and why", formatter_class=raw,
        epilog="example:\n  refold check timm:repvgg_a0 --target trt:10.3\n\n"
        "a MODEL may be an .onnx file, or a directory of the trt target, too\n",
    )  # fmt: skip
    arguments.model_arguments(check)
    arguments.fold_arguments(check)
    arguments.target_arguments(check)
    arguments.library_argument(check)
    check.add_argument("--target", default="trt", help="trt, trt:10.3, trt:11, trt:rtx")
    check.add_argument("--opset", type=int, help="ONNX operator set (default 20)")
    check.set_defaults(run=commands.check)

    build = added.add_parser(
        "build", help="build the engine of a trt directory, for this machine", formatter_class=raw,
        epilog="example:\n  refold build repvgg.trt && refold verify repvgg.trt\n",
    )  # fmt: skip
    build.add_argument("directory", metavar="DIR", help="what `refold export --target trt` wrote")
    build.add_argument("--rebuild", action="store_true", help="build although there is an engine")
    build.add_argument(
        "--refit", metavar="BASE",
        help="take the engine of a directory with the same graph, and give it this one's weights",
    )  # fmt: skip
    arguments.library_argument(build)
    build.add_argument("--json", action="store_true", help="machine-readable output")
    build.set_defaults(run=commands.build)

    fuzz = added.add_parser(
        "fuzz", help="fold random networks and judge every one", formatter_class=raw,
        description=_FUZZ, epilog=_FUZZ_EXAMPLES,
    )  # fmt: skip
    fuzz.add_argument("--count", type=int, help="how many networks (default 1000)")
    fuzz.add_argument(
        "--seconds", type=float, help="stop after so long; without --count, then only"
    )
    fuzz.add_argument(
        "--seed", type=int, help="the first seed; the others follow (default: a fresh one)"
    )
    fuzz.add_argument(
        "--pipeline", metavar="PASSES", help="the passes to try (default: every exact pipeline)"
    )
    fuzz.add_argument(
        "--modules", type=float, default=0.03, metavar="SHARE",
        help="the share that is traced as a module and called, as users do (default 0.03)",
    )  # fmt: skip
    fuzz.add_argument(
        "--target", dest="targets", action="append", choices=("torch", "ort", "inductor"),
        help="where modules run, repeatable (default torch)",
    )  # fmt: skip
    fuzz.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    fuzz.add_argument("--json", action="store_true", help="machine-readable output")
    fuzz.set_defaults(run=commands.fuzz)

    for name, text, run in (
        ("passes", "list the passes and pipelines", commands.passes),
        ("targets", "list the targets and what they miss", commands.targets),
    ):
        command = added.add_parser(name, help=text)
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="machine-readable output")
    return parser
