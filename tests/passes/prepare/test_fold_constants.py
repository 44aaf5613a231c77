"""Constant subgraphs become tensors: the same numbers, no growth, no surprises."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from refold.frontends.export import trace
from refold.graph import constants, provenance
from refold.graph.evaluate import Oracle
from refold.graph.ops import op_name
from refold.graph.printer import render
from refold.passes.prepare import fold_constants
from refold.passes.prepare.fold_constants import FoldConstants
from refold.rewrite.context import Context
from refold.rewrite.result import Decline, PassResult
from tests import golden

F64 = 1e-12  # float64 fold against the float64 oracle, relative
F32 = 1e-6  # one rounding of each weight, a few of the sums
KEPT = 1e-5  # a chain of calls stays, each of which rounds


class Does(nn.Module):
    def __init__(self, function: Callable[..., Tensor], **parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            if value.is_floating_point():
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def image(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 4, 6, 6, dtype=dtype)


def calls(gm: fx.GraphModule) -> list[str]:
    return [
        n.target._schema.name.removeprefix("aten::")
        for n in gm.graph.nodes
        if n.op == "call_function" and hasattr(n.target, "_schema")
    ]


def run(gm: fx.GraphModule, *, complex_: bool = True, **options: float) -> PassResult:
    result = FoldConstants(**options).run(gm, Context(complex=complex_))
    gm.recompile()
    return result


def folded(
    model: nn.Module, x: Tensor, tolerance: float = F32, **options: float
) -> tuple[fx.GraphModule, PassResult]:
    program = trace(model.eval(), (x,))
    gm = program.graph_module
    state = {k: v.clone() for k, v in model.state_dict().items()}
    reference = Oracle(gm)(x)
    result = run(gm, **options)
    with torch.no_grad():
        got = gm(x)
    scale = float(reference.detach().abs().max())
    assert float((got - reference).abs().max()) <= tolerance * scale
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    again = run(gm, **options)
    assert not again.modified
    assert not again.applied
    assert bool(result.applied) == result.modified
    return gm, result


def weight_norm(dtype: torch.dtype) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 5, 3)).to(dtype)


def old_weight_norm(dtype: torch.dtype) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 5, 3), dim=None).to(dtype)


def spectral_norm(dtype: torch.dtype) -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 5, 3)).to(dtype)


def orthogonal(dtype: torch.dtype) -> nn.Module:
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(6, 6), orthogonal_map="matrix_exp")
    return layer.to(dtype)


def standardised(dtype: torch.dtype) -> nn.Module:
    def function(s: Does, x: Tensor) -> Tensor:
        w = F.batch_norm(s.w.reshape(1, 5, -1), None, None, s.g, training=True, eps=1e-6)
        return F.conv2d(x, w.reshape_as(s.w))

    return Does(function, w=torch.randn(5, 4, 3, 3), g=torch.rand(5) + 0.5).to(dtype)


def generated(dtype: torch.dtype) -> nn.Module:
    """A weight that is written piece by piece (central difference convolution)."""

    def function(s: Does, x: Tensor) -> Tensor:
        w = torch.zeros(5, 4, 9, dtype=s.w.dtype)
        w[:, :, :] = s.w.reshape(5, 4, 9)
        w[:, :, 4] = s.w.reshape(5, 4, 9)[:, :, 4] - s.w.sum((2, 3))
        w[:, :, torch.tensor([0, 2])] = -w[:, :, torch.tensor([2, 0])]
        w[:, 1:3, 8] *= 0.5
        return F.conv2d(x, w.reshape(5, 4, 3, 3))

    return Does(function, w=torch.randn(5, 4, 3, 3)).to(dtype)


def averaged(dtype: torch.dtype) -> nn.Module:
    def function(s: Does, x: Tensor) -> Tensor:
        mix = torch.softmax(s.a, 0)
        return F.conv2d(x, sum(mix[i] * w for i, w in enumerate((s.u, s.v, s.w))))

    parameters = {k: torch.randn(5, 4, 3, 3) for k in "uvw"}
    return Does(function, a=torch.randn(3), **parameters).to(dtype)


SOURCES = {
    "weight norm": weight_norm,
    "weight norm over all": old_weight_norm,
    "spectral norm": spectral_norm,
    "orthogonal": orthogonal,
    "weight standardisation": standardised,
    "generated weight": generated,
    "averaged experts": averaged,
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parameter_only_subgraphs_become_plain_weights(name: str, dtype: torch.dtype) -> None:
    model = SOURCES[name](dtype)
    tolerance = F64 if dtype == torch.float64 else F32
    gm, result = folded(model, image(dtype), tolerance)
    assert calls(gm) in (["conv2d"], ["linear"])
    assert len(result.applied) == 1
    assert not result.declined


def test_record_and_provenance() -> None:
    gm, result = folded(nn.Sequential(weight_norm(torch.float32)), image())
    (record,) = result.applied
    assert record.rule == "fold-constants"
    assert record.removed == ("_weight_norm",)
    assert record.kinds == ("weight-norm",)
    node = next(n for n in gm.graph.nodes if n.name == record.added[0])
    origin = provenance.of(node)
    assert origin["nodes"][-1] == "_weight_norm"
    assert origin["rules"] == ["fold-constants"]
    assert any("parametrizations" in m for m in origin["modules"])


def test_a_fake_quantiser_keeps_its_grid() -> None:
    def function(s: Does, x: Tensor) -> Tensor:
        q = torch.clamp(torch.round(s.w / s.scale), -8, 7)
        return F.conv2d(x, q * s.scale)

    model = Does(function, w=torch.randn(5, 4, 3, 3), scale=torch.tensor(0.13))
    gm, _ = folded(model, image())
    assert calls(gm) == ["conv2d"]
    stored = next(b for n, b in gm.named_buffers() if n.startswith("folded"))
    own = torch.clamp(torch.round(model.w / model.scale), -8, 7) * model.scale
    assert torch.equal(stored, own)


def test_constants_shared_by_two_consumers_are_stored_once() -> None:
    def function(s: Does, x: Tensor) -> Tensor:
        w = s.v / s.v.norm()
        return F.conv2d(F.conv2d(x, w, padding=1), w, padding=1)

    gm, result = folded(Does(function, v=torch.randn(4, 4, 3, 3)), image())
    assert len(result.applied) == 1
    assert len([n for n in gm.graph.nodes if n.op == "get_attr"]) == 1


def test_nothing_to_fold() -> None:
    _, result = folded(nn.Conv2d(4, 5, 3), image())
    assert not result.modified
    assert not result.declined


# --- policy ---------------------------------------------------------------------------------------


def low_rank(s: Does, x: Tensor) -> Tensor:
    return x @ (s.a @ s.b)


def test_low_rank_product_stays_factored() -> None:
    model = Does(low_rank, a=torch.randn(256, 4), b=torch.randn(4, 256))
    gm, result = folded(model, torch.randn(2, 256))
    assert calls(gm) == ["matmul", "matmul"]
    (record,) = result.declined
    assert "256 KiB" in record.reason
    assert "8 KiB" in record.reason
    assert record.hint


@pytest.mark.parametrize(("growth", "left"), [(31.0, 2), (32.0, 1), (math.inf, 1)])
def test_max_growth_also_bounds_one_constant(growth: float, left: int) -> None:
    model = Does(low_rank, a=torch.randn(256, 4), b=torch.randn(4, 256))
    gm, result = folded(model, torch.randn(2, 256), max_growth=growth)
    assert calls(gm) == ["matmul"] * left
    assert bool(result.declined) == (left == 2)


@pytest.mark.parametrize(("layers", "folds"), [(20, True), (36, False)])
def test_small_weights_of_one_bank_count_together(layers: int, folds: bool) -> None:
    def function(s: Does, x: Tensor) -> Tensor:
        made = [(s.bank * s.mix[i]).sum(0) for i in range(layers)]
        return torch.cat([torch.tanh(x @ weight) for weight in made])

    bank = torch.randn(2, 100, 100) / 10
    model = Does(function, bank=bank, mix=torch.randn(layers, 2, 1, 1))
    gm, result = folded(model, torch.randn(2, 100))
    # each is 39 KiB, from 78 KiB; 36 are 1.3 MiB more than the bank, one may still be made of it
    assert calls(gm).count("sum") == (0 if folds else layers)
    assert len(result.declined) == (0 if folds else layers)


def test_what_does_not_grow_is_folded_beside_what_does() -> None:
    def function(s: Does, x: Tensor) -> Tensor:
        made = [(s.bank * s.mix[i]).sum(0) for i in range(4)]
        return torch.cat([x @ weight for weight in made]) @ (s.v * s.g)

    model = Does(
        function, bank=torch.randn(2, 128, 128), mix=torch.randn(4, 2, 1, 1),
        v=torch.randn(128, 128), g=torch.rand(128, 1),
    )  # fmt: skip
    gm, result = folded(model, torch.randn(2, 128))
    assert calls(gm).count("sum") == len(result.declined) == 4
    assert calls(gm).count("mul") == 4, "the product of its own v and g stores nothing more"


def waves(s: Does, x: Tensor) -> Tensor:
    """A long filter of two complex modes, as a state space makes it."""
    position = torch.arange(16384, dtype=s.a.dtype) / 16384
    modes = torch.polar(s.a.exp(), s.b).unsqueeze(-1) * torch.exp(1j * s.b[:, None] * position)
    return x * modes.sum(0).real


def test_complex_constants_are_stored_where_nothing_computes_them() -> None:
    def function(s: Does, x: Tensor) -> Tensor:
        return waves(s, x) + (s.c @ s.d).flatten()[:16384]

    model = Does(
        function, a=torch.randn(2), b=torch.randn(2), c=torch.randn(128, 2), d=torch.randn(2, 128)
    )
    x = torch.randn(2, 16384)
    kept, result = folded(model, x, KEPT)
    assert not result.notes
    assert {"exp", "real", "matmul"} <= set(calls(kept))
    assert len(result.declined) == 2
    stored, result = folded(model, x, KEPT, complex_=False)
    assert set(calls(stored)) <= {"mul", "add", "matmul", "flatten", "view", "slice"}
    assert calls(stored).count("matmul") == 1
    (record,) = result.declined
    assert "64 KiB, 32 times the 2 KiB" in record.reason
    (note,) = result.notes
    assert note == (
        "made of complex numbers, which the target does not compute, and so stored past "
        "max_growth: real, 64 KiB, 4.1e+03 times the 16 B that they are computed from"
    )


@pytest.mark.parametrize("forced", [True, False])
def test_stored_complex_constants_take_no_growth_from_others(forced: bool) -> None:
    def function(s: Does, x: Tensor) -> Tensor:
        made = [(s.bank * s.mix[i]).sum(0).flatten() for i in range(3)]
        return waves(s, x * s.plain) + sum(torch.tanh(x * weight) for weight in made)

    model = Does(
        function, a=torch.randn(2), b=torch.randn(2), plain=torch.rand(16384),
        bank=torch.rand(2, 128, 128), mix=torch.rand(3, 2, 1, 1),
    )  # fmt: skip
    limit = {"max_growth": 1.34}  # 192 KiB now, 256 KiB with three weights for the bank of two
    gm, result = folded(model, torch.randn(2, 16384), KEPT, complex_=not forced, **limit)
    assert calls(gm).count("tanh") == 3
    assert ("sum" in calls(gm)) != forced, "the sum of the waves, not of the bank"
    assert bool(result.notes) == forced


def test_what_complex_constants_feed_still_keeps_to_max_growth() -> None:
    def function(s: Does, x: Tensor) -> Tensor:
        return x @ torch.outer(torch.polar(s.a, s.b).real, s.a)

    model = Does(function, a=torch.rand(256), b=torch.randn(256))
    gm, result = folded(model, torch.randn(2, 256), KEPT, complex_=False)
    assert calls(gm) == ["outer", "matmul"]
    assert not result.notes, "the part that is complex does not grow"
    assert len(result.declined) == 1


def test_infinite_growth_of_nothing_stored() -> None:
    model = Does(lambda s, x: x + torch.arange(300 * 300.0).sin().view(300, 300))
    gm, result = folded(model, torch.randn(300, 300), max_growth=math.inf)
    assert calls(gm) == ["add"]
    assert not result.declined


def test_a_generator_is_declined_once_behind_an_expand_too() -> None:
    def function(s: Does, x: Tensor) -> Tensor:
        return x + torch.tanh(s.a @ s.b * 2).unsqueeze(0).expand(3, 256, 256)

    model = Does(function, a=torch.randn(256, 4), b=torch.randn(4, 256))
    gm, result = folded(model, torch.randn(3, 256, 256))
    (record,) = result.declined
    assert "32 times the 8 KiB" in record.reason
    assert calls(gm).count("matmul") == 1


def test_small_low_rank_product_is_folded() -> None:
    model = Does(low_rank, a=torch.randn(32, 4), b=torch.randn(4, 32))
    gm, _ = folded(model, torch.randn(2, 32))
    assert calls(gm) == ["matmul"]


def test_declined_product_still_gets_its_factors_folded() -> None:
    model = Does(lambda s, x: x @ ((2 * s.a) @ s.b), a=torch.randn(256, 4), b=torch.randn(4, 256))
    gm, result = folded(model, torch.randn(2, 256))
    assert calls(gm) == ["matmul", "matmul"]
    assert len(result.applied) == 1
    assert len(result.declined) == 1


def test_merge_into_a_weight_of_the_same_size_does_not_grow() -> None:
    model = Does(
        lambda s, x: F.linear(x, s.w + 0.5 * (s.a @ s.b)),
        w=torch.randn(256, 256), a=torch.randn(256, 4), b=torch.randn(4, 256),
    )  # fmt: skip
    gm, result = folded(model, torch.randn(2, 256), max_growth=1.0)
    assert calls(gm) == ["linear"]
    assert not result.declined


class Branches(nn.Module):
    """Two convolutions, the weight of the second generated from a ninth of its numbers."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor], *, wide: bool = True) -> None:
        super().__init__()
        self.join = join
        self.plain = nn.Parameter(torch.randn(64, 64, 3, 3) if wide else torch.randn(64, 64, 1, 1))
        self.flat = nn.Parameter(torch.randn(64, 64, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        made = 2 * self.flat.expand(-1, -1, 3, 3)
        first = F.conv2d(x, self.plain, padding=self.plain.shape[-1] // 2)
        return self.join(first, F.conv2d(x, made, padding=1))


@pytest.mark.parametrize("sign", [1, -1])
def test_weights_that_parallel_branches_merge_may_grow(sign: int) -> None:
    """A difference convolution makes 9 numbers of 3, which the branch beside it takes in."""
    gm, result = folded(Branches(lambda a, b: a + b if sign > 0 else a - b), wide_image())
    assert calls(gm) == ["conv2d", "conv2d", "add" if sign > 0 else "sub"]
    assert not result.declined


@pytest.mark.parametrize(
    ("join", "wide"),
    [
        (lambda a, b: a * b, True),
        (lambda a, b: a + b.relu(), True),
        (lambda a, b: a + b, False),
    ],
    ids=["product", "activation", "smaller sibling"],
)
def test_weights_of_other_branches_stay_factored(join, wide: bool) -> None:
    gm, result = folded(Branches(join, wide=wide), wide_image())
    assert any("factored" in record.reason for record in result.declined)
    assert "expand" in calls(gm)


def wide_image() -> Tensor:
    return torch.randn(2, 64, 4, 4)


def test_growth_in_total_is_bounded() -> None:
    def function(s: Does, x: Tensor) -> Tensor:
        return F.linear(F.linear(F.linear(x, s.w), s.w * s.g), s.w.t() * s.h)

    model = Does(function, w=torch.randn(256, 256), g=torch.randn(256, 1), h=torch.randn(256, 1))
    gm, result = folded(model, torch.randn(2, 256))
    assert [r.removed for r in result.applied] == [("t",)]  # a view stores nothing
    assert calls(gm) == ["linear", "mul", "linear", "mul", "linear"]
    assert len(result.declined) == 2
    assert "growth of 1.25" in result.declined[0].reason
    gm, result = folded(model, torch.randn(2, 256), max_growth=4.0)
    assert calls(gm) == ["linear"] * 3
    assert not result.declined


def test_large_expand_is_not_written_out() -> None:
    model = Does(lambda s, x: x + s.b.sin().expand(512, 128), b=torch.randn(1, 128))
    gm, result = folded(model, torch.randn(512, 128))
    assert sorted(set(calls(gm))) == ["add", "expand"]
    assert len(result.applied) == 1
    assert all(b.numel() <= 128 for b in gm.buffers())


def test_view_of_a_parameter_stores_nothing() -> None:
    model = Does(lambda s, x: x @ s.w.t(), w=torch.randn(256, 256))
    gm, result = folded(model, torch.randn(2, 256), max_growth=1.0)
    assert calls(gm) == ["matmul"]
    assert result.modified
    stored = next(b for n, b in gm.named_buffers() if n.startswith("folded"))
    assert stored.untyped_storage().data_ptr() == model.w.untyped_storage().data_ptr()


def test_pinned_nodes_stay() -> None:
    program = trace(standardised(torch.float32), (image(),))
    gm = program.graph_module
    for node in gm.graph.nodes:
        if node.op == "call_function" and "batch_norm" in node.name:
            node.meta["refold_pinned"] = True
    run(gm)
    assert "batch_norm" in "".join(calls(gm))


# --- what must not fold ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draw", "says"),
    [
        (lambda s: torch.rand(4, 4), "rand draws random numbers"),
        (lambda s: s.w * torch.randperm(4), "randperm draws random numbers"),
        (lambda s: torch.empty(4, 4).uniform_(-1, 1) @ s.w, "uniform draws random numbers"),
        (lambda s: torch.bernoulli(s.w.sigmoid()), "bernoulli draws random numbers"),
    ],
)
def test_random_generators_are_refused_with_the_reason(draw: Callable, says: str) -> None:
    model = Does(lambda s, x: x @ draw(s), w=torch.randn(4, 4))
    gm = trace(model, (torch.randn(2, 4),)).graph_module
    before = [c for c in calls(gm) if "rand" in c or "uniform" in c or "bernoulli" in c]
    result = run(gm)
    assert says in [d.reason for d in result.declined]
    assert all("buffer" in d.hint for d in result.declined)
    assert [c for c in calls(gm) if "rand" in c or "uniform" in c or "bernoulli" in c] == before


def test_written_buffer_is_not_constant() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("n", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.n += 1
            return x * (self.n * 2)

    gm = trace(Counts(), (torch.ones(2, 4),)).graph_module
    result = run(gm)
    assert not result.applied
    assert [float(gm(torch.ones(2, 4))[0, 0]) for _ in range(3)] == [2.0, 4.0, 6.0]


def test_sizes_are_not_constant() -> None:
    model = Does(lambda s, x: x + torch.arange(x.shape[0]).unsqueeze(1) * s.w, w=torch.ones(4))
    gm = trace(model, (torch.zeros(2, 4),)).graph_module
    run(gm)
    assert gm(torch.zeros(5, 4))[:, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: (x, s.w * 2),
        lambda s, x: (x, (s.w * 2).reshape(-1)),
        lambda s, x: (s.w * 2, (s.w * 2)[:1]),
        lambda s, x: (x, s.w.t()),
    ],
)
def test_constant_output_is_a_tensor_of_its_own(function: Callable) -> None:
    model = Does(function, w=torch.randn(3, 3))
    x = torch.randn(2, 3)
    gm = trace(model, (x,)).graph_module
    run(gm)
    expected = [t.clone() for t in model(x)]
    with torch.no_grad():
        for out in gm(x)[1:] if gm(x)[0] is x else gm(x):
            if out.untyped_storage().data_ptr() != model.w.untyped_storage().data_ptr():
                out.fill_(9.0)
    for got, want in zip(gm(x), expected, strict=True):
        torch.testing.assert_close(got, want)
    assert not run(gm).modified


def test_a_stretched_output_keeps_its_strides_and_what_is_stretched_folds() -> None:
    model = Does(lambda s, x: (x, (s.w * 2).expand(4, 3)), w=torch.randn(1, 3))
    x = torch.randn(2, 3)
    gm = trace(model, (x,)).graph_module
    result = run(gm)
    assert [r.kinds for r in result.applied] == [("mul",)]
    out = gm(x)[1]
    assert out.stride() == (0, 1)
    torch.testing.assert_close(out.clone(), model(x)[1])
    out[0].fill_(9.0)
    torch.testing.assert_close(gm(x)[1], model(x)[1])


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: x @ s.w.expand(3, 3),
        lambda s, x: x @ (s.w * 2).t(),
        lambda s, x: x[:, :1] * torch.fft.fft(s.w).real,
        lambda s, x: x[:, :2] @ (s.w * 2).as_strided((2, 2), (1, 1)),
    ],
)
def test_the_graph_knows_the_strides_of_what_is_stored(function: Callable) -> None:
    model = Does(function, w=torch.randn(1, 3))
    x = torch.randn(2, 3)
    gm = trace(model, (x,)).graph_module
    assert run(gm).applied
    (stored,) = gm.graph.find_nodes(op="get_attr")
    held = constants.tensor(stored)
    fake = stored.meta["val"]
    for size, stride, known in zip(held.shape, held.stride(), fake.stride(), strict=True):
        assert size == 1 or stride == known != 0
    assert held.untyped_storage().nbytes() == held.nbytes
    torch.testing.assert_close(gm(x), model(x))


