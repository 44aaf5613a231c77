"""Shift-add layers in ONNX Runtime: bytes in the file and in the session, and time against float32.

Run from the repository's root: ``python -m bench.shift_add [--shape 4096x4096]``. A chain of layers
is larger than the caches at every width, so that weights come from memory; everything that is
compared runs in turn in one process, and ratios are of medians with a bootstrap interval: of CPU
time for one thread, of wall time for more. Weights are random: no time depends on them.
"""

from __future__ import annotations

import argparse
import functools
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

import refold
from bench.common import interleaved, quiet, ratio, save
from refold.backends.onnx.session import LOSSY
from refold.ops.bcq_linear import pack

SHAPES = ("4096x4096", "4096x11008")
GROUP = 128
_CHAIN_BYTES = 36 * 2**20  # of the narrowest weights; more than the last cache of most machines
_ROUNDS = {1: 41, 128: 11}  # by batch
_VARIANTS = {
    "2 bits": (2, "uniform"),
    "2 bits without a correction": (2, "ternary"),
    "3 bits in 4": (3, "uniform"),
    "4 bits": (4, "uniform"),
}
_PLAIN = refold.Pipeline("plain", ())


class Coded(nn.Module):
    """A layer of random signs, scaled so that a chain of them neither grows nor vanishes."""

    def __init__(self, features: int, outputs: int, bits: int, scales: str) -> None:
        super().__init__()
        self.register_buffer("planes", pack(torch.randint(0, 2, (bits, outputs, features))))
        groups = math.ceil(features / GROUP)
        # Equal scales of two planes are -1, 0 and 1: no half integers, nothing to correct.
        kinds = 1 if scales == "uniform" else bits
        unit = (3 / (4**bits - 1) if scales == "uniform" else 1 / bits) ** 0.5
        alpha = torch.full((kinds, outputs, groups), unit / features**0.5)
        self.register_buffer("alpha", alpha)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.refold.bcq_linear(x, self.planes, self.alpha, None, GROUP)


def chain(shape: str, variant: str | None) -> nn.Sequential:
    """Layers there and back; ``None``: in float32."""
    narrow, wide = map(int, shape.split("x"))
    pairs = max(1, math.ceil(_CHAIN_BYTES / (2 * narrow * wide / 4)))
    sizes = [(narrow, wide), (wide, narrow)] * pairs
    if variant is None:
        layers: list[nn.Module] = [nn.Linear(k, n, bias=False) for k, n in sizes]
        for layer in layers:
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    else:
        layers = [Coded(k, n, *_VARIANTS[variant]) for k, n in sizes]
    return nn.Sequential(*layers).eval()


def write(model: nn.Module, features: int, path: Path) -> None:
    with quiet():
        made = refold.compile_for_inference(
            model, torch.randn(2, features), target="onnx", pipeline=_PLAIN, verify=False
        )
        made.save(path)


def session_bytes(path: Path) -> int:
    """The tensors of the model that a session makes of a file."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return tensor_bytes(Path(options.optimized_model_filepath))


def tensor_bytes(path: Path) -> int:
    return sum(len(t.raw_data) for t in onnx.load(path).graph.initializer)


def open_session(path: Path, threads: int) -> Any:
    """As refold opens it, but that its threads do not spin on while the others run."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(LOSSY)
    )


def timed(paths: dict[str, Path], features: int, threads: int) -> Iterator[dict[str, Any]]:
    sessions = {name: open_session(path, threads) for name, path in paths.items()}
    for batch, rounds in _ROUNDS.items():
        (given,) = next(iter(sessions.values())).get_inputs()
        x = {given.name: torch.randn(batch, features).numpy()}
        runs = {name: functools.partial(s.run, None, x) for name, s in sessions.items()}
        # CPU time is what a shared machine measures well, but not what several threads gain.
        clock = time.process_time if threads == 1 else time.perf_counter
        seconds = interleaved(runs, rounds, warmup=1, clock=clock)
        for name in _VARIANTS:
            yield {
                "variant": name,
                "batch": batch,
                "threads": threads,
                "milliseconds": 1e3 * sorted(seconds[name])[rounds // 2],
                "over_float32": ratio(seconds["float32"], seconds[name]),
                "fastest_over_fastest": min(seconds["float32"]) / min(seconds[name]),
            }
        name = "2 bits without a correction"
        yield {
            "variant": "the correction",
            "batch": batch,
            "threads": threads,
            "over_none": ratio(seconds["2 bits"], seconds[name]),
            "fastest_over_fastest": min(seconds["2 bits"]) / min(seconds[name]),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", action="append", choices=SHAPES)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    rows = []
    for shape in options.shape or SHAPES:
        features = int(shape.split("x")[0])
        with tempfile.TemporaryDirectory() as folder:
            paths = {n: Path(folder) / f"{i}.onnx" for i, n in enumerate(("float32", *_VARIANTS))}
            for name, path in paths.items():
                torch.manual_seed(0)
                write(chain(shape, None if name == "float32" else name), features, path)
            dense = tensor_bytes(paths["float32"])
            for name in _VARIANTS:
                rows.append(
                    {
                        "shape": shape,
                        "variant": name,
                        "smaller_in_file": dense / tensor_bytes(paths[name]),
                        "smaller_in_session": dense / session_bytes(paths[name]),
                    }
                )
                print(rows[-1], flush=True)
            for threads in options.threads:
                for row in timed(paths, features, threads):
                    rows.append({"shape": shape, **row})
                    print(rows[-1], flush=True)
    save("shift_add", {"group_size": GROUP, "chain_bytes": _CHAIN_BYTES}, rows)


if __name__ == "__main__":
    main()
