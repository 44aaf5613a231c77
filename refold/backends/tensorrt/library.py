"""The part of the ``tensorrt`` and ``tensorrt_rtx`` packages that refold uses.

Every name used here and in ``build``, ``refit`` and ``runner`` exists in 10.3 to 11.4 and in
TensorRT-RTX 1.7.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from refold.errors import BackendError, MissingDependencyError, UsageError

_MODULES = {
    "tensorrt": ("tensorrt", "tensorrt_bindings"),
    "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}


@dataclass(frozen=True)
class Library:
    """An imported TensorRT.

    Attributes:
        module: its Python module.
        name: ``tensorrt`` or ``tensorrt_rtx``.
        version: as the module states it.
    """

    module: Any
    name: str
    version: str

    @property
    def rtx(self) -> bool:
        return self.name == "tensorrt_rtx"

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def find(name: str | None = None) -> Library | None:
    """The library of that name, or the first that is installed."""
    if name is not None and name not in _MODULES:
        raise UsageError(f"library {name!r}: write {' or '.join(_MODULES)}")
    for known, modules in _MODULES.items():
        if name not in (None, known):
            continue
        for module in modules:
            if importlib.util.find_spec(module) is None:
                continue
            try:
                loaded = importlib.import_module(module)
            except (ImportError, OSError) as error:
                raise BackendError(f"{module} is installed, but does not load: {error}") from error
            return Library(loaded, known, str(loaded.__version__))
    return None


def need(name: str | None = None) -> Library:
    """The library, or an error that says what to install."""
    library = find(name)
    if library is None:
        raise MissingDependencyError(
            f"{name or 'TensorRT'} is not installed: "
            f"pip install {(name or 'tensorrt').replace('_', '-')}"
        )
    return library


class Log:
    """Keeps what the library says; made for one library, because it derives from its logger."""

    def __init__(self, library: Library) -> None:
        self.lines: list[tuple[str, str]] = []
        lines = self.lines
        trt: Any = library.module

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                lines.append((str(severity).rpartition(".")[2], str(message)))

        self.logger = Logger()

    @property
    def errors(self) -> list[str]:
        """What was logged as an error, without repetition."""
        worst = [text for severity, text in self.lines if severity in ("ERROR", "INTERNAL_ERROR")]
        return list(dict.fromkeys(t.strip() for t in worst))

    def engine_layers(self) -> int | None:
        """The layers of the engine, if the library listed them as it built it."""
        for _, message in reversed(self.lines):
            _, found, listed = message.partition("Layers:\n")
            if found:
                block = listed.partition("\n\n")[0]
                return sum(line.startswith("Name:") for line in block.splitlines())
        return None


@dataclass(frozen=True)
class ParserMessage:
    """What the parser holds against one node."""

    node: str
    operator: str
    code: str
    text: str


@dataclass(frozen=True)
class Parsed:
    """A network that a parser filled, and what it needs to live."""

    builder: Any
    network: Any
    messages: tuple[ParserMessage, ...]
    log: Log
    parser: Any = field(repr=False)

    @property
    def accepted(self) -> bool:
        return not self.messages


def parse(library: Library, model: Path) -> Parsed:
    """Parses an ONNX file into a strongly typed network."""
    trt = library.module
    log = Log(library)
    with _no_factory(library):
        builder = trt.Builder(log.logger)
    # Precision is the graph's own; 11.x knows nothing else and takes the flag without effect.
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log.logger)
    accepted = parser.parse_from_file(str(model))
    found = [parser.get_error(i) for i in range(parser.num_errors)]
    messages = tuple(
        ParserMessage(e.node_name(), e.node_operator(), str(e.code()).rpartition(".")[2], e.desc())
        for e in found
    )
    if not accepted and not messages:
        messages = (ParserMessage("", "", "", "; ".join(log.errors) or "no reason was given"),)
    return Parsed(builder, network, messages, log, parser)


@contextmanager
def _no_factory(library: Library) -> Iterator[None]:
    """The bindings answer with a TypeError where the library cannot make an object."""
    try:
        yield
    except TypeError as error:
        raise BackendError(f"{library} cannot be initialised here: {error}") from error


def make_runtime(library: Library, log: Log) -> Any:
    """A runtime; some versions crash without a GPU, so its absence is found out before."""
    require_gpu()
    with _no_factory(library):
        return library.module.Runtime(log.logger)


def require_gpu() -> None:
    """Raises where PyTorch sees no GPU."""
    if not torch.cuda.is_available():
        raise BackendError(
            "no GPU is visible (torch.cuda.is_available() is false): an engine runs on the machine "
            "that it was built for"
        )


def torch_dtypes(library: Library) -> dict[Any, torch.dtype]:
    """Torch dtypes of what an engine reads and writes."""
    kinds = library.module.DataType
    return {
        kinds.FLOAT: torch.float32,
        kinds.HALF: torch.float16,
        kinds.BF16: torch.bfloat16,
        kinds.INT8: torch.int8,
        kinds.INT32: torch.int32,
        kinds.INT64: torch.int64,
        kinds.BOOL: torch.bool,
        kinds.UINT8: torch.uint8,
        kinds.FP8: torch.float8_e4m3fn,
    }
