"""The random weights of the tests hide nothing and keep activations healthy."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.models import MODELS
from tests.randomise import randomise


def _deep(depth: int) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers)


def test_the_same_seed_gives_the_same_model() -> None:
    inputs = (torch.randn(2, 8, 6, 6),)
    first, second = randomise(_deep(3), inputs, 7), randomise(_deep(3), inputs, 7)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    other = randomise(_deep(3), inputs, 8)
    assert not torch.equal(first[0].weight, other[0].weight)


def test_norm_scales_have_every_sign() -> None:
    norm = randomise(nn.BatchNorm2d(512), (torch.randn(2, 512, 3, 3),))
    assert 0.1 < (norm.weight < 0).float().mean() < 0.3
    assert 0 < (norm.weight == 0).float().mean() < 0.1
    assert norm.bias.std() > 0.1
    without = randomise(nn.BatchNorm2d(512), (torch.randn(2, 512, 3, 3),), zeros=False)
    assert (without.weight != 0).all()


def test_statistics_fit_their_input_but_not_exactly() -> None:
    x = 3 + 5 * torch.randn(64, 8, 4, 4)
    model = randomise(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)), (x,))
    y = model[0](torch.randn(64, 8, 4, 4))
    ratio = model[1].running_var / y.var((0, 2, 3))
    assert ratio.min() > 0.5
    assert ratio.max() < 2
    assert (ratio - 1).abs().max() > 0.05


@pytest.mark.parametrize("depth", [2, 60])
def test_activations_stay_healthy(depth: int) -> None:
    x = torch.randn(2, 8, 8, 8)
    y = randomise(_deep(depth), (x,))(x)
    assert 0.1 < y.std() < 10


@pytest.mark.parametrize("name", MODELS)
def test_models_have_no_silent_part(name: str) -> None:
    case = MODELS[name]
    model = case.model()
    with torch.no_grad():
        output = model(*case.inputs())
    assert output.abs().max() < 1e3
    assert output.std() > 1e-2
    for key, value in model.named_parameters():
        tiny = value.numel() > 1 and value.abs().max() < 1e-3
        assert not tiny, f"{key} is too small for a wrong fold to show"
