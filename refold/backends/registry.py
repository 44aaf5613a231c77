"""Which targets there are: built in, announced by packages, registered in this process."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from refold import options, plugins
from refold.backends.base import Target
from refold.errors import MissingDependencyError, UsageError, did_you_mean

BUILT_IN = {
    "torch": "refold.backends.pytorch.eager:TorchTarget",
    "inductor": "refold.backends.pytorch.inductor:InductorTarget",
    "aoti": "refold.backends.pytorch.aoti:AotiTarget",
    "onnx": "refold.backends.onnx.targets:OnnxTarget",
    "ort": "refold.backends.onnx.targets:OnnxRuntimeTarget",
    "ort-format": "refold.backends.onnx.ort_format:OrtFormatTarget",
    "openvino": "refold.backends.edge.openvino:OpenVinoTarget",
    "executorch": "refold.backends.edge.executorch:ExecuTorchTarget",
    "litert": "refold.backends.edge.litert:LiteRtTarget",
    "ncnn": "refold.backends.edge.ncnn:NcnnTarget",
    "coreml": "refold.backends.edge.coreml:CoreMlTarget",
    "trt": "refold.backends.tensorrt.target:TensorRTTarget",
}
GROUP = "refold.targets"
_registered: dict[str, Target] = {}


def register_target(target: Target) -> None:
    """Makes a target known by its name, in this process.

    Packages announce theirs through the entry point group ``refold.targets`` instead
    (name = the target's name, value = a class without constructor arguments).

    Raises:
        UsageError: it is no target, or has the name of one of refold's own.
    """
    if not isinstance(target, Target):
        raise UsageError(f"{target!r} is no target: make an object of a subclass of refold.Target")
    if target.name in BUILT_IN:
        raise UsageError(f"target {target.name!r} is refold's own: give yours another name")
    _registered[target.name] = target


def target_names() -> list[str]:
    """The names of all targets, built in first."""
    return list(dict.fromkeys([*BUILT_IN, *plugins.strangers(GROUP, BUILT_IN), *_registered]))


_RUNTIMES = {"tensorrt": "trt", "onnxruntime": "ort", "tflite": "litert", "aotinductor": "aoti"}


def find_target(name: str) -> Target:
    """The target of that name; an unknown one is an error that names the nearest."""
    if not isinstance(name, str):
        raise UsageError(f"target is {name!r}: expected a name, as 'refold targets' lists them")
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        return cast(Target, getattr(importlib.import_module(module), attribute)())
    if name in _registered:
        return _registered[name]
    entries = plugins.offered(GROUP).get(name)
    if entries is not None:
        return _checked(name, plugins.load(entries, "target"), plugins.package(entries[0]))
    runtime = _RUNTIMES.get(name.lower().replace("-", "").replace("_", ""))
    hint = f" (did you mean {runtime!r}?)" if runtime else did_you_mean(name, target_names())
    raise UsageError(f"unknown target {name!r}{hint}")


def _checked(name: str, made: Any, package: str) -> Target:
    """What a package offers as a target, if it is one."""
    if not isinstance(made, Target):
        raise UsageError(
            f"target {name!r} of {package} is no target: {type(made).__name__} is no subclass of "
            "refold.Target"
        )
    if made.name != name:
        raise UsageError(
            f"target {name!r} of {package} calls itself {made.name!r}: its entry point must have "
            "the name of the target"
        )
    return made


def file_targets() -> dict[str, Target]:
    """By suffix the target that loads such files."""
    found: dict[str, Target] = {}
    for name in target_names():
        try:
            target = find_target(name)
        except UsageError:
            continue  # a package that is broken costs its own targets; whoever names one hears why
        if target.loads_files:
            found.setdefault(target.suffix, target)
    return found


def make_options(target: Target, given: Mapping[str, Any], settings: Iterable[str] = ()) -> Any:
    """Builds the target's options; an unknown one is an error that names the nearest.

    Args:
        target: the target.
        given: values by option.
        settings: what else the user may have meant.

    Raises:
        UsageError: there is no such option, or a value is of another kind.
    """
    known = [f.name for f in dataclasses.fields(target.options)]
    for name in given:
        if name not in known:
            hint = did_you_mean(name, [*known, *settings])
            if not hint.startswith(" (did"):
                hint = did_you_mean(name, known) if known else " (it has none)"
            raise UsageError(f"target {target.name!r} has no option {name!r}{hint}")
    options.check(target.options, given, f"target {target.name!r}")
    return target.options(**given)


def require(target: Target) -> None:
    """Raises :class:`MissingDependencyError` if the target cannot be used here."""
    reason = target.available()
    if reason:
        raise MissingDependencyError(f"target {target.name!r} cannot be used here: {reason}")


def read_options(target: Target, texts: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments of a target from ``name=value`` texts; unknown names are errors."""
    return options.read(target.options, options.assignments(texts), f"target {target.name!r}")