def test_strides_of_an_output_are_not_written_out() -> None:
    model = Does(lambda s, x: (x, (s.w * 2).as_strided((2, 2), (1, 1))), w=torch.randn(3))
    gm = trace(model, (torch.randn(2, 3),)).graph_module
    result = run(gm)
    assert [d.reason for d in result.declined] == ["the strides of an output would change"]
    assert gm(torch.randn(2, 3))[1].stride() == (1, 1)


def test_a_failure_costs_the_one_constant(
    monkeypatch: pytest.MonkeyPatch, failures: list[Decline]
) -> None:
    evaluate = fold_constants.evaluate_constants

    def failing(chosen: Sequence[fx.Node], **options: Any) -> dict[fx.Node, Tensor]:
        if any(op_name(node) == "mul" for node in chosen):
            raise ZeroDivisionError("planted")
        return evaluate(chosen, **options)

    monkeypatch.setattr(fold_constants, "evaluate_constants", failing)
    model = Does(lambda s, x: x * (s.w * 2) + (s.w + 1), w=torch.randn(3))
    x = torch.randn(2, 3)
    gm = trace(model, (x,)).graph_module
    result = run(gm)
    assert [r.kinds for r in result.applied] == [("add",)]
    (record,) = failures
    failures.clear()
    assert record in result.declined
    assert record.reason == "internal error: ZeroDivisionError: planted"
    torch.testing.assert_close(gm(x), model(x))


