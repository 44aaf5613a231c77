from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

import refold
from refold.errors import UsageError, VerificationError
from refold.frontends.export import trace
from refold.graph import printer
from refold.graph.ops import census
from refold.passes import PIPELINES
from refold.passes.experts.average_experts import AverageExperts
from refold.passes.prepare.clean_up import CleanUp
from refold.passes.prepare.fold_constants import FoldConstants
from refold.rewrite.pipeline import Pipeline
from refold.rewrite.result import PassResult
from refold.training.ewa import EWAMoE
from refold.verify import compare
from refold.verify.references import references
from tests import golden
from tests import tracing as tracer
from tests.compare import EXACT, relative_error
from tests.examples import examples, few
from tests.models.experts import (
    EXPERTS,
    FFN,
    STACKED,
    UNDO,
    WIDTH,
    Ensemble,
    FusedSwiGLU,
    Mixture,
    Normed,
    RandomPartition,
    SoftGated,
    Stacked,
    SwiGLU,
    TopK,
    averaged,
    spread,
)

ANY = math.inf  # a tolerance under which every layer is averaged


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def tokens(batch: int = 2, length: int = 4, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(batch, length, WIDTH, dtype=dtype)


def experts(count: int = 3, by: float = 0.1, kind: str = "ffn", **options) -> nn.ModuleList:
    return spread(EXPERTS[kind](**options).double(), count, by)


def join(
    model: nn.Module, x: torch.Tensor, *, dynamic: bool = True, **options
) -> tuple[fx.GraphModule, PassResult]:
    model = model.double().eval()
    with torch.no_grad():
        gm = trace(model, (x,), {}, dynamic_batch=dynamic).graph_module
        chosen = (FoldConstants(), CleanUp(), AverageExperts(**options))
        result = Pipeline("test", chosen).run(gm, debug=True)
    return gm, result.runs[-1].result


def error(gm: fx.GraphModule, expected, x: torch.Tensor) -> float:
    with torch.no_grad():
        return relative_error(gm(x), expected(x))


def reasons(result: PassResult) -> str:
    return "; ".join(d.reason for d in result.declined)


def calls(gm: fx.GraphModule) -> dict[str, int]:
    ignored = ("layout", "sym-size")
    return {k: n for k, n in census(gm.graph).items() if k not in ignored}


def test_golden() -> None:
    model, x = Ensemble(experts(2)), tokens()
    texts = [printer.render(tracer.trace(model, x, dynamic=True))]
    for mode in ("average", "concat"):
        gm, _ = join(model, x, mode=mode, tolerance=ANY)
        texts.append(printer.render(gm))
    golden.check("average_experts", "\n---\n".join(texts))


# --- averaging is what it says --------------------------------------------------------------------


@given(
    kind=st.sampled_from(sorted(EXPERTS)),
    count=st.integers(2, 4),
    hidden=st.sampled_from((WIDTH, 8)),
    bias=st.booleans(),
    form=st.sampled_from(("partition", "sum", "stack", "stack last")),
)
@examples(8)
def test_average_is_the_expert_of_mean_weights(kind, count, hidden, bias, form) -> None:
    parts = experts(count, by=0.5, kind=kind, hidden=hidden, bias=bias)
    model = RandomPartition(parts) if form == "partition" else Ensemble(parts, form)
    x = tokens()
    gm, result = join(model, x, mode="average", tolerance=ANY)
    assert len(result.applied) == 1
    assert calls(gm)["linear"] == (3 if kind == "swiglu" else 2)
    assert not {"randperm", "index", "cat", "argsort"} & calls(gm).keys()
    # a random partition may have made the batch static
    assert error(gm, averaged(parts), tokens(2 if form == "partition" else 3)) <= EXACT


@given(
    kind=st.sampled_from(("ffn", "swiglu", "fused")),
    count=st.integers(2, 4),
    hidden=st.sampled_from((WIDTH, 8)),
    bias=st.booleans(),
    form=st.sampled_from(("partition", "sum", "softmax", "gates", "einsum", "weighted stack")),
)
@examples(8)
def test_concat_is_exact(kind, count, hidden, bias, form) -> None:
    parts = experts(count, by=1.0, kind=kind, hidden=hidden, bias=bias)
    gates = torch.randn(count, dtype=torch.float64) + 0.5
    of_parts = form == "partition"
    model = RandomPartition(parts) if of_parts else Ensemble(parts, form, gates)
    gm, result = join(model, tokens(), mode="concat")
    assert len(result.applied) == 1, reasons(result)
    assert calls(gm)["linear"] == (3 if kind == "swiglu" else 2)
    assert error(gm, model.mean if of_parts else model, tokens(2 if of_parts else 3)) <= EXACT


@pytest.mark.parametrize(
    ("split", "undo"), few([*(("tensor_split", undo) for undo in UNDO), ("chunk", "argsort")], 4)
)
def test_every_spelling_of_a_random_partition(split: str, undo: str) -> None:
    model = RandomPartition(experts(2), split, undo)
    gm, result = join(model, tokens(), mode="average", tolerance=ANY)
    assert len(result.applied) == 1, reasons(result)
    assert calls(gm) == {"linear": 2, "gelu": 1}
    assert error(gm, averaged(model.experts), tokens()) <= EXACT


@pytest.mark.parametrize(
    ("count", "split", "size", "seen"),
    [
        (3, "tensor_split", (1, 5), 3),  # parts of 2, 2 and 1
        (3, "chunk", (1, 5), 3),
        (3, "split", (1, 7), 3),  # parts of 3, 3 and 1: split takes a size, not a count
        (3, "tensor_split", (1, 2), 3),  # the last one gets no token
        (4, "chunk", (1, 6), 3),  # chunk makes three parts of two, and the last one never runs
    ],
)
def test_unequal_parts(count: int, split: str, size: tuple[int, int], seen: int) -> None:
    model, x = RandomPartition(experts(count, by=0.5), split), tokens(*size)
    gm, result = join(model, x, mode="average", tolerance=ANY, dynamic=False)
    assert len(result.applied) == 1, reasons(result)
    assert result.applied[0].figures["experts"] == seen
    assert error(gm, averaged(list(model.experts)[:seen]), x) <= EXACT


@pytest.mark.parametrize("gates", few([False, True], 1))
@pytest.mark.parametrize("how", STACKED)
def test_stacked_weights(how: str, gates: bool) -> None:
    model, x = Stacked(3, how, gates=gates).double(), tokens()
    total = sum(model.factors())
    gm, result = join(model, x, mode="average", tolerance=ANY)
    if how == "einsum inner" and gates:  # a transpose stands between: not read
        assert not result.applied
        return
    assert len(result.applied) == 1, reasons(result)
    assert calls(gm) == {"linear": 2, "gelu": 1, "add": 2} | (
        {} if how != "baddbmm" else {"add": 2}
    ) | ({"mul": 1} if gates else {})
    mean = model.one()
    assert error(gm, lambda v: total * mean(v), x) <= EXACT

    gm, result = join(model, x, mode="concat")
    assert len(result.applied) == 1, reasons(result)
    each = [model.one(i) for i in range(3)]

    def expected(v: torch.Tensor) -> torch.Tensor:
        return sum(f * e(v) for f, e in zip(model.factors(), each, strict=True))

    assert error(gm, expected, x) <= EXACT
    assert "matmul" not in calls(gm)


def test_gates_weigh_the_experts() -> None:
    gates = torch.tensor([0.5, -0.2, 1.1], dtype=torch.float64)
    parts = experts(3, by=0.5, hidden=WIDTH)  # square: a transposed weight would still fit
    gm, _ = join(Ensemble(parts, "gates", gates), tokens(), mode="average", tolerance=ANY)
    total = float(gates.sum())
    mean = averaged(parts, (gates / total).tolist())
    assert error(gm, lambda x: total * mean(x), tokens()) <= EXACT
    assert calls(gm) == {"linear": 2, "gelu": 1}  # the last product takes the factor in


def test_a_factor_that_no_product_takes_in_is_a_call() -> None:
    gates = torch.tensor([0.5, 1.1], dtype=torch.float64)
    parts = experts(2, by=0.5, kind="normed")
    gm, _ = join(Ensemble(parts, "gates", gates), tokens(), mode="average", tolerance=ANY)
    mean = averaged(parts, (gates / gates.sum()).tolist())
    assert error(gm, lambda x: 1.6 * mean(x), tokens()) <= EXACT


def test_gates_that_cancel_are_declined() -> None:
    gates = torch.tensor([1.0, -1.0], dtype=torch.float64)
    model = Ensemble(experts(2), "gates", gates)
    _, result = join(model, tokens(), mode="average", tolerance=ANY)
    assert not result.modified
    assert "cancel" in reasons(result)


def test_shared_weights_stay_shared() -> None:
    parts = experts(3, by=0.5)
    for expert in parts:
        expert.up = parts[0].up
    model = Ensemble(parts)
    gm, _ = join(model, tokens(), mode="average", tolerance=ANY)
    assert error(gm, averaged(parts), tokens()) <= EXACT
    assert any("up_weight" in str(n.target) or "up.weight" in str(n.target) for n in gm.graph.nodes
               if n.op == "get_attr" and not str(n.target).startswith("folded"))  # fmt: skip


# --- the certificate ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(EXPERTS))
def test_the_error_is_of_second_order(kind: str) -> None:
    base = EXPERTS[kind]().double()
    spreads = (0.1, 0.03, 0.01)
    errors, predicted = [], []
    for by in spreads:
        model = RandomPartition(spread(base, 4, by))
        _, result = join(model, tokens(), mode="average", tolerance=ANY)
        figures = result.applied[0].figures
        errors.append(figures["measured_error"])
        predicted.append(figures["predicted_error"])
        assert figures["spread"] == pytest.approx(by, rel=0.4)
    slope = math.log(errors[0] / errors[-1]) / math.log(spreads[0] / spreads[-1])
    assert slope == pytest.approx(2, abs=0.15)
    assert predicted[-1] == pytest.approx(errors[-1], rel=0.1)


def test_measured_error_is_the_error() -> None:
    model, x = RandomPartition(experts(3, by=0.1)), tokens(4)
    gm, result = join(model, x, mode="average", tolerance=ANY, calibration=[x])
    assert result.applied[0].figures["measured_error"] == pytest.approx(error(gm, model.mean, x))
    assert "1 calibration inputs" in result.applied[0].detail


@pytest.mark.slow
def test_calibration_inputs_are_given_like_the_examples() -> None:
    x, model = tokens(), RandomPartition(experts(2)).double().eval()
    for args, kwargs, example in (((x,), {}, x), ((x,), {}, (x,)), ((), {"x": x}, {"x": x})):
        with torch.no_grad():
            gm = trace(model, args, kwargs).graph_module
        chosen = AverageExperts(mode="average", tolerance=ANY, calibration=[example])
        assert chosen.run(gm).applied[0].detail.endswith("1 calibration inputs")
    with torch.no_grad():
        gm = trace(model, (x,), {}).graph_module
    for wrong in ({"x": x}, (x, x)):
        with pytest.raises(UsageError, match="alike"):
            AverageExperts(mode="average", calibration=[wrong]).run(gm)


@pytest.mark.slow
def test_past_the_tolerance_the_layer_is_kept() -> None:
    model = Ensemble(experts(3, by=0.3))
    _, result = join(model, tokens(), mode="average", tolerance=ANY)
    measured = result.applied[0].figures["measured_error"]
    gm, result = join(model, tokens(), mode="average", tolerance=measured * 0.99)
    assert not result.modified
    assert "past the tolerance" in reasons(result)
    assert f"measured {measured:.1e}" in reasons(result)
    assert calls(gm)["linear"] == 6
    _, result = join(model, tokens(), mode="average", tolerance=measured * 1.01)
    assert result.modified
    assert result.allowed == measured * 1.01


@pytest.mark.slow
def test_figures() -> None:
    _, result = join(Ensemble(experts(3)), tokens(), mode="average", tolerance=ANY)
    figures = result.applied[0].figures
    one = 2 * 8 * WIDTH + 8 + WIDTH
    assert (figures["parameters_before"], figures["parameters_after"]) == (3 * one, one)
    assert (figures["flops_before"], figures["flops_after"]) == (3 * 4 * 8 * WIDTH, 4 * 8 * WIDTH)
    _, result = join(RandomPartition(experts(3)), tokens(), mode="average", tolerance=ANY)
    assert result.applied[0].figures["flops_before"] == 4 * 8 * WIDTH
    assert "3 experts (random partition) averaged" in result.notes[0]


# --- equal experts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    few(
        [
            RandomPartition(spread(FFN(), 3, 0)),
            Ensemble(spread(SwiGLU(), 3, 0)),
            Ensemble(spread(Normed(), 3, 0), "stack"),
            Ensemble(spread(FFN(), 3, 0), "softmax", torch.randn(3)),
        ],
        2,
    ),
    ids=["partition", "sum", "stack", "softmax"],
)
def test_equal_experts_are_one_without_asking(model: Mixture) -> None:
    model, x = deepcopy(model).float(), tokens(dtype=torch.float32)
    expected = dict(model.experts[0].named_parameters())
    folded = refold.fold(model, x, pipeline=PIPELINES["default"].without("merge-parallel-layers"))
    kept = dict(folded.graph_module.named_parameters())
    assert len(kept) == len(expected)
    for name, parameter in expected.items():
        assert torch.equal(kept[f"experts.0.{name}"], parameter)
    assert folded.report.numerics["inputs"] == 4
    assert folded.report.numerics["error"] <= folded.report.numerics["tolerance"] < 1e-4
    with torch.no_grad():
        assert relative_error(folded(x), model.experts[0](x)) < 1e-6


