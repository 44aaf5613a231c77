import gc
import re
import subprocess
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import refold
from refold.backends import base, registry
from refold.errors import (
    ExpectationError,
    FrontendError,
    MissingDependencyError,
    UsageError,
    VerificationError,
)
from refold.graph.ops import census
from tests.compare import SINGLE, relative_error
from tests.small_nets import (
    ConvNet,
    LateNorm,
    NothingToFold,
    Structured,
    Summed,
    assert_same,
    seeded,
    structured_call,
)

X = torch.randn(1, 3, 8, 8)


@pytest.fixture(scope="module")
def model():
    return seeded(ConvNet())


@pytest.fixture(scope="module")
def compiled(model):
    return refold.compile_for_inference(model, X)


# --- what comes out -------------------------------------------------------------------------------


def test_folded_graph_and_numbers(model, compiled):
    before, after = compiled.report.before.census, census(compiled.graph_module.graph)
    assert before["batch-norm"] == 1
    assert after["batch-norm"] == 0
    assert after["conv"] == 1
    for batch in (1, 2, 6):
        x = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(compiled(x), model(x))
    assert compiled.target == "torch"


def test_results_need_no_gradient(compiled):
    assert not compiled(X).requires_grad


def test_callers_model_and_inputs_stay_as_they_are():
    model = seeded(ConvNet()).train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x = X.clone()
    compiled = refold.compile_for_inference(model, x)
    assert model.training
    assert model.bn.training
    assert torch.equal(x, X)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert any("training mode" in note for note in compiled.report.notes)


def test_structure_in_and_out():
    model = seeded(Structured())
    args, kwargs = structured_call(1)
    wrapped = refold.compile_for_inference(_Keywords(model), {"x": args[0], **kwargs})
    for batch, reverse in ((1, False), (4, True)):
        args, kwargs = structured_call(batch, reverse)
        assert_same(wrapped(x=args[0], **kwargs), model(*args, **kwargs))
        # Traced by keyword, called by position: the model's own signature decides.
        assert_same(wrapped(args[0], kwargs["extra"]), model(*args, **kwargs))


class _Keywords(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, extra, mask=None):
        return self.inner(x, extra=extra, mask=mask)


def test_without_inputs_compiles_at_the_first_call(model):
    lazy = refold.compile_for_inference(model)
    with pytest.raises(UsageError, match="not compiled yet"):
        lazy.report  # noqa: B018
    assert "not compiled yet" in repr(lazy)
    torch.testing.assert_close(lazy(X), model(X))
    assert lazy.report.removed()["batch-norm"] == 1
    assert "ConvNet" in repr(lazy)


def test_exported_program_brings_its_inputs(model):
    program = torch.export.export(model, (torch.randn(2, 3, 8, 8),))
    folded = refold.fold(program)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(folded(x), model(x))
    assert folded.report.removed()["batch-norm"] == 1


def test_saved_program_is_a_model(model, tmp_path):
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(model, (torch.randn(2, 3, 8, 8),)), path)
    folded = refold.fold(path)
    assert folded.report.model == "net.pt2"
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(folded(str(path) and x), model(x))


def test_state_dict_map_names_the_sources(model, compiled):
    weights = compiled.state_dict_map()
    assert weights["head.weight"]["from"] == ["head.weight"]
    assert weights["head.weight"]["rules"] == []
    folded = {k: v for k, v in weights.items() if v["rules"]}
    (kernel,) = (v for v in folded.values() if len(v["shape"]) == 4)
    assert kernel["shape"] == (4, 3, 3, 3)
    assert {"conv.weight", "bn.weight", "bn.running_var"} <= set(kernel["from"])
    assert set(kernel["modules"]) == {"conv", "bn"}
    assert kernel["rules"] == ["fold-batch-norm"]
    scale = model.bn.weight / (model.bn.running_var + model.bn.eps).sqrt()
    torch.testing.assert_close(kernel["tensor"], model.conv.weight * scale.view(-1, 1, 1, 1))


def test_explain_is_a_dry_run(model):
    report = refold.explain(model, X)
    assert report.target is None
    assert report.numerics is None
    assert report.removed()["batch-norm"] == 1
    assert {"trace", "fold"} == set(report.timings)


def test_declined_fold_names_module_reason_and_line():
    report = refold.explain(seeded(LateNorm()), X)
    (declined,) = [d for d in report.declined if d.rule == "fold-batch-norm"]
    assert declined.module == "bn"
    assert declined.reason
    path, _, line = declined.source.rpartition(":")
    assert Path(path).name == "small_nets.py"
    assert "self.bn(" in Path(path).read_text().splitlines()[int(line) - 1]


def test_fold_that_a_later_pass_did_is_not_declined(compiled):
    remaining = {n.name for n in compiled.graph_module.graph.nodes}
    assert all(d.node in remaining for d in compiled.report.declined)


def test_exclude_keeps_a_module(model):
    folded = refold.fold(model, X, exclude=["bn"])
    assert folded.report.after.census["batch-norm"] == 1


