"""Builds the engine of an artifact directory, and keeps it for the machine that it was built on.

An engine belongs to one artifact, one version of the library and one kind of GPU; its file name
says which. Files appear whole: a build that is killed or cancelled leaves what was there before,
and two builds at once leave the engine of the later one.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from refold.backends.tensorrt import artifact, ops
from refold.backends.tensorrt import library as libraries
from refold.errors import BackendError, UsageError

_TIMING = b"refold timing cache 1\n"
Result = TypeVar("Result")
_POLL = 0.1  # seconds between looks for an interrupt


@dataclass(frozen=True)
class EngineRecord:
    """What is known about an engine; the file that says which engine is the present one.

    Attributes:
        engine: its file, beside the record.
        sha256: of that file.
        content: identifies the artifact that it was made of.
        library: ``tensorrt`` or ``tensorrt_rtx``.
        version: of the library.
        device: the GPU that it is for.
        seconds: how long the build took.
        layers: of the engine, where the library listed them.
    """

    engine: str
    sha256: str
    content: str
    library: str
    version: str
    device: str
    seconds: float
    layers: int | None


@dataclass(frozen=True)
class Built:
    """An engine on disk. ``cached``: it was there already."""

    path: Path
    record: EngineRecord
    cached: bool = True


def device_name() -> str:
    """The GPU that an engine is built for; ``ahead-of-time`` where none is visible."""
    if not torch.cuda.is_available():
        return "ahead-of-time"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}-sm{major}{minor}"


def find(folder: Path, made_of: artifact.Build, library: libraries.Library) -> Built | None:
    """The engine of an artifact for this library and this GPU, if it was built."""
    path = _record_path(folder, made_of, library)
    try:
        record = EngineRecord(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    # The record may have come from anywhere: a name beside it is all that it may give.
    stored = path.with_name(Path(str(record.engine)).name)
    return Built(stored, record) if stored.is_file() else None


def build(
    folder: Path,
    *,
    library: str | None = None,
    progress: Callable[[str], None] | None = None,
    rebuild: bool = False,
) -> Built:
    """Builds the engine of an artifact for this machine, unless it is there already.

    Args:
        folder: the artifact.
        library: ``tensorrt`` or ``tensorrt_rtx``; by default the first that is installed.
        progress: called with what is being done.
        rebuild: build although there is an engine.

    Raises:
        BackendError: the artifact is damaged, or the library does not accept the model.
        KeyboardInterrupt: the user cancelled; nothing was written.
    """
    made_of = artifact.read(folder)
    used = libraries.need(library)
    check_version(made_of, used)
    before = find(folder, made_of, used)
    if before is not None and not rebuild and artifact.digest(before.path) == before.record.sha256:
        return before
    if progress is not None:
        last = f" (last time {before.record.seconds:.0f} s)" if before is not None else ""
        progress(f"build the engine with {used}{last}")
    start = time.perf_counter()
    timing = _record_path(folder, made_of, used).with_name(f"{_stem(used)}.timing")
    engine, log, cache = _compile(folder, made_of, used, timing)
    seconds = time.perf_counter() - start
    built = store(folder, made_of, used, engine, seconds, log.engine_layers())
    if cache:
        artifact.replace_file(timing, lambda p: _write(p, _seal(cache)))
    return built


def store(
    folder: Path,
    made_of: artifact.Build,
    used: libraries.Library,
    engine: bytes,
    seconds: float,
    layers: int | None,
) -> Built:
    """Writes an engine of this machine into its artifact, in the place of the one before."""
    before = find(folder, made_of, used)
    index = _record_path(folder, made_of, used)
    digest = hashlib.sha256(engine).hexdigest()
    record = EngineRecord(
        f"{index.stem}-{digest[:8]}.engine", digest, made_of.content, used.name, used.version,
        device_name(), seconds, layers,
    )  # fmt: skip
    # The record goes last. Of two builds at once, each leaves an engine, and one of them a record
    # that fits its own.
    path = index.with_name(record.engine)
    artifact.replace_file(path, lambda p: _write(p, engine))
    artifact.replace_file(index, lambda p: artifact.write_json(p, asdict(record)))
    if before is not None and before.path != path:
        before.path.unlink(missing_ok=True)
    return Built(path, record, cached=False)


@dataclass(frozen=True)
class Opened:
    """An engine that the library has loaded, and what it needs to live."""

    library: libraries.Library
    log: libraries.Log
    runtime: Any
    engine: Any


def open_engine(built: Built) -> Opened:
    """Loads an engine.

    Raises:
        BackendError: no GPU, a damaged engine, or one of another library, version or GPU.
    """
    path, record = built.path, built.record
    plan = path.read_bytes()
    # A damaged engine can crash the library: it does not get to see one.
    if hashlib.sha256(plan).hexdigest() != record.sha256:
        raise BackendError(f"{path} is damaged: run refold build again")
    libraries.require_gpu()
    library = libraries.need(record.library)
    here = device_name()
    if (record.version, record.device) != (library.version, here):
        raise BackendError(
            f"{path} was built with {record.library} {record.version} for {record.device}; "
            f"here are {library} and {here}: run refold build again"
        )
    log = libraries.Log(library)
    runtime = libraries.make_runtime(library, log)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BackendError(f"{library} cannot load {path}: {'; '.join(log.errors)}")
    return Opened(library, log, runtime, engine)


def _record_path(folder: Path, made_of: artifact.Build, library: libraries.Library) -> Path:
    return folder / artifact.ENGINES / f"{_stem(library)}-{made_of.content[:16]}.json"


def _stem(library: libraries.Library) -> str:
    return re.sub(r"[^\w.]+", "-", f"{library.name}-{library.version}-{device_name()}")


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def check_version(made_of: artifact.Build, library: libraries.Library) -> None:
    """Raises if the library is older than the artifact needs."""
    if library.rtx:
        return
    have, least = (
        ops.Version.parse(".".join(re.findall(r"\d+", text)[:2])).number
        for text in (library.version, made_of.minimum_version)
    )
    if have < least:
        raise UsageError(
            f"{library} is too old for opset {made_of.opset}: needs {made_of.minimum_version}, "
            "or export again with a lower opset"
        )


def _compile(
    folder: Path, made_of: artifact.Build, library: libraries.Library, timing: Path
) -> tuple[bytes, libraries.Log, bytes]:
    """The engine, what was logged, and the timing cache.

    The library runs beside the main thread: where it calls Python, an interruption would be lost.
    """
    stop = threading.Event()
    return _interruptible(lambda: _compiled(folder, made_of, library, timing, stop), stop)


def _compiled(
    folder: Path,
    made_of: artifact.Build,
    library: libraries.Library,
    timing: Path,
    stop: threading.Event,
) -> tuple[bytes, libraries.Log, bytes]:
    parsed = libraries.parse(library, folder / artifact.MODEL)
    if not parsed.accepted:
        raise BackendError(_rejected(folder, library, parsed.messages))
    config = _configuration(made_of, library, parsed)
    # Without a GPU there is nothing to time, and asking for a cache asks for one.
    cache = _timing_cache(config, timing) if torch.cuda.is_available() else None
    monitor = _monitor(library, stop)  # the library holds no reference of its own
    config.progress_monitor = monitor
    engine = parsed.builder.build_serialized_network(parsed.network, config)
    if engine is None:
        reasons = "; ".join(parsed.log.errors) or "no reason was given"
        raise BackendError(f"{library} cannot build the engine: {reasons}")
    return bytes(engine), parsed.log, bytes(cache.serialize()) if cache is not None else b""


def _configuration(
    made_of: artifact.Build, library: libraries.Library, parsed: libraries.Parsed
) -> Any:
    trt = library.module
    config = parsed.builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # TF32 is on by default: it rounds the inputs of float32 layers to 10 bits.
    known = {"TF32": trt.BuilderFlag.TF32, "REFIT": trt.BuilderFlag.REFIT}
    unknown = made_of.flags.keys() - known.keys()
    if unknown:
        raise UsageError(
            f"{artifact.MARKER} sets {', '.join(sorted(unknown))}; this refold knows "
            f"{', '.join(known)}: use the refold that wrote it, or export again"
        )
    for name, flag in known.items():
        if made_of.flags.get(name):
            config.set_flag(flag)
        else:
            config.clear_flag(flag)
    dynamic = [t for t in made_of.inputs if t.profile is not None]
    if dynamic:
        profile = parsed.builder.create_optimization_profile()
        for tensor in dynamic:
            assert tensor.profile is not None
            profile.set_shape(tensor.name, *tensor.profile)
        if config.add_optimization_profile(profile) < 0:
            raise BackendError(
                f"{library} does not accept the profile: {'; '.join(parsed.log.errors)}"
            )
    return config


def _rejected(
    folder: Path, library: libraries.Library, messages: tuple[libraries.ParserMessage, ...]
) -> str:
    try:
        origins: Mapping[str, Any] = json.loads((folder / "provenance.json").read_text())
    except (OSError, ValueError):
        origins = {}
    lines = [f"the parser of {library} does not accept the model"]
    for message in messages:
        origin = origins.get(message.node, {})
        lines.append(
            f"  {message.node or 'the model'} ({message.operator}): {message.text.strip()}"
        )
        if origin.get("modules") or origin.get("source"):
            lines.append(
                f"    from {origin.get('modules', '')} {origin.get('source', '')}".rstrip()
            )
        lines.append(f"    fix: {ops.known_fix(message.operator)}")
    return "\n".join(lines)


def _timing_cache(config: Any, path: Path) -> Any:
    """The cache of earlier builds on this machine; a damaged one is started anew."""
    data = b""
    if path.is_file():
        stored = path.read_bytes()
        content = stored[len(_seal(b"")) :]
        if stored == _seal(content):
            data = content
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _seal(cache: bytes) -> bytes:
    return _TIMING + hashlib.sha256(cache).hexdigest().encode() + b"\n" + cache


def _monitor(library: libraries.Library, stop: threading.Event) -> Any:
    trt: Any = library.module

    class Monitor(trt.IProgressMonitor):
        """Lets a build be cancelled between its steps; called from other threads too."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            pass

        def step_complete(self, phase: str, step: int) -> bool:
            return not stop.is_set()

        def phase_finish(self, phase: str) -> None:
            pass

    return Monitor()


def _interruptible(work: Callable[[], Result], stop: threading.Event) -> Result:
    """Runs ``work`` beside the main thread, which alone hears Ctrl-C and then sets ``stop``."""
    results: list[Result] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # handed over to the caller's thread
            failures.append(error)
        finally:
            done.set()

    done = threading.Event()
    thread = threading.Thread(target=run, name="refold-build")
    try:
        thread.start()
        while not done.wait(_POLL):
            pass
    except KeyboardInterrupt:
        stop.set()
        if thread.ident is not None:
            done.wait()
        raise
    if failures:
        raise failures[0]
    return results[0]
