"""The commands: ``refold export | explain | verify | refit | check | build | ...``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refold.cli.arguments import bind, expected, target_options
from refold.cli.exit_codes import ERROR, INTERRUPTED, NUMBERS, OK
from refold.errors import UsageError
from refold.reading import unreadable
from refold.scratch import Scratch

if TYPE_CHECKING:
    import torch

    from refold.cli.model_spec import InputText, NamedModel
    from refold.cli.progress import Progress
    from refold.report.report import Report

_PROGRAM = ".pt2"  # of torch.export
# --- commands -------------------------------------------------------------------------------------


def export(arguments: argparse.Namespace, progress: Progress) -> int:
    from refold.backends.registry import file_targets, find_target, require
    from refold.backends.write import check_output
    from refold.compiler import compile_for_inference

    target = find_target(arguments.target)
    require(target)
    output = Path(arguments.output or f"model{target.suffix}")
    # Said before minutes of work, and checked again when the file is written.
    check_output(
        arguments.output or output,
        force=arguments.force,
        marker=target.capabilities.marker,
        inputs=_files_read(arguments),
    )
    expect = dict(expected(e) for e in arguments.expect)
    options = target_options(arguments, target)
    if arguments.target == "trt":
        options["build"] = False  # the engine is built where it will run
    named, inputs, shapes = _prepare(arguments, progress)
    compiled = _quietly(
        compile_for_inference,
        named.model,
        inputs,
        target=arguments.target,
        dynamic_shapes=shapes,
        bind=bind(arguments),
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
    keep = (*_files_read(arguments), *named.files)
    path = compiled.save(output, force=arguments.force, keep=keep)
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


def explain(arguments: argparse.Namespace, progress: Progress) -> int:
    from refold.compiler import explain

    named, inputs, shapes = _prepare(arguments, progress)
    report = _quietly(
        explain,
        named.model,
        inputs,
        dynamic_shapes=shapes,
        bind=bind(arguments),
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


def verify(arguments: argparse.Namespace, progress: Progress) -> int:
    if arguments.artifact is None:
        return _verify_directory(arguments, progress)
    from refold.frontends.export import trace
    from refold.verify.compare import verify_widely
    from refold.verify.references import references

    path = Path(arguments.artifact)
    loader = _loader(path)
    named, inputs, shapes = _prepare(arguments, progress)
    static = loader is not None and loader.capabilities.static
    if static and shapes is not None:
        raise UsageError(f"{path} has fixed shapes: write them in --shape as numbers alone")
    progress("trace")
    program = _quietly(
        trace,
        named.model,
        inputs or (),
        {},
        dynamic_shapes=shapes,
        dynamic_batch=not static,
        bind=bind(arguments),
        trust=arguments.trust,
    )
    progress("load")
    candidate = _load_artifact(path, loader, program, trust=arguments.trust)
    progress("verify")
    known = _quietly(references, program.graph_module, program, module=program.module)
    known = known.leaving_inputs()
    result, _ = verify_widely(program.graph_module, candidate, program, known)
    progress.close()
    if arguments.json:
        print(json.dumps({"artifact": arguments.artifact, **result.to_dict()}, indent=2))
    else:
        print(f"{arguments.artifact}: {result.summary}")
    return OK


def _verify_directory(arguments: argparse.Namespace, progress: Progress) -> int:
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


def check(arguments: argparse.Namespace, progress: Progress) -> int:
    from refold.backends.registry import find_target, require
    from refold.backends.tensorrt import artifact, check, library, ops

    name, _, number = arguments.target.partition(":")
    if name != "trt":
        raise UsageError(f"--target {arguments.target}: trt, or trt:VERSION, can be checked")
    version = ops.Version.parse(number)
    require(find_target(name))
    given = Path(arguments.model)
    with Scratch() as folder:
        if given.is_dir():
            artifact.read(given)
            model = given / artifact.MODEL
        elif given.suffix == ".onnx":
            model = given
        else:
            model = _lowered(arguments, progress, folder) / artifact.MODEL
        if reason := unreadable(model):
            raise UsageError(f"{model}: {reason}")
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


def _lowered(arguments: argparse.Namespace, progress: Progress, folder: Path) -> Path:
    from refold.backends.registry import find_target
    from refold.compiler import compile_for_inference

    named, inputs, shapes = _prepare(arguments, progress)
    compiled = _quietly(
        compile_for_inference,
        named.model,
        inputs,
        target="trt",
        dynamic_shapes=shapes,
        bind=bind(arguments),
        pipeline=arguments.pipeline,
        max_growth=arguments.max_growth,
        verify=False,
        exclude=arguments.exclude,
        trust=arguments.trust,
        progress=progress,
        build=False,
        **target_options(arguments, find_target("trt")),
    )
    return compiled.save(folder / "model.trt")


def refit(arguments: argparse.Namespace, progress: Progress) -> int:
    from refold.backends.onnx.recipe_file import refit_file
    from refold.cli.model_spec import read_tensors

    progress("refit")
    weights: dict[str, torch.Tensor] = {}
    for file in arguments.weights:
        weights.update(read_tensors(Path(file)))
    path = refit_file(
        arguments.model,
        weights,
        arguments.output,
        bind=bind(arguments),
        recipe=arguments.recipe,
        force=arguments.force,
        keep=(*arguments.weights, *(text.partition("=")[2] for text in arguments.bind)),
    )
    progress.close()
    if arguments.json:
        print(json.dumps({"output": str(path)}, indent=2))
    else:
        print(f"{path}: written with the new weights; compare it with the model: refold verify")
    return OK


def build(arguments: argparse.Namespace, progress: Progress) -> int:
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

    if reason := unreadable(path):
        raise UsageError(f"{path}: {reason}")
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


_SHRUNK = 8  # faults that are made smaller and printed
_TOLD = 500  # networks between two signs of life
_ALIKE = 40  # characters of what is said by which faults are taken for one


def fuzz(arguments: argparse.Namespace, progress: Progress) -> int:
    import random

    from refold.fuzz import run
    from refold.fuzz.cases import Mix
    from refold.fuzz.outcome import WRONG
    from refold.passes import find_pipeline

    if arguments.pipeline is not None:
        find_pipeline(arguments.pipeline)
    for name, least in (("count", 1), ("seconds", 0), ("workers", 1), ("seed", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UsageError(f"--{name} {value}: expected {least} or more")
    if not 0 <= arguments.modules <= 1:
        raise UsageError(f"--modules {arguments.modules}: expected a share between 0 and 1")
    count = arguments.count
    if count is None and arguments.seconds is None:
        count = 1000
    seed = arguments.seed if arguments.seed is not None else random.randrange(10**9)
    mix = Mix(arguments.modules, arguments.pipeline, tuple(arguments.targets or ("torch",)))
    progress(f"fuzzing from seed {seed}")
    summary = run.run(seed, mix, count=count, seconds=arguments.seconds, workers=arguments.workers)
    progress("making what fails smaller")
    kinds = {(fault.kind, fault.what[:_ALIKE]): fault for fault in reversed(summary.faults)}
    shown = run.shown(list(kinds.values())[:_SHRUNK], mix) if kinds else []
    progress.close()
    if arguments.json:
        faults = [{**record, "module": code} for record, code in shown]
        print(json.dumps({**summary.to_dict(), "smallest": faults}, indent=2))
    else:
        print(summary)
        for fault in summary.faults:
            print(f"  seed {fault.seed}: {fault.kind}: {fault.what}")
        for record, code in shown:
            print(f"\n# {record['kind']}: {record['what']}\n# refold fuzz {record['repeat']}")
            print(code or "# no smaller module: its process ended, or took too long")
    if summary.interrupted:
        print("refold: interrupted: this is what was found so far", file=sys.stderr)
        return INTERRUPTED
    if any(fault.kind == WRONG for fault in summary.faults):
        return NUMBERS
    return ERROR if summary.failed else OK


def passes(arguments: argparse.Namespace, progress: Progress) -> int:
    from refold import plugins
    from refold.passes import PASSES, PIPELINES
    from refold.rewrite import spec

    rows = [_pass_row(name, item) for name, item in PASSES.items()]
    for name, entries in plugins.strangers(spec.ENTRY_POINT_GROUP, PASSES).items():
        try:
            made = type(spec.load_pass(name, PASSES))
            rows.append({**_pass_row(name, made), "package": plugins.package(entries[0])})
        except UsageError as error:
            rows.append({"name": name, "broken": str(error)})
    pipelines = {name: list(p.names) for name, p in PIPELINES.items()}
    if arguments.json:
        print(json.dumps({"passes": rows, "pipelines": pipelines}, indent=2))
        return OK
    width = min(shutil.get_terminal_size().columns, 100)
    for row in rows:
        if "broken" in row:
            print(f"{row['name']}\n    {row['broken']}")
            continue
        package = f", of {row['package']}" if "package" in row else ""
        print(f"{row['name']} ({row['exactness']}{package})")
        for line in textwrap.wrap(row["summary"], width - 4):
            print(f"    {line}")
        _print_options(row["options"], width)
    for line in plugins.namesakes(spec.ENTRY_POINT_GROUP, {*PASSES, *PIPELINES}):
        print(f"note: {line}")
    for name, names in pipelines.items():
        print(f"\npipeline {name}")
        for line in textwrap.wrap(", ".join(names), width - 4, break_on_hyphens=False):
            print(f"    {line}")
    return OK


def _pass_row(name: str, kind: type) -> dict[str, Any]:
    from refold import options

    return {
        "name": name, "exactness": kind().exactness, "summary": _summary(kind),
        "options": options.described(kind),
    }  # fmt: skip


def _print_options(described: Mapping[str, str], width: int) -> None:
    for name, takes in described.items():
        for line in textwrap.wrap(f"{name}: {takes}", width - 8, subsequent_indent="    "):
            print(f"        {line}")


def _summary(cls: type) -> str:
    # One rule a file: the module's docstring opens with what the rule does.
    text = inspect.getdoc(inspect.getmodule(cls)) or inspect.getdoc(cls) or ""
    return text.split("\n\n")[0].replace("\n", " ").rstrip(".")


def targets(arguments: argparse.Namespace, progress: Progress) -> int:
    from refold import native, plugins
    from refold import options as read
    from refold.backends.registry import BUILT_IN, GROUP, file_targets, find_target, target_names

    kernel = native.status() or "available"
    rows: list[dict[str, Any]] = []
    broken: dict[str, str] = {}
    described: dict[str, Mapping[str, str]] = {}
    for name in target_names():
        try:
            target = find_target(name)
        except UsageError as error:
            broken[name] = str(error)
            continue
        can = target.capabilities
        options = {f.name: f.default for f in dataclasses.fields(target.options)}
        described[name] = read.described(target.options)
        rows.append(
            {"name": name, "suffix": target.suffix, "missing": target.available(),
             "shapes": "fixed" if can.static else "dynamic",
             "dtypes": list(can.dtypes), "verified": can.verified,
             "options": options}
        )  # fmt: skip
    if arguments.json:
        record = {"targets": rows, "broken": broken, "native_kernel": kernel}
        print(json.dumps(record, indent=2, default=str))
        return OK
    names, suffixes = (max(len(row[key]) for row in rows) for key in ("name", "suffix"))
    width = min(shutil.get_terminal_size().columns, 100)
    for row in rows:
        first = f"{row['name']:<{names}}  {row['suffix']:<{suffixes}}  "
        print("\n    ".join(textwrap.wrap(first + (row["missing"] or "available"), width - 4)))
        dtypes = ", ".join(row["dtypes"]) or "any dtype"
        for line in (f"{row['shapes']} shapes; {dtypes}", row["verified"]):
            for part in textwrap.wrap(line, width - 4, subsequent_indent="  "):
                print(f"    {part}")
        _print_options(described[row["name"]], width)
    for name, reason in broken.items():
        print("\n    ".join(textwrap.wrap(f"{name}  {reason}", width - 4)))
    for line in plugins.namesakes(GROUP, BUILT_IN):
        print(f"note: {line}")
    print(f"refold verify reads {', '.join([_PROGRAM, *file_targets()])}")
    last = f"native kernel of binary planes, for torch: {kernel}"
    print("\n    ".join(textwrap.wrap(last, width - 4)))
    return OK


# --- models and inputs ----------------------------------------------------------------------------


def _prepare(
    arguments: argparse.Namespace, progress: Progress
) -> tuple[NamedModel, tuple[torch.Tensor, ...] | None, Any]:
    """The model, its example inputs and, if any dimension was named, its dynamic shapes."""
    progress("load model")
    import torch

    from refold.cli import model_spec

    if not -(1 << 63) <= arguments.seed < 1 << 64:
        raise UsageError(f"--seed {arguments.seed}: expected a number of 64 bits")
    torch.manual_seed(arguments.seed)
    with _aside():
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
    if not dtype.is_floating_point:
        raise UsageError(f"--dtype {arguments.dtype}: a model computes in a floating-point dtype")
    inputs = tuple(t.example(dtype) for t in texts)
    if not isinstance(named.model, Path):
        if arguments.checkpoint:
            model_spec.load_checkpoint(named.model, arguments.checkpoint)
        if arguments.randomize_bn:
            wide = [dataclasses.replace(t, sizes=(max(t.sizes[0], 4), *t.sizes[1:])) for t in texts]
            with _aside():
                _randomize(named, [t.example(torch.float32) for t in wide])
        if arguments.dtype:
            named.model.to(dtype)
    return named, inputs, _dynamic_shapes(texts)


def _aside() -> contextlib.redirect_stdout[Any]:
    """What a model prints goes to the error stream: the answer is alone on the other."""
    return contextlib.redirect_stdout(sys.stderr)


def _quietly(work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls what runs the model."""
    with _aside():
        return work(*args, **kwargs)


def _files_read(arguments: argparse.Namespace) -> tuple[Path, ...]:
    """The files that the arguments name as models, weights and values."""
    texts = [arguments.model, arguments.checkpoint or ""]
    texts += [text.partition("=")[2] for text in arguments.bind]
    return tuple(path for text in texts if not unreadable(path := Path(text)))


def _randomize(named: NamedModel, inputs: list[torch.Tensor]) -> None:
    from refold.cli.model_spec import randomize_batch_norms

    assert not isinstance(named.model, Path)
    if not randomize_batch_norms(named.model, inputs):
        raise UsageError(f"--randomize-bn: {named.name} has no batch norm")


def _dynamic_shapes(texts: list[InputText]) -> Any:
    from torch.export import Dim

    # A named leading dimension alone is what happens by default, with more care.
    if not any(d for t in texts for d in t.dynamic):
        return None
    return tuple(dict.fromkeys(t.dynamic, Dim.AUTO) for t in texts)


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
