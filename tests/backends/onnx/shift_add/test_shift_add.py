"""Shift-add layers in ONNX, ONNX Runtime and TensorRT's ONNX file, against the operator itself."""

from __future__ import annotations

import json
from collections import Counter

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import refold
from refold.backends.onnx.session import open_session
from refold.backends.onnx.shift_add import check, choice, rewrite
from refold.errors import UsageError, VerificationError
from refold.ops.bcq_linear import dequantise, pack, reference

FLOAT, INT8 = 1e-6, 1e-2  # relative L2 of one layer, by class


class Layer(nn.Module):
    def __init__(self, bits, features, size, outputs=48, *, family="uniform", bias=True):
        super().__init__()
        groups = -(-features // size)
        self.register_buffer("planes", pack(torch.randn(bits, outputs, features)))
        alpha = torch.rand(bits, outputs, groups).sort(0, descending=True)[0] + 0.1
        if family == "uniform":
            alpha = alpha[:1].half()
        elif family == "integers":  # two thirds of them are not what a uniform grid has
            alpha = torch.arange(bits, 0, -1)[:, None, None] * alpha[:1].half().float()
        self.register_buffer("alpha", alpha)
        self.bias = nn.Parameter(torch.randn(outputs)) if bias else None
        self.size = size

    def forward(self, x):
        return torch.ops.refold.bcq_linear(x, self.planes, self.alpha, self.bias, self.size)

    def exact(self, x):
        bias = None if self.bias is None else self.bias.detach().double()
        return reference(x.double(), self.planes, self.alpha, bias, self.size)


class Parallel(nn.Module):
    """Layers of several widths, each on the part of its input that it takes."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.features = [layer.planes.shape[2] * 8 for layer in layers]

    def forward(self, x):
        return [f(x[..., :k]) for f, k in zip(self.layers, self.features, strict=True)]


class Shared(nn.Module):
    """Query, key and value of one tensor, and a layer of their product."""

    def __init__(self, bits, *, width=64, size=32, family="uniform"):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (
            Layer(bits, width, size, width, family=family, bias=b)
            for b in (True, False, True, True)
        )

    def forward(self, x):
        x = self.norm(x)
        return self.out(torch.relu(self.q(x)) * torch.sigmoid(self.k(x)) + self.v(x))


def compiled(model, x, target="ort", **options):
    torch.manual_seed(0)
    return refold.compile_for_inference(model.eval(), x, target=target, **options)


def apart(got, expected):
    return float((got.detach().double() - expected).norm() / expected.norm())


def saved(made, folder, **session):
    """The file, and what a session makes of it."""
    path = made.save(folder / "net.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    level = str(session.get("accuracy_level", 4))
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return onnx.load(path), onnx.load(folder / "optimised.onnx")


def operators(model):
    return Counter(n.op_type for n in model.graph.node)


def stored(model):
    return sum(len(t.SerializeToString()) for t in model.graph.initializer)


# --- numbers --------------------------------------------------------------------------------------


SIZES = (32, 64, 128)


@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize(
    ("sizes", "families"),
    [
        ((64,), ("uniform",)),
        pytest.param(SIZES, ("uniform", "integers"), marks=pytest.mark.slow),
    ],
)
def test_every_width_and_group_is_the_operator(sizes, families, level, tmp_path):
    torch.manual_seed(0)
    layers = [
        Layer(bits, features, size, family=family)
        for bits in (1, 2, 3, 4)
        for size in sizes
        for features in (256, 200)
        for family in families
    ]
    model = Parallel(layers)
    x = torch.randn(3, 5, 256)
    made = compiled(model, x, accuracy_level=level, verify=False)
    for batch in (1, 4):
        x = torch.randn(batch, 5, 256)
        for layer, k, got in zip(layers, model.features, made(x), strict=True):
            error = apart(got, layer.exact(x[..., :k]))
            assert error <= (FLOAT if level == 0 else INT8), (layer.planes.shape, layer.size)
    fused = operators(saved(made, tmp_path, accuracy_level=level)[1])
    assert fused["MatMulNBits"] == len(layers)
    assert "DequantizeLinear" not in fused


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_general_scales_become_a_function(bits, tmp_path):
    torch.manual_seed(0)
    layers = [Layer(bits, k, s, family="any") for s, k in ((32, 256), (64, 200), (128, 200))]
    model = Parallel(layers)
    x = torch.randn(2, 256)
    made = compiled(model, x)
    for layer, k, got in zip(layers, model.features, made(x), strict=True):
        assert apart(got, layer.exact(x[..., :k])) <= FLOAT
    file, _ = saved(made, tmp_path)
    assert [f.name for f in file.functions] == ["BCQLinear"]
    assert file.opset_import[0].version == 20
    (note,) = [n for n in made.report.notes if "BCQLinear" in n]
    assert "not integers times one unit" in note
    assert "in memory ONNX Runtime makes them dense" in note
    onnx.checker.check_model(file, full_check=True)
    # The planes are in the file, the weights are not.
    assert max(len(t.raw_data) for t in file.graph.initializer) == layers[0].planes.numel()


@pytest.mark.slow
def test_half_precision_models():
    torch.manual_seed(0)
    model, x = Shared(2).half(), torch.randn(2, 3, 64).half()
    made = compiled(model, x)
    exact = compiled(Shared.float(model), x.float(), target="torch", verify=False)(x.float())
    assert apart(made(x), exact.double()) <= 2 * INT8


# --- what is written ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("features", [256, 200])
@pytest.mark.parametrize(("bits", "level", "limit"), [(2, 4, INT8), (4, 0, FLOAT)])
def test_matrices_add_the_correction_as_they_multiply(bits, level, limit, features, tmp_path):
    torch.manual_seed(0)
    layer, x = Layer(bits, features, 64), torch.randn(2, features)
    made = compiled(layer, x, accuracy_level=level)
    for batch in (1, 5):
        x = torch.randn(batch, features)
        assert apart(made(x), layer.exact(x)) <= limit
    found = operators(saved(made, tmp_path)[0])
    assert (found["MatMul"], found["Gemm"], found["Add"]) == (1, 1, 1)  # the bias is added apart


@pytest.mark.slow
@pytest.mark.parametrize(("size", "form"), [(192, "DequantizeLinear"), (40, "BCQLinear")])
def test_groups_that_no_block_has(size, form, tmp_path):
    """Several blocks share a group's scale; where none divides it, each plane gets its own."""
    torch.manual_seed(0)
    layer, x = Layer(3, 400, size), torch.randn(2, 400)
    made = compiled(layer, x, accuracy_level=0)
    assert apart(made(x), layer.exact(x)) <= FLOAT
    assert operators(saved(made, tmp_path)[0])[form] == 1


@pytest.mark.slow
def test_matrices_of_half_precision():
    torch.manual_seed(0)
    layer, x = Layer(2, 256, 64), torch.randn(2, 256)
    made = compiled(layer.half(), x.half())
    assert apart(made(x.half()), layer.exact(x.half())) <= 2 * INT8


@pytest.mark.slow
def test_two_bits_share_their_group_sums(tmp_path):
    made = compiled(Shared(2), torch.randn(2, 3, 64))
    file, optimised = saved(made, tmp_path)
    found = operators(file)
    assert found["DequantizeLinear"] == 4
    assert found["ReduceSum"] == 2  # one for q, k and v, one for what follows
    assert found["MatMul"] == 8
    weights = [n.input[0] for n in file.graph.node if n.op_type == "DequantizeLinear"]
    assert len(set(weights)) == 4
    assert operators(optimised)["MatMulNBits"] == 4
    assert file.opset_import[0].version == 25
    assert any("opset 25 instead of 20" in n for n in made.report.notes)
    onnx.checker.check_model(file, full_check=True)


@pytest.mark.slow
def test_three_bits_need_no_group_sums(tmp_path):
    made = compiled(Shared(3), torch.randn(2, 3, 64))
    file, optimised = saved(made, tmp_path)
    found = operators(file)
    assert found["DequantizeLinear"] == found["MatMul"] == 4
    assert "ReduceSum" not in found
    assert file.opset_import[0].version == 21
    assert operators(optimised)["MatMulNBits"] == 4
    assert any("3-bit codes stored in 4" in n for n in made.report.notes)


@pytest.mark.slow
def test_groups_that_end_early_pad_the_sums_alone(tmp_path):
    made = compiled(Parallel([Layer(2, 200, 64), Layer(2, 200, 64)]), torch.randn(2, 256))
    found = operators(saved(made, tmp_path)[0])
    assert found["Pad"] == found["ReduceSum"] == 1
    assert found["DequantizeLinear"] == 2


@pytest.mark.slow
def test_the_origin_of_each_product_is_kept(tmp_path):
    made = compiled(Shared(2), torch.randn(2, 3, 64))
    file, _ = saved(made, tmp_path)
    products = [n for n in file.graph.node if n.op_type == "DequantizeLinear"]
    told = [{p.key: p.value for p in n.metadata_props} for n in products]
    assert [t["refold.modules"] for t in told] == ["q", "k", "v", "out"]
    assert {t["refold.exactness"] for t in told} == {choice.INT8_ACTIVATIONS}
    assert all("test_shift_add.py" in t["refold.source"] for t in told)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "least"), [(2, 12.5), (3, 7.5), (4, 7.0)])