def test_pipelines_by_value(model):
    nothing = refold.fold(model, X, pipeline=refold.Pipeline("nothing", ()))
    assert nothing.report.pipeline == "nothing"
    assert nothing.report.after == nothing.report.before


# --- expectations and verification ----------------------------------------------------------------


def test_expected_fold_is_met(model):
    assert refold.fold(model, X, expect={"batch-norm": 1}).report.removed()["batch-norm"] == 1


def test_missing_fold_says_how_many_and_why():
    with pytest.raises(ExpectationError) as error:
        refold.fold(seeded(LateNorm()), X, expect={"batch-norm": 1})
    text = str(error.value)
    assert "expected at least 1 batch-norm to go, 0 of 1 went" in text
    assert "declined bn: " in text
    assert "small_nets.py:" in text


def test_misspelled_kind_is_named(model):
    with pytest.raises(ExpectationError, match="did you mean 'batch-norm'"):
        refold.fold(model, X, expect={"batchnorm": 1})


@dataclass(frozen=True)
class _Wrong:
    """A pass with a bug: it halves a bias."""

    name: str = "wrong"
    exactness: str = "exact"

    def run(self, gm, context):
        for node in gm.graph.nodes:
            if node.op == "get_attr" and node.target == "head.bias":
                bias = gm.head.bias.detach() / 2
                delattr(gm.head, "bias")
                gm.head.register_buffer("bias", bias)
        return refold.PassResult(modified=True)


def test_wrong_numbers_are_an_error(model):
    pipeline = refold.Pipeline("wrong", (_Wrong(),))
    with pytest.raises(VerificationError, match="from the float64 reference"):
        refold.fold(model, X, pipeline=pipeline)
    assert refold.fold(model, X, pipeline=pipeline, verify=False).report.numerics is None


def test_artifact_is_verified_too(model):
    target = _Doubling()
    registry.register_target(target)
    try:
        with pytest.raises(VerificationError):
            refold.compile_for_inference(model, X, target="doubling", factor=2)
        fine = refold.compile_for_inference(model, X, target="doubling", factor=1)
        assert fine.report.artifact_numerics["passed"]
        assert fine.report.artifact == {"nodes": 1, "bytes": 0}
        with pytest.raises(UsageError, match="did you mean 'factor'"):
            refold.compile_for_inference(model, X, target="doubling", facto=1)
    finally:
        del registry._registered["doubling"]


@dataclass(frozen=True)
class _DoublingOptions:
    factor: int = 1


class _Doubling(base.Target):
    name, suffix, options = "doubling", ".bin", _DoublingOptions

    def lower(self, program, gm, options):
        return base.Artifact(gm)

    def load(self, artifact, options):
        return lambda *args: artifact.content(*args) * options.factor

    def save(self, artifact, folder, name):
        raise NotImplementedError

    def stats(self, artifact):
        return {"nodes": 1, "bytes": 0}


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "onx"}, "unknown target 'onx' \\(did you mean 'onnx'"),
        ({"target": "TensorRT"}, "unknown target 'TensorRT' \\(did you mean 'trt'"),
        ({"target": "torch", "opset": 20}, "target 'torch' has no option 'opset'"),
        ({"target": "onnx", "opst": 20}, "no option 'opst' \\(did you mean 'opset'"),
        ({"pipeline": "defaut"}, "unknown pipeline or pass 'defaut' \\(did you mean 'default'"),
        ({"exclude": ["bm"]}, "did you mean 'bn'"),
    ],
)
def test_unknown_names_suggest_the_nearest(model, settings, message):
    with pytest.raises(UsageError, match=message):
        refold.compile_for_inference(model, X, **settings)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c(X[0]), r"input 'x': expected 4 dimensions .* got 3 \[3, 8, 8\]"),
        (lambda c: c(torch.randn(1, 3, 9, 8)), "dimension 2 is 8 in the compiled model, got 9"),
        (lambda c: c(X.double()), "expected dtype torch.float32, got torch.float64"),
        (lambda c: c([[1.0]]), r"expected a tensor, got \[\[1.0\]\] \(list\)"),
        (lambda c: c(3), r"expected a tensor, got 3 \(int\)"),
        (lambda c: c("x" * 999), r"got 'x{79} \.\.\. \(str\)"),
        (lambda c: c(torch.zeros(1, 3, 8, 8).numpy()), r"numpy \[1, 3, 8, 8\]: torch.from_numpy"),
        (lambda c: c(), "missing a required argument: 'x'"),
        (lambda c: c(X, X), "too many positional arguments"),
        (lambda c: c(y=X), "the model was traced with 1 positional input"),
    ],
)
def test_calls_that_do_not_fit_the_trace(compiled, call, message):
    with pytest.raises(UsageError, match=message):
        call(compiled)


def test_equal_symbols_and_baked_constants():
    compiled = refold.compile_for_inference(Summed(), (torch.randn(2, 3), torch.randn(2, 3), 2))
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    torch.testing.assert_close(compiled(a, b, 2), (a + b) * 2)
    with pytest.raises(UsageError, match="dimension 0 must equal dimension 0 of 'x'"):
        compiled(a, b[:2], 2)
    with pytest.raises(UsageError, match="traced as the constant 2, got 3"):
        compiled(a, b, 3)
    # Left out, the model's default 1 is meant, not the traced 2.
    with pytest.raises(UsageError, match="traced as the constant 2, got 1"):
        compiled(a, b)


