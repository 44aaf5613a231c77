"""Whole networks of timm, with random weights and calibrated statistics."""

from __future__ import annotations

from functools import partial

from torch import nn

from refold.cli.torchvision_shim import declare_torchvision_ops
from tests.models.systems.case import Systems

SYSTEMS = Systems("Whole networks (timm)")


def _network(name: str) -> nn.Module:
    declare_torchvision_ops()
    import timm

    return timm.create_model(name, pretrained=False)


def _add(
    name: str, paper: str, there: dict[str, int], left: dict[str, int], size: int = 64
) -> None:
    SYSTEMS.add(
        name, (2, 3, size, size), paper=paper, there=there, left=left, slow=True, requires=("timm",)
    )(partial(_network, name))


# mobileone with random weights is so badly conditioned at 64 pixels that the authors' own fold is
# 1.6e-12 from it in float64.
_add(
    "mobileone_s0", "MobileOne (Vasu et al., 2023)",
    {"conv": 191, "batch-norm": 226, "add": 212}, {"conv": 43}, 128,
)  # fmt: skip
_add(
    "mobileone_s4", "MobileOne (Vasu et al., 2023)",
    {"conv": 89, "batch-norm": 99, "add": 86}, {"conv": 67}, 128,
)  # fmt: skip
_add("lcnet_050", "PP-LCNet (Cui et al., 2021)", {"conv": 32, "batch-norm": 27}, {"conv": 32})
_add("lcnetv2_small", "PP-LCNetV2 (PaddleClas, 2022)", {"conv": 46, "batch-norm": 37}, {"conv": 36})
_add("poolformer_s12", "MetaFormer (Yu et al., 2022)", {"mul": 24}, {})
_add("fasternet_t0", "FasterNet (Chen et al., 2023)", {"conv": 44, "batch-norm": 17}, {"conv": 44})
_add("resnetblur18", "Making CNNs Shift-Invariant Again (Zhang, 2019)",
     {"conv": 24, "batch-norm": 20}, {"conv": 24})  # fmt: skip
