from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refold.algebra.binary_coding import (
    BinaryCode,
    assign,
    decode,
    encode,
    planar,
    power_of_two,
    sum_of_powers,
)

FAMILIES = ("uniform", "bcq", "apot3", "pot")
DISTRIBUTIONS = {
    "gauss": torch.distributions.Normal(0, 1),
    "laplace": torch.distributions.Laplace(0, 1),
    "student": torch.distributions.StudentT(5),
}


def weights(rows: int = 64, features: int = 256, kind: str = "gauss", seed: int = 0):
    torch.manual_seed(seed)
    return DISTRIBUTIONS[kind].sample((rows, features)).double() * 0.02


def error(code: BinaryCode, weight: torch.Tensor) -> float:
    return float((decode(code) - weight).square().sum() / weight.square().sum())


def levels(alpha: torch.Tensor) -> torch.Tensor:
    """All levels of one row of scales, spelled out."""
    signs = itertools.product((-1.0, 1.0), repeat=len(alpha))
    sums = [sum(s * a for s, a in zip(row, alpha.tolist(), strict=True)) for row in signs]
    return torch.tensor(sums, dtype=torch.float64)


# --- peers, written from the formulas -------------------------------------------------------------


def least_squares_uniform(groups: torch.Tensor, bits: int, rounds: int = 30) -> torch.Tensor:
    """Half-integer grid from the largest value, step and levels in turn; the reconstruction."""
    top = 2**bits - 1
    step = groups.abs().amax(1, keepdim=True) / top
    for _ in range(rounds):
        odd = (2 * torch.floor(groups / step / 2) + 1).clamp(-top, top)
        step = (groups * odd).sum(1, keepdim=True) / odd.square().sum(1, keepdim=True)
    odd = (2 * torch.floor(groups / step / 2) + 1).clamp(-top, top)
    return step * odd


def released(groups: torch.Tensor, bits: int, rounds: int = 15, terms: int = 3) -> torch.Tensor:
    """Greedy, then alternating with scales rounded in each round, logarithms to whole numbers."""
    rest, planes = groups, []
    for _ in range(bits):
        sign = torch.where(rest >= 0, 1.0, -1.0).double()
        planes.append(sign)
        rest = rest - sign * rest.abs().mean(1, keepdim=True)
    chosen = torch.stack(planes, -1)
    codes = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=bits))).double()
    for _ in range(rounds):
        gram = chosen.mT @ chosen + 1e-6 * torch.eye(bits)
        alpha = torch.linalg.solve(gram, (chosen.mT @ groups.unsqueeze(-1)).squeeze(-1))
        alpha = alpha.abs().sort(1, descending=True).values
        rounded = torch.zeros_like(alpha)
        for _ in range(terms):
            left = alpha - rounded
            rounded += left.sign() * 2.0 ** torch.log2(left.abs().clamp_min(1e-30)).round()
        grid = rounded @ codes.T
        nearest = (groups.unsqueeze(-1) - grid.unsqueeze(1)).abs().argmin(-1)
        chosen = codes[nearest]
    return (chosen * rounded.unsqueeze(1)).sum(-1)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_not_worse_than_its_peers(kind: str, bits: int) -> None:
    weight = weights(256, 128, kind)
    size = weight.square().sum()
    peer = float((released(weight, bits) - weight).square().sum() / size)
    grid = float((least_squares_uniform(weight, bits) - weight).square().sum() / size)
    own = {family: error(encode(weight, bits, 128, family), weight) for family in FAMILIES}
    assert own["bcq"] <= peer
    assert own["apot3"] <= peer
    assert own["uniform"] <= grid
    assert own["bcq"] <= own["uniform"]
    assert own["apot3"] <= grid


@pytest.mark.parametrize(("bits", "family", "most"), [(2, "bcq", 0.115), (3, "bcq", 0.0355)])
def test_errors_on_gaussian_weights_are_those_of_the_literature(bits, family, most) -> None:
    weight = weights(512, 128)
    assert error(encode(weight, bits, 128, family), weight) <= most


# --- invariants -----------------------------------------------------------------------------------