def test_bounds_of_dynamic_dimensions():
    shapes = {"x": {0: torch.export.Dim("rows", min=4, max=8)}}
    compiled = refold.compile_for_inference(
        NothingToFold(), torch.randn(5, 3), dynamic_shapes=shapes
    )
    assert compiled(torch.randn(8, 3)).shape == (8, 3)
    for rows in (3, 9):
        with pytest.raises(
            UsageError, match=f"dimension 0 must be from 4 to 8, as traced, got {rows}"
        ):
            compiled(torch.randn(rows, 3))


@pytest.mark.slow
def test_unfolded_weights_are_let_go():
    model = seeded(ConvNet())
    watched = [weakref.ref(model), weakref.ref(model.conv.weight)]
    compiled = refold.compile_for_inference(model, X)
    del model
    gc.collect()
    assert [w() for w in watched] == [None, None]
    assert compiled(X).shape == (1, 5)


def test_argument_that_was_not_traced():
    compiled = refold.compile_for_inference(Summed(), (torch.randn(2, 3), torch.randn(2, 3)))
    a = torch.randn(2, 3)
    torch.testing.assert_close(compiled(a, a, scale=1), 2 * a)
    with pytest.raises(UsageError, match="input 'scale' was not given when the model was traced"):
        compiled(a, a, scale=2)


@pytest.mark.parametrize(
    ("bad", "message"), [(3, "expected a torch.nn.Module"), (ConvNet, "instance")]
)
def test_not_a_module(bad, message):
    with pytest.raises(FrontendError, match=message):
        refold.compile_for_inference(bad, X)


def test_onnx_as_model_is_not_yet():
    with pytest.raises(FrontendError, match="not yet"):
        refold.compile_for_inference("net.onnx", X)


def test_explain_needs_inputs(model):
    with pytest.raises(UsageError, match="needs example_inputs"):
        refold.explain(model)


def test_unavailable_target_says_why(model, monkeypatch):
    from refold.backends.onnx.targets import OnnxTarget

    monkeypatch.setattr(
        OnnxTarget, "available", lambda self: "onnx is not installed: pip install x"
    )
    with pytest.raises(MissingDependencyError, match="'onnx' cannot be used here: onnx is not"):
        refold.compile_for_inference(model, X, target="onnx")


# --- the package ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_import_is_light():
    code = """
import sys, refold
optional = {"onnx", "onnxscript", "onnxruntime", "timm", "rich"}
assert not ({"torch"} | optional) & set(sys.modules), "import refold"
refold.compile_for_inference
assert not optional & set(sys.modules), "compiler"
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_public_names_exist():
    for name in refold.__all__:
        assert getattr(refold, name) is not None
    assert set(refold.__all__) == set(dir(refold))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        refold.nothing  # noqa: B018


def test_nothing_to_fold_says_so():
    text = refold.explain(NothingToFold(), torch.randn(2, 3)).render()
    assert "to fold: found no conv, linear or batch norm" in text


def test_a_trace_that_is_not_the_model_is_refused() -> None:
    class Elsewhere(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x if torch.compiler.is_exporting() else x + 1

    x = torch.randn(2, 4)
    with pytest.raises(VerificationError, match="the traced program is not the model"):
        refold.compile_for_inference(Elsewhere(), x)
    compiled = refold.compile_for_inference(Elsewhere(), x, verify=False)
    assert "the traced program is not the model" in str(compiled.report.notes)


@pytest.mark.slow
def test_padded_rows_of_a_fused_encoder_are_refused_until_it_is_not_fused() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 1).eval()
    inputs = {
        "src": torch.randn(2, 3, 8),
        "src_key_padding_mask": torch.tensor([[False, False, True], [False, False, False]]),
    }
    with pytest.raises(VerificationError, match="set_fastpath_enabled"):
        refold.compile_for_inference(model, inputs)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        compiled = refold.compile_for_inference(model, inputs)
        with torch.no_grad():
            assert relative_error(compiled(**inputs), model(**inputs)) <= SINGLE
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pipeline": None}, "pipeline is None: expected a name"),
        ({"pipeline": ["default"]}, "pipeline is"),
        ({"max_growth": "2"}, "max_growth is '2': expected 1"),
        ({"max_growth": True}, "max_growth is True"),
        ({"exclude": None}, "exclude is None: expected globs"),
        ({"exclude": [3]}, "exclude is"),
        ({"expect": {"conv": "x"}}, "expect is"),
        ({"expect": 3}, "expect is 3"),
        ({"target": None}, "target is None: expected a name"),
        ({"target": 3}, "target is 3"),
    ],
)
def test_settings_of_a_wrong_type_are_usage_errors(settings, said) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        refold.compile_for_inference(nn.Linear(2, 2), torch.randn(1, 2), **settings)
