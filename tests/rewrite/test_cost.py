"""What is cheaper: by a table where calls were measured, in every measure where nobody did."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import refold
from refold.backends.base import Target
from refold.backends.registry import find_target, target_names
from refold.graph import ops
from refold.passes.branches.fold_branches import FoldBranches
from refold.rewrite.context import Context
from refold.rewrite.cost import FREE, CostModel, Price, Rates, reference
from tests.folding import Net, image, run
from tests.tracing import trace

NOWHERE = Context(CostModel("somewhere"))


def test_a_price_of_several_measures_is_less_where_none_grows() -> None:
    now = Price((4.0, 2.0, 1.0))
    assert now.over(Price((3.0, 2.0, 1.0))) == 1.0
    assert now.over(Price((3.0, 2.0, 0.0))) == 2.0
    assert now.over(now) == 0.0
    assert now.over(Price((0.0, 0.0, 1.5))) == -0.5
    assert (FREE + now).parts == now.parts
    assert (2 * now).total == 14.0


def test_rounding_of_a_sum_is_no_growth() -> None:
    assert Price((0.1 + 0.2, 1.0)).over(Price((0.3, 0.5))) > 0
    assert Price((0.3, 1.0)).over(Price((0.1 + 0.2, 0.5))) > 0


def test_a_table_is_for_the_cpu_in_single_precision() -> None:
    costs = reference()
    for device, dtype, words in (
        ("cpu", torch.float32, None),
        ("cpu", torch.float64, None),
        ("cpu", torch.float16, "half precision"),
        ("cpu", torch.bfloat16, "half precision"),
        ("meta", torch.float32, "the CPU alone"),
    ):
        gm = trace(torch.relu, torch.ones(2, 3, dtype=dtype, device=device))
        (node,) = (n for n in gm.graph.nodes if n.op == "call_function")
        found = costs.at(node)
        assert (found.rates is None) == (found.layers is None) == (words is not None)
        assert words is None or (words in found.unmeasured and words in found.apart)
        assert len(found.of(node).parts) == (1 if words is None else 3)


def test_branches_of_one_input_are_one_anywhere() -> None:
    """Less arithmetic, traffic and calls: no table has to say so."""
    parts = {"a": nn.Conv2d(4, 4, 3, padding=1), "b": nn.Conv2d(4, 4, 1)}
    gm, declined = run(
        FoldBranches(), Net(lambda s, x: s.a(x) + s.b(x) + x, **parts), image(), context=NOWHERE
    )
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [
        torch.ops.aten.conv2d.default
    ]
    assert not declined


def narrow() -> Net:
    """A bottleneck: merged, it is one call of more operations."""
    return Net(lambda s, x: s.b(s.a(x)), a=nn.Conv2d(64, 4, 1), b=nn.Conv2d(4, 64, 3))


def test_more_arithmetic_for_fewer_calls_needs_a_table() -> None:
    gm, declined = run(FoldBranches(), narrow(), image(64), context=NOWHERE)
    assert sum(n.op == "call_function" for n in gm.graph.nodes) == 2
    (record,) = declined
    assert record.reason.endswith(
        "would take more arithmetic and memory traffic, and what calls cost on somewhere is not "
        "measured"
    )


def test_a_model_in_half_precision_is_not_folded_by_the_table_of_single() -> None:
    gm = trace(narrow().half(), image(64).half())
    (record,) = FoldBranches().run(gm).declined
    assert record.reason.endswith("what calls cost is not measured in half precision")


@pytest.mark.parametrize("name", target_names())
def test_each_target_says_what_calls_cost_on_it(name: str) -> None:
    costs = find_target(name).costs
    unmeasured = name in ("trt", "coreml")
    assert (costs.rates is None) == unmeasured, "give costs=cost.on_cpu(...), or list it here"
    assert (costs.layers is not None) == (name in ("torch", "inductor", "ort", "ort-format"))


def test_a_target_of_somebody_else_was_never_measured() -> None:
    class Mine(Target):
        name, suffix = "mine", ".mine"
        lower = load = save = stats = None

    assert Mine().costs == CostModel("mine")


@pytest.mark.slow
def test_the_target_hands_its_costs_to_the_passes() -> None:
    report = refold.compile_for_inference(
        narrow().float(), image(64).float(), target="trt", build=False
    ).report
    (record,) = (d for d in report.declined if d.rule == "fold-branches")
    assert "what calls cost on TensorRT is not measured" in record.reason


# --- what each call is counted as -----------------------------------------------------------------

F = torch.nn.functional
LANES = 16
MAP, ROWS = torch.randn(2, 8, 6, 5), torch.randn(3, 7, 8)


def last(forward, *inputs: torch.Tensor, **parts) -> torch.fx.Node:
    """The last call of a function of its parts and its inputs."""
    model = nn.Module()
    for name, part in parts.items():
        setattr(model, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)
    model.forward = lambda *given: forward(model, *given)
    calls = [n for n in trace(model, *inputs).graph.nodes if n.op == "call_function"]
    if ops.op_name(calls[-1]) == "squeeze" and len(calls) > 1:  # of a layer of one sample
        return calls[-2]
    return calls[-1]


def counted(node: torch.fx.Node) -> tuple[float, float, float]:
    """Operations, bytes and calls."""
    arithmetic, traffic, calls = CostModel("somewhere").of(node).parts
    return round(arithmetic * 1e5, 3), round(traffic * 5e4, 3), calls


def conv(inputs: int, outputs: int, kernel: int, **options) -> nn.Module:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


@pytest.mark.parametrize(
    ("node", "flops", "moved"),
    [
        # eight channels are computed as sixteen, up to four as they are; twenty as thirty-two
        (lambda: last(lambda s, x: s.c(x), MAP, c=conv(8, 16, 3)),
         2 * 60 * 16 * 16 * 9, 4 * (60 * 16 + 60 * 8 + 16 * 8 * 9)),
        (lambda: last(lambda s, x: s.c(x), MAP, c=conv(8, 20, 1)),
         2 * 60 * 32 * 16, 4 * (60 * 20 + 60 * 8 + 20 * 8)),
        (lambda: last(lambda s, x: s.c(x), MAP[:, :4], c=conv(4, 16, 1)),
         2 * 60 * 16 * 4, 4 * (60 * 16 + 60 * 4 + 16 * 4)),
        (lambda: last(lambda s, x: s.c(x), MAP[:, :5], c=conv(5, 17, 1)),
         2 * 60 * 32 * 16, 4 * (60 * 17 + 60 * 5 + 17 * 5)),
        (lambda: last(lambda s, x: s.c(x), MAP, c=conv(8, 12, 3, groups=2)),
         2 * 60 * 12 * 4 * 9, 4 * (60 * 12 + 60 * 8 + 12 * 4 * 9)),
        (lambda: last(lambda s, x: s.c(x), MAP, c=conv(8, 8, 3, groups=8)),
         2 * 60 * 16 * 9, 4 * (60 * 8 + 60 * 8 + 8 * 9)),
        (lambda: last(lambda s, x: s.c(x), MAP[:, :1], c=conv(1, 8, 3)),
         2 * 60 * 16 * 9, 4 * (60 * 8 + 60 + 8 * 9)),
        (lambda: last(lambda s, x: s.c(x), MAP.double(), c=conv(8, 16, 1).double()),
         2 * 60 * 16 * 16, 8 * (60 * 16 + 60 * 8 + 16 * 8)),
        (lambda: last(lambda s, x: s.c(x), MAP, c=conv(8, 16, 3, stride=2)),
         2 * 18 * 16 * 16 * 9, 4 * (18 * 16 + 60 * 8 + 16 * 8 * 9)),
        # turned round, and of another stride: each input writes its taps
        (lambda: last(lambda s, x: s.c(x), MAP, c=nn.ConvTranspose2d(8, 6, 3, 1, 1, groups=2)),
         2 * 60 * 6 * 4 * 9, 4 * (60 * 6 + 60 * 8 + 6 * 4 * 9)),
        (lambda: last(lambda s, x: s.c(x), MAP, c=nn.ConvTranspose2d(8, 6, 2, 2)),
         2 * 60 * 16 * 16 * 4, 4 * (60 * 8 + 60 * 8 + 8 * 6 * 4)),
        (lambda: last(lambda s, x: s.w @ x, ROWS, w=torch.randn(20, 7)),
         2 * 3 * 8 * 32 * 16, 4 * (3 * 20 * 8 + 3 * 7 * 8 + 20 * 7)),
        (lambda: last(lambda s, x: s.l(x), ROWS, l=nn.Linear(8, 5)),
         2 * 21 * 5 * 8, 4 * (21 * 13 + 5 * 8)),
        (lambda: last(lambda s, x: s.l(x), ROWS[0, 0], l=nn.Linear(8, 5)),
         2 * 5 * 8, 4 * (13 + 5 * 8)),
        (lambda: last(lambda s, x: x @ x.transpose(1, 2), ROWS),
         2 * 3 * 7 * 7 * 8, 4 * (21 * (7 + 8) + 7 * 8)),
        (lambda: last(lambda s, x: x @ x, ROWS[0, 0]), 2 * 8, 4 * (9 + 8)),
        (lambda: last(lambda s, x: x @ x[0], ROWS[0]), 2 * 7 * 8, 4 * (15 * 1 + 7 * 8)),
        (lambda: last(lambda s, x, y: torch.einsum("abc,cd,de->abe", x, y, y.t()),
                      ROWS, torch.randn(8, 5)),
         2 * (3 * 7 * 8 * 5 + 3 * 7 * 5 * 8), 4 * (3 * 7 * 8 + 3 * 7 * 8 + 40 + 40)),
        (lambda: last(lambda s, x: torch.einsum("abc->cb", x), ROWS), 0, 4 * (56 + 168)),
        (lambda: last(lambda s, x: x.relu(), MAP), 0, 4 * (480 + 480)),
        (lambda: last(lambda s, x: x + s.g, MAP, g=torch.randn(8, 1, 1)), 0, 4 * (480 + 8 + 480)),
        (lambda: last(lambda s, x: x > 0, MAP), 0, 480 + 480),
        (lambda: last(lambda s, x: torch.cat([x, x.relu()], 1), MAP), 0, 4 * (960 + 960)),
        (lambda: last(lambda s, x: x.repeat(1, 2, 1, 1), MAP), 0, 4 * (480 + 960)),
        (lambda: last(lambda s, x: F.avg_pool2d(x, (3, 2)), MAP), 0, 4 * (480 * 6 + 2 * 8 * 2 * 2)),
        (lambda: last(lambda s, i: s.e(i), torch.tensor([[1, 2, 3]]), e=nn.Embedding(9, 5)),
         0, 4 * (15 + 15)),
    ],
)  # fmt: skip
def test_operations_and_bytes_of_a_call(node, flops, moved) -> None:
    assert counted(node()) == (flops, moved, 1.0)


@pytest.mark.parametrize(
    "node",
    [
        lambda: last(lambda s, x: x.relu().reshape(-1), MAP),
        lambda: last(lambda s, x: x.relu().permute(0, 2, 3, 1), MAP),
        lambda: last(lambda s, x: x.relu().chunk(2, 1)[1], MAP),
        lambda: last(lambda s, x: x.relu(), MAP).args[0],
        lambda: last(lambda s, x: x[:, 0].sum().item() * 2, MAP).args[0],
    ],
)
def test_views_inputs_and_numbers_cost_nothing(node) -> None:
    assert CostModel("somewhere").of(node()) == FREE


RATES = Rates(
    conv_1x1=1.0, conv_kxk=2.0, conv_grouped=4.0, conv_depthwise=8.0, linear=16.0, launch=0.25
)


@pytest.mark.parametrize(
    ("shape", "per_group", "groups", "taps", "rate", "flops"),
    [
        ((1, 16, 5), 16, 1, (1,), 1.0, 2 * 5 * 256),
        ((1, 16, 5), 16, 1, (3,), 2.0, 2 * 5 * 256 * 3),
        ((1, 16, 5), 1, 1, (3,), 2.0, 2 * 5 * 16 * 3),
        ((1, 16, 5), 2, 2, (1,), 4.0, 2 * 5 * 16 * 2),
        ((1, 12, 5), 2, 2, (3,), 4.0, 2 * 5 * 12 * 2 * 3),
        ((1, 16, 5), 1, 16, (3,), 8.0, 2 * 5 * 16 * 3),
        ((1, 12, 5), 1, 2, (1,), 8.0, 2 * 5 * 16),
    ],
)
def test_families_of_convolutions_have_rates_of_their_own(
    shape, per_group, groups, taps, rate, flops
) -> None:
    price = CostModel("here", RATES).convolution(shape, shape, per_group, groups, taps, 4)
    assert price.parts == (pytest.approx(0.25 + flops / rate * 1e-3),)
    assert CostModel("here", RATES).matrix(3, 4, 5, 4).total == 0.25 + 120 / 16 * 1e-3


def test_a_call_takes_its_arithmetic_or_its_traffic_and_a_resize_its_own() -> None:
    slow = CostModel("here", Rates(linear=16.0, bytes=0.5, resize=2.0, launch=1.0))
    assert slow.matrix(3, 4, 5, 4).total == 1 + 4 * (3 * 9 + 20) / 0.5 * 1e-3
    assert slow.elementwise((2, 3), 2, 4).total == 1 + 4 * 18 / 0.5 * 1e-3
    assert slow.elementwise((2, 3), 2, 4, 7).total == 1 + 4 * 25 / 0.5 * 1e-3
    assert slow.resize((2, 3), (2, 1), 4).total == 1 + 4 * 8 / 2.0 * 1e-3
    up = last(lambda s, x: F.interpolate(x, scale_factor=2.0, mode="nearest"), MAP)
    assert slow.of(up).total == 1 + 4 * (480 + 4 * 480) / 2.0 * 1e-3


def test_what_is_said_of_a_dearer_price() -> None:
    here, nowhere = CostModel("here", RATES), CostModel("nowhere")
    told = here.dearer(Price((1.25,)), Price((2.0,)))
    assert told == "would cost 2.0 us instead of 1.2 us (cost table)"
    told = nowhere.dearer(Price((1.0, 1.0, 1.0)), Price((2.0, 1.0, 2.0)))
    assert told == (
        "would take more arithmetic and calls, and what calls cost on nowhere is not measured"
    )
    assert nowhere.apart == "what a call takes on nowhere is not known"
    given = CostModel("x", apart="they are apart", unmeasured="nobody looked")
    assert (given.apart, given.unmeasured) == ("they are apart", "nobody looked")


def test_prices_of_fewer_measures_have_none_of_the_others() -> None:
    assert (Price((1.0,)) + Price((1.0, 2.0))).parts == (2.0, 2.0)
    assert (Price((1.0, 2.0)) + Price((1.0,))).parts == (2.0, 2.0)
    assert Price((1.0, 2.0)).over(FREE) == 3.0
    assert FREE.total == 0.0
    # a share of 1e-9 is rounding, two of them are growth
    assert Price((1.0, 1.0)).over(Price((1.0 + 0.9e-9, 0.5))) > 0
    assert Price((1.0, 1.0)).over(Price((1.0 + 1.1e-9, 0.5))) < 0


def test_numbers_cost_the_same_anywhere() -> None:
    number = last(lambda s, x: x[:, 0].sum().item() * 2, MAP).args[0]
    assert not isinstance(number.meta["val"], torch.Tensor)
    assert reference().at(number) == reference()
