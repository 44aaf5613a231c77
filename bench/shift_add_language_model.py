"""Perplexity of a small language model whose layers became binary codes.

Run from the repository's root: ``python -m bench.shift_add_language_model``, after
``python -m bench.byte_language_model`` has trained the proxy, for each seed. Every variant
quantises the same linear layers (all but the embeddings and the head) and is evaluated on the same
held-out windows; differences are paired by window. Two checkpoints of a seed, each as it is and
with a few channels of its norms enlarged (the same function): ``guard``, the first at which 2-bit
round-to-nearest costs 5 %, and ``end``, far past it. A comparison is void below these 5 %: a model
that nothing hurts ranks nothing.

``auto`` is compared with what else the bytes that it may spend could buy, quantised by the same
code on the same calibration inputs:

- a single width: 2 bits in the smallest groups that fit (3 bits do not fit in any), and 2 bits with
  a scale for each plane;
- a mix that is fixed beforehand: all layers at 2 bits, then as many at 3 bits as the bytes allow,
  in the order of the graph, in its reverse, the largest first, and the smallest first.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from bench.byte_language_model import (
    CONTEXT,
    FOLDER,
    GROUP,
    GUARD,
    load,
    losses,
    quantised_layers,
    round_to_nearest,
    text,
    windows,
)
from bench.common import RESULTS, save
from bench.common import load as results_of
from refold.frontends.export import trace
from refold.graph import provenance
from refold.passes.shift_add.substitute_shift_add import SubstituteShiftAdd
from refold.rewrite.pipeline import Pipeline

CHECKPOINTS = ("guard", "end")
AVERAGE = 2.5  # bits for each weight, scales included
OUTLIERS, GAIN = 0.005, 20.0  # share of the channels that a norm enlarges, and how much
_NAME = "shift_add_language_model"
_WINDOWS = 64  # of the training text, to calibrate on
_BATCH = 16


@dataclass(frozen=True)
class Allocated(SubstituteShiftAdd):
    """The pass with a width for each layer given by its module path, not chosen."""

    widths: Mapping[str, int] = field(default_factory=dict)

    def _coded(self, gm: Any, layers: Any, calls: Any, result: Any) -> Any:
        widths = {layer: self.widths[provenance.module_path(layer.node)] for layer in layers}
        return self._coder.code(gm, widths, calls).codes


def inject_outliers(model: nn.Module) -> None:
    """Enlarges a few channels of each norm and divides the columns that read them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in model.blocks:
            for norm, readers in (
                (block.norm1, (block.q, block.k, block.v)),
                (block.norm2, (block.expand,)),
            ):
                width = norm.weight.numel()
                count = max(1, round(OUTLIERS * width))
                chosen = torch.randperm(width, generator=generator)[:count]
                norm.weight[chosen] *= GAIN
                norm.bias[chosen] *= GAIN
                for reader in readers:
                    reader.weight[:, chosen] /= GAIN


def substituted(model: nn.Module, item: SubstituteShiftAdd) -> tuple[fx.GraphModule, int]:
    """The model after the pass alone, and the bytes of its codes."""
    tokens = torch.zeros(2, CONTEXT, dtype=torch.long)
    program = trace(model, (tokens,), {})
    run = Pipeline("substitution", (item,)).run(program.graph_module)
    applied = run.runs[0].result.applied
    assert len(applied) == len(quantised_layers(model)), run.runs[0].result.declined
    return program.graph_module, int(sum(a.figures["bytes_after"] for a in applied))


def allocations(model: nn.Module, budget: int, sizes: Mapping[int, Mapping[str, int]]) -> Any:
    """The mixes of some bytes, by how the layers at 3 bits are picked."""
    names = list(quantised_layers(model))
    by_size = sorted(names, key=lambda n: sizes[2][n])
    orders = {
        "order of the graph": names,
        "its reverse": names[::-1],
        "largest first": by_size[::-1],
        "smallest first": by_size,
    }
    for label, order in orders.items():
        widths = dict.fromkeys(names, 2)
        spent = sum(sizes[2].values())
        for name in order:
            more = sizes[3][name] - sizes[2][name]
            if spent + more <= budget:
                widths[name], spent = 3, spent + more
        yield label, widths


def code_bytes(model: nn.Module) -> dict[int, dict[str, int]]:
    """Bytes of each layer's code at each width: planes, and one 16-bit scale for each group."""
    return {
        bits: {
            name: bits * m.weight.numel() // 8 + 2 * m.weight.numel() // GROUP
            for name, m in quantised_layers(model).items()
        }
        for bits in (2, 3)
    }


