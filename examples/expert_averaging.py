"""Trains a small ViT with mixtures of experts and makes one plain ViT of it to deploy.

Two networks start from the same weights and see the same batches: a plain one, and one whose FFNs
are `refold.EWAMoE` layers of four experts, which share weights more and more, in deeper layers and
in later steps. The data are synthetic: two waves and noise; the class is the pair of their
directions. They are few enough that the networks can learn them by heart.

    python examples/expert_averaging.py --steps 400
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

import refold
from refold.passes import PIPELINES
from refold.passes.experts.average_experts import AverageExperts

SIZE, PATCH, WIDTH, HEADS, DEPTH, EXPERTS = 16, 4, 64, 4, 4, 4
DIRECTIONS = 5
PAIRS = torch.combinations(torch.arange(DIRECTIONS))  # 10 classes
NOISE = 1.5
TRAINED, TESTED = 4096, 8192


def images(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    labels = torch.randint(len(PAIRS), (count,), generator=generator)
    angles = PAIRS[labels] * torch.pi / DIRECTIONS
    starts = 2 * torch.pi * torch.rand(count, 2, generator=generator)
    pitch = 0.8 + 0.4 * torch.rand(count, 2, generator=generator)
    axis = torch.arange(SIZE, dtype=torch.float32)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    along = x * angles.cos()[..., None, None] + y * angles.sin()[..., None, None]
    clean = (along * pitch[..., None, None] + starts[..., None, None]).sin().sum(1, keepdim=True)
    return clean + NOISE * torch.randn(clean.shape, generator=generator), labels


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp: nn.Module = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        heads = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, tokens, WIDTH))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, stride=PATCH)
        self.position = nn.Parameter(0.02 * torch.randn((SIZE // PATCH) ** 2, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(PAIRS))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens).mean(1)))


def with_experts(plain: ViT) -> ViT:
    vit = copy.deepcopy(plain)
    for block in vit.blocks:
        block.mlp = refold.EWAMoE(copy.deepcopy(block.mlp) for _ in range(EXPERTS))
    return vit


def train(vit: nn.Module, steps: int, share_rate: float | None) -> None:
    torch.manual_seed(1)
    every, classes = images(TRAINED, torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(vit.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    order = torch.Generator().manual_seed(5)  # the experts draw from the default generator
    vit.train()
    for step in range(steps):
        batch = torch.randint(TRAINED, (128,), generator=order)
        loss = functional.cross_entropy(vit(every[batch]), classes[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if share_rate is not None:
            grown = share_rate * (step + 1) / steps
            refold.ewa_step_(vit, [grown * (layer + 1) / DEPTH for layer in range(DEPTH)])
        if (step + 1) % max(1, steps // 5) == 0:
            print(f"  step {step + 1:4d}: loss {loss.item():.3f}", flush=True)
    vit.eval()


@torch.no_grad()
def right(model: Callable[[Tensor], Tensor]) -> Tensor:
    """For each test image: 1 if the model says its class."""
    data = torch.Generator().manual_seed(2)
    answers = []
    for _ in range(TESTED // 512):
        x, labels = images(512, data)
        answers.append(model(x).argmax(1) == labels)
    return torch.cat(answers).double()


@torch.no_grad()
def cpu_times(models: dict[str, Callable[[Tensor], Tensor]], rounds: int = 15) -> dict[str, float]:
    """Medians of all models run in turn, so that a busy machine slows all alike."""
    x, _ = images(64, torch.Generator().manual_seed(3))
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 2):
        for name, model in models.items():
            start = time.process_time()
            model(x)
            times[name].append(time.process_time() - start)
    return {name: sorted(seen[2:])[rounds // 2] for name, seen in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--share-rate", type=float, default=0.05, help="of the last layer and step")
    parser.add_argument("--tolerance", type=float, default=0.05, help="of a layer's outputs")
    arguments = parser.parse_args()
    start = time.perf_counter()

    torch.manual_seed(0)
    plain = ViT()
    moe = with_experts(plain)
    print("plain ViT")
    train(plain, arguments.steps, None)
    print(f"the same with {EXPERTS} experts in each layer")
    train(moe, arguments.steps, arguments.share_rate)

    data = torch.Generator().manual_seed(4)
    calibration = [images(64, data)[0] for _ in range(4)]
    averaging = AverageExperts(
        mode="average", tolerance=arguments.tolerance, calibration=calibration
    )
    pipeline = (
        PIPELINES["default"].without("average-experts").with_(averaging, before="fold-batch-norm")
    )
    converted = refold.compile_for_inference(moe, calibration[0], pipeline=pipeline)
    print("\nexpert averaging")
    for note in converted.report.notes:
        print(f"  {note}")
    for refusal in converted.report.declined:
        if refusal.rule == averaging.name:
            print(f"  kept: {refusal.module}: {refusal.reason}")
    deployed = refold.compile_for_inference(plain, calibration[0])

    as_trained = copy.deepcopy(moe)
    for block in as_trained.blocks:
        block.mlp.train()  # random partition; the rest of the network is in eval mode
    rows: dict[str, Callable[[Tensor], Tensor]] = {
        "experts, random partition": as_trained,
        "experts, mean of outputs": moe,
        "experts averaged": converted,
        "trained plainly": deployed,
    }
    times = cpu_times(rows)
    answers = {name: right(model) for name, model in rows.items()}
    print(f"\n{'':28}{'accuracy':>9}{'averaged - this':>22}{'CPU time':>11}")
    for name, answer in answers.items():
        gap = answers["experts averaged"] - answer
        paired = 100 * float(gap.std()) / len(gap) ** 0.5
        points = f"{100 * float(gap.mean()):+.2f} +- {paired:.2f}"
        accuracy = f"{100 * float(answer.mean()):.2f} %"
        print(f"{name:28}{accuracy:>9}{points:>22}{times[name] * 1e3:>8.1f} ms")
    print(
        f"{TESTED} test images; differences in points with their standard error on the same "
        f"images,\none training each; CPU time of 64 images. "
        f"{time.perf_counter() - start:.0f} s in all"
    )


if __name__ == "__main__":
    main()
