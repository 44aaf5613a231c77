"""Networks of timm with a deploy form of their own, at sizes that keep tests quick."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import fx, nn

from refold.cli.torchvision_shim import declare_torchvision_ops
from refold.frontends.export import trace
from tests.randomise import randomise

# Name and image size. Fixed-size models keep their own; mobileone with random weights is so badly
# conditioned at 64 pixels that its author's own fold is 1.6e-12 from it in float64.
NETWORKS: dict[str, int] = {
    "repvgg_a0": 64,
    "repvgg_b1g4": 64,
    "mobileone_s0": 128,
    "mobileone_s1": 128,
    "mobileone_s4": 128,
    "fastvit_t8": 64,
    "fastvit_mci0": 64,
    "ghostnetv3_050": 64,
    "repghostnet_050": 64,
    "lcnetv2_small": 64,
    "repvit_m0_9": 64,
    "iformer_t": 64,
    "levit_128s": 224,
    "levit_conv_128s": 224,
    "efficientvit_m0": 224,
    "efficientvim_m1": 64,
    "shvit_s1": 64,
    "tiny_vit_5m_224": 64,
    "nextvit_small": 64,
}


def network(name: str, size: int | None = None, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    """A timm model in eval mode, with random weights and calibrated statistics, and an input.

    Args:
        name: a model of timm.
        size: height and width of the image; the model's own by default.
        seed: of weights and input.
    """
    declare_torchvision_ops()
    import timm

    torch.manual_seed(seed)
    model = timm.create_model(name, pretrained=False)
    channels, *native = model.pretrained_cfg["input_size"]
    image = torch.randn(2, channels, *((size, size) if size else native))
    return randomise(model, (image,), seed), image


def deploy_form(model: nn.Module) -> nn.Module:
    """The form that timm's own hooks convert a copy of the model to."""
    from timm.utils import reparameterize_model

    return reparameterize_model(deepcopy(model)).eval()


def traced(model: nn.Module, image: torch.Tensor) -> fx.GraphModule:
    """The model in refold's IR, unfolded."""
    return trace(model, (image,), {}).graph_module