def test_equal_stacked_experts_keep_their_bits() -> None:
    model = Stacked(3, "bmm")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter[:1].clone().expand_as(parameter))
    folded = refold.fold(model, tokens(dtype=torch.float32))
    found = [t for t in folded.graph_module.buffers() if t.shape == (8, WIDTH)]
    assert len(found) == 1
    assert torch.equal(found[0], model.up[0].t())
    assert folded.report.after.census["linear"] == 2


def test_equal_experts_with_gates_that_do_not_add_up_to_one() -> None:
    model = Ensemble(experts(3, by=0), "gates", torch.tensor([0.5, -0.2, 1.1]))
    gm, result = join(model, tokens())
    assert result.modified
    assert error(gm, model, tokens(3)) <= EXACT


def test_one_bit_apart_is_not_equal() -> None:
    model = Ensemble(experts(2, by=0))
    with torch.no_grad():
        bias = model.experts[1].down.bias
        bias[0] = torch.nextafter(bias[0], torch.tensor(9.0, dtype=torch.float64))
    _, result = join(model, tokens())
    assert not result.modified
    assert "not equal" in reasons(result)


# --- what is compared -----------------------------------------------------------------------------


def test_the_mean_of_the_experts_is_the_expectation() -> None:
    model, x = RandomPartition(experts(2, by=0.5)), tokens(1, 4)
    with torch.no_grad():
        drawn = torch.stack([model(x) for _ in range(2000)])
        # Each entry is one of two values at random: 5 standard errors of their mean.
        allowed = 5 * drawn.std(0) / math.sqrt(len(drawn))
        assert ((drawn.mean(0) - model.mean(x)).abs() <= allowed + 1e-9).all()


