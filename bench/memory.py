"""Memory: peak resident bytes while a transformer with a LoRA branch on every linear is folded.

Run from the repository's root: ``python -m bench.memory [--billions 1.0]``. Each measurement runs
in a process of its own. Linux only: the peak is read from ``/proc``.
"""

from __future__ import annotations

import argparse
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import refold
from bench.common import quiet, save
from refold.frontends.export import trace
from refold.passes import PIPELINES
from tests.models import counts

MODES = ("trace", "fold", "consume", "verify")


class LoRALinear(nn.Module):
    """A linear with a low-rank branch."""

    def __init__(self, inputs: int, outputs: int, rank: int = 8) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs, bias=False)
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.up(self.down(x))


class Block(nn.Module):
    """A pre-norm transformer block: 12 width^2 parameters."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.out = (LoRALinear(width, width) for _ in range(4))
        self.expand, self.project = LoRALinear(width, 4 * width), LoRALinear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        shape = (*y.shape[:2], self.heads, -1)
        q, k, v = (m(y).view(shape).transpose(1, 2) for m in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.project(F.gelu(self.expand(self.norm2(x))))


def build(billions: float, width: int) -> nn.Module:
    """As many blocks as make the asked number of parameters."""
    depth = max(1, round(billions * 1e9 / (12 * width**2)))
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width, width // 64) for _ in range(depth))).eval()


def memory(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (peak since the last reset), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{field} is not in /proc/self/status: this benchmark needs Linux")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(mode: str, billions: float, width: int) -> dict[str, Any]:
    """One measurement, in this process."""
    torch.set_num_threads(1)
    with quiet():  # what torch and refold import at first use is not the fold's own memory
        refold.fold(build(0, 64), (torch.randn(2, 8, 64),))
    model = build(billions, width)
    inputs = (torch.randn(2, 8, width),)
    parameters = sum(p.numel() for p in model.parameters())
    largest = max(p.numel() for p in model.parameters())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    row: dict[str, Any] = {"mode": mode, "parameters": parameters, "weight bytes": weights}
    # Tracing has a peak of its own, and so it is left out unless it is what is asked for.
    if mode == "trace":
        reset_peak()
        before = memory("VmRSS")
        trace(model, inputs, {})
    elif mode == "fold":
        gm = trace(model, inputs, {}).graph_module
        own = {id(p) for p in model.parameters()}
        row["linears before"] = counts(gm)["conv-like"]
        reset_peak()
        before = memory("VmRSS")
        PIPELINES["default"].run(gm)
        row["linears after"] = counts(gm)["conv-like"]
        tensors = [*gm.parameters(), *gm.buffers()]
        row["new constants"] = sum(t.nbytes for t in tensors if id(t) not in own)
        row["allowed growth"] = row["new constants"] + 8 * largest
    else:
        options = {"consume": True, "verify": False} if mode == "consume" else {}
        reset_peak()
        before = memory("VmRSS")
        with quiet():
            refold.fold(model, inputs, **options)
    row["before"], row["peak"] = before, memory("VmHWM")
    row["growth"] = row["peak"] - before
    row["growth / weights"] = row["growth"] / weights
    row["peak / weights"] = row["peak"] / weights
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--billions", type=float, default=1.0, help="parameters, in 1e9")
    parser.add_argument("--width", type=int, default=2048, help="a multiple of 64")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--output", default="memory", help="name of the result")
    parser.add_argument("--child", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options.billions, options.width)))
        return
    modes = list(options.modes)
    if "consume" not in inspect.signature(refold.compile_for_inference).parameters:
        modes = [mode for mode in modes if mode != "consume"]
    size = ["--billions", str(options.billions), "--width", str(options.width)]
    rows = []
    for mode in modes:
        command = [sys.executable, "-m", "bench.memory", "--child", mode, *size]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{mode} failed:\n{done.stderr}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    del options.child
    print(save(options.output, vars(options), rows))


if __name__ == "__main__":
    main()
