"""The laws of training with experts: a fair partition, and sharing that keeps the mean."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import refold
from refold.errors import UsageError
from refold.passes import PIPELINES
from refold.passes.experts.average_experts import AverageExperts

# A float64 sum of at most eight terms of order one, a few roundings of 1.1e-16 each.
EXACT = 1e-14


def ffn(features: int = 3, hidden: int = 5, out: int | None = None) -> nn.Sequential:
    layers = nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, out or features)
    return nn.Sequential(*layers).double()


def mixture(count: int = 4, **sizes: int) -> refold.EWAMoE:
    return refold.EWAMoE(ffn(**sizes) for _ in range(count))


class Stub(nn.Module):
    """An expert that answers with its number, and counts the tokens that it was given."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(float(number)))
        self.seen: list[int] = []

    def forward(self, tokens: Tensor) -> Tensor:
        self.seen.append(len(tokens))
        return tokens * 0 + self.value


def stubs(count: int) -> refold.EWAMoE:
    return refold.EWAMoE(Stub(index) for index in range(count))


def parameters(experts: nn.ModuleList) -> dict[str, Tensor]:
    """For each parameter, those of all experts along a first axis."""
    names = [name for name, _ in experts[0].named_parameters()]
    return {n: torch.stack([e.get_parameter(n).detach().clone() for e in experts]) for n in names}


def tied_within() -> nn.Sequential:
    expert = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    expert[1].weight = expert[0].weight
    return expert


# ---- sharing


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(2, 8), rate=st.floats(0, 1), seed=st.integers(0, 99), tied=st.booleans()
)  # fmt: skip
def test_a_step_keeps_the_mean_and_contracts_the_deviations(count, rate, seed, tied):
    torch.manual_seed(seed)
    moe = refold.EWAMoE(tied_within() if tied else ffn() for _ in range(count))
    before = parameters(moe.experts)
    refold.ewa_step_(moe, rate)
    after = parameters(moe.experts)
    for name, old in before.items():
        others = (old.sum(0) - old) / (count - 1)
        assert (after[name] - ((1 - rate) * old + rate * others)).abs().max() < EXACT
        mean = old.mean(0)
        assert (after[name].mean(0) - mean).abs().max() < EXACT
        contracted = (1 - rate * count / (count - 1)) * (old - mean)
        assert (after[name] - mean - contracted).abs().max() < EXACT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_equal_experts_stay_equal_to_the_last_bit(count, dtype):
    one = ffn().to(dtype)
    moe = refold.EWAMoE(copy.deepcopy(one) for _ in range(count))
    for _ in range(5):
        refold.ewa_step_(moe, 0.3)
    for expert in moe.experts:
        for name, value in expert.named_parameters():
            assert torch.equal(value, one.get_parameter(name))


def test_rate_n_minus_1_over_n_collapses_all_experts_and_rate_0_nothing():
    moe = mixture(4)
    before = parameters(moe.experts)
    refold.ewa_step_(moe, 0)
    assert all(torch.equal(before[n], v) for n, v in parameters(moe.experts).items())
    refold.ewa_step_(moe, 3 / 4)
    for name, value in parameters(moe.experts).items():
        assert (value - before[name].mean(0)).abs().max() < EXACT


def test_a_low_precision_step_is_rounded_once():
    moe = refold.EWAMoE(ffn().bfloat16() for _ in range(3))
    before = parameters(moe.experts)
    refold.ewa_step_(moe, 0.1)
    for name, old in before.items():
        wide = old.double()
        exact = wide + 0.15 * (wide.mean(0) - wide)
        error = (parameters(moe.experts)[name].double() - exact).abs()
        # One rounding to bfloat16's 8 significant bits, and a little of float32.
        assert (error <= exact.abs() * 2**-8 * 1.01 + 1e-6).all()


def test_each_mixture_has_its_own_rate_in_order():
    model = nn.Sequential(mixture(4), nn.Linear(3, 3), mixture(4))
    before = [parameters(model[i].experts) for i in (0, 2)]
    refold.ewa_step_(model, [0.0, 0.75])
    after = [parameters(model[i].experts) for i in (0, 2)]
    assert all(torch.equal(after[0][n], v) for n, v in before[0].items())
    assert all((after[1][n] - v.mean(0)).abs().max() < EXACT for n, v in before[1].items())


def test_weights_that_experts_share_are_written_once():
    moe = mixture(3)
    moe.experts[1][0].weight = moe.experts[0][0].weight
    old = parameters(moe.experts)["0.weight"]
    refold.ewa_step_(moe, 0.3)
    contracted = old.mean(0) + (1 - 0.3 * 3 / 2) * (old - old.mean(0))
    assert (parameters(moe.experts)["0.weight"] - contracted).abs().max() < EXACT
    assert moe.experts[1][0].weight is moe.experts[0][0].weight