def test_the_file_and_the_session_are_small(bits, least, tmp_path):
    torch.manual_seed(0)
    layer = Layer(bits, 1024, 128, 1024, bias=False)
    made = compiled(layer, torch.randn(2, 1024), verify=False)
    dense = 4 * 1024 * 1024
    assert made.report.artifact["bytes"] <= dense / least
    for model in saved(made, tmp_path):
        assert stored(model) <= 1.01 * dense / least
        floats = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
        assert max(len(t.raw_data) for t in floats) < dense / 100


# --- what is chosen -------------------------------------------------------------------------------


def choose(bits, size, *, features=512, level=4, dtype=torch.float32, family="uniform", ask=None):
    layer = Layer(bits, features, size, 4, family=family)
    kernels = choice.onnx_runtime(level, ask)
    return choice.choose(layer.planes, layer.alpha, features, size, dtype, kernels)


@pytest.mark.parametrize(
    ("bits", "size", "level", "width", "block"),
    [
        (2, 128, 4, 2, 128),
        (2, 256, 4, 2, 128),  # a block of 256 would run in float, 20 times slower
        (2, 512, 4, 2, 128),
        (2, 16, 4, 4, 16),  # as would one of 16: four bits
        (2, 48, 4, 4, 16),
        (2, 128, 0, 4, 128),  # without int8 activations two bits have no kernel
        (3, 128, 4, 4, 128),
        (3, 128, 0, 4, 128),
        (4, 512, 4, 4, 256),
        (4, 24, 4, 0, 0),  # no power of two from 16 on divides it
    ],
)
def test_widths_and_blocks(bits, size, level, width, block):
    found = choose(bits, size, level=level)
    assert (found.bits, found.block) == (width, block)