@pytest.mark.slow
def test_verification_takes_the_mean_of_the_experts() -> None:
    model, x = RandomPartition(experts(3, by=0.1)).double(), tokens()
    pipeline = PIPELINES["default"].with_(
        AverageExperts(mode="average", tolerance=0.1), before="average-experts"
    )
    folded = refold.fold(model, x, pipeline=pipeline)
    judged = folded.report.numerics
    assert judged["inputs"] == 4
    assert 1e-5 < judged["error"] <= judged["tolerance"] == 0.1
    assert any("compared with the mean of the experts" in n for n in folded.report.notes)
    assert any("measured" in n and "parameters" in n for n in folded.report.notes)
    assert any(n.startswith("time on the example, before / after") for n in folded.report.notes)
    again = refold.Report.from_json(folded.report.to_json())
    figures = [a.figures for a in again.applied if a.rule == "average-experts"]
    assert figures[0]["tolerance"] == 0.1


def test_a_random_partition_that_stays_is_not_compared() -> None:
    folded = refold.fold(RandomPartition(experts(2)), tokens())
    assert folded.report.numerics["inputs"] == 0
    assert "draws random numbers" in folded.report.numerics["summary"]
    assert any("random partition" in d.reason for d in folded.report.declined)
    assert not any("compared with the mean" in n for n in folded.report.notes)
    assert not any("time on the example" in n for n in folded.report.notes)