def test_nan_weights_fold_to_nan() -> None:
    model = weight_norm(torch.float32)
    with torch.no_grad():
        model.parametrizations.weight.original1[0, 0, 0, 0] = float("nan")
    gm = trace(model.eval(), (image(),)).graph_module
    x = image()
    own = gm(x)
    run(gm)
    assert torch.equal(gm(x).isnan(), own.isnan())
    assert own.isnan().any()


def test_what_cannot_be_evaluated_is_declined() -> None:
    model = Does(
        lambda s, x: x @ torch.linalg.cholesky(s.w) + s.b * 2, w=-torch.eye(3), b=torch.ones(3)
    )
    gm = trace(model, (torch.randn(2, 3),), dynamic_batch=False).graph_module
    result = run(gm)
    assert [r.kinds for r in result.applied] == [("mul",)]
    assert "cannot be evaluated" in result.declined[0].reason


# --- any constant expression ----------------------------------------------------------------------

STEPS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda a, b: a + b,
    lambda a, b: a * b,
    lambda a, b: a - b.mean(),
    lambda a, b: a / (b.abs() + 1),
    lambda a, b: a.t(),
    lambda a, b: torch.tanh(a),
    lambda a, b: a @ b,
    lambda a, b: torch.round(a * 4) / 4,
    lambda a, b: torch.where(a > b, a, b),
    lambda a, b: torch.cat([a[:2], b[2:]]),
    lambda a, b: a.flip(0).softmax(1),
    lambda a, b: F.pad(a[1:, 1:], (1, 0, 1, 0)),
]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, len(STEPS) - 1), st.integers(0, 9), st.integers(0, 9)),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_any_constant_expression(steps: list[tuple[int, int, int]], dtype: torch.dtype) -> None:
    def function(s: Does, x: Tensor) -> Tensor:
        values = [s.a, s.b]
        for step, i, j in steps:
            values.append(STEPS[step](values[i % len(values)], values[j % len(values)]))
        return x @ values[-1]

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4, 4, generator=generator, dtype=dtype) for _ in range(2))
    x = torch.randn(2, 4, generator=generator, dtype=dtype)
    gm, _ = folded(Does(function, a=a, b=b), x, F64 if dtype == torch.float64 else F32)
    assert calls(gm) == ["matmul"]


