"""Quantised graphs: integers stay integers, what is exact folds, nothing crosses a quantiser."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.ao.quantization.fx import _decomposed  # registers the quantised operators

import refold
from refold.frontends.export import trace
from refold.graph import constants
from refold.graph.evaluate import Oracle
from refold.graph.ops import op_name
from refold.passes import PIPELINES
from refold.rewrite.result import Decline
from tests.compare import EXACT, relative_error
from tests.examples import few
from tests.folding import left, randomise_norms

assert _decomposed is not None
ops = torch.ops.quantized_decomposed

# Dequantised weights and their products are float32: a few roundings of 6e-8, relative to the
# largest output. A dropped sign, scale or zero point is at least 1e-3.
ROUNDING = 2e-6


def quantiser(x: torch.Tensor, scale: float = 0.02, zero: int = 120) -> torch.Tensor:
    """An activation through 8 bits."""
    q = ops.quantize_per_tensor(x, scale, zero, 0, 255, torch.uint8)
    return ops.dequantize_per_tensor(q, scale, zero, 0, 255, torch.uint8)


class Weight(nn.Module):
    """An 8-bit weight, dequantised in the graph."""

    def __init__(self, *shape: int, form: str = "channel", low: int = -127, zero: int = 0) -> None:
        super().__init__()
        self.form, self.low, self.zero = form, low, zero
        integers = torch.randint(low, 128, shape)
        integers[0].view(-1)[0] = low
        self.register_buffer("integers", integers.to(torch.int8))
        self.register_buffer("scales", torch.rand(shape[0]) / 500 + 0.001)
        self.register_buffer("zeros", torch.full((shape[0],), zero))
        self.floats = nn.Parameter(torch.randn(shape) / 8)

    def forward(self) -> torch.Tensor:
        q, limits = self.integers, (self.low, 127, torch.int8)
        if self.form == "tensor":
            return ops.dequantize_per_tensor(q, 0.002, self.zero, *limits)
        if self.form == "in the graph":
            q = ops.quantize_per_channel(self.floats, self.scales, self.zeros, 0, *limits)
        return ops.dequantize_per_channel(q, self.scales, self.zeros, 0, *limits)


class Layer(nn.Module):
    """``norm(layer(x))`` with a quantised weight."""

    def __init__(self, kind: str = "conv2d", *, bias: bool = True, **options: Any) -> None:
        super().__init__()
        self.kind = kind
        spatial = 0 if kind == "linear" else int(kind[4])
        self.weight = Weight(6, 3, *(3,) * spatial, **options)
        self.bias = nn.Parameter(torch.randn(6)) if bias else None
        norms = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        self.norm = norms[spatial](6)
        randomise_norms(self)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(getattr(F, self.kind)(x, self.weight(), self.bias))


class Around(nn.Module):
    """Functions around parts."""

    def __init__(self, forward: Any, **parts: Any) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)
        randomise_norms(self)
        self.eval()

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def folded(net: nn.Module, x: torch.Tensor) -> tuple[fx.GraphModule, str]:
    """Folds, compares with the float64 oracle of the original, returns the reasons."""
    with torch.no_grad():
        gm, original = (trace(net, (x,), {}).graph_module for _ in range(2))
        oracle = Oracle(original)
        result = PIPELINES["default"].run(gm, debug=True)
        batch_size = gm.graph.find_nodes(op="placeholder")[0].meta["val"].shape[0]
        # torch.export fixes the sizes of what torch.fake_quantize reads
        for batch in (2,) if isinstance(batch_size, int) else (1, 2, 3):
            probe = torch.randn(batch, *x.shape[1:])
            error = relative_error(gm(probe), oracle(probe))
            assert error <= ROUNDING, f"relative error {error:.1e}\n{gm.graph}"
    declined: list[Decline] = [d for r in result.runs for d in r.result.declined]
    return gm, "\n".join(f"{d.node}: {d.reason}" for d in declined)


def weight_of(gm: fx.GraphModule, name: str = "conv2d") -> tuple[torch.Tensor, ...]:
    """Integers, scales and zero points behind the one layer of the graph."""
    (layer,) = [n for n in gm.graph.nodes if n.op == "call_function" and op_name(n) == name]
    dequantise: Any = layer.args[1]
    assert op_name(dequantise) == "dequantize_per_channel"
    return tuple(constants.tensor(a) for a in dequantise.args[:3])


SIZES = {"conv1d": (3, 9), "conv2d": (3, 7, 6), "conv3d": (3, 5, 4, 5), "linear": (3,)}


@pytest.mark.parametrize("form", few(["channel", "tensor", "in the graph"], 4))
@pytest.mark.parametrize("kind", SIZES)
def test_a_norm_folds_into_the_scales(kind: str, form: str) -> None:
    net = Layer(kind, form=form)
    gm, _ = folded(net, torch.randn(2, *SIZES[kind]))
    counts = left(gm)
    assert counts == {counts_as(kind): 1, "dequantize-per-channel": 1}
    integers, scales, _ = weight_of(gm, kind)
    assert integers.dtype == torch.int8
    assert scales.dtype == torch.float32
    assert bool((scales > 0).all())


def counts_as(kind: str) -> str:
    return "linear" if kind == "linear" else "conv"


def test_without_a_bias_one_appears() -> None:
    gm, _ = folded(Layer(bias=False), torch.randn(2, 3, 7, 6))
    assert left(gm) == {"conv": 1, "dequantize-per-channel": 1}


def test_integers_change_their_sign_with_the_factor_and_nothing_else() -> None:
    net = Layer()
    net.norm.weight.data = torch.tensor([1.0, -1.0, 0.0, 2.0, 0.5, 1.0])
    gm, _ = folded(net, torch.randn(2, 3, 7, 6))
    integers, scales, _ = weight_of(gm)
    before = net.weight.integers
    assert torch.equal(integers[0], before[0])
    assert torch.equal(integers[1], -before[1])
    assert not integers[2].any()
    assert torch.equal(integers[3:], before[3:])
    expected = net.weight.scales[3] * 2 / (net.norm.running_var[3] + net.norm.eps).sqrt()
    assert scales[3] == pytest.approx(float(expected), rel=1e-6)
    assert scales[2] == net.weight.scales[2]


def test_a_zero_factor_leaves_zeros() -> None:
    net = Layer()
    net.norm.weight.data.abs_().add_(0.1)[2] = 0.0
    gm, _ = folded(net, torch.randn(2, 3, 7, 6))
    assert not weight_of(gm)[0][2].any()


@pytest.mark.parametrize("form", ["channel", "tensor"])
def test_the_oracle_dequantises_in_float64(form: str) -> None:
    weight = Weight(4, 3, form=form, low=-90, zero=5)
    net = Around(lambda s, x: F.linear(x, s.w()), w=weight)
    x = torch.randn(2, 3)
    with torch.no_grad():
        found = Oracle(trace(net, (x,), {}).graph_module)(x)
    scales = weight.scales.double()[:, None] if form == "channel" else 0.002
    exact = x.double() @ ((weight.integers.double() - 5) * scales).t()
    assert relative_error(found, exact) <= EXACT


def test_a_positive_factor_shares_the_integers() -> None:
    net = Layer()
    net.norm.weight.data.abs_().add_(0.1)
    gm, _ = folded(net, torch.randn(2, 3, 7, 6))
    assert weight_of(gm)[0].data_ptr() == net.weight.integers.data_ptr()


def test_a_zero_point_is_the_origin_of_the_sign() -> None:
    net = Layer(low=-100, zero=13)
    net.weight.integers.clamp_(-90, 120)  # the other side of 13 is within the limits
    net.norm.weight.data = torch.tensor([-1.0, -0.5, 0.0, 2.0, 0.5, 1.0])
    gm, _ = folded(net, torch.randn(2, 3, 7, 6))
    integers, _, zeros = weight_of(gm)
    assert torch.equal(integers[0].long(), 26 - net.weight.integers[0].long())
    assert bool((integers[2] == 13).all())
    assert bool((zeros == 13).all())


def test_a_sign_that_the_integers_cannot_take_is_declined() -> None:
    net = Layer(low=-128)
    net.norm.weight.data[0] = -1.0
    gm, reasons = folded(net, torch.randn(2, 3, 7, 6))
    assert left(gm)["batch-norm"] == 1
    assert "has a quantised weight that a negative scale would clip" in reasons


def test_a_whole_quantised_block_folds() -> None:
    net = Around(
        lambda s, x: quantiser(F.relu(s.b(quantiser(F.relu(s.a(quantiser(x))), 0.03, 0))), 0.05, 0),
        a=Layer(), b=Layer(),
    )  # fmt: skip
    net.b.weight = Weight(6, 6, 3, 3)
    folded_model = refold.fold(net, (torch.randn(2, 3, 12, 12),), expect={"batch-norm": 2})
    counts = left(folded_model.graph_module)
    assert counts["conv"] == 2
    assert counts["quantize-per-tensor"] == counts["dequantize-per-tensor"] == 3
    assert counts["dequantize-per-channel"] == 2


@pytest.mark.parametrize("size", [1, 48])  # below and above what constant folding calls small
def test_weights_stay_integers(size: int) -> None:
    net = Around(lambda s, x: F.conv2d(x, s.w()), w=Weight(size, size, 7, 7))
    gm, _ = folded(net, torch.randn(2, size, 8, 8))
    assert left(gm) == {"conv": 1, "dequantize-per-channel": 1}


def test_a_quantiser_of_a_weight_is_evaluated_bit_for_bit() -> None:
    net = Layer(form="in the graph")
    weight = net.weight
    net.norm.weight.data.abs_().add_(0.1)
    gm, _ = folded(net, torch.randn(2, 3, 7, 6))
    expected = ops.quantize_per_channel(
        weight.floats, weight.scales, weight.zeros, 0, -127, 127, torch.int8
    )
    assert torch.equal(weight_of(gm)[0], expected)


FAKES = {
    "per tensor": lambda s: torch.fake_quantize_per_tensor_affine(s.w, 0.02, 3, -128, 127),
    "per channel": lambda s: torch.fake_quantize_per_channel_affine(s.w, s.d, s.z, 0, -127, 127),
}


@pytest.mark.parametrize("fake", FAKES)
def test_a_trained_quantiser_of_a_weight_is_a_constant(fake: str) -> None:
    net = Around(
        lambda s, x: F.relu(s.bn(F.conv2d(x, FAKES[fake](s), padding=1))),
        w=torch.randn(6, 3, 3, 3), bn=nn.BatchNorm2d(6),
    )  # fmt: skip
    net.register_buffer("d", torch.rand(6) / 50 + 0.01)
    net.register_buffer("z", torch.zeros(6, dtype=torch.int32))
    gm, _ = folded(net, torch.randn(2, 3, 7, 6))
    assert left(gm) == {"conv": 1, "relu": 1}
    (conv,) = [n for n in gm.graph.nodes if n.op == "call_function" and op_name(n) == "conv2d"]
    constants.materialise_all(gm)
    bn = net.bn
    factor = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    exact = FAKES[fake](net).double() * factor.reshape(-1, 1, 1, 1)
    assert torch.equal(constants.tensor(conv.args[1]), exact.float()), "rounded once, on its grid"


@pytest.mark.parametrize("quantised", [pytest.param(True, marks=pytest.mark.slow), False])
def test_onnx_runtime_keeps_the_numbers(quantised: bool) -> None:
    """Float weights and biases between quantisers are not its to quantise."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    layer = Layer() if quantised else nn.Sequential(conv(), nn.BatchNorm2d(6))
    net = Around(lambda s, x: quantiser(F.relu(s.l(quantiser(x))), 0.02, 0), l=layer)
    compiled = refold.compile_for_inference(net, (torch.randn(2, 3, 8, 8),), target="ort")
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        assert relative_error(compiled(x), net(x)) <= ROUNDING


