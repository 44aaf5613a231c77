"""Linears of one input become one where that pays; what cannot be merged stays, and says why."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import refold
from refold.backends.registry import find_target
from refold.graph import printer, provenance
from refold.passes import PIPELINES
from refold.passes.branches.merge_parallel_layers import MergeParallelLayers
from refold.rewrite import cost
from refold.rewrite.context import Context
from refold.rewrite.cost import CostModel, LayerCosts, Price
from refold.rewrite.pipeline import Pipeline
from refold.rewrite.result import PassResult
from tests import golden
from tests.examples import examples, few
from tests.folding import Net, run
from tests.tracing import trace

MERGE = MergeParallelLayers()
WIDTH = 16


def linear(outputs: int = 8, inputs: int = WIDTH, **options) -> nn.Linear:
    return nn.Linear(inputs, outputs, **options)


def tokens(rows: int = 5, batch: int = 2) -> Tensor:
    return torch.randn(batch, rows, WIDTH, dtype=torch.float64)


def net(forward, **parts) -> Net:
    made = {"q": linear(), "k": linear(), "v": linear(12), "w": linear(8, bias=False)}
    return Net(forward, **{**made, **parts})


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


def gated(s: Net, x: Tensor) -> Tensor:
    return F.silu(s.q(x)) * s.w(x)


def linears(gm: fx.GraphModule) -> list[fx.Node]:
    names = ("linear", "mm", "addmm", "matmul", "einsum")
    return [
        n
        for n in gm.graph.nodes
        if n.op == "call_function"
        and getattr(n.target, "_opname", "") in names
        and any(a.op == "get_attr" for m in n.all_input_nodes for a in (m, *m.all_input_nodes))
    ]


def widths(gm: fx.GraphModule) -> list[int]:
    """Features of what the linears give, in order."""
    return [int(n.meta["val"].shape[-1]) for n in linears(gm)]


REFERENCE = cost.reference()


def merged(
    model: nn.Module, *args: Tensor, costs: CostModel = REFERENCE
) -> tuple[fx.GraphModule, PassResult]:
    gm = trace(model, *args)
    return gm, Pipeline("test", (MERGE,)).run(gm, Context(costs), debug=True).runs[0].result


class FreeProducts(CostModel):
    """Products take nothing but their call."""

    def of(self, node: fx.Node) -> Price:
        return Price((self.rates.launch,))


def free(call: float, bias: float, part: float) -> CostModel:
    return FreeProducts("test", REFERENCE.rates, LayerCosts(call, bias, part))


def test_golden() -> None:
    model = net(gated)
    before = printer.render(trace(model, tokens(), dynamic=True))
    after, _ = run(MERGE, model, tokens())
    golden.check("merge_parallel_layers", f"{before}\n---\n{printer.render(after)}")


FORMS = {
    "q k v": (lambda s, x: attended(s.q(x), s.k(x), s.v(x)), [28]),
    "heads": (
        lambda s, x: torch.cat([attended(*(p(x) for p in h)) for h in s.heads], -1),
        [48],
    ),
    "a bias here and there": (lambda s, x: s.w(x).tanh() * s.q(x).tanh(), [16]),
    "no bias": (lambda s, x: (x @ s.w.weight.t()).tanh() + F.linear(x, s.k.weight).tanh(), [16]),
    "addmm": (
        lambda s, x: (
            torch.addmm(s.q.bias, t := x.flatten(0, 1), s.q.weight.t()).exp() + s.k(t).tanh()
        ).view_as(x[..., :8]),
        [16],
    ),
    "einsum": (
        lambda s, x: torch.einsum("bti,oi->bto", x, s.q.weight).tanh() + s.k(x).tanh(),
        [16],
    ),
    "two inputs": (
        lambda s, x: (s.q(x) + s.k(x)).tanh() * (s.w(y := x.sin()) + s.l(y)).tanh(),
        [16, 16],
    ),
    "split heads": (
        lambda s, x: F.scaled_dot_product_attention(
            *(p(x).view(x.shape[0], -1, 2, 4).transpose(1, 2) for p in (s.q, s.k, s.w))
        ).transpose(1, 2).flatten(2),
        [24],
    ),
    "of another layer": (lambda s, x: s.o(t := s.q(x)).tanh() * s.m(t).tanh(), [8, 6]),
}  # fmt: skip


@pytest.mark.parametrize("name", few(FORMS, 5))
def test_linears_of_one_input_are_one(name: str) -> None:
    forward, expected = FORMS[name]
    heads = nn.ModuleList(nn.ModuleList(linear() for _ in range(3)) for _ in range(2))
    model = net(forward, l=linear(), o=linear(3, 8), m=linear(3, 8), heads=heads)
    after, _ = run(MERGE, model, tokens())
    assert widths(after) == expected
    again = MERGE.run(after)
    assert not again.modified


def test_the_record_names_the_layers_and_the_nodes_their_origin() -> None:
    gm, result = merged(net(gated), tokens())
    (record,) = result.applied
    assert record.kinds == ("linear", "linear")
    assert record.modules == ("q", "w")
    assert "q, w" in record.detail
    assert record.figures["predicted us after"] < 0.9 * record.figures["predicted us before"]
    (layer,) = linears(gm)
    assert provenance.of(layer)["modules"] == ["q", "w"]
    assert provenance.value_of(layer) == ""
    parts = [n for n in gm.graph.nodes if n.name.startswith("getitem")]
    assert [provenance.value_of(n) for n in parts] == list(record.removed)


def test_weights_are_stored_once_and_as_they_were() -> None:
    model = net(gated)
    gm, _ = merged(model, tokens())
    stored = dict(gm.named_buffers())
    weight, bias = (stored[next(n for n in stored if n.endswith(e))] for e in ("weight", "bias"))
    assert torch.equal(weight, torch.cat([model.q.weight, model.w.weight]))
    assert torch.equal(bias, torch.cat([model.q.bias, torch.zeros(8)]))
    assert len(stored) == 2
    assert not list(gm.parameters())


def wide(s: Net, x: Tensor) -> Tensor:
    return torch.stack([h(x).sum(-1) for h in (s.q, s.k, s.w, s.big)])


def test_a_layer_that_outweighs_its_call_stays_out() -> None:
    model = net(wide, big=linear(1 << 16))
    gm, result = merged(model, tokens())
    assert widths(gm) == [24, 1 << 16]
    assert "big" not in result.applied[0].modules


def test_a_cost_that_does_not_pay_is_said_with_both_figures() -> None:
    model = net(lambda s, x: s.a(x).sum() + s.b(x).sum(), a=linear(1 << 14), b=linear(1 << 14))
    gm, result = merged(model, tokens())
    assert len(widths(gm)) == 2
    (record,) = result.declined
    assert record.reason.startswith("on torch one layer instead of 2 would save")
    assert " us: " in record.reason


def test_the_margin_decides() -> None:
    """Calls of 10 us, products of nothing: two layers save 10 less two parts, of 20."""
    for part, taken in ((3.9, True), (4.1, False)):
        gm, _ = merged(net(gated), tokens(), costs=free(call=10.0, bias=0.0, part=part))
        assert (len(widths(gm)) == 1) is taken, part


def test_a_bias_is_a_call_more() -> None:
    costs = replace(REFERENCE, layers=LayerCosts(call=1.0, bias=10.0, part=1.0))
    model = net(lambda s, x: s.q(x).tanh() * s.k(x).tanh() + s.w(x).tanh())
    gm, _ = merged(model, tokens(), costs=costs)
    assert widths(gm) == [16, 8], "the layer without a bias gains nothing"


def test_the_merged_layer_adds_a_bias_too() -> None:
    costs = replace(REFERENCE, layers=LayerCosts(call=1.0, bias=10.0, part=4.6))
    gm, _ = merged(net(lambda s, x: s.q(x).tanh() * s.k(x).tanh()), tokens(), costs=costs)
    assert widths(gm) == [8, 8], "22 us, less two parts and a layer of 11"


def test_parts_of_many_rows_are_copied() -> None:
    costs = FreeProducts("test", REFERENCE.rates, REFERENCE.layers)
    for rows, count in ((5, 1), (20000, 2)):
        gm, _ = merged(net(gated), tokens(rows), costs=costs)
        assert len(widths(gm)) == count


def test_another_device_stays() -> None:
    gm = trace(net(gated).to("meta"), tokens().to("meta"))
    (record,) = MERGE.run(gm).declined
    assert "measured on the CPU alone" in record.reason


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("openvino", "slower"),
        ("trt", "TensorRT merges"),
        ("onnx", "target 'ort'"),
        ("executorch", "what a call takes on executorch is not known"),
        ("coreml", "what a call takes on coreml is not known"),
    ],
)
def test_a_target_without_costs_merges_nothing_and_says_so_once(target: str, words: str) -> None:
    costs = find_target(target).costs
    gm, result = merged(net(FORMS["two inputs"][0], l=linear()), tokens(), costs=costs)
    assert widths(gm) == [8] * 4
    (record,) = result.declined
    assert record.reason.startswith("4 layers that read 2 tensors stay apart")
    assert words in record.reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays(dtype: torch.dtype) -> None:
    gm, result = merged(net(gated).to(dtype), tokens().to(dtype))
    assert widths(gm) == [8, 8]
    assert "half precision" in result.declined[0].reason


def test_single_precision_is_merged() -> None:
    gm, _ = merged(net(gated).float(), tokens().float())
    assert widths(gm) == [16]


def test_a_layer_alone_is_nothing_to_talk_of() -> None:
    for costs in (REFERENCE, CostModel("somewhere")):
        _, result = merged(net(lambda s, x: s.q(x)), tokens(), costs=costs)
        assert not result.declined
        assert not result.modified


KEPT = {
    "outputs": (lambda s, x: (s.q(x), s.k(x)), "the caller gets"),
    "rows of outputs": (lambda s, x: (s.q(x)[0, 0], s.k(x)[0, 0]), "the caller gets"),
    "one output": (lambda s, x: (s.q(x).sum(), s.k(x).transpose(0, 1)), "the caller gets"),
    "a view": (lambda s, x: s.q(x).view(-1).exp() + s.k(x).view(-1).exp(), "view"),
    "strides that are read": (
        lambda s, x: (s.q(x).as_strided((3,), (2,)) + s.k(x).as_strided((3,), (2,))).exp(),
        "depends on the strides",
    ),
    "one weight": (
        lambda s, x: F.linear(x, s.q.weight).tanh() + F.linear(x, s.q.weight, s.k.bias).tanh(),
        "q.weight is read elsewhere",
    ),
    "a weight of something else": (
        lambda s, x: (s.q(x) * s.k(x)).sum() + s.q.weight.sum() + s.k.weight.sum(),
        "read elsewhere",
    ),
    "a bias of something else": (
        lambda s, x: F.linear(x, s.q.weight, s.q.bias).tanh() + F.linear(x, s.k.weight, s.q.bias),
        "q.bias is read elsewhere",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_cannot_be_merged_says_why(name: str) -> None:
    forward, words = KEPT[name]
    model = net(forward)
    names = {n for n, _ in trace(model, tokens()).named_buffers()}
    gm, result = merged(model, tokens())
    assert widths(gm) == [8, 8]
    assert not result.modified
    assert any(words in d.reason for d in result.declined), result.declined
    assert {n for n, _ in gm.named_buffers()} == names, "what was tried is gone"


def test_other_inputs_stay_apart() -> None:
    gm, result = merged(net(lambda s, x: s.q(x).tanh() * s.k(x.sin()).tanh()), tokens())
    assert widths(gm) == [8, 8]
    assert not result.declined


def test_a_weight_of_another_dtype_or_that_is_computed_stays() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        return s.q(x).tanh() + F.linear(x, s.k.weight * x.sum()).tanh()

    gm, _ = merged(net(forward), tokens())
    assert widths(gm)[0] == 8
    assert len(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)) == 2


def test_what_is_written_between_the_layers_is_read_when_it_was() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("state", torch.randn(2, WIDTH))
            self.a, self.b = linear(), linear()

        def forward(self, x: Tensor) -> Tensor:
            view = self.state.transpose(0, 1).transpose(0, 1)
            first = self.a(view).tanh()
            self.state.add_(x)
            return first + self.b(view).tanh()

    result = MERGE.run(trace(Writes(), torch.randn(2, WIDTH)))
    assert not result.modified
    assert "the graph writes" in result.declined[0].reason


def test_what_the_caller_does_not_get_is_merged_without_it() -> None:
    model = net(lambda s, x: (s.q(x), attended(s.k(x), s.w(x), s.v(x))))
    gm, result = merged(model, tokens())
    assert sorted(widths(gm)) == [8, 28]
    assert [d.module for d in result.declined] == ["q"]


def test_an_excluded_layer_stays() -> None:
    gm = trace(net(lambda s, x: attended(s.q(x), s.k(x), s.v(x))), tokens())
    PIPELINES["default"].run(gm, Context(exclude=("k",)))
    assert sorted(widths(gm)) == [8, 20]


@pytest.mark.slow
def test_the_target_decides() -> None:
    model = net(gated).float()
    x = tokens().float()
    for target, count in (("torch", 1), ("onnx", 2)):
        done = refold.compile_for_inference(model, x, target=target)
        assert done.report.after.census["linear"] == count


def test_new_weights_go_into_the_merged_layer() -> None:
    model, other = net(gated).float(), net(gated).float()
    x = tokens().float()
    done = refold.fold(model, x, recipe=True)
    assert done.report.after.census["linear"] == 1
    torch.testing.assert_close(done.refit(other.state_dict())(x), other(x))


def test_torch_compile_merges_for_what_runs_the_graph() -> None:
    from refold.torch_compile import backend as torch_compile

    def costs(**options) -> str:
        return torch_compile._BackendSettings(**options).costs.name

    assert costs() == "inductor"
    assert costs(inner="eager") == "torch"
    assert costs(inner=lambda gm, inputs: gm) == "another compiler"


def test_torch_compile_merges_nothing_for_a_compiler_that_nobody_measured() -> None:
    seen: list[int] = []

    def inner(gm: fx.GraphModule, inputs: list[Tensor]) -> fx.GraphModule:
        seen.append(len(linears(gm)))
        return gm

    with torch.no_grad():
        torch.compile(net(gated).float(), backend=refold.backend(inner=inner))(tokens().float())
    assert seen == [2]


@examples(25)
@given(
    layers=st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=2, max_size=5),
    shape=st.sampled_from([(), (1,), (3,), (2, 3)]),
    readers=st.lists(st.integers(0, 3), min_size=5, max_size=5),
    dynamic=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_layers_of_one_input_keep_their_numbers(layers, shape, readers, dynamic, seed) -> None:
    torch.manual_seed(seed)

    def forward(s: Net, x: Tensor) -> list[Tensor]:
        read = (
            lambda t: t.sin(),
            lambda t: t.sum(-1),
            lambda t: t,
            lambda t: t.unsqueeze(-1) @ t.unsqueeze(-2),
        )
        return [read[r](layer(x)) for layer, r in zip(s.layers, readers, strict=False)]

    made = nn.ModuleList(linear(outputs, bias=bias) for outputs, bias in layers)
    run_all(Net(forward, layers=made), torch.randn(2, *shape, WIDTH, dtype=torch.float64), dynamic)


def run_all(model: nn.Module, x: Tensor, dynamic: bool) -> None:
    gm = trace(model, x, dynamic=dynamic)
    Pipeline("test", (MERGE,)).run(gm, debug=True)
    for batch in (2, 3) if dynamic else (2,):
        probe = torch.randn(batch, *x.shape[1:], dtype=x.dtype)
        for got, expected in zip(gm(probe), model(probe), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
            assert got.stride() == expected.stride()