def test_golden() -> None:
    def function(s: Does, x: Tensor) -> Tensor:
        w = s.v / s.v.square().sum((1, 2, 3), keepdim=True).sqrt() * torch.tensor(2.0)
        return F.conv2d(x, w).relu()

    gm = trace(Does(function, v=torch.randn(5, 4, 3, 3)), (image(),)).graph_module
    before = render(gm)
    run(gm)
    golden.check("fold_constants", f"before:\n{before}\nafter:\n{render(gm)}")


def _waves(t: float, width: int = 32) -> Tensor:
    steps = torch.exp(-math.log(10000) * torch.arange(width, dtype=torch.float32) / width)
    return t * steps


TABLES: dict[str, Callable[..., Tensor]] = {
    "a step of diffusion": lambda s, x: x + torch.cat([_waves(5000).sin(), _waves(5000).cos()]),
    "rotary frequencies": lambda s, x: (
        x
        * torch.outer(torch.arange(4990, 5000.0), 1 / 10000 ** (torch.arange(0, 64) / 64))
        .cos()
        .amax(0)
    ),
    "complex rotary frequencies": lambda s, x: (
        x * torch.view_as_real(torch.polar(torch.ones(32), _waves(5000.0))).flatten()
    ),
    "of a buffer": lambda s, x: x * (5000 * s.f).sin(),
    "a ramp": lambda s, x: x + (torch.linspace(0, 1, 64) * 31415.9).sin(),
    "a tangent": lambda s, x: x + (torch.arange(64.0) * 100.7).tan().clamp(-1, 1),
    "positions that cancel": lambda s, x: x + (1e4 + s.f - 1e4),
    "times that add up": lambda s, x: x + torch.full((5000,), 0.1).cumsum(0)[-64:].sin(),
    "a large power": lambda s, x: x + torch.full((64,), 1.0001).pow(50000 + torch.arange(64)) / 200,
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tables_are_what_the_model_computes(name, dtype) -> None:
    """``sin(5000 * f)`` in float32 is 1e-4 away from the exact one; the model knows its own."""
    net = Does(TABLES[name], f=torch.rand(64)).to(dtype).eval()
    x = torch.randn(3, 64, dtype=dtype)
    gm = trace(net, (x,)).graph_module
    exact = Oracle(gm)(x)
    run(gm, max_growth=math.inf)
    assert len(calls(gm)) <= 2
    with torch.no_grad():
        want, got = net(x), gm(x)
    scale = float(want.abs().max())
    limit = 4 * torch.finfo(dtype).eps * scale
    assert float((got - want).abs().max()) <= limit
    assert float((want.double() - exact).abs().max()) <= limit, "the oracle has the same table"


def test_what_rounding_explains_is_computed_in_float64() -> None:
    net = Does(lambda s, x: x * F.normalize(s.w, dim=1), w=torch.randn(6, 6))
    gm, _ = folded(net, image())
    stored = next(b for n, b in gm.named_buffers() if n.startswith("folded"))
    assert torch.equal(stored, F.normalize(net.w.double(), dim=1).float())


def test_a_constant_that_overflows_stays_what_it_was() -> None:
    net = Does(lambda s, x: x * (s.w * 60000 / 60000), w=torch.full((6,), 2.0)).half()
    x = image(torch.float16)
    gm = trace(net, (x,)).graph_module
    run(gm, max_growth=math.inf)
    assert torch.equal(gm(x), net(x))
    assert gm(x).isinf().any()
