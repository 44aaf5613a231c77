from __future__ import annotations

import pytest
import torch

from refold.algebra import compensation
from refold.algebra.binary_coding import decode, encode, fit_scales
from refold.algebra.compensation import (
    Hessian,
    InverseFactor,
    encode_compensated,
    inverse_factor,
    output_error,
)
from tests.examples import few

FAMILIES = ("uniform", "bcq", "apot3", "pot")


def correlated(features: int, count: int = 400, rank: int = 8, seed: int = 0) -> torch.Tensor:
    """Inputs near a subspace, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank, features, generator=generator)
    noise = 0.1 * torch.randn(count, features, generator=generator)
    return torch.randn(count, rank, generator=generator) @ mix + noise


def hessian(x: torch.Tensor) -> torch.Tensor:
    total = Hessian(x.shape[-1])
    for part in x.split(64):
        total.add(part)
    return total.mean()


def round_to_nearest(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """The usual grid between the smallest and the largest value of each group."""
    parts = weight.unflatten(1, (-1, group))
    low = parts.amin(-1, keepdim=True)
    step = (parts.amax(-1, keepdim=True) - low) / (2**bits - 1)
    return (((parts - low) / step).round() * step + low).flatten(1)


def test_the_hessian_is_the_mean_of_outer_products() -> None:
    x = correlated(12, 100).reshape(10, 10, 12)
    expected = torch.einsum("abi,abj->ij", x.double(), x.double()) / 100
    assert torch.allclose(hessian(x), expected, rtol=1e-12, atol=0)


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    h = hessian(correlated(24))
    factor = inverse_factor(h, 0.01, 8)
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(24).double()
    in_order = damped[factor.order][:, factor.order]
    assert torch.equal(factor.upper, factor.upper.triu())
    product = factor.upper.mT @ factor.upper @ in_order
    assert torch.allclose(product, torch.eye(24).double(), atol=1e-9)


def test_the_largest_inputs_come_first_and_groups_stay_whole() -> None:
    diagonal = torch.tensor([1, 3, 2, 9, 8, 7, 4, 5, 6, 90.0]).double()
    factor = inverse_factor(diagonal.diag(), 0.01, 3)
    assert factor.order.tolist() == [3, 4, 5, 8, 7, 6, 1, 2, 0, 9]  # the short group stays last
    ties = inverse_factor(torch.eye(10).double(), 0.01, 3)
    assert ties.order.tolist() == list(range(10))


@pytest.mark.parametrize("features", [96, 72])
def test_the_order_leaves_no_trace_in_the_layout(features: int) -> None:
    """Columns that do not depend on each other: each is as it would be alone, in its place."""
    torch.manual_seed(0)
    weight = torch.randn(4, features).double()
    h = (0.5 + torch.rand(features).double()).diag()
    code = encode_compensated(weight, inverse_factor(h, 1e-9, 32), 3, 32, "uniform")
    plain = encode(weight, 3, 32, "uniform", importance=h.diagonal())
    assert output_error(decode(code) - weight, h) <= 1.001 * output_error(decode(plain) - weight, h)


def test_the_order_makes_outputs_nearer() -> None:
    gains = []
    for seed in range(5):
        torch.manual_seed(seed)
        x = correlated(128, rank=40, seed=seed) * torch.logspace(-1, 1, 128)[torch.randperm(128)]
        weight, h = torch.randn(16, 128).double(), hessian(x)
        factor = inverse_factor(h, 0.01, 32)
        own = output_error(decode(encode_compensated(weight, factor, 3, 32, "uniform")) - weight, h)
        damped = h + 0.01 * h.diagonal().mean() * torch.eye(128).double()
        as_given = InverseFactor(
            torch.linalg.cholesky(damped.inverse(), upper=True), torch.arange(128)
        )
        code = encode_compensated(weight, as_given, 3, 32, "uniform")
        gains.append(output_error(decode(code) - weight, h) / own)
    assert sorted(gains)[2] > 1.1


@pytest.mark.parametrize("bad", [torch.zeros(4, 4), torch.full((4, 4), torch.nan)])
def test_inputs_that_say_nothing(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="zero or not finite"):
        inverse_factor(bad.double(), 0.01, 2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("features", [64, 200])
def test_white_inputs_need_no_compensation(family: str, features: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, features).double()
    factor = inverse_factor(torch.eye(features).double() * 3.7, 0.01, 48)
    plain = encode(weight, 3, 48, family)
    code = encode_compensated(weight, factor, 3, 48, family)
    assert torch.equal(plain.signs, code.signs)
    assert torch.equal(plain.alpha, code.alpha)


@pytest.mark.parametrize("features", [96, 104])
def test_the_loop_is_that_of_the_formula(features: int) -> None:
    """Column by column, without blocks; scales of the group as compensated when it is reached."""
    torch.manual_seed(0)
    weight, h = torch.randn(4, features).double(), hessian(correlated(features))
    factor = inverse_factor(h, 0.01, 32)
    code = encode_compensated(weight, factor, 3, 32, "bcq")
    free, values = weight.clone(), decode(code)
    for at, column in enumerate(factor.order.tolist()):
        error = (free[:, column] - values[:, column]) / factor.upper[at, at]
        group = code.alpha[:, :, column // 32]  # [q, N]
        signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 3)
        nearest = (free[:, column, None] - group.mT @ signs.mT).abs().amin(1)
        assert torch.allclose(nearest, (free[:, column] - values[:, column]).abs(), atol=1e-10)
        free[:, factor.order[at + 1 :]] -= error[:, None] * factor.upper[at, at + 1 :]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", few([2, 3], 1))
def test_five_times_nearer_than_round_to_nearest(family: str, bits: int) -> None:
    ratios, gains = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        weight, h = torch.randn(16, 256).double(), hessian(correlated(256, seed=seed))
        factor = inverse_factor(h, 0.01, 64)
        own = output_error(decode(encode_compensated(weight, factor, bits, 64, family)) - weight, h)
        plain = output_error(decode(encode(weight, bits, 64, family)) - weight, h)
        nearest = output_error(round_to_nearest(weight, bits, 64) - weight, h)
        ratios.append(nearest / own)
        gains.append(plain / own)
    assert sorted(ratios)[1] >= 5
    assert sorted(gains)[1] >= 2


def test_the_best_scales_of_each_row_are_kept() -> None:
    torch.manual_seed(0)
    columns = torch.randn(16, 5).double()
    group = compensation._Group(columns, torch.eye(16).double(), 2)
    good = fit_scales(columns.T, 2, "bcq")
    group.offer(good * 4)
    group.offer(good)
    signs, errors = group.signs.clone(), group.errors.clone()
    group.offer(good / 4)
    assert torch.equal(group.alpha, good)
    assert torch.equal(group.signs, signs)
    assert torch.equal(group.errors, errors)


def test_refits_help_every_row_of_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight, h = torch.randn(16, 64).double(), hessian(correlated(64, rank=40))
    factor = inverse_factor(h, 0.01, 64)
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(64).double()

    def losses() -> torch.Tensor:
        error = decode(encode_compensated(weight, factor, 2, 64, "uniform")) - weight
        return ((error @ damped) * error).sum(1)

    refitted = losses()
    monkeypatch.setattr(compensation, "_REFITS", 0)
    once = losses()
    assert bool((refitted <= once * (1 + 1e-9)).all())
    assert float(refitted.sum()) < 0.99 * float(once.sum())


def test_outlier_channels_are_kept() -> None:
    x = correlated(128, rank=100)
    x[:, [7, 77]] *= 30
    torch.manual_seed(0)
    weight, h = torch.randn(16, 128).double(), hessian(x)
    code = encode_compensated(weight, inverse_factor(h, 0.01, 64), 3, 64, "bcq")
    relative = output_error(decode(code) - weight, h) / output_error(weight, h)
    assert relative < 0.005


def test_rows_do_not_depend_on_each_other() -> None:
    torch.manual_seed(0)
    weight = torch.randn(10, 64).double()
    factor = inverse_factor(hessian(correlated(64)), 0.01, 32)
    whole = encode_compensated(weight, factor, 3, 32, "bcq")
    parts = [encode_compensated(w, factor, 3, 32, "bcq") for w in weight.split(4)]
    assert torch.equal(whole.signs, torch.cat([p.signs for p in parts], 1))
    # batched products round by the size of the batch
    assert torch.allclose(whole.alpha, torch.cat([p.alpha for p in parts], 1), rtol=1e-12, atol=0)


def test_output_error_is_the_mean_squared_change() -> None:
    x = correlated(16)
    change = torch.randn(5, 16).double()
    expected = (x.double() @ change.T).square().sum(1).mean()
    assert output_error(change, hessian(x)) == pytest.approx(float(expected), rel=1e-10)