def test_other_random_numbers_still_forbid_a_comparison() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixture = RandomPartition(experts(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mixture(x) + torch.rand(1)

    pipeline = PIPELINES["default"].with_(AverageExperts(mode="average", tolerance=1.0))
    folded = refold.fold(Noisy(), tokens(), pipeline=pipeline)
    assert folded.report.numerics["inputs"] == 0


def test_the_outputs_are_held_to_the_tolerance_too() -> None:
    model, x = nn.Linear(WIDTH, 3), tokens(dtype=torch.float32)
    program = trace(model, (x,), {})
    known = references(program.graph_module, program)

    def off(by: float):
        return lambda v: model(v) * (1 + by)

    with pytest.raises(VerificationError):
        compare.verify(None, off(0.05), known)
    known.allowed = 0.06
    compare.verify(None, off(0.05), known)
    with pytest.raises(VerificationError):
        compare.verify(None, off(0.07), known)


@pytest.mark.parametrize("mode", ["average", "concat"])
@pytest.mark.parametrize("place", [{}, {"before": "average-experts"}], ids=["last", "first"])
def test_in_the_default_pipeline(mode: str, place: dict[str, str]) -> None:
    model = EWAMoE(experts(3, by=0.01)).eval()
    chosen = AverageExperts(mode=mode, tolerance=0.01)
    folded = refold.fold(model, tokens(), pipeline=PIPELINES["default"].with_(chosen, **place))
    assert folded.report.after.census["linear"] == 2
    x = tokens(3)
    with torch.no_grad():
        if mode == "concat":
            assert relative_error(folded(x), model(x)) <= EXACT
        else:
            assert relative_error(folded(x), averaged(model.experts)(x)) <= EXACT


# --- routed experts -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", few(["swiglu", "fused", "normed"], 2))
@pytest.mark.parametrize("form", [SoftGated, TopK])
def test_routed_experts_are_averaged_by_name(form, kind: str) -> None:
    model, x = form(experts(3, by=0.05, kind=kind)).double(), tokens(3)
    options = {"routed": "uniform", "tolerance": 1.0, "calibration": [x, tokens()]}
    gm, result = join(model, x, mode="average", **options)
    assert len(result.applied) == 1, reasons(result)
    assert not {"topk", "softmax", "where", "index-add", "assert-scalar"} & calls(gm).keys()
    assert error(gm, averaged(model.experts), x) <= EXACT


@pytest.mark.parametrize("form", [SoftGated, TopK])
def test_frequencies_are_those_of_the_router(form) -> None:
    model, x, y = form(experts(3, by=0.3)).double(), tokens(3), tokens()
    gm, result = join(
        model, x, mode="average", routed="frequency", tolerance=ANY, calibration=[x, y]
    )
    with torch.no_grad():
        gates = torch.cat([model.gates(v).reshape(-1, 3) for v in (x, y)])
    weights = gates.mean(0).tolist()
    assert max(weights) - min(weights) > 0.02  # else nothing is tested
    assert error(gm, averaged(model.experts, weights), x) <= EXACT
    figures = result.applied[0].figures
    chosen = 2 if form is TopK else 3
    assert figures["flops_before"] == pytest.approx(chosen * figures["flops_after"])
    assert math.isnan(figures["predicted_error"])


def test_gates_that_do_not_add_up_are_kept_as_a_factor() -> None:
    class Sigmoid(SoftGated):
        def gates(self, x: torch.Tensor) -> torch.Tensor:
            return self.router(x).sigmoid()

    model, x = Sigmoid(experts(3, by=0.05)).double(), tokens(3)
    gm, _ = join(model, x, mode="average", routed="uniform", tolerance=ANY, calibration=[x])
    with torch.no_grad():
        factor = float(model.gates(x).sum(-1).mean())
    mean = averaged(model.experts)
    assert error(gm, lambda v: factor * mean(v), x) <= EXACT


@pytest.mark.parametrize("form", few([SoftGated, TopK], 1))
def test_routed_experts_are_kept_otherwise(form) -> None:
    gm, _ = join(form(experts(3)), tokens())
    for options in (
        {},
        {"mode": "average", "tolerance": ANY},
        {"mode": "concat"},
        {"mode": "average", "tolerance": ANY, "routed": "frequency"},  # nothing to measure on
        {"mode": "average", "tolerance": 0.0, "routed": "frequency", "calibration": [tokens()]},
    ):
        result = AverageExperts(**options).run(gm)
        assert not result.modified
        assert reasons(result)
        assert calls(gm)["linear"] == 7


@pytest.mark.slow
def test_equal_routed_experts_are_kept() -> None:
    """Their gates need not add up to 1: that is the router's affair, and not proved."""
    _, result = join(TopK(experts(3, by=0)), tokens())
    assert not result.modified


# --- what must stay -------------------------------------------------------------------------------


class Odd(Mixture):
    """Two experts, joined by a function under test."""

    def __init__(self, function, **options) -> None:
        super().__init__(experts(2, by=0, **options))
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x.reshape(-1, WIDTH)).reshape(x.shape)


def partition(body=lambda s, i, v: s.experts[i](v), undo=None, split=None, order=None):
    def forward(s: Odd, x: torch.Tensor) -> torch.Tensor:
        p = torch.randperm(len(x))
        parts = (split or (lambda v: v.tensor_split(2)))(x[p])
        joined = torch.cat([body(s, i, parts[i]) for i in order or (0, 1)])
        return joined[p.argsort()] if undo is None else undo(joined, p)

    return forward


@pytest.mark.parametrize(
    "function",
    [
        partition(lambda s, i, v: s.experts[i](v - v.mean(0))),
        partition(lambda s, i, v: s.experts[i](v) * v.softmax(0)),
        partition(lambda s, i, v: s.experts[i](v.cumsum(0))),
        partition(lambda s, i, v: s.experts[i](v.flip(0))),
        partition(lambda s, i, v: F.layer_norm(s.experts[i](v), (4, WIDTH))),
        partition(undo=lambda y, p: y[p]),
        partition(undo=lambda y, p: y[p.argsort(descending=True)]),
        partition(undo=lambda y, p: y[torch.randperm(len(y)).argsort()]),
        partition(undo=lambda y, p: torch.ones_like(y).index_put((p,), y, accumulate=True)),
        partition(order=(1, 0)),
    ],
    ids=[
        "mean over tokens", "softmax over tokens", "cumsum", "flip", "norm over tokens",
        "permuted twice", "descending", "another order", "accumulates", "parts swapped",
    ],
)  # fmt: skip
def test_partitions_that_are_none(function) -> None:
    gm, result = join(Odd(function), tokens(2, 4), dynamic=False)
    assert not result.modified
    for mode in ("average", "concat"):
        assert not AverageExperts(mode=mode, tolerance=ANY).run(gm).modified
    assert "randperm" in calls(gm)


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: (s.experts[0](x) + s.experts[1](2 * x)) / 2,
        lambda s, x: (F.gelu(s.experts[0].up(x)) + F.relu(s.experts[1].up(x))).sum(-1, True) * x,
        lambda s, x: (s.experts[0](x) - s.experts[1](x)) / 2,
        lambda s, x: s.experts[0](x) * s.experts[1](x) / 2,
        lambda s, x: torch.stack([s.experts[0](x), s.experts[1](x)]).amax(0),
        lambda s, x: torch.stack([s.experts[0](x), s.experts[1](x)], 1).mean(2),
        lambda s, x: torch.add(s.experts[0](x), s.experts[1](x), alpha=0.5) / 2,
        lambda s, x: s.experts[0](x) + s.experts[1](x),  # branches, for who does not say so
        lambda s, x: s.experts[0](x) / 2 + s.experts[1](x).sin() / 2,
    ],
    ids=[
        "inputs differ", "activations differ", "difference", "product", "maximum", "other axis",
        "alpha", "plain sum", "one goes on",
    ],
)  # fmt: skip
def test_sums_that_are_no_equal_experts(function) -> None:
    def forward(s: Odd, x: torch.Tensor) -> torch.Tensor:
        y = function(s, x)
        return y if y.shape == x.shape else y.sum() * x

    model = Odd(forward)
    gm, result = join(model, tokens())
    assert not result.modified
    assert error(gm, model, tokens(3)) <= EXACT