@given(
    bits=st.integers(1, 4),
    family=st.sampled_from(FAMILIES),
    rows=st.integers(1, 4),
    features=st.integers(1, 50),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_codes_are_what_their_family_says(bits, family, rows, features, seed) -> None:
    weight = weights(rows, features, "student", seed)
    code = encode(weight, bits, 16, family)
    assert code.signs.shape == (bits, rows, features)
    assert set(code.signs.unique().tolist()) <= {-1, 1}
    kinds = 1 if family in ("uniform", "pot") else bits
    assert code.alpha.shape == (kinds, rows, -(-features // 16))
    assert (code.alpha >= 0).all()
    assert (code.alpha[:-1] >= code.alpha[1:]).all()
    if family == "pot":
        assert (torch.frexp(code.alpha[code.alpha > 0]).mantissa == 0.5).all()
    if family == "apot3":
        assert torch.equal(sum_of_powers(code.alpha, 3), code.alpha)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", [0.0, 5e-324, 1e-310, 1e-40])
def test_zero_and_denormal_weights(family: str, value: float) -> None:
    weight = torch.full((2, 32), value, dtype=torch.float64)
    code = encode(weight, 3, 16, family)
    assert decode(code).isfinite().all()
    assert (decode(code) - weight).abs().max() <= value


@given(bits=st.integers(1, 4), seed=st.integers(0, 20), uniform=st.booleans())
@settings(max_examples=30, deadline=None)
def test_assigned_levels_are_the_nearest(bits: int, seed: int, uniform: bool) -> None:
    torch.manual_seed(seed)
    alpha = torch.rand(3, 1 if uniform else bits, dtype=torch.float64).sort(1, True).values
    values = torch.randn(3, 40, dtype=torch.float64)
    got, signs = assign(values, alpha, bits)
    full = planar(alpha.T, bits).T
    spelled = (signs * full.T.unsqueeze(-1)).sum(0)
    assert torch.allclose(spelled, got, rtol=0, atol=1e-15)
    for row in range(3):
        grid = levels(full[row])
        apart = (values[row].unsqueeze(1) - grid).abs().amin(1)
        assert torch.allclose((values[row] - got[row]).abs(), apart, rtol=0, atol=1e-14)
        inside = values[row].abs() <= grid.max()
        gap = grid.sort().values.diff().max()
        assert (apart[inside] <= gap / 2 + 1e-15).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_more_planes_and_more_rounds_are_not_worse(family: str) -> None:
    weight = weights(64, 128, "laplace")
    by_bits = [error(encode(weight, bits, 128, family), weight) for bits in (1, 2, 3, 4)]
    assert all(more < less for less, more in itertools.pairwise(by_bits))
    by_rounds = [error(encode(weight, 3, 128, family, rounds=r), weight) for r in (1, 2, 4, 8, 16)]
    assert all(more <= less for less, more in itertools.pairwise(by_rounds))


def test_alternation_goes_far_beyond_the_first_round() -> None:
    weight = weights(256, 128, "laplace")
    first = error(encode(weight, 3, 128, "bcq", rounds=1), weight)
    assert error(encode(weight, 3, 128, "bcq"), weight) < 0.9 * first


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("family", ["uniform", "bcq"])
def test_a_code_is_found_again(bits: int, family: str) -> None:
    torch.manual_seed(1)
    signs = torch.randint(0, 2, (bits, 8, 128), dtype=torch.int8) * 2 - 1
    alpha = torch.tensor([8.0, 3.7, 1.6, 0.7])[:bits, None, None] * torch.rand(1, 8, 1).add(0.5)
    if family == "uniform":
        alpha = alpha[:1]
    weight = decode(BinaryCode(signs, alpha.double(), 128))
    code = encode(weight, bits, 128, family, rounds=50)
    assert (decode(code) - weight).abs().max() <= 1e-6 * weight.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_scaling_and_negation(family: str) -> None:
    weight = weights(16, 64, "laplace")
    code, scaled = encode(weight, 3, 32, family), encode(weight * 2**5, 3, 32, family)
    assert torch.equal(scaled.alpha, code.alpha * 2**5)
    assert torch.equal(scaled.signs, code.signs)
    negated = encode(-weight, 3, 32, family)
    assert torch.allclose(negated.alpha, code.alpha, rtol=1e-9, atol=0)
    assert torch.allclose(decode(negated), -decode(code), rtol=1e-9, atol=0)


def test_importance_moves_the_error_to_where_it_counts_less() -> None:
    weight = weights(32, 64, "student")
    importance = torch.ones(64, dtype=torch.float64)
    importance[:4] = 1000.0
    plain, weighted = encode(weight, 2, 64, "bcq"), encode(
        weight, 2, 64, "bcq", importance=importance
    )  # fmt: skip
    apart = [(decode(c) - weight)[:, :4].square().sum() for c in (plain, weighted)]
    assert apart[1] < 0.3 * apart[0]


def test_the_last_group_may_be_short() -> None:
    weight = weights(4, 37)
    code = encode(weight, 3, 16, "bcq")
    alone = encode(weight[:, 32:], 3, 16, "bcq")
    assert torch.equal(code.signs[:, :, 32:], alone.signs)
    assert torch.equal(code.alpha[:, :, 2:], alone.alpha)


def test_rounded_scales_choose_the_signs() -> None:
    weight = weights(8, 64)
    code = encode(weight, 3, 32, "bcq", rounding=lambda a: a.half().double())
    assert torch.equal(code.alpha, code.alpha.half().double())
    grouped = weight.reshape(16, 32)
    _, signs = assign(grouped, code.alpha.permute(1, 2, 0).reshape(16, 3), 3)
    assert torch.equal(signs.reshape(3, 8, 64), code.signs)


def test_what_is_between_two_levels_takes_the_upper_one() -> None:
    values, signs = assign(torch.zeros(1, 3).double(), torch.tensor([[2.0, 1.0]]).double(), 2)
    assert values.tolist() == [[1.0] * 3]
    assert signs[:, 0, 0].tolist() == [1, -1]


def test_powers_of_two() -> None:
    x = torch.tensor([0.0, 1.0, 1.49, 1.5, 3.1, 0.75, 5e-324, 1e-310], dtype=torch.float64)
    assert power_of_two(x)[:6].tolist() == [0.0, 1.0, 1.0, 2.0, 4.0, 1.0]
    assert power_of_two(x)[6] == 5e-324
    assert 0.5e-310 < power_of_two(x)[7] < 2e-310
    sums = sum_of_powers(torch.tensor([7.0, 0.6875, -0.3, 0.0]), 2)
    assert sums.tolist() == [7.0, 0.75, -0.3125, 0.0]
