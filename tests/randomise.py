"""Random weights and calibrated statistics, so that a wrong fold cannot hide.

A freshly built network is blind: batch norms are the identity, biases and adapters are zero, layer
scales are 1e-5. Naive random statistics are no better: a deep network explodes. Here every
parameter is drawn at a healthy size, and each batch norm takes its statistics from what really
arrives at it, layer after layer, before they are jittered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

_WEIGHTED = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_NEGATIVE = 0.2  # share of negative norm scales
_ZERO = 0.04  # share of exactly zero norm scales
_CALIBRATION_BATCH = 16


def randomise(
    model: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any],
    seed: int = 0,
    *,
    zeros: bool = True,
) -> nn.Module:
    """Draws all parameters anew, calibrates the batch norms; returns ``model`` in eval mode.

    Args:
        model: changed in place.
        example_inputs: positional inputs, or keyword inputs as a mapping; they give the shapes of
            the random inputs that calibrate the statistics.
        seed: the same seed gives the same numbers, whatever the model's weights were.
        zeros: lets a few norm scales be exactly zero (dead channels).
    """
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                parameter.copy_(_draw(module, name, parameter, generator, zeros=zeros))
        _calibrate(model, example_inputs, generator)
    return model


def random_inputs(
    example_inputs: Sequence[Any] | Mapping[str, Any],
    generator: torch.Generator,
    batch: int | None = None,
) -> Any:
    """Standard normal tensors in the place of the floating examples; other values stay.

    Args:
        example_inputs: a tuple of positional inputs or a mapping of keyword inputs.
        generator: source of the numbers.
        batch: leading size of every tensor, where it shall differ from the example's.
    """

    def fresh(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        size = list(value.shape)
        if batch is not None and size:
            size[0] = batch
        if not value.is_floating_point():
            return value.expand(size) if batch is None else value[:1].expand(size)
        return _normal(size, generator).to(value.dtype)

    return pytree.tree_map(fresh, example_inputs)


def _normal(size: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(size), generator=generator)


def _uniform(size: Sequence[int], low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(tuple(size), generator=generator)


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and not isinstance(module, _WEIGHTED)


def _norm_scale(size: Sequence[int], generator: torch.Generator, *, zeros: bool) -> Tensor:
    scale = _uniform(size, 0.5, 1.5, generator)
    draw = torch.rand(tuple(size), generator=generator)
    scale = torch.where(draw < _NEGATIVE, -scale, scale)
    return torch.where(draw > 1 - _ZERO, 0.0, scale) if zeros else scale


def _draw(
    module: nn.Module, name: str, old: Tensor, generator: torch.Generator, *, zeros: bool
) -> Tensor:
    """New values for one parameter, by what it is."""
    size = old.shape
    if _is_norm(module) and name == "weight":
        return _norm_scale(size, generator, zeros=zeros)
    if _is_norm(module) or name.endswith("bias"):
        return 0.2 * _normal(size, generator)
    if isinstance(module, _WEIGHTED) and name == "weight":
        fan_in = old[0].numel()
        if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            fan_in = old.numel() // (old[0].shape[0] * module.groups)
        return _normal(size, generator) / math.sqrt(fan_in)
    constant = bool((old == old.flatten()[0]).all()) if old.numel() else True
    per_channel = old.numel() == max(size, default=1)
    if constant and per_channel and old.numel() and float(old.flatten()[0]):
        # layer scale (tiny at first) or a scale of an adapter (one at first)
        tiny = abs(float(old.flatten()[0])) < 0.5
        return _uniform(size, 0.2, 1.0, generator) if tiny else _uniform(size, 0.5, 1.5, generator)
    if constant:
        return 0.2 * _normal(size, generator)
    return old.mean() + old.std() * _normal(size, generator)


def _calibrate(
    model: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any],
    generator: torch.Generator,
) -> None:
    """Sets each batch norm's statistics from its own input, jittered, in one eval-mode pass.

    Each layer is calibrated just before it runs, so later ones see what the jitter does: nothing
    accumulates over depth, as it would after one pass in training mode.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_var is not None]
    if not norms:
        return
    seen: set[nn.Module] = set()

    def set_statistics(module: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(module, _BatchNorm)
        assert module.running_mean is not None
        assert module.running_var is not None
        if module in seen:
            return
        seen.add(module)
        x = args[0].float()
        axes = [axis for axis in range(x.ndim) if axis != 1]
        mean, variance = x.mean(axes), x.var(axes, unbiased=False)
        # a channel that is constant here is not so at another input's border
        variance = variance.clamp_min(1e-2 * float(variance.mean()) + 1e-4)
        jitter = 0.1 * variance.sqrt() * _normal(mean.shape, generator)
        module.running_mean.copy_(mean + jitter)
        module.running_var.copy_(variance * _uniform(mean.shape, 0.7, 1.4, generator))

    hooks = [norm.register_forward_pre_hook(set_statistics) for norm in norms]
    try:
        inputs = random_inputs(example_inputs, generator, _calibration_batch(example_inputs))
        model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()


def _calibration_batch(example_inputs: Sequence[Any] | Mapping[str, Any]) -> int | None:
    """A batch of a few samples where every tensor leads with the same size, else the example's."""
    sizes = {
        value.shape[0] if value.ndim else None
        for value in pytree.tree_leaves(example_inputs)
        if isinstance(value, Tensor)
    }
    if len(sizes) != 1 or None in sizes:
        return None
    return max(_CALIBRATION_BATCH, *(s for s in sizes if s is not None))
