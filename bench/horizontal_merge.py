"""Layers that read one tensor, apart and merged into one: does it pay, and where?

Run from the repository's root: ``python -m bench.horizontal_merge [--rounds 30]``. Queries, keys
and values, or a gate and what it gates, are linears (pointwise convolutions) of one input. Merged,
they are one layer whose result is split. Both forms run in turn, one thread; figures are
microseconds of CPU time, the least of all rounds, and their ratio: above 1, merged is faster.
Blocks are compiled by refold, without ``merge-parallel-layers`` and with it; where that pass leaves
them as they are, there is nothing to compare. ``merges`` says whether it takes the layers.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.graph import CodeGen

import refold
from bench.common import export_onnx, interleaved, quiet, ratio, save
from bench.ort_latency import session
from refold.frontends.export import trace
from refold.passes import PIPELINES
from refold.passes.branches.merge_parallel_layers import MergeParallelLayers
from refold.rewrite.context import Context
from refold.rewrite.cost import on_cpu

DEFAULT = PIPELINES["default"]
_PASS = "merge-parallel-layers"
_CALLS = 20  # a round is that many calls: one call alone is below the clock's steps

# name: rows (tokens, or a square of pixels), input features, output features of each layer
LINEARS = {
    "q k v, 1 token, 256": (1, 256, (256,) * 3),
    "q k v, 1 token, 512": (1, 512, (512,) * 3),
    "q k v, 1 token, 2048": (1, 2048, (2048,) * 3),
    "grouped q k v, 1 token, 512": (1, 512, (512, 64, 64)),
    "grouped q k v, 1 token, 2048": (1, 2048, (2048, 256, 256)),
    "gate and up, 1 token, 1024": (1, 1024, (2816,) * 2),
    "16 heads of 32, 1 token, 512": (1, 512, (32,) * 16),
    "q k v, 16 tokens, 256": (16, 256, (256,) * 3),
    "16 heads of 32, 16 tokens, 512": (16, 512, (32,) * 16),
    "q k v, 197 tokens, 192": (197, 192, (192,) * 3),
    "q k v, 197 tokens, 768": (197, 768, (768,) * 3),
}
CONVS = {
    "3 pointwise, 14 x 14, 128": (14, 128, (128,) * 3),
    "4 narrow pointwise, 28 x 28, 256": (28, 256, (64,) * 4),
}

# name: tokens, features, heads
BLOCKS = {
    "block of 8 heads of 32, 1 token": (1, 256, 8),
    "block of 8 heads of 32, 16 tokens": (16, 256, 8),
    "block of 8 heads of 32, 64 tokens": (64, 256, 8),
}


class Apart(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


class Merged(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        first = layers[0]
        self.sizes = [layer.weight.shape[0] for layer in layers]
        self.axis = -1 if isinstance(first, nn.Linear) else 1
        inner = first.weight.shape[1]
        self.layer = (
            nn.Linear(inner, sum(self.sizes))
            if isinstance(first, nn.Linear)
            else nn.Conv2d(inner, sum(self.sizes), 1)
        )
        with torch.no_grad():
            self.layer.weight.copy_(torch.cat([layer.weight for layer in layers]))
            self.layer.bias.copy_(torch.cat([layer.bias for layer in layers]))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.layer(x).split(self.sizes, self.axis)


class Head(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(inner, outer, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(-2, -1) * self.key.weight.shape[0] ** -0.5
        count = x.shape[1]
        hidden = torch.ones(count, count, dtype=torch.bool).triu(1)
        return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ self.value(x)


class Block(nn.Module):
    """Causal attention as it is taught: a list of heads, each with three layers of its own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList(Head(width, width // heads) for _ in range(heads))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return x + self.out(torch.cat([head(normed) for head in self.heads], -1))


def forms(name: str) -> tuple[dict[str, nn.Module], Tensor]:
    """The layers apart and merged, and an input."""
    torch.manual_seed(0)
    if name in LINEARS:
        rows, inner, outer = LINEARS[name]
        layers: list[nn.Module] = [nn.Linear(inner, size) for size in outer]
        x = torch.randn(1, rows, inner)
    else:
        side, inner, outer = CONVS[name]
        layers = [nn.Conv2d(inner, size, 1) for size in outer]
        x = torch.randn(1, inner, side, side)
    made = {"apart": Apart(layers).eval(), "merged": Merged(layers).eval()}
    for one, other in zip(*(form(x) for form in made.values()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    return made, x


def in_torch(model: nn.Module, x: Tensor, folder: Path) -> Callable[[], Any]:
    """The calls of the model's operators alone, as a folded graph makes them."""
    graph = torch.export.export(model, (x,), strict=False).module(check_guards=False)
    graph.graph.set_codegen(CodeGen())  # without what takes nested inputs apart
    graph.recompile()
    return lambda: graph.forward(x)


def in_inductor(model: nn.Module, x: Tensor, folder: Path) -> Callable[[], Any]:
    torch._dynamo.reset()
    with quiet():
        compiled = torch.compile(model, options={"freezing": True})
        compiled(x)
    return lambda: compiled(x)


def in_onnxruntime(model: nn.Module, x: Tensor, folder: Path) -> Callable[[], Any]:
    found = session(export_onnx(model, (x,), _file(folder)), 1)
    feed = {found.get_inputs()[0].name: x.numpy()}
    return lambda: found.run(None, feed)


def _file(folder: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=folder)) / "model.onnx"


def in_openvino(model: nn.Module, x: Tensor, folder: Path) -> Callable[[], Any]:
    import openvino

    path = export_onnx(model, (x,), _file(folder))
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.compile_model(str(path), "CPU", settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.numpy()))
    return request.infer


TARGETS = {"torch": "torch", "inductor": "inductor", "onnxruntime": "ort", "openvino": "openvino"}
BACKENDS = {
    "torch": in_torch,
    "inductor": in_inductor,
    "onnxruntime": in_onnxruntime,
    "openvino": in_openvino,
}


def merges(name: str, backend: str) -> bool:
    """Whether the pass takes some of the layers, where what they give is not the caller's."""
    models, x = forms(name)
    with torch.no_grad():
        gm = trace(_Read(models["apart"]), (x,), dynamic_batch=False).graph_module
        return MergeParallelLayers().run(gm, Context(on_cpu(backend))).modified


class _Read(nn.Module):
    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.inner = layers

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.sum(-1) for t in self.inner(x))


def compiled(name: str, backend: str) -> dict[str, Callable[[], Any]] | None:
    """A block compiled without and with the pass; none where the pass leaves it as it is."""
    tokens, width, heads = BLOCKS[name]
    torch.manual_seed(0)
    model, x = Block(width, heads).eval(), torch.randn(1, tokens, width)
    threads = {"threads": 1} if backend == "onnxruntime" else {}
    made = {}
    for form, pipeline in (("apart", DEFAULT.without(_PASS)), ("merged", DEFAULT)):
        torch._dynamo.reset()
        made[form] = refold.compile_for_inference(
            model, x, target=TARGETS[backend], pipeline=pipeline, **threads
        )
    (record,) = (r for r in made["merged"].report.passes if r.name == _PASS)
    if not record.applied:
        return None
    return {form: lambda model=model: model(x) for form, model in made.items()}


def measure(name: str, backend: str, rounds: int) -> dict[str, Any] | None:
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        if name in BLOCKS:
            runs, taken_in = compiled(name, backend), True
            if runs is None:
                return None
        else:
            models, x = forms(name)
            runs = {k: BACKENDS[backend](model, x, Path(folder)) for k, model in models.items()}
            taken_in = merges(name, backend)
        taken = interleaved(runs, rounds, calls=_CALLS)
    least = {form: 1e6 * min(seconds) for form, seconds in taken.items()}
    return {
        "layers": name,
        "backend": backend,
        "merges": taken_in,
        "least us": least,
        "ratio of the least": least["apart"] / least["merged"],
        "apart / merged": ratio(taken["apart"], taken["merged"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="paired rounds")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=list(BACKENDS))
    parser.add_argument("--output", default="horizontal_merge", help="name of the result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for backend in options.backends:
        for name in (*LINEARS, *CONVS, *BLOCKS):
            row = measure(name, backend, options.rounds)
            if row is None:
                continue
            rows.append(row)
            least, found = row["least us"], row["ratio of the least"]
            figures = f"{least['apart']:8.1f} {least['merged']:8.1f} {found:.2f}"
            mark = "merges" if row["merges"] else ""
            print(f"{backend:12} {name:34} {figures} {mark}", flush=True)
    print(save(options.output, vars(options), rows))


if __name__ == "__main__":
    main()
