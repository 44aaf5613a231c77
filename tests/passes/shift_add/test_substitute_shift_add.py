from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import refold
from refold.errors import MissingDependencyError, UsageError, VerificationError
from refold.frontends.export import trace
from refold.graph import constants, printer
from refold.graph.ops import census
from refold.ops.bcq_linear import dequantise
from refold.passes import PIPELINES
from refold.passes.shift_add import codes as layer_codes
from refold.passes.shift_add.substitute_shift_add import SubstituteShiftAdd
from refold.rewrite.context import Context
from refold.rewrite.edit import Edit
from refold.rewrite.pipeline import Pipeline
from refold.rewrite.result import Decline, PassResult
from tests import golden
from tests import tracing as tracer
from tests.compare import EXACT, relative_error
from tests.examples import few

WIDTH = 32


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Block(nn.Module):
    """Attention-like: three layers on one input, and two in sequence, around residuals."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        y = self.norm(x)
        x = x + (self.q(y) * self.k(y)).sigmoid() * self.v(y)
        return x + self.down(self.up(x).relu())


class Scorer(nn.Module):
    """An embedding, a block and a head."""

    def __init__(self, tokens: int = 11, *, tied: bool = False) -> None:
        super().__init__()
        self.embed, self.block = nn.Embedding(tokens, WIDTH), Block()
        self.head = nn.Linear(WIDTH, tokens, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.block(self.embed(ids)))


def ids(batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 11, (batch, 6))


def samples(count: int = 3) -> list[tuple[torch.Tensor]]:
    return [(ids(4),) for _ in range(count)]


def substitute(
    model: nn.Module, x: torch.Tensor, exclude: tuple[str, ...] = (), **options
) -> tuple[fx.GraphModule, PassResult]:
    options = {"min_features": 16, "group_size": 16, **options}
    with torch.no_grad():
        gm = trace(model.eval(), (x,), {}).graph_module
        chosen = Pipeline("test", (SubstituteShiftAdd(**options),))
        run = chosen.run(gm, Context(exclude=exclude), debug=True).runs[0]
    return gm, run.result


def codes(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.target is torch.ops.refold.bcq_linear.default]


def weight_of(node: fx.Node, features: int) -> torch.Tensor:
    planes, alpha = (constants.tensor(a) for a in node.args[1:3])
    return dequantise(planes, alpha, features, node.args[4], torch.float64)


def modules(result: PassResult) -> list[str]:
    return [path for a in result.applied for path in a.modules]


def reasons(result: PassResult) -> dict[str, str]:
    return {d.module: d.reason for d in result.declined}


def with_codes(model: nn.Module, gm: fx.GraphModule) -> nn.Module:
    """The model in eager with the weights that the codes stand for."""
    out = deepcopy(model).double()
    for node in codes(gm):
        path = node.meta["custom"]["refold"]["modules"][0]
        layer = out.get_submodule(path)
        wide = weight_of(node, layer.weight[0].numel())
        layer.weight.data = wide.reshape(layer.weight.shape)
    return out


def test_golden() -> None:
    gm = tracer.trace(nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU()), torch.randn(2, WIDTH))
    text = printer.render(gm)
    SubstituteShiftAdd(group_size=16, min_features=16).run(gm)
    golden.check("substitute_shift_add", f"{text}\n---\n{printer.render(gm)}")


# --- the graph computes with the codes that the records describe ----------------------------------


@given(
    bits=st.sampled_from((2, 3, 4)),
    scales=st.sampled_from(("uniform", "bcq", "apot3", "pot")),
    features=st.integers(16, 50),
    rows=st.integers(1, 9),
    group=st.sampled_from((16, 24, 128)),
    bias=st.booleans(),
    calibrated=st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_any_layer_is_its_code(bits, scales, features, rows, group, bias, calibrated) -> None:
    model = nn.Sequential(nn.Linear(features, rows, bias=bias), nn.ReLU()).double()
    x = torch.randn(4, features, dtype=torch.float64)
    gm, result = substitute(
        model, x, bits=bits, scales=scales, group_size=group,
        calibration=[(x,)] if calibrated else (), include="0",
    )  # fmt: skip
    (node,), (record,) = codes(gm), result.applied
    assert "linear" not in census(gm.graph)
    assert (record.figures["bits"], record.figures["group_size"]) == (bits, group)
    assert record.labels["family"] == scales
    with torch.no_grad():
        assert relative_error(gm(x), with_codes(model, gm)(x)) <= EXACT
    weight = model[0].weight.detach()
    error = (weight_of(node, features) - weight).norm() / weight.norm()
    assert record.figures["weight_error"] == pytest.approx(float(error), rel=1e-6)
    assert ("output_error" in record.figures) == calibrated
    if calibrated:
        change = x @ (weight_of(node, features) - weight).T
        expected = change.norm() / (x @ weight.T).norm()
        assert record.figures["output_error"] == pytest.approx(float(expected), rel=1e-6, abs=1e-9)


def test_layers_of_a_network() -> None:
    model, x = Scorer(), ids()
    gm, result = substitute(model, x)
    assert modules(result) == [f"block.{n}" for n in ("q", "k", "v", "up", "down")]
    assert census(gm.graph)["linear"] == 1
    with torch.no_grad():
        for probe in (x, ids(3)):
            assert relative_error(gm(probe).double(), with_codes(model, gm)(probe)) <= 2e-5
            assert relative_error(gm(probe), model(probe)) > 1e-3


def test_bytes_are_those_of_the_constants() -> None:
    gm, result = substitute(Scorer(), ids())
    for node, record in zip(codes(gm), result.applied, strict=True):
        stored = sum(constants.size_in_bytes(a) for a in node.args[1:3])
        assert record.figures["bytes_after"] == stored
        assert constants.tensor(node.args[2]).dtype == torch.float16
    before = sum(p.numel() * 4 for n, p in Scorer().named_parameters() if "block" in n)
    biases = sum(p.numel() * 4 for n, p in Block().named_parameters() if p.dim() == 1)
    assert sum(a.figures["bytes_before"] for a in result.applied) == before - biases
    assert "-> " in result.notes[-1]
    names = [n for n, _ in [*gm.named_parameters(), *gm.named_buffers()]]
    assert not [n for n in names if n.startswith("block") and n.endswith(("q.weight", "up.weight"))]


def test_two_bits_of_128_are_fourteen_times_smaller() -> None:
    model = nn.Sequential(nn.Linear(1024, 64, bias=False), nn.ReLU())
    sizes = {}
    for bits in (2, 3):
        _, result = substitute(model, torch.randn(2, 1024), bits=bits, group_size=128)
        figures = result.applied[0].figures
        sizes[bits] = figures["bytes_before"] / figures["bytes_after"]
    assert sizes[2] >= 14.5
    assert sizes[3] >= 9


def test_a_product_without_a_linear_layer() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.randn(WIDTH, 24))
            self.b, self.c = nn.Parameter(torch.randn(24, WIDTH)), nn.Parameter(torch.randn(24))

        def forward(self, x):
            return torch.addmm(self.c, (x @ self.a).relu() @ self.b, self.a).relu()

    class Twice(Products):
        def forward(self, x):
            return torch.addmm(self.c, x, self.a).relu()

    x = torch.randn(2, WIDTH)
    _, shared = substitute(Products(), x)
    assert [d.reason for d in shared.declined if "shared with" in d.reason]
    gm, result = substitute(Twice(), x)
    assert len(result.applied) == 1
    a = weight_of(codes(gm)[0], WIDTH).float()
    with torch.no_grad():
        expected = (x @ a.T + constants.tensor(codes(gm)[0].args[3])).relu()
        assert relative_error(gm(x), expected) <= 2e-6


def test_a_bias_of_one_row() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Parameter(torch.randn(WIDTH, 24)), nn.Parameter(torch.randn(1, 24))

        def forward(self, x):
            return torch.addmm(self.c, x, self.a).relu()

    x = torch.randn(2, WIDTH)
    gm, result = substitute(Product(), x, calibration=[x])
    for graph in (gm, result.approximation.after):
        (node,) = codes(graph)
        assert constants.tensor(node.args[3]).shape == (24,)
        with torch.no_grad():
            expected = (
                x @ weight_of(node, WIDTH).float().T + constants.tensor(node.args[3])
            ).relu()
            assert relative_error(graph(x), expected) <= 2e-6


@pytest.mark.slow
def test_the_callers_weights_are_not_written() -> None:
    model = Scorer()
    before = deepcopy(model.state_dict())
    substitute(model, ids(), calibration=samples(), bits="auto", average_bits=4.0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


# --- what stays -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_defaults_leave_embeddings_heads_and_small_layers() -> None:
    _, result = substitute(Scorer(), ids(), min_features=WIDTH + 1)
    assert modules(result) == ["block.down"]
    said = reasons(result)
    assert "looked up" in said["embed"]
    assert f"min_features={WIDTH + 1}" in said["block.q"]
    assert "min_features" in said["head"]
    _, result = substitute(Scorer(), ids())
    assert "model's own" in reasons(result)["head"]
    assert all(d.hint for d in result.declined if d.module != "embed")


def test_a_head_that_shares_the_embedding_stays_even_if_included() -> None:
    _, result = substitute(Scorer(tied=True), ids(), include=["head", "block.q"])
    assert modules(result) == ["block.q"]
    assert "shared with embedding" in reasons(result)["head"]


@pytest.mark.slow
def test_include_and_exclude() -> None:
    _, result = substitute(Scorer(), ids(), include=["block.?", "head"], exclude="block.k")
    assert modules(result) == ["block.q", "block.v", "head"]
    _, result = substitute(Scorer(), ids(), exclude="block")
    assert not result.applied
    assert not result.modified
    _, result = substitute(Scorer(), ids(), exclude=("block.up",))
    assert modules(result) == [f"block.{n}" for n in "qkv"] + ["block.down"]


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_glob_that_names_nothing(option: str) -> None:
    with pytest.raises(UsageError, match=rf"{option}: no module matches 'blok.q'.*'block.q'"):
        substitute(Scorer(), ids(), **{option: "blok.q"})


def test_pinned_layers_stay() -> None:
    _, result = substitute(Scorer(), ids(), exclude=())
    assert "block.q" in modules(result)
    with torch.no_grad():
        gm = trace(Scorer().eval(), (ids(),), {}).graph_module
        chosen = SubstituteShiftAdd(min_features=16, group_size=16)
        runs = Pipeline("test", (chosen,)).run(gm, Context(exclude=("block.q",))).runs
    assert modules(runs[0].result) == [f"block.{n}" for n in ("k", "v", "up", "down")]


def test_a_weight_that_is_not_finite() -> None:
    model = Scorer()
    model.block.q.weight.data[0, 0] = math.inf
    _, result = substitute(model, ids())
    assert "not finite" in reasons(result)["block.q"]
    assert "block.q" not in modules(result)


def test_a_code_that_would_not_be_smaller() -> None:
    model = nn.Sequential(nn.Linear(16, 8).to(torch.bfloat16), nn.ReLU())
    x = torch.randn(2, 16, dtype=torch.bfloat16)
    _, result = substitute(model, x, bits=4, scales="bcq", include="0", group_size=16)
    assert result.applied  # 4 + 4 of 16 bits
    narrow = nn.Sequential(nn.Linear(3, 8).to(torch.bfloat16), nn.ReLU())
    x = torch.randn(2, 3, dtype=torch.bfloat16)
    _, result = substitute(narrow, x, bits=4, scales="bcq", include="0", group_size=16)
    assert "would take" in reasons(result)["0"]


def test_scales_that_float16_does_not_hold() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU())
    model[0].weight.data *= 1e-6
    gm, result = substitute(model, torch.randn(2, WIDTH))
    assert constants.tensor(codes(gm)[0].args[2]).dtype == torch.float32
    assert result.applied[0].labels["scales_dtype"] == "float32"
    assert "float32 scales" in result.notes[-1]
    assert result.applied[0].figures["weight_error"] < 0.2


# --- calibration ----------------------------------------------------------------------------------


def near_a_plane(count: int, width: int = 64) -> list[torch.Tensor]:
    mix = torch.randn(4, width)
    return [torch.randn(32, 4) @ mix + 0.1 * torch.randn(32, width) for _ in range(count)]


def test_calibration_brings_the_outputs_nearer() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    data = near_a_plane(6)
    errors = []
    for calibration in ((), data[:5]):
        gm, _ = substitute(model, data[0], calibration=calibration, bits=2, group_size=32)
        with torch.no_grad():
            apart = gm(data[5]) - model(data[5])
            errors.append(float(apart.norm() / model(data[5]).norm()))
    assert errors[1] < 0.5 * errors[0]


def test_later_layers_see_what_earlier_ones_leave() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Identity(), nn.Linear(64, 48), nn.ReLU()).double()
    x = near_a_plane(1)[0].double()
    gm, result = substitute(model, x, calibration=[x], bits=2, group_size=32)
    first, second = codes(gm)
    with torch.no_grad():
        h = x @ weight_of(first, 64).T + model[0].bias
        weight = model[2].weight
        change = h @ (weight_of(second, 64) - weight).T
        expected = change.norm() / (h @ weight.T).norm()
    got = result.applied[1].figures["output_error"]
    assert got == pytest.approx(float(expected), rel=1e-6)


def test_layers_on_one_input_share_its_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    factor = layer_codes.inverse_factor
    monkeypatch.setattr(
        layer_codes, "inverse_factor", lambda h, d, g: seen.append(d) or factor(h, d, g)
    )
    _, result = substitute(Scorer(), ids(), calibration=samples(), damping=0.05)
    assert len(result.applied) == 5
    assert seen == [0.05] * 3  # q, k and v; up; down


@pytest.mark.slow
def test_one_of_eight_inputs_is_held_out() -> None:
    for count, held in ((7, 0), (8, 1), (17, 2)):
        _, result = substitute(Scorer(), ids(), calibration=iter(samples(count)))
        assert len(result.approximation.held_out) == held


@pytest.mark.slow
def test_what_is_held_out_is_not_calibrated_on() -> None:
    model, data = Scorer(), samples(7)
    without, _ = substitute(model, ids(), calibration=data)
    held, result = substitute(model, ids(), calibration=[*data, *samples(1)])
    assert len(result.approximation.held_out) == 1
    for a, b in zip(constants_of(without), constants_of(held), strict=True):
        assert torch.equal(a, b)


def test_inputs_that_are_all_zero_fall_back_to_the_weights() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU())
    x = torch.zeros(2, WIDTH)
    gm, result = substitute(model, x, calibration=[x])
    plain, _ = substitute(model, x)
    assert result.applied[0].figures["output_error"] == 0.0
    assert torch.equal(weight_of(codes(gm)[0], WIDTH), weight_of(codes(plain)[0], WIDTH))


def test_calibration_inputs_of_another_form() -> None:
    with pytest.raises(UsageError, match="give both alike"):
        substitute(Scorer(), ids(), calibration=[{"ids": ids()}])
    with pytest.raises(UsageError, match=r"calibration=\[x\]"):
        SubstituteShiftAdd(calibration=ids())


def test_a_model_that_writes_its_state_is_not_calibrated() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, 8)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count.add_(1)
            return self.layer(x).relu() + self.count

    with pytest.raises(UsageError, match="leave calibration out"):
        substitute(Counting(), torch.randn(2, WIDTH), calibration=[torch.randn(2, WIDTH)])
    _, result = substitute(Counting(), torch.randn(2, WIDTH))
    assert result.applied


# --- widths ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_past_the_largest_error_more_bits_are_taken_or_the_layer_stays() -> None:
    model = Scorer()
    by_bits = {}
    for bits in (2, 3, 4):
        _, result = substitute(model, ids(), bits=bits)
        by_bits[bits] = {a.modules[0]: a.figures["weight_error"] for a in result.applied}
    limit = max(by_bits[3].values())
    gm, result = substitute(model, ids(), bits=2, max_layer_error=limit)
    assert {a.figures["bits"] for a in result.applied} == {3}
    assert all("raised from 2" in a.detail for a in result.applied)
    assert "5 took more bits" in result.notes[-1]
    limit = sorted(by_bits[4].values())[2]
    gm, result = substitute(model, ids(), bits=2, max_layer_error=limit)
    assert len(result.applied) == len(codes(gm)) == 3
    assert all("at 4 bits" in d.reason for d in result.declined if "max_layer_error" in d.reason)
    assert sum("past max_layer_error" in d.reason for d in result.declined) == 2


def test_a_layer_that_stays_is_run_as_it_is_by_the_calibration() -> None:
    gm, result = substitute(Scorer(), ids(), calibration=samples(), max_layer_error=1e-9)
    assert not result.applied
    assert not result.modified
    assert result.approximation is None
    assert not codes(gm)


@pytest.mark.slow
@pytest.mark.parametrize("calibrated", [False, True])
def test_auto_keeps_its_budget_of_bytes(calibrated: bool) -> None:
    pytest.importorskip("scipy")
    model, calibration = Scorer(), samples() if calibrated else ()
    weights = 3 * WIDTH**2 + 4 * WIDTH**2
    taken = []
    for average in (3.2, 4.0, 5.0):
        gm, result = substitute(
            model, ids(), bits="auto", average_bits=average, calibration=calibration
        )
        stored = sum(constants.size_in_bytes(a) for n in codes(gm) for a in n.args[1:3])
        assert stored <= average * weights / 8
        assert f"{stored} of {int(average * weights / 8)} bytes" in " ".join(result.notes)
        taken.append(stored)
    assert taken[0] < taken[1] < taken[2]
    assert {a.figures["bits"] for a in result.applied} == {4}


@pytest.mark.slow
def test_auto_gives_bits_to_layers_that_matter() -> None:
    pytest.importorskip("scipy")

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loud, self.quiet = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.loud(x).sin() + 0.01 * self.quiet(x).sin()

    x = torch.randn(64, WIDTH)
    _, result = substitute(Two(), x, bits="auto", average_bits=4.0, calibration=[x])
    assert {a.modules[0]: a.figures["bits"] for a in result.applied} == {"loud": 4, "quiet": 2}


@pytest.mark.slow
def test_auto_leaves_layers_that_no_width_suits() -> None:
    pytest.importorskip("scipy")
    model = Scorer()
    model.block.q.weight.data = torch.distributions.StudentT(1.0).sample((WIDTH, WIDTH))
    _, result = substitute(model, ids(), bits="auto", average_bits=5.0, max_layer_error=0.15)
    assert "past max_layer_error" in reasons(result)["block.q"]
    assert modules(result) == [f"block.{n}" for n in ("k", "v", "up", "down")]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 5}, "bits is 5, expected 2, 3, 4 or 'auto'"),
        ({"bits": "auto"}, "average_bits"),
        ({"average_bits": 2.5}, "average_bits"),
        ({"scales": "ternary"}, "uniform, bcq, apot3, pot"),
        ({"group_size": 12}, "multiple of 8"),
        ({"group_size": 8}, "from 16 on"),
        ({"damping": 0.0}, "damping"),
        ({"rounds": 0}, "rounds"),
        ({"jobs": 0}, "jobs"),
        ({"max_layer_error": 0.0}, "max_layer_error"),
    ],
)
def test_options_that_do_not_fit(options, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        SubstituteShiftAdd(**options)


def test_more_rounds_are_not_worse() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU())
    errors = []
    for rounds in (1, 15):
        _, result = substitute(model, torch.randn(2, WIDTH), rounds=rounds, scales="bcq")
        errors.append(result.applied[0].figures["weight_error"])
    assert errors[1] < errors[0]


# --- convolutions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conv", "shape"),
    few(
        [
            (nn.Conv2d(16, 9, 1), (2, 16, 5, 4)),
            (nn.Conv2d(16, 9, 1, stride=2, bias=False), (2, 16, 5, 4)),
            (nn.Conv2d(5, 9, 3, padding=1), (2, 5, 6, 7)),
            (nn.Conv2d(5, 9, (3, 2), stride=(2, 1), padding=(0, 1)), (2, 5, 7, 6)),
            (nn.Conv2d(5, 9, 3, padding="same"), (2, 5, 6, 7)),
            (nn.Conv1d(8, 9, 3, padding=1), (2, 8, 9)),
            (nn.Conv3d(3, 9, 2), (2, 3, 4, 3, 3)),
        ],
        7,
    ),
)
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_convolution_is_a_product_of_its_windows(conv, shape, calibrated: bool) -> None:
    conv.weight.data.normal_()
    model, x = nn.Sequential(conv, nn.ReLU()).double(), torch.randn(*shape, dtype=torch.float64)
    gm, result = substitute(
        model, x, convolutions=True, include="0", calibration=[x] if calibrated else ()
    )
    assert len(result.applied) == 1
    assert "conv" not in census(gm.graph)
    reference = with_codes(model, gm)
    probe = torch.randn(3, *shape[1:], dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(gm(probe), reference(probe)) <= EXACT
        assert gm(probe).stride() == model(probe).stride()
        if calibrated:
            bias = 0 if conv.bias is None else conv.bias.view(1, -1, *[1] * (x.dim() - 2))
            change, outputs = reference[0](x) - model[0](x), model[0](x) - bias
    if calibrated:
        expected = float(change.norm() / outputs.norm())
        assert result.applied[0].figures["output_error"] == pytest.approx(expected, rel=1e-6)


def test_strides_that_nobody_sees_are_not_restored() -> None:
    model = nn.Sequential(nn.Conv2d(5, 9, 3), nn.ReLU(), nn.Conv2d(9, 9, 1))
    x = torch.randn(2, 5, 6, 7)
    gm, result = substitute(model, x, convolutions=True, include="*")
    assert len(result.applied) == 2
    assert tracer.ops(gm)["contiguous"] == 1


def test_a_failure_costs_the_one_layer(
    monkeypatch: pytest.MonkeyPatch, failures: list[Decline]
) -> None:
    replace = Edit.replace

    def failing(self: Edit, old: fx.Node, new: fx.Node, **options: Any) -> None:
        replace(self, old, new, **options)
        if old.name == "linear_1":
            raise ZeroDivisionError("planted")

    monkeypatch.setattr(Edit, "replace", failing)
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(3)]).double()
    x = torch.randn(4, 32, dtype=torch.float64)
    gm = trace(model.eval(), (x,), {}).graph_module
    result = SubstituteShiftAdd(min_features=16, group_size=16, include="*").run(gm)
    assert [r.removed for r in result.applied] == [("linear",), ("linear_2",)]
    assert [(d.node, d.failed) for d in result.declined] == [("linear_1", True)]
    assert relative_error(gm(x), with_codes(model, gm)(x)) <= EXACT
    assert failures == result.declined
    failures.clear()


@pytest.mark.parametrize(
    ("conv", "words"),
    [
        (nn.Conv2d(8, 8, 3, groups=2), "in 2 groups"),
        (nn.ConvTranspose2d(8, 8, 3), "transposed"),
        (nn.Conv2d(8, 8, 3, dilation=2), "dilated"),
        (nn.Conv2d(8, 8, 2, padding="same"), "lopsided"),
    ],
)
def test_convolutions_that_stay(conv, words: str) -> None:
    x = torch.randn(2, 8, 7, 7)
    _, result = substitute(nn.Sequential(conv, nn.ReLU()), x, convolutions=True, include="0")
    assert not result.applied
    assert words in reasons(result)["0"]


def test_convolutions_stay_unless_asked_for() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU())
    _, result = substitute(model, torch.randn(2, 16, 4, 4))
    assert not result.applied
    assert not result.declined
    _, result = substitute(model, torch.randn(2, 16, 4, 4), include="0")
    assert "unless asked for" in reasons(result)["0"]


# --- parallel -------------------------------------------------------------------------------------


def constants_of(gm: fx.GraphModule) -> list[torch.Tensor]:
    return [constants.tensor(a) for n in codes(gm) for a in n.args[1:3]]


def test_joblib_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "joblib", None)
    with pytest.raises(MissingDependencyError, match=r"refold\[shiftadd\]"):
        substitute(Scorer(), ids(), jobs=2)


@pytest.mark.slow
@pytest.mark.parametrize("calibrated", [False, True])
def test_parallel_jobs_give_the_same_bits(calibrated: bool) -> None:
    joblib = pytest.importorskip("joblib")
    calibration, model = samples() if calibrated else (), Scorer()
    alone, _ = substitute(model, ids(), calibration=calibration)
    with joblib.parallel_config("threading"):
        shared, _ = substitute(model, ids(), calibration=calibration, jobs=2)
    for a, b in zip(constants_of(alone), constants_of(shared), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_a_cluster_gives_the_same_bits_and_outlives_a_worker() -> None:
    joblib, distributed = pytest.importorskip("joblib"), pytest.importorskip("distributed")
    model = nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 128), nn.ReLU())
    x = torch.randn(2, 64)
    alone, _ = substitute(model, x, scales="bcq", group_size=64)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
        joblib.parallel_config("dask"),
    ):
        started = set(client.scheduler_info()["workers"])
        (victim, *_) = client.run(os.getpid).values()

        def kill_once_busy() -> None:
            while not any(client.processing().values()):
                time.sleep(0.05)
            os.kill(victim, signal.SIGKILL)

        killer = threading.Thread(target=kill_once_busy)
        killer.start()
        shared, _ = substitute(model, x, scales="bcq", group_size=64, jobs=2)
        killer.join()
        client.wait_for_workers(2)
        assert set(client.scheduler_info()["workers"]) != started, "no worker was lost"
    assert len(codes(shared)) == 2
    for a, b in zip(constants_of(alone), constants_of(shared), strict=True):
        assert torch.equal(a, b)


# --- compilation ----------------------------------------------------------------------------------


def compiled(model: nn.Module, x: torch.Tensor, **options):
    chosen = SubstituteShiftAdd(**{"min_features": 16, "group_size": 16, **options})
    return refold.fold(model.eval(), x, pipeline=PIPELINES["default"].with_(chosen))


def substitution(report: refold.Report):
    return next(p for p in report.passes if p.name == "substitute-shift-add")


def test_a_compilation_verifies_both_sides_and_measures_the_difference() -> None:
    model, data = Scorer(), samples(8)
    done = compiled(model, ids(), calibration=data)
    report = done.report
    assert report.numerics["passed"]
    assert report.numerics["error"] < 1e-4
    with torch.no_grad():
        held = data[7][0]
        expected = (done(held) - model(held)).norm() / model(held).norm()
    assert report.divergence["error"] == pytest.approx(float(expected), rel=1e-3)
    assert report.divergence["held_out"]
    assert report.divergence["inputs"] == 1
    assert report.divergence["kl"] > 0
    assert 0 <= report.divergence["top1"] <= 1
    text = report.render()
    assert "held-out" in text
    rows = [line.split() for line in text.splitlines() if line.startswith(" block.")]
    assert [row[0] for row in rows] == [f"block.{n}" for n in ("q", "k", "v", "up", "down")]
    first = substitution(report).applied[0].figures
    assert rows[0][1:5] == ["3", "uniform", "/", "16"]
    assert rows[0][-2:] == [f"{first['weight_error']:.1e}", f"{first['output_error']:.1e}"]
    assert any(n.startswith("before the approximation: ") for n in report.notes)
    again = refold.Report.from_json(report.to_json())
    assert again.divergence == report.divergence
    assert substitution(again).applied == substitution(report).applied
    written = json.loads(report.to_json())["passes"]
    (row, *_) = next(p["applied"] for p in written if p["name"] == "substitute-shift-add")
    assert row["labels"]["exactness"] == "bit-exact planes"
    assert {"bits", "bytes_before", "bytes_after", "weight_error"} <= row["figures"].keys()


def test_without_calibration_the_difference_is_measured_on_the_verification_inputs() -> None:
    report = compiled(Scorer(), ids()).report
    assert not report.divergence["held_out"]
    assert report.divergence["inputs"] >= 4


def test_a_compilation_that_consumes_the_model() -> None:
    chosen = SubstituteShiftAdd(min_features=16, group_size=16, calibration=samples(8))
    pipeline = PIPELINES["default"].with_(chosen)
    report = refold.fold(Scorer().eval(), ids(), pipeline=pipeline, consume=True).report
    assert report.divergence["error"] > 0
    assert any("consume" in note for note in report.notes)


def test_only_by_name() -> None:
    assert "substitute-shift-add" not in PIPELINES["default"].names
    assert "substitute-shift-add" not in PIPELINES["min-nodes"].names
    assert PIPELINES["shift-add"].names[-1] == "substitute-shift-add"
    assert SubstituteShiftAdd().exactness == "approximate"
    model = nn.Sequential(nn.Linear(256, 64), nn.ReLU()).eval()
    report = refold.fold(model, torch.randn(2, 256), pipeline="shift-add").report
    assert report.after.census["bcq-linear"] == 1


@pytest.mark.slow
def test_a_wrong_fold_before_it_is_found() -> None:
    """What comes before the substitution is judged by the original, whatever the codes cost."""

    class Broken:
        name, exactness = "broken", "exact"

        def run(self, gm: fx.GraphModule, context: Context = Context()) -> PassResult:
            node = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.relu.default)
            node.target = torch.ops.aten.gelu.default
            gm.recompile()
            return PassResult(modified=True)

    chosen = SubstituteShiftAdd(min_features=16, group_size=16)
    with pytest.raises(VerificationError):
        refold.fold(Scorer().eval(), ids(), pipeline=Pipeline("test", (Broken(), chosen)))
    with pytest.raises(VerificationError):
        refold.fold(Scorer().eval(), ids(), pipeline=Pipeline("test", (chosen, Broken())))


@pytest.mark.parametrize(
    "example", [torch.randn(4, 63), torch.randn(4, 64, dtype=torch.float64), torch.randn(64)]
)
def test_a_calibration_input_of_another_kind_is_an_error(example: torch.Tensor) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    with pytest.raises(UsageError, match=r"does not fit: input.* the model takes torch.float32"):
        substitute(model, torch.randn(2, 64), calibration=[example], include="0")
