"""Gives an engine the weights of another artifact, instead of building one.

The other artifact is the same model from another checkpoint: folded with the same settings it has
the same graph, the same names, and other weights. Written against the programming interface that
10.3 to 11.4 and TensorRT-RTX share, and executed nowhere yet.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from refold.backends.onnx import file
from refold.backends.tensorrt import artifact
from refold.backends.tensorrt import build as builds
from refold.backends.tensorrt import library as libraries
from refold.errors import BackendError, UsageError


def refit(folder: Path, base: Path, *, library: str | None = None) -> builds.Built:
    """The engine of ``folder``, made of the one that ``base`` has for this machine.

    Args:
        folder: an artifact with new weights.
        base: an artifact whose engine was built here.
        library: ``tensorrt`` or ``tensorrt_rtx``; by default the first that is installed.

    Raises:
        UsageError: the artifacts differ in more than weights, or there is no engine yet.
        BackendError: one of them is damaged, or the library does not accept the weights.
    """
    made_of, was = artifact.read(folder), artifact.read(base)
    for path, build in ((folder, made_of), (base, was)):
        if not build.flags.get("REFIT"):
            raise UsageError(f"{path} was exported without refittable=True (--refittable)")
    reason = difference(folder, made_of, base, was)
    if reason:
        raise UsageError(f"{folder} and {base} differ in {reason}: run refold build {folder}")
    used = libraries.need(library)
    built = builds.find(base, was, used)
    if built is None:
        raise UsageError(f"{base} has no engine for this machine: run refold build {base}")
    start = time.perf_counter()
    opened = builds.open_engine(built)
    trt = opened.library.module
    refitter = trt.Refitter(opened.engine, opened.log.logger)
    reader = trt.OnnxParserRefitter(refitter, opened.log.logger)
    accepted = reader.refit_from_file(str(folder / artifact.MODEL))
    missing = refitter.get_missing_weights()
    if not accepted or missing or not refitter.refit_cuda_engine():
        reasons = [reader.get_error(i).desc() for i in range(reader.num_errors)]
        reasons += [f"no weights for {', '.join(missing)}"] * bool(missing) + opened.log.errors
        raise BackendError(
            f"{opened.library} cannot refit the engine: {'; '.join(reasons) or 'no reason given'}"
        )
    plan = bytes(opened.engine.serialize())
    seconds = time.perf_counter() - start
    return builds.store(folder, made_of, used, plan, seconds, built.record.layers)


def difference(folder: Path, one: artifact.Build, base: Path, other: artifact.Build) -> str:
    """What two artifacts differ in, other than weights; empty if in nothing."""
    for key in ("inputs", "outputs", "flags", "precision", "opset"):
        if getattr(one, key) != getattr(other, key):
            return key
    graphs = [_without_weights(path / artifact.MODEL) for path in (folder, base)]
    return "" if graphs[0] == graphs[1] else "their graphs"


def _without_weights(model: Path) -> bytes:
    """The graph; of its constants the names, dtypes and shapes, and the values of integers."""
    import onnx

    proto = onnx.load(str(model), load_external_data=False)
    del proto.metadata_props[:]
    fixed = {onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL}
    for tensor in file.tensors(proto):
        # Sizes, axes and masks make the graph what it is.
        if tensor.data_type not in fixed:
            _empty(tensor)
    for node in proto.graph.node:
        del node.metadata_props[:]
    return bytes(proto.SerializeToString(deterministic=True))


def _empty(tensor: Any) -> None:
    for name in ("raw_data", "float_data", "int32_data", "double_data", "external_data"):
        tensor.ClearField(name)
    tensor.ClearField("data_location")