def test_one_group_of_any_size_is_cut_into_blocks():
    found = choose(2, 200, features=200)
    assert (found.bits, found.block) == (2, 128)


def test_eight_bits_are_not_taken_without_int8_activations():
    assert choose(4, 64, family="integers").bits == 4  # 4, 3, 2, 1: halves of 10
    wide = Layer(2, 256, 64, 4)
    wide.alpha = torch.tensor([99.0, 1.0])[:, None, None] * torch.ones(2, 4, 4)
    given = (wide.planes, wide.alpha, 256, 64, torch.float32)
    assert choice.choose(*given, choice.onnx_runtime(4)).bits == 8
    refused = choice.choose(*given, choice.onnx_runtime(0))
    assert refused.exactness == choice.FUNCTION
    assert "past 4 bits" in refused.reason


def test_scales_that_the_dtype_cannot_hold_are_declined():
    layer = Layer(2, 64, 32, 4)
    for factor in (1e6, 1e-6):
        found = choice.choose(
            layer.planes, layer.alpha.float() * factor, 64, 32, torch.float16,
            choice.onnx_runtime(4),
        )  # fmt: skip
        assert found.exactness == choice.FUNCTION
        assert "range of torch.float16" in found.reason
    assert choose(2, 32, dtype=torch.bfloat16).exactness == choice.FUNCTION


@pytest.mark.parametrize("width", [4, 8])
def test_rounding_is_done_on_request_alone_and_named(width):
    assert choose(3, 64, family="any").exactness == choice.FUNCTION
    found = choose(3, 64, family="any", ask=width)
    assert (found.bits, found.exactness) == (width, choice.REQUANTISED)
    assert choose(3, 64, ask=width).exactness == choice.INT8_ACTIVATIONS  # exact where it can be


@pytest.mark.slow
def test_rounded_layers_are_measured():
    made = compiled(Shared(3, family="any"), torch.randn(2, 3, 64), requantise=4)
    assert any("4 shift-add layers of 3 bits" in n for n in made.report.notes)
    (moved,) = [n for n in made.report.notes if n.startswith("requantised weights")]
    assert "moved by at most" in moved
    assert made.report.artifact_numerics["passed"]


