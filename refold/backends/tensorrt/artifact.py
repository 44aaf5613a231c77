"""The portable directory: everything that another machine needs to build and to judge an engine.

::

    DIR/build.json       inputs, outputs, profiles, precision, flags, files with their SHA-256
        model.onnx       the folded graph (and model.onnx.data where the weights are large)
        provenance.json  for each ONNX node the module, the user's line and the rules behind it
        refit.json       which checkpoint tensors each weight was folded from, by which passes
        verify/          inputs and float64 results of the original model
        engines/         written by ``refold build``, one engine for each machine
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from refold.backends.base import missing
from refold.errors import BackendError, MissingDependencyError, UsageError

SCHEMA = 1
MARKER = "build.json"
MODEL = "model.onnx"
ENGINES = "engines"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Tensor:
    """An input or output. ``shape`` holds numbers and names of dynamic dimensions.

    ``profile`` holds the smallest, the expected and the largest shape of an input.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    profile: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def dynamic(self) -> bool:
        return any(isinstance(size, str) for size in self.shape)


@dataclass(frozen=True)
class Build:
    """The content of ``build.json``."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    precision: Mapping[str, Any]
    opset: int
    flags: Mapping[str, bool]
    minimum_version: str
    verify: Mapping[str, Any] | None
    versions: Mapping[str, str]
    trtexec: Mapping[str, str]
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def content(self) -> str:
        """Identifies what an engine is made of; verification data is no part of it."""
        made_of = {n: f["sha256"] for n, f in self.files.items() if n.startswith(MODEL)}
        profiles = [asdict(t) for t in self.inputs]
        text = json.dumps([made_of, profiles, dict(self.flags)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            sha.update(block)
    return sha.hexdigest()


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=False) + "\n")


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of everything in an artifact but ``build.json``."""
    return {
        p.relative_to(folder).as_posix(): {"sha256": digest(p), "bytes": p.stat().st_size}
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != MARKER
    }


def read(folder: Path) -> Build:
    """Reads and checks a directory that may have come from anywhere.

    Raises:
        UsageError: it is no artifact, or one of another schema.
        BackendError: a file is missing, was changed, or lies outside of the directory.
    """
    marker = folder / MARKER
    if not marker.is_file():
        raise UsageError(
            f"{folder} has no {MARKER}: name a directory that "
            "`refold export MODEL --target trt -o DIR` has written"
        )
    build = _parse(marker)
    for name, told in build.files.items():
        path = _inside(folder, name)
        if not path.is_file():
            raise BackendError(f"{folder} is incomplete: {name} is missing; copy all of it again")
        if path.stat().st_size != told["bytes"] or digest(path) != told["sha256"]:
            raise BackendError(f"{path} was changed or damaged after export; copy it again")
    if MODEL not in build.files:
        raise BackendError(f"{marker} does not list {MODEL}; export the model again")
    check_external_data(folder / MODEL, set(build.files))
    return build


def _parse(marker: Path) -> Build:
    try:
        data = json.loads(marker.read_text())
        schema = data["schema"]
        if schema == SCHEMA:
            tensors = {
                key: tuple(
                    Tensor(
                        str(t["name"]),
                        str(t["dtype"]),
                        tuple(t["shape"]),
                        _profile(t["profile"]) if t["profile"] else None,
                    )
                    for t in data[key]
                )
                for key in ("inputs", "outputs")
            }
            files = {
                str(name): {"sha256": str(told["sha256"]), "bytes": int(told["bytes"])}
                for name, told in data["files"].items()
            }
            flags = {str(name): bool(on) for name, on in data["flags"].items()}
            plain = {"opset": int(data["opset"]), "minimum_version": str(data["minimum_version"])}
            return Build(**{**data, **tensors, **plain, "files": files, "flags": flags})
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise BackendError(f"{marker} cannot be read: {error}; export the model again") from error
    raise UsageError(
        f"{marker} has schema {schema}, this refold reads {SCHEMA}: use the refold that wrote it, "
        "or export again"
    )


def _profile(shapes: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    low, best, high = (tuple(map(int, shape)) for shape in shapes)
    return low, best, high


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BackendError(f"{folder / MARKER} names {name!r}, which is outside of the directory")
    return path


def check_external_data(model: Path, listed: set[str] | None = None) -> None:
    """Raises if an ONNX file takes weights from outside of its own directory.

    Args:
        model: an ONNX file.
        listed: the files of the directory that are known to be what they were.
    """
    reason = missing(("onnx",), "onnx")
    if reason:
        raise MissingDependencyError(reason)
    import onnx
    from google.protobuf.message import DecodeError

    try:
        proto = onnx.load(str(model), load_external_data=False)
    except DecodeError as error:
        raise BackendError(f"{model} is not an ONNX file: {error}") from error
    for tensor in tensors(proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        location = next((e.value for e in tensor.external_data if e.key == "location"), "")
        path = model.parent / location
        home = model.parent.resolve()
        if not location or not path.resolve().is_relative_to(home) or path.resolve() == home:
            raise BackendError(
                f"{model} takes the weight {tensor.name!r} from {location!r}, outside of its own "
                "directory: not read"
            )
        if not path.is_file():
            raise BackendError(f"{model} needs {location} beside it: copy it too")
        if listed is not None and Path(location).as_posix() not in listed:
            raise BackendError(
                f"{model} takes weights from {location}, which {MARKER} does not list"
            )


def tensors(proto: Any) -> Iterator[Any]:
    """All tensors of a protobuf message, those in attributes and subgraphs too."""
    for descriptor, value in proto.ListFields():
        if descriptor.message_type is None:
            continue
        for item in value if hasattr(value, "add") else [value]:
            if item.DESCRIPTOR.name == "TensorProto":
                yield item
            else:
                yield from tensors(item)


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Writes a file beside its place, then moves it there: whole, or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        os.replace(beside, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BackendError(f"cannot write {path}: {reason}; nothing was written") from error
    finally:
        beside.unlink(missing_ok=True)
