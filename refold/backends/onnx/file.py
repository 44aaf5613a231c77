"""Reads ONNX files that may have come from anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from refold.backends.base import missing
from refold.errors import BackendError, MissingDependencyError, first_line
from refold.reading import unreadable


def read(path: Path) -> Any:
    """The model (``onnx_ir.Model``) of a file.

    Raises:
        BackendError: it is no ONNX file, or takes weights from outside of its own directory.
    """
    check_external_data(path)
    import onnx_ir

    return onnx_ir.load(path)


def external_data(model: Any) -> list[Path]:
    """The files that a model reads weights from, beside its own."""
    import onnx_ir

    stored = [v.const_value for v in model.graph.initializers.values()]
    return list({Path(t.path): None for t in stored if isinstance(t, onnx_ir.ExternalTensor)})


def check_external_data(model: Path, listed: set[str] | None = None) -> None:
    """Raises if a file is no ONNX model, or takes weights from outside of its own directory.

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
    except OSError as error:
        raise BackendError(f"{model} cannot be read: {first_line(error)}") from error
    if not proto.HasField("graph"):  # any bytes may be a message without one
        raise BackendError(f"{model} is not an ONNX file: it holds no graph")
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
        if unreadable(path):
            raise BackendError(f"{model} needs {location} beside it: copy it too")
        if listed is not None and Path(location).as_posix() not in listed:
            raise BackendError(
                f"{model} takes weights from {location}, which the directory does not list"
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
