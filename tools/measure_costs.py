"""Measures the rates of the cost table on this machine and writes them as JSON.

    python tools/measure_costs.py            # prints the table
    python tools/measure_costs.py --write    # replaces refold/rewrite/cost_table.json

Each rate is the median over several layer shapes of the median of repeated calls, one thread.
What a call of a layer takes on a backend, and a part of a merged layer's result, are differences of
the least times of graphs of tiny layers of one input (``bench/horizontal_merge.py`` has real ones).
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.common import interleaved  # noqa: E402
from bench.horizontal_merge import BACKENDS, Apart, Merged  # noqa: E402

TABLE = ROOT / "refold" / "rewrite" / "cost_table.json"
SHAPES = ((32, 56), (64, 28), (128, 28), (256, 14), (384, 7))  # channels, height and width


def seconds(call: Callable[[], object], rounds: int = 15) -> float:
    """Median process seconds of one call; short calls are repeated within a round."""
    call()
    start = time.process_time()
    call()
    repeats = max(1, int(2e-3 / max(time.process_time() - start, 1e-6)))
    times = []
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(repeats):
            call()
        times.append((time.process_time() - start) / repeats)
    return statistics.median(times)


def convolution_rate(kernel: int, groups: Callable[[int], int], launch: float) -> float:
    """GFLOP/s of stride-1 convolutions, launches taken off."""
    rates = []
    for channels, size in SHAPES:
        g = groups(channels)
        x = torch.randn(1, channels, size, size)
        w = torch.randn(channels, channels // g, kernel, kernel)
        b = torch.randn(channels)
        spent = seconds(lambda x=x, w=w, b=b, g=g: F.conv2d(x, w, b, 1, kernel // 2, 1, g))
        flops = 2.0 * channels * size * size * (channels // g) * kernel * kernel
        rates.append(flops / max(spent - launch * 1e-6, spent / 4) / 1e9)
    return statistics.median(rates)


def linear_rate(launch: float) -> float:
    """GFLOP/s of linears over 49 to 196 rows."""
    rates = []
    for rows, features in ((196, 192), (196, 384), (49, 768), (64, 256)):
        x, w, b = (
            torch.randn(rows, features),
            torch.randn(features, features),
            torch.randn(features),
        )
        spent = seconds(lambda x=x, w=w, b=b: F.linear(x, w, b))
        rates.append(2.0 * rows * features**2 / max(spent - launch * 1e-6, spent / 4) / 1e9)
    return statistics.median(rates)


def byte_rate(launch: float) -> float:
    """GB/s of an addition (two reads, one write) over tensors that the cache does not hold."""
    rates = []
    for channels, size in SHAPES:
        pairs = [torch.randn(2, 1, channels, size, size) for _ in range(24)]
        turn = itertools.cycle(pairs)

        def step(turn: Iterator[torch.Tensor] = turn) -> torch.Tensor:
            x, y = next(turn)
            return x + y

        spent = seconds(step)
        moved = 3 * 4 * channels * size * size
        rates.append(moved / max(spent - launch * 1e-6, spent / 4) / 1e9)
    return statistics.median(rates)


def resize_rate(launch: float) -> float:
    """GB/s of bilinear resizing to twice the size: it computes more than it moves."""
    rates = []
    for channels, size in SHAPES:
        x = torch.randn(1, channels, size // 2, size // 2)
        spent = seconds(lambda x=x, size=size: F.interpolate(x, size=size, mode="bilinear"))
        moved = 4 * (x.numel() + channels * size * size)
        rates.append(moved / max(spent - launch * 1e-6, spent / 4) / 1e9)
    return statistics.median(rates)


CALLS = ("torch", "inductor", "onnxruntime")  # where merging layers can pay


def layer_costs(backend: str, layers: int = 16) -> dict[str, float]:
    """Microseconds of a call of a linear, of its bias, and of a part cut out of its result."""

    def linears(count: int, outputs: int, *, bias: bool) -> list[torch.nn.Module]:
        return [torch.nn.Linear(64, outputs, bias=bias) for _ in range(count)]

    forms = {
        "bare": Apart(linears(layers, 16, bias=False)),
        "apart": Apart(linears(layers, 16, bias=True)),
        "merged": Merged(linears(layers, 16, bias=True)),
        "whole": Apart(linears(1, 16 * layers, bias=True)),
        "bare whole": Apart(linears(1, 16 * layers, bias=False)),
    }
    x = torch.randn(1, 1, 64)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        runs = {f: BACKENDS[backend](made.eval(), x, Path(folder)) for f, made in forms.items()}
        taken = interleaved(runs, 100, calls=50)
    least = {form: 1e6 * min(seconds) for form, seconds in taken.items()}
    call = (least["bare"] - least["bare whole"]) / (layers - 1)
    return {
        "call": call,
        "bias": max((least["apart"] - least["whole"]) / (layers - 1) - call, 0.0),
        "part": max(least["merged"] - least["whole"], 0.0) / layers,
    }


def measure() -> dict[str, float]:
    """All rates of the table."""
    torch.set_num_threads(1)
    small = torch.randn(1, 4, 2, 2)
    launch = seconds(lambda: small + small) * 1e6
    with torch.inference_mode():
        return {
            "conv_1x1": convolution_rate(1, lambda c: 1, launch),
            "conv_kxk": convolution_rate(3, lambda c: 1, launch),
            "conv_grouped": convolution_rate(3, lambda c: 4, launch),
            "conv_depthwise": convolution_rate(3, lambda c: c, launch),
            "linear": linear_rate(launch),
            "bytes": byte_rate(launch),
            "resize": resize_rate(launch),
            "launch": launch,
        }


def _rounded(found: dict[str, float]) -> dict[str, float]:
    return {k: float(f"{v:.3g}") for k, v in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"replace {TABLE.name}")
    options = parser.parse_args()
    record = {
        "rates": _rounded(measure()),
        "layers": {name: _rounded(layer_costs(name)) for name in CALLS},
        "units": {
            "conv_*, linear": "GFLOP/s",
            "bytes, resize": "GB/s",
            "launch": "us",
            "layers": "us of a call of a linear, of its bias, of a part of its result",
        },
        "measured": {"torch": torch.__version__, "machine": platform.machine(), "threads": 1},
    }
    text = json.dumps(record, indent=2) + "\n"
    if options.write:
        temporary = TABLE.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(TABLE)
    print(text, end="")


if __name__ == "__main__":
    main()
