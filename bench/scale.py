"""Scale: how long a fold takes of graphs from 1e3 to 1e5 nodes, and 3e9 parameters in 24 GiB.

Run from the repository's root::

    python -m bench.scale nodes [--nodes 1000 ... 100000]
    python -m bench.scale big [--billions 3.0]

``nodes``: tracing 1e5 nodes takes torch minutes, and is not what is measured. One block is traced
and canonicalised as ever; copies of it, each with weights of its own, are then joined to one long
graph, and the default pipeline folds that. Seconds are of the process; the exponent is the slope of
log(seconds) over log(nodes) from the second size on.

``big``: the weights of a transformer with a LoRA branch on every linear lie in a file that is
mapped into memory. It is folded with ``consume=True``, exported as ONNX with its weights in a file
beside, and one block is compared with the original in float64. Linux only, in a process of its own,
which is ended where it takes more than ``--limit`` GiB.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

import refold
from bench.common import quiet, save
from bench.memory import Block, LoRALinear, build, memory
from refold.frontends.export import trace
from refold.graph import constants, provenance
from refold.graph.program import Program
from refold.passes import PIPELINES
from refold.rewrite.context import Context
from refold.stages import Clock, Folded, fold_program
from tests.randomise import randomise

_NODES = (1_000, 3_000, 10_000, 30_000, 100_000)
_GIB = 1 << 30


# --- nodes ----------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two convolutions with batch norms beside a third, as in a residual network."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.third = nn.Conv2d(width, width, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norms[0](self.first(x)))
        return torch.relu(self.norms[1](self.second(y)) + self.norms[2](self.third(x)) + x)


class Adapted(nn.Module):
    """A transformer block: layer norms, attention, and a LoRA branch on every linear."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (LoRALinear(width, width, 2) for _ in range(4))
        self.expand = LoRALinear(width, 2 * width, 2)
        self.project = LoRALinear(2 * width, width, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        shape = (*y.shape[:2], 2, -1)
        q, k, v = (m(y).view(shape).transpose(1, 2) for m in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.project(nn.functional.gelu(self.expand(self.norm2(x))))


FORMS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "conv-bn-relu-add": lambda: (Residual(), torch.randn(2, 8, 4, 4)),
    "attention with LoRA": lambda: (Adapted(), torch.randn(2, 4, 16)),
}


def traced(form: str) -> Program:
    """One block."""
    torch.manual_seed(0)
    block, x = FORMS[form]()
    return trace(randomise(block, (x,)).eval(), (x,), {})


def joined(program: Program, copies: int) -> fx.GraphModule:
    """A block after a block, each with weights of its own: one graph, as a trace would leave it."""
    block = program.graph_module
    graph = fx.Graph()
    held: dict[str, Any] = {}
    (own_input,) = block.graph.find_nodes(op="placeholder")
    at = graph.node_copy(own_input)
    for i in range(copies):
        known = {own_input: at}
        for node in block.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            made = graph.node_copy(node, known.__getitem__)
            made.meta = dict(node.meta)
            if node.op == "get_attr":
                made.target = f"block{i}_{str(node.target).replace('.', '_')}"
                held[made.target] = _own(block, str(node.target))
            known[node] = made
        (result,) = block.graph.output_node().all_input_nodes
        at = known[result]
    graph.output((at,))
    graph.output_node().meta = dict(block.graph.output_node().meta)
    graph.set_codegen(block.graph._codegen)
    return fx.GraphModule(held, graph)


def _own(module: nn.Module, target: str) -> Any:
    *path, name = target.split(".")
    value = getattr(module.get_submodule(".".join(path)), name)
    if isinstance(value, nn.Parameter):
        return nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
    return value.clone() if isinstance(value, Tensor) else value


def folded(form: str, nodes: int) -> dict[str, Any]:
    """Seconds of a fold, in this process."""
    torch.set_num_threads(1)
    with quiet():
        program = traced(form)
        size = len(program.graph_module.graph.nodes) - 2
        _fold(program, joined(program, 2))  # what is imported at first use
        gm = joined(program, max(1, nodes // size))
        start = time.process_time()
        result = _fold(program, gm)
        seconds = time.process_time() - start
    passes: dict[str, float] = {}
    for run in result.passes:
        passes[run.name] = passes.get(run.name, 0.0) + run.seconds
    calls = [sum(record.census.values()) for record in (result.before, result.after)]
    return {
        "form": form, "nodes": len(gm.graph.nodes), "seconds": seconds, "passes": passes,
        "calls": calls, "peak": memory("VmHWM"),
    }  # fmt: skip


def _fold(program: Program, gm: fx.GraphModule) -> Folded:
    """A fold as a compilation makes it, with what is looked for before and after the passes."""
    whole = replace(program, graph_module=gm)
    return fold_program(whole, PIPELINES["default"], Context(), Clock())


def exponent(points: list[tuple[float, float]]) -> float:
    """The slope of a straight line through logarithms, by least squares."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum(
        (x - mean_x) ** 2 for x, _ in logs
    )


def run_nodes(sizes: list[int]) -> list[dict[str, Any]]:
    rows = []
    for form in FORMS:
        own = []
        for nodes in sizes:
            own.append(_child("nodes", form, str(nodes)))
            print({k: v for k, v in own[-1].items() if k != "passes"}, flush=True)
        if len(own) > 2:
            found = exponent([(row["nodes"], row["seconds"]) for row in own[1:]])
            print(f"{form}: seconds grow as nodes to the power of {found:.2f}")
            for row in own:
                row["exponent"] = found
        rows += own
    return rows


# --- parameters -----------------------------------------------------------------------------------


def mapped(folder: Path, billions: float, width: int, dtype: torch.dtype) -> nn.Module:
    """A transformer whose weights are read from a file, where and when they are needed."""
    depth = max(1, round(billions * 1e9 / (12 * width**2)))
    with torch.device("meta"):
        model = nn.Sequential(*(Block(width, width // 64) for _ in range(depth))).eval()
    pool = (torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) / 50).to(dtype)
    offset = 0
    with (folder / "weights").open("wb") as file:
        for i, (name, parameter) in enumerate(list(model.named_parameters())):
            norm = parameter.dim() == 1
            _fill(file, parameter.numel(), torch.ones(1 << 12, dtype=dtype) if norm else pool, i)
            file.flush()
            owner, _, own = name.rpartition(".")
            parameters = model.get_submodule(owner)._parameters
            parameters[own] = _mapped(folder / "weights", offset, parameter.shape, dtype)
            offset += parameter.numel() * dtype.itemsize
    return model


def _fill(file: Any, count: int, pool: Tensor, seed: int) -> None:
    """Values of a pool, begun anywhere: each weight has others, and none takes long to make."""
    start = (seed * 7919) % len(pool)
    while count:
        part = pool[start : start + count]
        file.write(part.view(torch.uint8).numpy())
        count, start = count - len(part), 0


def _mapped(path: Path, offset: int, shape: torch.Size, dtype: torch.dtype) -> nn.Parameter:
    array = np.memmap(path, np.uint8, "c", offset, (shape.numel() * dtype.itemsize,))
    return nn.Parameter(torch.from_numpy(array).view(dtype).view(shape), requires_grad=False)


def exported(billions: float, width: int, dtype: str, limit: float) -> dict[str, Any]:
    """Peaks and seconds of a fold and an export, in this process."""
    torch.set_num_threads(1)
    with quiet():  # what torch and refold import at first use is not what is measured
        x = torch.randn(2, 8, 64)
        refold.compile_for_inference(build(0, 64), (x,), target="onnx", verify=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = mapped(folder, billions, width, getattr(torch, dtype))
        shapes = [p.shape for p in model.parameters()]
        x = torch.randn(2, 8, width, generator=torch.Generator().manual_seed(1)).to(
            model[0].norm1.weight.dtype
        )
        stages = _Peaks(int(limit * _GIB))
        with quiet():
            compiled = refold.compile_for_inference(
                model, (x,), target="onnx", consume=True, verify=False, progress=stages
            )
            stages("write")
            compiled.save(folder / "net.onnx")
        stages("compare")
        report = compiled.report
        row = {
            "parameters": sum(map(torch.Size.numel, shapes)), "dtype": dtype,
            "weight bytes": (folder / "weights").stat().st_size,
            "file bytes": sum(p.stat().st_size for p in folder.glob("net.onnx*")),
            "calls": [sum(r.census.values()) for r in (report.before, report.after)],
            "error of one block": _error(compiled.graph_module, folder / "weights", width, x),
        }  # fmt: skip
        return {**row, **stages.finish()}


class _Peaks:
    """Peak resident bytes and seconds by stage; ends the process where it takes too much."""

    def __init__(self, limit: int) -> None:
        self._limit, self._stage = limit, "start"
        self.peaks: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()
        threading.Thread(target=self._watch, daemon=True).start()

    def __call__(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = stage, now

    def _watch(self) -> None:
        while True:
            resident = memory("VmRSS")
            self.peaks[self._stage] = max(self.peaks.get(self._stage, 0), resident)
            if resident > self._limit:
                sys.stderr.write(f"more than {self._limit:,} bytes at {self._stage}\n")
                os._exit(1)
            time.sleep(0.02)

    def finish(self) -> dict[str, Any]:
        self("end")
        return {"peak": max(self.peaks.values()), "peaks": self.peaks, "seconds": self.seconds}


def _error(gm: fx.GraphModule, weights: Path, width: int, x: Tensor) -> float:
    """The first block as folded against the original, both computed in float64."""
    block = Block(width, width // 64).eval()
    offset = 0
    for name, parameter in list(block.named_parameters()):
        owner, _, own = name.rpartition(".")
        stored = _mapped(weights, offset, parameter.shape, x.dtype)
        offset += stored.nbytes
        block.get_submodule(owner)._parameters[own] = nn.Parameter(stored.double(), False)
    with torch.no_grad():
        expected = block(x.double())
    values: dict[fx.Node, Any] = {}
    found = None
    with torch.no_grad():
        for node in gm.graph.nodes:
            if node.op == "call_function" and provenance.module_path(node).startswith("1"):
                break
            if node.op == "placeholder":
                values[node] = x.double()
            elif node.op == "get_attr":
                values[node] = lambda node=node: constants.tensor(node).double()
            else:
                args, kwargs = fx.map_arg(
                    (node.args, node.kwargs),
                    lambda n: values[n]() if n.op == "get_attr" else values[n],
                )
                found = values[node] = node.target(*args, **kwargs)
    assert found is not None
    return float((found - expected).norm() / (expected - x.double()).norm())


def _child(*arguments: str) -> Any:
    command = [sys.executable, "-m", "bench.scale", "--child", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", default="big", choices=("nodes", "big"))
    parser.add_argument("--nodes", type=int, nargs="+", default=list(_NODES))
    parser.add_argument("--billions", type=float, default=3.0, help="parameters, in 1e9")
    parser.add_argument("--width", type=int, default=4096, help="a multiple of 64")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--limit", type=float, default=24.0, help="GiB that ``big`` may take")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, *given = options.child
        if what == "nodes":
            print(json.dumps(folded(given[0], int(given[1]))))
        else:
            billions, width, dtype, limit = given
            print(json.dumps(exported(float(billions), int(width), dtype, float(limit))))
        return
    if options.what == "nodes":
        print(save("scale_nodes", {"nodes": options.nodes}, run_nodes(options.nodes)))
        return
    size = {name: getattr(options, name) for name in ("billions", "width", "dtype", "limit")}
    row = _child("big", *map(str, size.values()))
    print(json.dumps(row, indent=1))
    print(save("scale_big", size, [row]))


if __name__ == "__main__":
    main()
