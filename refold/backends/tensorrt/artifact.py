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
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from refold.backends.onnx.file import check_external_data
from refold.backends.write import write_atomically
from refold.errors import BackendError, UsageError

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
    with path.open("rb") as content:
        while block := content.read(_BLOCK):
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
        try:
            same = path.stat().st_size == told["bytes"] and digest(path) == told["sha256"]
        except OSError as error:
            raise BackendError(f"{path} cannot be read: {error.strerror or error}") from error
        if not same:
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
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError) as error:
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


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Writes a file beside its place, then moves it there: whole, or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BackendError(f"cannot write {path}: {reason}; nothing was written") from error
    write_atomically(path, lambda folder, name: write(folder / name), force=True)
