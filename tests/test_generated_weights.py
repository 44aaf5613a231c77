"""Generated weights beyond the rows of the systems: bits, zeros, bytes and what they equal."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

import refold
from refold.errors import UsageError
from tests.compare import declined
from tests.models.systems import SYSTEMS
from tests.models.systems.hypercomplex import CompacterNet
from tests.models.systems.kernels import CompanionStateSpace, NormalLowRankStateSpace
from tests.models.systems.low_rank import MaskedLowRank, PrincipalLinear, RandomBasisLinear
from tests.models.systems.quantisers import (
    AdaptiveRounding,
    FlexibleRounding,
    SelfCompressing,
    SignedSupermask,
)


def stored(model: nn.Module, x: Tensor) -> Tensor:
    """The one constant weight that is left of a layer."""
    graph_module = refold.fold(deepcopy(model).eval(), (x,), verify=False).graph_module
    (weight,) = (b for b in graph_module.buffers() if b.ndim > 1)
    return weight


def supermask() -> nn.Module:
    layer = SignedSupermask(6)
    edge = math.log(0.7 / 0.3)  # where the sigmoid crosses the threshold
    with torch.no_grad():
        layer.scores.copy_(edge + torch.randint(-4, 5, layer.scores.shape) * 2.0**-24)
    return layer


def self_compressing() -> nn.Module:
    layer = SelfCompressing(6, 8)
    with torch.no_grad():
        layer.exponent.uniform_(-5, -3)
        half = torch.randint(-4, 4, layer.weight.shape) + 0.5
        layer.weight.copy_(half * 2**layer.exponent)
    return layer


def adaptive() -> nn.Module:
    layer = AdaptiveRounding(16, 32)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-7, 7, layer.weight.shape) * layer.step)
    return layer


def flexible() -> nn.Module:
    layer = FlexibleRounding(16, 32)
    with torch.no_grad():
        half = torch.randint(-7, 7, layer.weight.shape) + 0.5
        layer.weight.copy_(half * layer.s1 * layer.s2 * layer.s3)
    return layer


@pytest.mark.parametrize("build", [supermask, self_compressing, adaptive, flexible])
def test_steps_are_those_of_the_models_own_dtype(build: object) -> None:
    layer = build()  # type: ignore[operator]
    channels = 6 if isinstance(layer, nn.Conv2d) else 16
    x = torch.randn(2, channels, *((5, 5) if isinstance(layer, nn.Conv2d) else ()))
    with torch.no_grad():
        expected, wide = layer.effective(), deepcopy(layer).double().effective()
    step = float(expected.diff().abs().max())
    assert ((expected - wide).abs() > 1e-3 * step).any(), "no weight lies on a step: nothing tested"
    # behind the step float64 is rounded once, which may be one place off the model's own product
    torch.testing.assert_close(stored(layer, x), expected, rtol=2e-7, atol=0)


def test_a_mask_keeps_its_zeros() -> None:
    layer = MaskedLowRank(16)
    weight = stored(layer, torch.randn(2, 5, 16))
    assert torch.equal(weight == 0, layer.mask == 0)
    assert int((weight == 0).sum()) == 128


def test_principal_components_merge_to_the_weight_they_came_from() -> None:
    layer = PrincipalLinear(16)
    assert torch.allclose(stored(layer, torch.randn(2, 5, 16)), layer.original, rtol=0, atol=1e-6)


def test_random_bases_leave_the_artifact() -> None:
    report = refold.fold(RandomBasisLinear(16).eval(), (torch.randn(2, 5, 16),)).report
    assert report.after.parameters == 16 * 16 + 16
    assert report.before.parameters > 2 * report.after.parameters


def powers(a: Tensor, b: Tensor, length: int) -> Tensor:
    """``[B, A B, A^2 B, ...]`` one after the other."""
    columns = [b]
    for _ in range(length - 1):
        columns.append((a @ columns[-1].unsqueeze(-1)).squeeze(-1))
    return torch.stack(columns, -1)


def test_the_kernel_of_s4_is_that_of_its_discretised_recurrence() -> None:
    layer = NormalLowRankStateSpace(3, 12).double()
    with torch.no_grad():
        b, c, p = (torch.view_as_complex(v) for v in (layer.b, layer.c, layer.p))
        diagonal = torch.complex(-layer.log_decay.exp(), layer.frequency)
        a = torch.diag_embed(diagonal) - p.unsqueeze(-1) * p.conj().unsqueeze(-2)
        half = (layer.log_step.exp() / 2).unsqueeze(-1)
        eye = torch.eye(4, dtype=a.dtype)
        step = torch.linalg.solve(eye - half * a, eye + half * a)
        into = torch.linalg.solve(eye - half * a, (2 * half.squeeze(-1)) * b)
        truncated = eye - torch.linalg.matrix_power(step, 12)
        read = torch.linalg.solve(truncated.mT, c)
        expected = torch.einsum("hn,hnl->hl", read, powers(step, into, 12)).real
        assert torch.allclose(layer.kernel(), expected, rtol=0, atol=1e-12)


def test_the_kernel_of_a_companion_matrix_is_its_powers() -> None:
    layer = CompanionStateSpace(3, 11).double()
    with torch.no_grad():
        last = torch.tensor([0.0, 0, 0, 1], dtype=torch.float64)
        a = layer.shift + layer.column.unsqueeze(-1) * last
        expected = torch.einsum("hn,hnl->hl", layer.c, powers(a, layer.b, 11))
        assert torch.allclose(layer.kernel(), expected, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_a_kept_generator_is_one_record_and_says_its_factor() -> None:
    model, x = CompacterNet(256, 128).eval(), (torch.randn(2, 256),)
    kept = [r for r in declined(refold.fold(model, x)) if r.rule == "fold-constants"]
    assert len(kept) == 4  # two weights of two adapters, and nothing on the way to them
    for record in kept:
        assert "128 KiB, 73.1 times the 1.75 KiB" in record.reason
        assert "max_growth" in record.hint
    assert {r.module for r in kept} == {"adapters.0", "adapters.1"}
    report = refold.explain(model, x, max_growth=math.inf)
    assert not [r for r in report.declined if r.rule == "fold-constants"]
    assert report.after.bytes > report.before.bytes + 4 * 126 * 1024


def test_a_growth_below_one_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"expected 1 \(no growth\), more, or infinity"):
        refold.fold(nn.Linear(3, 3), (torch.randn(2, 3),), max_growth=0.5)


def test_templates_stay_for_the_layer_that_reads_one() -> None:
    system = SYSTEMS["template sharing, one layer reads a template"]
    model, inputs = system.model(), system.inputs()
    shapes = [tuple(b.shape) for b in refold.fold(model, inputs).graph_module.buffers()]
    assert sorted(shapes) == [(6, 6, 3, 3)] * 3  # one template of three, as a view of the bank
