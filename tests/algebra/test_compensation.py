from __future__ import annotations

import pytest
import torch

from refold.algebra.binary_coding import decode, encode
from refold.algebra.compensation import (
    Hessian,
    encode_compensated,
    inverse_factor,
    output_error,
)

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
    factor = inverse_factor(h, 0.01)
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(24).double()
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.mT @ factor @ damped, torch.eye(24).double(), atol=1e-9)


@pytest.mark.parametrize("bad", [torch.zeros(4, 4), torch.full((4, 4), torch.nan)])
def test_inputs_that_say_nothing(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="zero or not finite"):
        inverse_factor(bad.double(), 0.01)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("features", [64, 200])
def test_white_inputs_need_no_compensation(family: str, features: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, features).double()
    factor = inverse_factor(torch.eye(features).double() * 3.7, 0.01)
    plain = encode(weight, 3, 48, family)
    code = encode_compensated(weight, factor, 3, 48, family)
    assert torch.equal(plain.signs, code.signs)
    assert torch.equal(plain.alpha, code.alpha)


def test_the_loop_is_that_of_the_formula() -> None:
    """Column by column, without blocks; scales of the group as compensated when it is reached."""
    torch.manual_seed(0)
    weight, h = torch.randn(4, 96).double(), hessian(correlated(96))
    factor = inverse_factor(h, 0.01)
    code = encode_compensated(weight, factor, 3, 32, "bcq")
    free, values = weight.clone(), decode(code)
    for column in range(96):
        error = (free[:, column] - values[:, column]) / factor[column, column]
        group = code.alpha[:, :, column // 32]  # [q, N]
        signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 3)
        nearest = (free[:, column, None] - group.mT @ signs.mT).abs().amin(1)
        assert torch.allclose(nearest, (free[:, column] - values[:, column]).abs(), atol=1e-10)
        free[:, column + 1 :] -= error[:, None] * factor[column, column + 1 :]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [2, 3])
def test_five_times_nearer_than_round_to_nearest(family: str, bits: int) -> None:
    ratios, gains = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        weight, h = torch.randn(16, 256).double(), hessian(correlated(256, seed=seed))
        factor = inverse_factor(h, 0.01)
        own = output_error(decode(encode_compensated(weight, factor, bits, 64, family)) - weight, h)
        plain = output_error(decode(encode(weight, bits, 64, family)) - weight, h)
        nearest = output_error(round_to_nearest(weight, bits, 64) - weight, h)
        ratios.append(nearest / own)
        gains.append(plain / own)
    assert sorted(ratios)[1] >= 5
    assert sorted(gains)[1] >= 2


def test_outlier_channels_are_kept() -> None:
    x = correlated(128, rank=100)
    x[:, [7, 77]] *= 30
    torch.manual_seed(0)
    weight, h = torch.randn(16, 128).double(), hessian(x)
    code = encode_compensated(weight, inverse_factor(h, 0.01), 3, 64, "bcq")
    relative = output_error(decode(code) - weight, h) / output_error(weight, h)
    assert relative < 0.005


def test_rows_do_not_depend_on_each_other() -> None:
    torch.manual_seed(0)
    weight, factor = torch.randn(10, 64).double(), inverse_factor(hessian(correlated(64)), 0.01)
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