def test_affine_experts_are_left_to_exact_folds() -> None:
    parts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
    _, result = join(Ensemble(parts), tokens(), mode="average", tolerance=ANY)
    assert not result.modified
    assert not result.declined


@pytest.mark.slow
def test_hidden_sizes_that_differ() -> None:
    parts = nn.ModuleList([FFN(8), FFN(10)]).double()
    for mode in ("keep", "average", "concat"):
        _, result = join(Ensemble(parts), tokens(), mode=mode)
        assert not result.modified


@pytest.mark.parametrize(
    "make",
    [
        lambda: experts(2, kind="normed"),  # a norm reads all hidden units
        lambda: nn.ModuleList(nn.Sequential(FFN(), nn.GELU()) for _ in range(2)),
        lambda: nn.ModuleList(nn.Sequential(FFN(), nn.GELU(), FFN()) for _ in range(2)),
    ],
    ids=["norm", "ends in an activation", "three layers"],
)
def test_concat_declines_what_does_not_split(make) -> None:
    model = Ensemble(make().double())
    _, result = join(model, tokens(), mode="concat")
    assert not result.modified
    assert "of an expert" in reasons(result) or "hidden units" in reasons(result)


@pytest.mark.slow
def test_index_add_onto_something() -> None:
    class Onto(TopK):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = x.reshape(-1, WIDTH)
            weights, chosen = self._chosen(rows)
            out = rows.clone()
            mask = F.one_hot(chosen, len(self.experts)).permute(2, 1, 0)
            for index, expert in enumerate(self.experts):
                choice, at = torch.where(mask[index])
                out.index_add_(0, at, expert(rows[at]) * weights[at, choice, None])
            return out.reshape(x.shape)

    x = tokens()
    options = {"mode": "average", "routed": "uniform", "tolerance": ANY, "calibration": [x]}
    _, result = join(Onto(experts(2)), x, **options)
    assert not result.modified


