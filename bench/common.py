"""What the benchmarks share: versions, results, paired timing with intervals."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import logging
import os
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

RESULTS = Path(__file__).parent / "results"
_PACKAGES = (
    "torch",
    "timm",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxslim",
    "onnxsim",
    "transformers",
    "openvino",
    "executorch",
    "litert-torch",
    "ai-edge-litert",
    "ncnn",
    "pnnx",
    "coremltools",
)


def versions() -> dict[str, str]:
    """Versions of refold, Python and every peer that is installed."""
    import refold

    found = {"refold": refold.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def machine() -> dict[str, Any]:
    """The processor, as far as the system names it, and the instructions that torch uses."""
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "processor": model,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "system": platform.system(),
    }


def save(name: str, settings: Mapping[str, Any], rows: Any, folder: Path = RESULTS) -> Path:
    """Writes one benchmark's result; says where.

    A run that has fewer rows than the stored result, because it was asked for some networks alone
    or is still going on, is written beside it and replaces nothing: ``NAME.part.json``. (Where a
    benchmark has lost rows for good, remove its stored result first.)

    Args:
        name: file name without suffix.
        settings: the options it ran with.
        rows: the measurements.
        folder: where it goes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, part = folder / f"{name}.json", folder / f"{name}.part.json"
    if path.exists() and len(rows) < len(load(name, folder)["rows"]):
        path = part
    else:
        part.unlink(missing_ok=True)
    document = {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "versions": versions(),
        "machine": machine(),
        "settings": dict(settings),
        "rows": rows,
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def load(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the exporters' and optimizers' warnings, logs and prints."""
    with warnings.catch_warnings(), open(os.devnull, "w") as sink:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
                yield
        finally:
            logging.disable(logging.NOTSET)


def export_onnx(model: nn.Module, inputs: tuple[torch.Tensor, ...], path: Path) -> Path:
    """PyTorch's own exporter, with its optimizer, static shapes, opset 20."""
    with quiet(), torch.no_grad():
        program = torch.onnx.export(model, inputs, dynamo=True, opset_version=20, verbose=False)
        program.save(str(path))
    return path


_REST = 0.005  # seconds in which the idle threads of another form stop spinning


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 3,
    calls: int = 1,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Seconds of each run in each round; the order changes every round.

    CPU time, summed over threads, is what a shared machine can still measure; what several threads
    gain, wall time alone can tell. With more than one call a round, the seconds are those of a call
    in a loop: one call before them is not counted, which finds the caches as the form before it has
    left them.
    """
    order = list(runs)
    for name in order * warmup:
        runs[name]()
    shuffle = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            if calls > 1:
                runs[name]()
            elif clock is not time.process_time:
                time.sleep(_REST)
            start = clock()
            for _ in range(calls):
                runs[name]()
            seconds[name].append((clock() - start) / calls)
    return seconds


def ratio(
    slow: list[float], fast: list[float], draws: int = 2000, level: float = 0.95
) -> dict[str, float]:
    """Ratio of medians with a bootstrap interval; rounds are resampled in pairs."""
    generator = random.Random(0)
    pairs = list(zip(slow, fast, strict=True))

    def of(sample: list[tuple[float, float]]) -> float:
        return statistics.median(a for a, _ in sample) / statistics.median(b for _, b in sample)

    resampled = sorted(of(generator.choices(pairs, k=len(pairs))) for _ in range(draws))
    tail = (1 - level) / 2
    return {
        "ratio": of(pairs),
        "low": resampled[int(tail * draws)],
        "high": resampled[int((1 - tail) * draws) - 1],
    }
