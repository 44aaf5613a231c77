"""What a caller can see of a compiled model is what the original shows, over all models here.

Values at three batch sizes and on the second call, after the outputs of the first were written;
inputs, strides, what shares memory with what, and the state after each call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from refold.cli.torchvision_shim import declare_torchvision_ops
from refold.fuzz import contract
from tests import small_nets
from tests.compare import EXACT, double
from tests.examples import few
from tests.models import MODELS, PATTERNS
from tests.models.random_graphs import RandomGraph
from tests.models.systems import SYSTEMS
from tests.models.systems.case import System, settings_of
from tests.models.timm_networks import NETWORKS, network
from tests.randomise import randomise

SMALL = {
    "ConvNet": (small_nets.ConvNet, (2, 3, 8, 8)),
    "NothingToFold": (small_nets.NothingToFold, (2, 4)),
    "LateNorm": (small_nets.LateNorm, (2, 3, 6, 6)),
}


# What is traced of a batch norm says that its result is contiguous, and the compiled model keeps
# that; the kernel lays it out as its input, which is transposed here.
OTHER_STRIDES = {"linear-transpose-bn1d"}


def keeps_the_contract(
    model: nn.Module,
    inputs: tuple[Any, ...],
    settings: Mapping[str, Any] | None = None,
    *,
    bound: float = 100 * EXACT,
    fixed: bool = False,
    strided: bool = True,
) -> None:
    """Compares calls of a float64 copy with those of its compilation."""
    model, (inputs, settings) = model.eval().double(), double((inputs, settings or {}))
    contract.keeps_the_contract(model, inputs, settings, bound=bound, fixed=fixed, strided=strided)


def drawn(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    inputs = (torch.randn(shape),)
    return randomise(build(), inputs), inputs


@pytest.mark.parametrize("name", SMALL)
def test_small_nets(name: str) -> None:
    keeps_the_contract(*drawn(*SMALL[name]))


@pytest.mark.parametrize("name", few(PATTERNS, 16))
def test_patterns(name: str) -> None:
    model, inputs = drawn(PATTERNS[name].model, PATTERNS[name].shape)
    keeps_the_contract(model, inputs, strided=name not in OTHER_STRIDES)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if i % 9 == 0 else pytest.mark.sweep) for i, n in enumerate(MODELS)],
)
def test_models(name: str) -> None:
    keeps_the_contract(MODELS[name].model(), MODELS[name].inputs())


@pytest.mark.parametrize("seed", few(range(200, 212), 3))
def test_random_graphs(seed: int) -> None:
    model = RandomGraph(seed, steps=6 + seed % 10)
    keeps_the_contract(model, (model.example,))


def _systems() -> list[Any]:
    kept = [(name, s) for name, s in SYSTEMS.items() if not s.refused]
    quick = {name for name, s in kept[::12] if not s.slow}
    return [pytest.param(n, marks=() if n in quick else pytest.mark.sweep) for n, _ in kept]


@pytest.mark.parametrize("name", _systems())
def test_systems(name: str) -> None:
    system: System = SYSTEMS[name]
    if system.requires:
        declare_torchvision_ops()
    for package in system.requires:
        pytest.importorskip(package)
    keeps_the_contract(
        system.model(),
        system.inputs(),
        settings_of(system),
        bound=max(system.bound, 100 * EXACT),
        fixed=system.fixed_batch,
    )


@pytest.mark.sweep
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    pytest.importorskip("timm")
    model, image = network(name, NETWORKS[name])
    keeps_the_contract(model, (image,), bound=1e-8)