# -- what must not fold ----------------------------------------------------------------------------


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(3, 6, 3, **options)


NOTHING_CROSSES = {
    "batch norm after a quantised convolution": (
        lambda s, x: F.relu(s.bn(quantiser(s.c(x)))), "batch-norm",
        "dequantize_per_tensor gives integers their scale",
    ),
    "scale after a trained quantiser": (
        lambda s, x: torch.fake_quantize_per_tensor_affine(s.c(x), 0.02, 5, 0, 255) * s.g, "mul",
        "fake_quantize_per_tensor_affine rounds its input",
    ),
    "scale after a trained quantiser per channel": (
        lambda s, x: torch.fake_quantize_per_channel_affine(s.c(x), s.d, s.z, 1, 0, 255) * s.g,
        "mul", "fake_quantize_per_channel_affine rounds its input",
    ),
    "scale before a quantiser": (
        lambda s, x: s.c(quantiser(F.relu(x) * 3.0)), "mul",
        "quantize_per_tensor rounds its input",
    ),
    "sum of quantised branches": (
        lambda s, x: F.relu(quantiser(s.c(x)) + quantiser(s.e(x), 0.03)), "add", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NOTHING_CROSSES)
def test_nothing_crosses_a_quantiser_of_activations(case: str) -> None:
    forward, kind, reason = NOTHING_CROSSES[case]
    net = Around(
        forward, c=conv(), e=conv(), bn=nn.BatchNorm2d(6), g=torch.randn(6, 1, 1) + 2,
    )  # fmt: skip
    net.register_buffer("d", torch.rand(6) / 50 + 0.01)
    net.register_buffer("z", torch.full((6,), 120, dtype=torch.int32))
    gm, reasons = folded(net, torch.randn(2, 3, 7, 6))
    assert left(gm)[kind] == 1
    assert left(gm)["conv"] == (2 if "branches" in case else 1)
    assert reason in reasons


def test_branches_of_quantised_weights_stay_integers() -> None:
    """Their sum is on no grid: merged, the weight would be floats."""
    net = Around(
        lambda s, x: F.relu(F.conv2d(x, s.a(), padding=1) + F.conv2d(x, s.b())),
        a=Weight(6, 3, 3, 3), b=Weight(6, 3, 1, 1),
    )  # fmt: skip
    gm, _ = folded(net, torch.randn(2, 3, 7, 6))
    assert left(gm) == {"conv": 2, "add": 1, "relu": 1, "dequantize-per-channel": 2}


def test_a_float8_weight_has_one_scale_for_all_channels() -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        limits = (-448, 448, torch.float8_e4m3fn)
        result: torch.Tensor = s.bn(F.conv2d(x, ops.dequantize_per_tensor(s.w, 0.004, 0, *limits)))
        return result

    net = Around(forward, bn=nn.BatchNorm2d(6))
    net.register_buffer("w", (torch.randn(6, 3, 3, 3) * 50).to(torch.float8_e4m3fn))
    gm, reasons = folded(net, torch.randn(2, 3, 7, 6))
    assert left(gm)["batch-norm"] == 1
    assert "has a float8 weight" in reasons


def test_an_axis_of_the_inputs_takes_no_scale_of_the_outputs() -> None:
    net = Around(
        lambda s, x: s.bn(
            F.conv2d(
                x, ops.dequantize_per_channel(s.w.integers, s.d, s.z, 1, -127, 127, torch.int8)
            )
        ),
        w=Weight(3, 3, 3, 3), d=torch.rand(3) / 100, bn=nn.BatchNorm2d(3),
    )  # fmt: skip
    net.register_buffer("z", torch.zeros(3, dtype=torch.int64))
    gm, reasons = folded(net, torch.randn(2, 3, 7, 6))
    assert left(gm)["batch-norm"] == 1
    assert "conv2d" in reasons


def test_a_shared_weight_folds_for_each_of_its_readers() -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        w = s.w()
        return s.bn(F.conv2d(x, w)) * F.relu(F.conv2d(x, w, s.c))

    net = Around(forward, w=Weight(6, 3, 3, 3), c=torch.randn(6), bn=nn.BatchNorm2d(6))
    gm, _ = folded(net, torch.randn(2, 3, 7, 6))
    assert left(gm)["conv"] == 2
    assert "batch-norm" not in left(gm)


@settings(max_examples=8, deadline=None)
@given(
    kind=st.sampled_from(["conv1d", "conv2d", "linear"]),
    form=st.sampled_from(["channel", "tensor", "in the graph"]),
    zero=st.sampled_from([0, 0, 5, -9]),
    low=st.sampled_from([-127, -128, -90]),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_property_a_quantised_layer_stays_equal(
    kind: str, form: str, zero: int, low: int, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    net = Layer(kind, form=form, zero=zero, low=low, bias=bias)
    gm, reasons = folded(net, torch.randn(2, *SIZES[kind]))
    integers = [n for n in gm.graph.nodes if "dequantize" in n.name]
    assert len(integers) == 1
    assert "batch-norm" not in left(gm) or "would clip" in reasons