@pytest.mark.parametrize("options", [{"requantise": 3}, {"accuracy_level": 2}])
def test_unknown_options(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        compiled(Shared(2), torch.randn(2, 3, 64), **options)


# --- checks ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("level", [0, 4])
def test_a_wrong_code_is_found(level, monkeypatch):
    real = rewrite._codes

    def wrong(layer):
        codes = real(layer)
        codes.codes[3, 5] += 1 if codes.codes[3, 5] < 0 else -1
        return codes

    monkeypatch.setattr(rewrite, "_codes", wrong)
    with pytest.raises(VerificationError):
        compiled(Shared(3), torch.randn(2, 3, 64), accuracy_level=level)


@pytest.mark.slow
def test_a_wrong_kernel_is_found(monkeypatch):
    """The dense weights are right, what the kernels return is not."""
    from refold.backends.onnx import session as backend

    real = backend.run_session

    def wrong(session, tensors):
        results = real(session, tensors)
        names = [o.name for o in session.get_outputs()]
        if len(names) > 1:  # the session that shows what each layer returns
            results[-1] = results[-1] * 1.03
        return results

    monkeypatch.setattr(backend, "run_session", wrong)
    with pytest.raises(VerificationError, match="accuracy_level=0"):
        compiled(Shared(2), torch.randn(2, 3, 64))


@pytest.mark.slow
def test_the_cost_of_int8_activations_is_told():
    made = compiled(Shared(2), torch.randn(2, 3, 64))
    (told,) = [n for n in made.report.notes if n.startswith("int8 activations")]
    assert "of a layer (" in told
    assert made.report.artifact_numerics["error"] > 1e-4
    exact = compiled(Shared(2), torch.randn(2, 3, 64), accuracy_level=0)
    assert exact.report.artifact_numerics["error"] < 1e-5
    assert not any("int8 activations cost" in n for n in exact.report.notes)


@pytest.mark.slow
def test_outliers_past_the_bound_are_named_not_refused():
    model = Shared(2)
    with torch.no_grad():
        model.norm.weight[3] = 300.0
        model.q.planes[:, :, 0] = model.k.planes[:, :, 0] = 0x55
    made = compiled(model, torch.randn(2, 3, 64))
    assert any("as their range explains" in n for n in made.report.notes)


@pytest.mark.slow
def test_dense_sessions_compute_in_floats(tmp_path):
    torch.manual_seed(0)
    layer, x = Layer(4, 256, 64), torch.randn(2, 256)
    made = compiled(layer, x, verify=False)
    path = made.save(tmp_path / "net.onnx")
    (got,) = open_session(path, dense=True).run(None, {"x": x.numpy()})
    assert apart(torch.from_numpy(got), layer.exact(x)) <= FLOAT


# --- TensorRT's file and the others ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_tensorrt_gets_int4_without_zero_points(bits, tmp_path):
    made = compiled(Shared(bits), torch.randn(2, 3, 64), target="trt", build=False)
    assert made.report.artifact_numerics["error"] < 1e-5
    folder = made.save(tmp_path / "net.trt")
    file = onnx.load(folder / "model.onnx")
    quantised = [n for n in file.graph.node if n.op_type == "DequantizeLinear"]
    assert [len(n.input) for n in quantised] == [2] * 4
    kinds = {t.name: t.data_type for t in file.graph.initializer}
    assert {kinds[n.input[0]] for n in quantised} == {onnx.TensorProto.INT4}
    assert json.loads((folder / "build.json").read_text())["opset"] == 21


@pytest.mark.slow
def test_tensorrt_gets_floats_or_what_was_asked_for(tmp_path):
    model, x = Shared(3, family="any"), torch.randn(2, 3, 64)
    dense = compiled(model, x, target="trt", build=False)
    assert any("dense float weights, because its scales" in n for n in dense.report.notes)
    assert dense.report.artifact_numerics["error"] < 1e-5
    rounded = compiled(model, x, target="trt", build=False, requantise=4)
    assert any("requantised weights" in n for n in rounded.report.notes)
    assert rounded.report.artifact["bytes"] < dense.report.artifact["bytes"] / 3
    with pytest.raises(UsageError, match="requantise 8"):
        compiled(model, x, target="trt", build=False, requantise=8)


def test_a_graph_without_such_layers_is_written_as_before(tmp_path):
    made = compiled(nn.Linear(8, 4), torch.randn(2, 8))
    file, _ = saved(made, tmp_path)
    assert file.opset_import[0].version == 20
    assert {o.domain for o in file.opset_import} == {""}
    assert check.check(made._compilation.artifact.content, None, None, 4).notes == ()


@pytest.mark.slow
def test_the_function_is_the_operator_in_other_runtimes(tmp_path):
    """ONNX's own reference implementation, which shares nothing with ONNX Runtime."""
    from onnx.reference import ReferenceEvaluator

    torch.manual_seed(0)
    layer, x = Layer(3, 40, 16, 6, family="any"), torch.randn(2, 40)
    made = compiled(layer, x)
    file = onnx.load(made.save(tmp_path / "net.onnx"))
    (got,) = ReferenceEvaluator(file).run(None, {"x": x.numpy()})
    assert apart(torch.tensor(got), layer.exact(x)) <= FLOAT
    weight = dequantise(layer.planes, layer.alpha, 40, 16, torch.float64)
    assert apart(torch.tensor(got) - layer.bias, x.double() @ weight.t()) <= 2 * FLOAT
