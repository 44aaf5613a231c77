"""The adapters of the peft package on a small transformer block, with random weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refold.cli.torchvision_shim import declare_torchvision_ops
from tests.models.systems.case import Systems

SYSTEMS = Systems("Adapters of peft")
WIDTH = 16
TOKENS = (2, 5, WIDTH)
TARGETS = ["q", "k", "v", "out", "up", "down"]


class Block(nn.Module):
    """Attention and a feed-forward part, six linears."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        heads = [p(y).unflatten(2, (2, -1)).transpose(1, 2) for p in (self.q, self.k, self.v)]
        x = x + self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def adapted(config: str, **options: Any) -> nn.Module:
    """The block with an adapter of peft on each linear, all of its weights random."""
    declare_torchvision_ops()
    import peft

    torch.manual_seed(0)
    model = peft.get_peft_model(Block(WIDTH), getattr(peft, config)(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # what is trained starts at zero or one
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


_BLOCK = {"linear": 6, "layer-norm": 2, "attention": 1, "gelu": 1, "add": 2}
_REST = {"layer-norm": 2, "attention": 1, "gelu": 1}


@SYSTEMS.add(
    "LoRA of peft", TOKENS, paper="LoRA (Hu et al., 2022)", prepared=True, requires=("peft",),
    there={"linear": 18, "mul": 6, "add": 8, **_REST}, left=_BLOCK, passes=("fold-branches",),
)  # fmt: skip
def lora() -> nn.Module:
    return adapted("LoraConfig", r=2, target_modules=TARGETS)


@SYSTEMS.add(
    "DoRA of peft", TOKENS, paper="DoRA (Liu et al., 2024)", prepared=True, requires=("peft",),
    there={"linear": 30, "linalg-norm": 6, **_REST}, passes=("fold-constants", "fold-branches"),
    left={**_BLOCK, "mul": 0, "eye": 0, "sub": 0, "div": 0},
)  # fmt: skip
def dora() -> nn.Module:
    return adapted("LoraConfig", r=2, use_dora=True, target_modules=TARGETS)


@SYSTEMS.add(
    "LoHa of peft", TOKENS, paper="FedPara, LoHa (Hyeon-Woo et al., 2022)", prepared=True,
    there={"linear": 12, "matmul": 12, "mul": 12, "add": 8, **_REST}, left=_BLOCK,
    passes=("fold-constants", "fold-branches"), requires=("peft",),
)  # fmt: skip
def loha() -> nn.Module:
    return adapted("LoHaConfig", r=2, target_modules=TARGETS)


@SYSTEMS.add(
    "LoKr of peft", TOKENS, paper="KronA, LoKr (Edalati et al., 2022)", prepared=True,
    there={"linear": 12, "kron": 6, "mul": 6, "add": 8, **_REST}, left=_BLOCK,
    passes=("fold-constants", "fold-branches"), requires=("peft",),
)  # fmt: skip
def lokr() -> nn.Module:
    return adapted("LoKrConfig", r=2, target_modules=TARGETS)


@SYSTEMS.add(
    "VeRA of peft", TOKENS, paper="VeRA (Kopiczko et al., 2024)", prepared=True,
    there={"linear": 14, "mul": 8, "add": 6, **_REST}, left=_BLOCK, passes=("fold-branches",),
    requires=("peft",),
)  # fmt: skip
def vera() -> nn.Module:
    return adapted("VeraConfig", r=4, target_modules=["q", "k", "v", "out"])


@SYSTEMS.add(
    "IA3 of peft", TOKENS, paper="IA3 (Liu et al., 2022)", prepared=True, requires=("peft",),
    there={"linear": 6, "mul": 6, "add": 2, **_REST}, left=_BLOCK, passes=("absorb-scale-shift",),
)  # fmt: skip
def ia3() -> nn.Module:
    targets = {"target_modules": ["k", "v", "down"], "feedforward_modules": ["down"]}
    return adapted("IA3Config", **targets)