def test_a_layer_that_stands_twice_is_shared_once():
    moe = mixture(4)
    once = copy.deepcopy(moe)
    refold.ewa_step_(nn.Sequential(moe, nn.ReLU(), moe), 0.2)
    refold.ewa_step_(once, 0.2)
    pairs = zip(parameters(moe.experts).values(), parameters(once.experts).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_buffers_are_left_alone():
    moe = refold.EWAMoE(nn.Sequential(ffn(), nn.BatchNorm1d(3).double()) for _ in range(2))
    moe.experts[0][1].running_mean.fill_(7)
    refold.ewa_step_(moe, 0.5)
    assert moe.experts[0][1].running_mean.eq(7).all()
    assert moe.experts[1][1].running_mean.eq(0).all()


class Routed(nn.Module):
    """Somebody else's mixture in a stack of layers, which is a list of equal modules as well."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"members": nn.ModuleList(ffn() for _ in range(3))}) for _ in range(2)
        )


def test_lists_of_other_layers_are_named_by_globs():
    model = Routed()
    before = [parameters(layer["members"]) for layer in model.layers]
    refold.ewa_step_(model, 2 / 3, experts="layers.*.members")
    for layer, old in zip(model.layers, before, strict=True):
        for name, value in parameters(layer["members"]).items():
            assert (value - old[name].mean(0)).abs().max() < EXACT
    assert not torch.equal(*(layer["members"][0][0].weight for layer in model.layers))


def test_a_stack_of_equal_layers_is_never_taken_for_experts():
    with pytest.raises(UsageError, match=r"its ModuleLists are: layers, layers\.0\.members"):
        refold.ewa_step_(Routed(), 0.1)


def test_sharing_between_forward_and_backward_is_noticed():
    moe = mixture(2)
    loss = moe(torch.randn(4, 3).double()).square().sum()
    refold.ewa_step_(moe, 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            ffn(3, 6),
            r"0\.weight of expert 1 is float64\[6, 3\] on cpu, of expert 0 float64\[5, 3\]",
        ),
        (ffn().float(), r"0\.weight of expert 1 is float32"),
        (ffn().to("meta"), "on meta"),
        (nn.Sequential(*ffn(), nn.Linear(3, 3)), r"only one of them has a parameter '3\.bias'"),
    ],
)
def test_experts_that_are_not_alike_are_refused_before_anything_is_written(other, message):
    with pytest.raises(UsageError, match=message):
        refold.EWAMoE([ffn(), other])
    model = nn.Sequential(mixture(2), nn.ModuleDict({"e": nn.ModuleList([ffn(), other])}))
    before = parameters(model[0].experts)
    with pytest.raises(UsageError, match=message):
        refold.ewa_step_(model, 0.1, experts=["0.experts", "1.e"])
    assert all(torch.equal(before[n], v) for n, v in parameters(model[0].experts).items())


def test_what_cannot_be_shared_says_so():
    moe = mixture(2)
    for rate in (-0.1, 1.1, float("nan"), [0.1, 2.0]):
        model = nn.Sequential(moe, mixture(2)) if isinstance(rate, list) else moe
        with pytest.raises(UsageError, match=r"share rate .* is not in \[0, 1\]"):
            refold.ewa_step_(model, rate)
    with pytest.raises(UsageError, match="2 rates for 1 mixtures of experts: experts"):
        refold.ewa_step_(moe, [0.1, 0.1])
    with pytest.raises(UsageError, match=r"'exprts' matches no ModuleList .* it has: experts"):
        refold.ewa_step_(moe, 0.1, experts="exprts")
    with pytest.raises(UsageError, match="holds no experts"):
        refold.ewa_step_(nn.ModuleDict({"e": nn.ModuleList()}), 0.1, experts="e")
    with pytest.raises(UsageError, match="at least one expert"):
        refold.EWAMoE([])
    with pytest.raises(UsageError, match="stands twice"):
        refold.EWAMoE([ffn()] * 2)
    quantised = [nn.ParameterDict({"w": nn.Parameter(torch.ones(2).char(), False)}) for _ in "ab"]
    with pytest.raises(UsageError, match="no average"):
        refold.EWAMoE(quantised)


def test_one_expert_has_nobody_to_share_with():
    moe = mixture(1)
    before = parameters(moe.experts)
    refold.ewa_step_(moe, 0.5)
    assert all(torch.equal(before[n], v) for n, v in parameters(moe.experts).items())


# ---- the layer


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(0, 13), count=st.integers(1, 5), seed=st.integers(0, 99))
def test_every_token_goes_to_one_expert_and_comes_back_to_its_place(tokens, count, seed):
    torch.manual_seed(seed)
    moe = refold.EWAMoE(ffn(out=2) for _ in range(count))
    x = torch.randn(tokens, 3).double()
    y = moe(x)
    each = torch.stack([expert(x) for expert in moe.experts])
    chosen = (each - y).abs().amax(-1) < EXACT
    assert y.shape == (tokens, 2)
    assert chosen.sum(0).eq(1).all()
    sizes = chosen.sum(1)
    assert tokens == 0 or sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("tokens", [8, 6, 3])
def test_each_expert_meets_each_token_equally_often(tokens):
    moe, times = stubs(4), 3000
    answers = torch.stack([moe(torch.zeros(tokens, 1)).detach()[:, 0] for _ in range(times)])
    for expert in range(4):
        often = answers.eq(expert).double().mean(0)
        # Five standard deviations of a count of 3000 with probability 1/4.
        assert (often - 0.25).abs().max() < 5 * (0.25 * 0.75 / times) ** 0.5


def test_the_mean_over_partitions_is_what_eval_mode_gives():
    moe = mixture(3)
    x = torch.randn(5, 3).double()
    with torch.no_grad():
        drawn = torch.stack([moe(x) for _ in range(2000)])
        error = drawn.mean(0) - moe.eval()(x)
    assert (error.abs() < 5 * drawn.std(0) / 2000**0.5 + EXACT).all()


def test_an_expert_without_tokens_is_not_called_and_has_no_gradient():
    moe = stubs(4)
    moe(torch.zeros(2, 1)).sum().backward()
    called = [expert for expert in moe.experts if expert.seen]
    assert [expert.seen for expert in called] == [[1], [1]]
    for expert in moe.experts:
        assert (expert.value.grad is not None) == (expert in called)


def test_gradients_reach_every_expert_that_got_tokens():
    moe = mixture(4)
    x = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    moe(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in moe.parameters())
    assert x.grad.abs().sum(-1).gt(0).all()


def test_the_seed_decides_the_partition():
    moe = mixture(4)
    x = torch.randn(3, 7, 3).double()

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return moe(x)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_eval_mode_is_the_mean_of_the_experts_and_exports_for_every_batch():
    moe = mixture(3, out=2).eval()
    batch = torch.export.Dim("batch", min=2)
    shapes = ({0: batch},)
    program = torch.export.export(moe, (torch.randn(2, 7, 3).double(),), dynamic_shapes=shapes)
    for size in (2, 5):
        x = torch.randn(size, 7, 3).double()
        mean = torch.stack([expert(x) for expert in moe.experts]).mean(0)
        assert (moe(x) - mean).abs().max() < EXACT
        assert (program.module()(x) - mean).abs().max() < EXACT
    assert not any("rand" in str(node.target) for node in program.graph.nodes)


def test_eval_mode_sees_rows_as_training_does():
    moe = refold.EWAMoE(nn.BatchNorm1d(3) for _ in range(2)).eval()
    for index, expert in enumerate(moe.experts):
        expert.running_mean.copy_(torch.arange(3.0) * (index + 1))
    x = torch.zeros(2, 3, 3)  # a square, of which a batch norm would normalise the other axis
    expected = -1.5 * torch.arange(3.0).expand(2, 3, 3)
    assert torch.allclose(moe(x), expected, rtol=1e-4)


def test_the_layer_is_one_network_to_the_compiler():
    model = nn.Sequential(nn.Linear(6, 3).double(), nn.GELU(), mixture(3, out=2)).eval()
    for _ in range(2):
        refold.ewa_step_(model, 0.6)  # 10, then 1 % of the experts' spread is left
    x = torch.randn(4, 6).double()
    pipeline = PIPELINES["default"].without("average-experts")
    pipeline = pipeline.with_(AverageExperts(mode="average"), before="fold-batch-norm")
    compiled = refold.compile_for_inference(model, x, pipeline=pipeline)
    linears = [n for n in compiled.graph_module.graph.nodes if "linear" in str(n.target)]
    assert len(linears) == 3
    refold.ewa_step_(model, 2 / 3)  # now each expert is the mean
    with torch.no_grad():
        assert (compiled(x) - model(x)).abs().max() < EXACT


def test_dispersion_decides_how_far_the_average_is_from_the_mixture():
    """Second order: ten times closer experts, a hundred times closer outputs."""
    base = ffn(8, 16)
    x = torch.randn(64, 8).double()
    noise = [ffn(8, 16) for _ in range(4)]
    errors = []
    for spread in (1e-2, 1e-3):
        experts = [copy.deepcopy(base) for _ in noise]
        for expert, other in zip(experts, noise, strict=True):
            for weight, change in zip(expert.parameters(), other.parameters(), strict=True):
                weight.data.add_(change.detach(), alpha=spread)
        moe = refold.EWAMoE(experts).eval()
        with torch.no_grad():
            mixed = moe(x)
            refold.ewa_step_(moe, 3 / 4)
            errors.append(float((moe(x) - mixed).norm()))
    slope = torch.tensor(errors[0] / errors[1]).log10()
    assert abs(float(slope) - 2) < 0.15


@pytest.mark.slow
def test_the_example_runs():
    example = Path(__file__).parents[2] / "examples" / "expert_averaging.py"
    done = subprocess.run(
        [sys.executable, str(example), "--steps", "20"],
        capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(example.parents[1])},
    )  # fmt: skip
    assert done.stdout.count("experts (ensemble) averaged") == 4
    assert "trained plainly" in done.stdout
