"""Which targets there are: built in, announced by packages, registered in this process."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
from collections.abc import Mapping
from typing import Any, cast

from refold.backends.base import LoadsFile, Target
from refold.errors import MissingDependencyError, UsageError, did_you_mean

_BUILT_IN = {
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
_registered: dict[str, Target] = {}


def register_target(target: Target) -> None:
    """Makes a target known by its name, in this process.

    Packages announce theirs through the entry point group ``refold.targets`` instead
    (name = the target's name, value = a class without constructor arguments).
    """
    _registered[target.name] = target


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {e.name: e for e in importlib.metadata.entry_points(group="refold.targets")}


def target_names() -> list[str]:
    """The names of all targets, built in first."""
    return list(dict.fromkeys([*_BUILT_IN, *_entry_points(), *_registered]))


_RUNTIMES = {"tensorrt": "trt", "onnxruntime": "ort", "tflite": "litert", "aotinductor": "aoti"}


def find_target(name: str) -> Target:
    """The target of that name; an unknown one is an error that names the nearest."""
    if name in _registered:
        return _registered[name]
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        return cast(Target, getattr(importlib.import_module(module), attribute)())
    entry = _entry_points().get(name)
    if entry is not None:
        return cast(Target, entry.load()())
    runtime = _RUNTIMES.get(name.lower().replace("-", "").replace("_", ""))
    hint = f" (did you mean {runtime!r}?)" if runtime else did_you_mean(name, target_names())
    raise UsageError(f"unknown target {name!r}{hint}")


def file_targets() -> dict[str, Target]:
    """By suffix the target that loads such files."""
    found: dict[str, Target] = {}
    for target in map(find_target, target_names()):
        if isinstance(target, LoadsFile):
            found.setdefault(target.suffix, target)
    return found


def make_options(target: Target, given: Mapping[str, Any]) -> Any:
    """Builds the target's options; an unknown one is an error that names the nearest."""
    known = [f.name for f in dataclasses.fields(target.options)]
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known) if known else " (it has none)"
            raise UsageError(f"target {target.name!r} has no option {name!r}{hint}")
    return target.options(**given)


def require(target: Target) -> None:
    """Raises :class:`MissingDependencyError` if the target cannot be used here."""
    reason = target.available()
    if reason:
        raise MissingDependencyError(f"target {target.name!r} cannot be used here: {reason}")
