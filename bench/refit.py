"""New weights for a compiled model: refitting it against compiling and exporting anew.

Run from the repository's root: ``python -m bench.refit [CASE ...]``. CPU seconds, the smallest of
each; every result is compared with the fresh one, initializer by initializer.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import refold
from bench.common import quiet, save
from refold.backends.onnx.recipe_file import refit_file
from tests.models.adapters import LoRABlock
from tests.models.timm_networks import network
from tests.randomise import randomise


class Conditional(nn.Module):
    """A condition makes the weights of a row of convolutions."""

    def __init__(self, width: int = 48, layers: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        size = width * width * 9
        self.make = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, size)) for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(layers))
        self.width = width

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = self.stem(x)
        for make, norm in zip(self.make, self.norms, strict=True):
            weight = make(condition).view(self.width, self.width, 3, 3)
            x = F.relu(norm(F.conv2d(x, weight, padding=1)))
        return x


def mobileone(seed: int) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    model, _ = network("mobileone_s0", 64, seed)
    image = torch.randn(2, 3, 64, 64)
    return randomise(model, (image,), seed, zeros=False), (image,), {}


def lora(seed: int) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    tokens = torch.randn(2, 16, 128)
    torch.manual_seed(seed)
    model = nn.Sequential(*(LoRABlock(128) for _ in range(4)))
    return randomise(model, (tokens,), seed, zeros=False), (tokens,), {}


def bound(seed: int) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    image = torch.randn(2, 3, 32, 32)
    condition = torch.randn(1, 32, generator=torch.Generator().manual_seed(seed))
    model = randomise(Conditional(), (image, condition), 0, zeros=False)
    return model, (image,), {"condition": condition}


CASES = {"mobileone_s0": mobileone, "LoRA transformer": lora, "bound condition": bound}


def fastest(run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    taken, result = [], None
    for _ in range(repeats):
        start = time.process_time()
        with quiet():
            result = run()
        taken.append(time.process_time() - start)
    return min(taken), result


def initializers(compiled: refold.CompiledModel) -> dict[str, Any]:
    model = compiled._compilation.artifact.content.model  # type: ignore[union-attr]
    return {n: v.const_value.numpy() for n, v in model.graph.initializers.items()}


def measure(name: str, repeats: int) -> dict[str, Any]:
    old, inputs, before = CASES[name](0)
    new, _, after = CASES[name](1)
    row: dict[str, Any] = {"case": name}

    def compiled(model: nn.Module, bind: dict[str, Any], **options: Any) -> Any:
        return refold.compile_for_inference(model, inputs, target="ort", bind=bind, **options)

    row["compile"], fresh = fastest(lambda: compiled(new, after), repeats)
    row["compile with recipe"], kept = fastest(lambda: compiled(old, before, recipe=True), repeats)
    for label, verify in (("refit", True), ("refit, not verified", False)):
        row[label], refitted = fastest(
            lambda verify=verify: kept.refit(new, bind=after, verify=verify), repeats
        )
    with tempfile.TemporaryDirectory() as folder:
        path = kept.save(Path(folder) / "old.onnx")
        row["recipe bytes"] = path.with_name("old.onnx.recipe").stat().st_size
        row["refit of the file"], _ = fastest(
            lambda: refit_file(
                path, new.state_dict(), Path(folder) / "new.onnx", bind=after, force=True
            ),
            repeats,
        )
    ours, theirs = initializers(refitted), initializers(fresh)
    row["equal"] = ours.keys() == theirs.keys() and all(
        a.tobytes() == theirs[n].tobytes() for n, a in ours.items()
    )
    row["compile / refit"] = row["compile"] / row["refit"]
    row["compile / refit, not verified"] = row["compile"] / row["refit, not verified"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", help=", ".join(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in arguments.cases or CASES:
        rows.append(measure(name, arguments.repeats))
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()})
    save("refit", {"repeats": arguments.repeats, "target": "ort"}, rows)


if __name__ == "__main__":
    main()
