"""Arguments that several commands take, and what they mean."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from refold.errors import UsageError

if TYPE_CHECKING:
    from refold.backends.base import Target


class _AddInput(argparse.Action):
    """Keeps --shape and --input in the order in which they were given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        from refold.cli.model_spec import parse_input, parse_shape

        read = parse_shape if option_string == "--shape" else parse_input
        try:
            parsed = read(values)
        except UsageError as error:
            raise argparse.ArgumentError(self, str(error)) from error
        namespace.inputs = [*(namespace.inputs or []), parsed]
        namespace.input_texts = [*(namespace.input_texts or []), values]


def target_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-O", "--option", dest="options", action="append", default=[], metavar="NAME=VALUE",
        help="an option of the target, as in -O threads=4; repeatable: refold targets lists them",
    )  # fmt: skip
    parser.add_argument("--precision", choices=("fp16", "bf16"), help="trt: cast what is float32")
    parser.add_argument(
        "--refittable", action="store_true",
        help="trt: an engine that `refold build --refit` can give other weights",
    )  # fmt: skip
    parser.add_argument(
        "--profile", action="append", default=[], metavar="NAME=MIN:OPT:MAX",
        help="trt: sizes of a dynamic dimension, as in batch=1:8:32; repeatable",
    )  # fmt: skip


def library_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--library", choices=("tensorrt", "tensorrt_rtx"),
        help="which one, where both are installed (default: the first that is)",
    )  # fmt: skip


def model_arguments(parser: argparse.ArgumentParser) -> None:
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


def fold_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pipeline", default="default", metavar="SPEC",
        help="a pipeline, or pipelines and passes with options, as in 'shift-add{bits=2}' or "
        "'default,fold-constants{max-growth=4}': refold passes lists them",
    )  # fmt: skip
    parser.add_argument(
        "--max-growth", type=float, metavar="FACTOR",
        help="how much larger the stored constants may become; inf folds every weight generator",
    )  # fmt: skip
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="GLOB",
        help="module paths that no pass touches; repeatable",
    )  # fmt: skip


def target_options(arguments: argparse.Namespace, target: Target) -> dict[str, Any]:
    from refold.backends.registry import read_options

    given = read_options(target, arguments.options)
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


def bind(arguments: argparse.Namespace) -> dict[str, Any]:
    from refold.cli.model_spec import parse_binding

    return dict(parse_binding(text) for text in arguments.bind)


def expected(text: str) -> tuple[str, int]:
    kind, _, number = text.partition("=")
    if not kind or not number.isdigit():
        raise UsageError(f"--expect {text!r}: write KIND=NUMBER, as in batch-norm=61")
    return kind, int(number)
