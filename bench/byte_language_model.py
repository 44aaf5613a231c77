"""The proxy of the quantisation benchmarks: a byte-level transformer trained on Python's own help.

``pydoc_data.topics`` ships with every CPython. Every tenth block of 4 KiB is held out. Run from the
repository's root to train it: ``python -m bench.byte_language_model [--steps N] [--seed S]``; one
thread, and everything drawn from the seed, so that a machine repeats its own result. Two
checkpoints of each seed are kept, outside the repository: ``guard``, the first at which 2-bit
round-to-nearest costs 5 % of the perplexity, and ``end``. Before the first there is nothing that a
better quantiser could save.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FOLDER = Path(tempfile.gettempdir()) / "refold-byte-language-model"
CONTEXT = 128
GROUP = 64  # weights that share a scale
GUARD = 1.05  # what 2-bit round-to-nearest must multiply the perplexity by
_BLOCK, _EVERY = 4096, 10
_BATCH, _RATE, _WARMUP = 8, 2e-3, 100
_CHECKED = 100  # steps between looks at what rounding costs


def text() -> tuple[Tensor, Tensor]:
    """The bytes to train on and those held out."""
    from pydoc_data.topics import topics

    joined = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    blocks = [joined[i : i + _BLOCK] for i in range(0, len(joined), _BLOCK)]
    held = b"".join(b for i, b in enumerate(blocks) if i % _EVERY == _EVERY - 1)
    seen = b"".join(b for i, b in enumerate(blocks) if i % _EVERY != _EVERY - 1)
    return (
        torch.frombuffer(bytearray(seen), dtype=torch.uint8).long(),
        torch.frombuffer(bytearray(held), dtype=torch.uint8).long(),
    )


def windows(data: Tensor) -> Tensor:
    """Successive windows of one byte more than the context."""
    return data[: len(data) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.expand, self.project = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        shape = (*y.shape[:2], self.heads, -1)
        q, k, v = (m(y).view(shape).transpose(1, 2) for m in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.project(F.gelu(self.expand(self.norm2(x))))


class ByteLanguageModel(nn.Module):
    """Logits of the next byte at each position."""

    def __init__(self, width: int = 128, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embed(tokens) + self.position(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def losses(model: nn.Module, data: Tensor, batch: int = 16) -> Tensor:
    """Mean negative log-likelihood of each window, in nats per byte."""
    found = []
    with torch.no_grad():
        for part in data.split(batch):
            logits = model(part[:, :-1]).double().transpose(1, 2)
            found.append(F.cross_entropy(logits, part[:, 1:], reduction="none").mean(1))
    return torch.cat(found)


def quantised_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that are quantised, in the order of the graph: all linear ones but the head."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "head"}


def round_to_nearest(model: nn.Module, bits: int) -> nn.Module:
    """These layers rounded between the extremes of each group, without calibration."""
    rounded = copy.deepcopy(model).eval()
    for layer in quantised_layers(rounded).values():
        grouped = layer.weight.detach().unflatten(1, (-1, GROUP))
        low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
        step = (high - low).clamp_min(1e-12) / (2**bits - 1)
        layer.weight.data = (((grouped - low) / step).round() * step + low).flatten(1)
    return rounded


def is_hurt(model: nn.Module, held: Tensor) -> bool:
    """Whether 2-bit round-to-nearest costs what the comparison needs."""
    change = losses(round_to_nearest(model, 2), held) - losses(model, held)
    return math.exp(change.mean()) >= GUARD


def train(steps: int, seed: int, folder: Path) -> None:
    """Trains from a seed and writes both checkpoints."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    seen, held = text()
    model = ByteLanguageModel()
    decayed = [p for p in model.parameters() if p.dim() == 2]
    plain = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    held, guarded = windows(held), False
    folder.mkdir(parents=True, exist_ok=True)
    for step in range(steps):
        rate = min(1.0, step / _WARMUP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = _RATE * rate
        first = torch.randint(len(seen) - CONTEXT, (_BATCH,), generator=generator)
        batch = seen[first[:, None] + torch.arange(CONTEXT + 1)]
        loss = F.cross_entropy(model(batch[:, :-1]).transpose(1, 2), batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 250 == 0 or step == steps - 1:
            spent = time.perf_counter() - start
            print(f"step {step}: loss {loss.item():.3f}, {spent:.0f} s", flush=True)
        if not guarded and step % _CHECKED == 0 and is_hurt(model, held[::4]):
            guarded = True
            _write(model, held, step + 1, path_of("guard", seed, folder))
    _write(model, held, steps, path_of("end", seed, folder))


def path_of(name: str, seed: int, folder: Path) -> Path:
    """Where the checkpoint of a seed is kept."""
    return folder / f"{name}-{seed}.pt"


def _write(model: nn.Module, held: Tensor, steps: int, path: Path) -> None:
    nll = losses(model, held).mean().item()
    bits = nll / math.log(2)
    print(f"{path.stem}: step {steps}, {math.exp(nll):.3f} perplexity per byte, {bits:.3f} bits",
          flush=True)  # fmt: skip
    torch.save({"model": model.state_dict(), "steps": steps, "nll": nll}, path)


def load(name: str, seed: int = 0, folder: Path = FOLDER) -> tuple[ByteLanguageModel, int]:
    """A trained model, ``guard`` or ``end``, and the steps that it took."""
    saved = torch.load(path_of(name, seed, folder))
    model = ByteLanguageModel().eval()
    model.load_state_dict(saved["model"])
    return model, saved["steps"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    train(options.steps, options.seed, options.folder)


if __name__ == "__main__":
    main()