def compare(model: nn.Module, calibration: list[Tensor], held: Tensor) -> dict[str, Any]:
    """Every variant of one model."""
    plain = losses(model, held)
    weights = sum(m.weight.numel() for m in quantised_layers(model).values())
    rows: list[dict[str, Any]] = []
    found: dict[str, Tensor] = {}

    def row(name: str, candidate: Any, size: int | None) -> None:
        nll = found[name] = losses(candidate, held)
        change = nll - plain
        rows.append(
            {
                "variant": name,
                "perplexity": math.exp(nll.mean()),
                "change": math.exp(change.mean()) - 1,
                "nll": float(change.mean()),
                "standard_error": float(change.std() / len(change) ** 0.5),
                "bits": None if size is None else 8 * size / weights,
            }
        )
        print(f"{name:<44} {rows[-1]['perplexity']:.4f} {100 * rows[-1]['change']:+.2f} %",
              flush=True)  # fmt: skip

    def substitution(name: str, **options: Any) -> None:
        made = {"group_size": GROUP, "min_features": 1, **options}
        kind = Allocated if "widths" in made else SubstituteShiftAdd
        graph, size = substituted(model, kind(**made))
        row(name, graph, size)

    rows.append({"variant": "float32", "perplexity": math.exp(plain.mean())})
    for bits in (2, 3):
        row(f"round to nearest, {bits} bits", round_to_nearest(model, bits), None)
    for bits in (2, 3):
        substitution(f"uniform, {bits} bits, no calibration", bits=bits)
        substitution(f"uniform, {bits} bits", bits=bits, calibration=calibration)
        substitution(f"bcq, {bits} bits", bits=bits, scales="bcq", calibration=calibration)
    substitution(
        f"auto, {AVERAGE} bits", bits="auto", average_bits=AVERAGE, calibration=calibration
    )
    fine = round(16 / (AVERAGE - 2))  # a group's size at which a 16-bit scale fills the bytes
    name = f"uniform, 2 bits, groups of {fine}"
    substitution(name, bits=2, group_size=fine, calibration=calibration)
    singles, mixes = ["uniform, 2 bits", name, "bcq, 2 bits"], []
    for label, widths in allocations(model, int(AVERAGE * weights / 8), code_bytes(model)):
        name = f"2 and 3 bits, {label}"
        substitution(name, bits=2, widths=widths, calibration=calibration)
        mixes.append(name)
    auto = found[f"auto, {AVERAGE} bits"]
    best, best_mix = (min(n, key=lambda n: float(found[n].mean())) for n in (singles, mixes))
    damage = {r["variant"]: r["nll"] for r in rows[1:]}
    half = found["uniform, 2 bits"] - plain - 0.5 * (found["round to nearest, 2 bits"] - plain)
    return {
        "windows": len(held),
        "rows": rows,
        "valid": math.exp(damage["round to nearest, 2 bits"]) >= GUARD,
        "three_bits_cost": math.exp(damage["uniform, 3 bits"]) - 1,
        "two_bits_share_of_damage": damage["uniform, 2 bits"] / damage["round to nearest, 2 bits"],
        "two_bits_less_half_the_damage": _with_error(half),
        "best_single_width": best,
        "auto_less_best_single_width": _with_error(auto - found[best]),
        "best_mix": best_mix,
        "auto_less_best_mix": _with_error(auto - found[best_mix]),
    }


def _with_error(difference: Tensor) -> dict[str, float]:
    return {
        "nll": float(difference.mean()),
        "standard_error": float(difference.std() / len(difference) ** 0.5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--checkpoint", nargs="+", choices=CHECKPOINTS, default=CHECKPOINTS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seen, held = text()
    picked = windows(seen)[:: len(windows(seen)) // _WINDOWS][:_WINDOWS, :-1]
    calibration = list(picked.split(_BATCH))
    settings = {
        "group_size": GROUP, "average_bits": AVERAGE, "calibration_windows": _WINDOWS,
        "outlier_gain": GAIN,
    }  # fmt: skip
    results = {}
    if (RESULTS / f"{_NAME}.json").exists():
        results = results_of(_NAME)["rows"]  # of other checkpoints
    for name in options.checkpoint:
        model, steps = load(name, options.seed, options.folder)
        plain = f"{name}, seed {options.seed}"
        for kind in (plain, f"{plain}, with outliers"):
            if kind != plain:
                inject_outliers(model)
            found = {"steps": steps, **compare(model, calibration, windows(held))}
            print(kind, {k: v for k, v in found.items() if k != "rows"}, flush=True)
            results[kind] = found
            save(_NAME, settings, results)


if __name__ == "__main__":
    main()