def test_excluded_modules_stay() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixture = Ensemble(experts(2, by=0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mixture(x)

    folded = refold.fold(Net(), tokens(), exclude=["mixture"])
    assert folded.report.after.census["linear"] == 4


def test_experts_on_two_sides_of_a_write_stay() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("state", torch.randn(3, 4))
            self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            view = self.state.transpose(0, 1).transpose(0, 1)
            first = self.b(self.a(view).relu())
            self.state.add_(x)
            return (first + self.d(self.c(view).relu())) / 2

    net, x = Writes().eval(), torch.randn(3, 4)
    gm = tracer.trace(deepcopy(net), x)
    result = AverageExperts(mode="concat").run(gm)
    assert [d.reason for d in result.declined] == ["it reads storage that the graph writes"]
    assert not result.modified
    torch.testing.assert_close(gm(x), net(x))


def test_wrong_options_are_errors() -> None:
    for wrong in ({"mode": "avg"}, {"routed": "top"}, {"tolerance": -1.0},
                  {"calibration": tokens()}):  # fmt: skip
        with pytest.raises(UsageError):
            AverageExperts(**wrong)
    assert AverageExperts(mode="average").exactness == "approximate"
    assert AverageExperts(mode="concat").exactness == "reassociates"


# --- real networks --------------------------------------------------------------------------------


def _close(model: nn.Module, by: float) -> None:
    """Lets the experts of stacked weights deviate by about ``by`` of their size."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "experts" in name and p.dim() >= 2:
                p.normal_(0, 0.3)
                p.copy_(p[:1] * (1 + by * torch.randn_like(p)))


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["grouped_mm", "batched_mm"])
def test_mixtral_to_onnx_runtime(spelling: str) -> None:
    from refold.cli.torchvision_shim import declare_torchvision_ops

    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    declare_torchvision_ops()
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    inner = transformers.MixtralForCausalLM(config).eval()
    inner.set_experts_implementation(spelling)
    _close(inner, 0.01)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = inner

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=ids).logits

    ids = torch.randint(0, 32, (2, 6))
    model, examples = Logits().eval(), [torch.randint(0, 32, (4, 6)) for _ in range(4)]
    chosen = AverageExperts(mode="average", routed="frequency", tolerance=0.1, calibration=examples)
    pipeline = PIPELINES["default"].with_(chosen, before="average-experts")
    compiled = refold.compile_for_inference(model, ids, target="ort", pipeline=pipeline)
    records = [a for p in compiled.report.passes if p.name == chosen.name for a in p.applied]
    assert len(records) == 2
    for record in records:
        assert record.figures["experts"] == 4
        assert record.figures["parameters_before"] == 4 * record.figures["parameters_after"]
        assert record.figures["flops_before"] == 2 * record.figures["flops_after"]
    assert "topk" not in compiled.report.after.census
    with torch.no_grad():
        assert relative_error(compiled(ids), model(ids)) < 0.1


@pytest.mark.slow
def test_vision_transformer_with_experts_to_onnx_runtime() -> None:
    from refold.cli.torchvision_shim import declare_torchvision_ops

    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    declare_torchvision_ops()
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2,
        num_classes=5,
    )  # fmt: skip
    for block in model.blocks:
        block.mlp = EWAMoE(spread(block.mlp, 4, 0.01))
    model, x = model.eval(), torch.randn(2, 3, 32, 32)
    pipeline = PIPELINES["default"].with_(
        AverageExperts(mode="average", tolerance=0.01), before="average-experts"
    )
    compiled = refold.compile_for_inference(model, x, target="ort", pipeline=pipeline)
    assert compiled.report.after.census["linear"] == compiled.report.before.census["linear"] - 12
    with torch.no_grad():
        assert relative_error(compiled(x), model(x)) < 0.01


def test_fused_gate_and_up_are_put_side_by_side_piece_by_piece() -> None:
    model = Ensemble(nn.ModuleList([FusedSwiGLU(5), FusedSwiGLU(5)]).double())
    gm, result = join(model, tokens(), mode="concat")
    assert result.modified, reasons(result)
    shapes = [tuple(t.shape) for t in gm.buffers()]
    assert (20, WIDTH) in shapes
    assert error(gm, model, tokens(3)) <= EXACT


@pytest.mark.slow
def test_deep_networks_are_no_experts() -> None:
    """Experts are read by recursion, which must end; equal ones would be folded otherwise."""
    layers = [layer for _ in range(33) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    tower = nn.Sequential(*layers).double()
    _, result = join(Ensemble(nn.ModuleList([tower, deepcopy(tower)])), tokens())
    assert not result.modified
