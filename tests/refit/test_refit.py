"""New weights in a folded model: equal to folding anew, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import refold
from refold.backends.onnx.recipe_file import refit_file
from refold.errors import RefitError, UsageError
from refold.graph import constants
from refold.refit.tape import Recorder
from tests.examples import few
from tests.models import adapters, branches, weights
from tests.randomise import randomise

MODELS = {**adapters.MODELS, **branches.MODELS, **weights.MODELS}
REFITTED = (
    "repvgg", "mobileone", "ssf vit", "lora transformer", "layerscale vit", "tied weights",
    "weight standardisation", "lora conv", "dbb", "acnet",
)  # fmt: skip


def with_weights(name: str, seed: int) -> nn.Module:
    """A model with random weights, none of them zero: dead channels are dropped from the graph."""
    torch.manual_seed(seed)
    case = MODELS[name]
    return randomise(case.build(), case.inputs(), seed, zeros=False)


class DoRALinear(nn.Module):
    """``m (W + B A) / ||W + B A||`` a row (Liu et al., DoRA, 2024)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.down = nn.Parameter(torch.randn(2, inputs))
        self.up = nn.Parameter(torch.randn(outputs, 2))
        self.magnitude = nn.Parameter(torch.rand(outputs) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        adapted = self.base.weight + self.up @ self.down
        scale = self.magnitude / adapted.norm(dim=1)
        return F.linear(x, scale[:, None] * adapted, self.base.bias)


class Hypernetwork(nn.Module):
    """A network that makes a convolution's weight from a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.make = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4 * 3 * 9))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.norm(F.conv2d(x, self.make(condition).view(4, 3, 3, 3), padding=1))


class Twin(nn.Module):
    """Two convolutions in a row: merged if the first's bias does not meet the second's border."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.inner, self.outer = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, padding=1)
        nn.init.constant_(self.inner.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x))


def conv_bn(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    return randomise(net, (torch.randn(4, 3, 8, 8),), seed)


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def assert_equal_folds(one: refold.CompiledModel, other: refold.CompiledModel) -> None:
    """Bit for bit."""
    ours, theirs = (constants.stored(m.graph_module) for m in (one, other))
    assert one.graph_module.code == other.graph_module.code
    assert ours
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("name", few(REFITTED, 5))
def test_refit_equals_folding_anew(name: str) -> None:
    case = MODELS[name]
    old, new = with_weights(name, 0), with_weights(name, 1)
    compiled = refold.fold(old, case.inputs(), recipe=True)
    before = {k: v.clone() for k, v in constants.stored(compiled.graph_module).items()}
    refitted = compiled.refit(new.state_dict())
    assert_equal_folds(refitted, refold.fold(new, case.inputs(), verify=False))
    assert refitted.report.numerics is not None
    assert refitted.report.numerics["inputs"] == 1
    # The model that was refitted is as it was.
    for key, value in constants.stored(compiled.graph_module).items():
        assert torch.equal(value, before[key]), key
    changed = constants.stored(refitted.graph_module)
    assert any(not torch.equal(changed[k], v) for k, v in before.items())


def test_refit_of_dora() -> None:
    x = torch.randn(2, 6)
    old, new = DoRALinear(6, 5), DoRALinear(6, 5)
    compiled = refold.fold(old, (x,), recipe=True)
    assert_equal_folds(compiled.refit(new), refold.fold(new, (x,)))


def test_refit_of_a_bound_condition_alone() -> None:
    model = randomise(Hypernetwork(), (IMAGE, torch.randn(1, 3))).eval()
    one, other = torch.randn(1, 3), torch.randn(1, 3)
    compiled = refold.fold(model, (IMAGE,), bind={"condition": one}, recipe=True)
    refitted = compiled.refit(bind={"condition": other})
    assert_equal_folds(refitted, refold.fold(model, (IMAGE,), bind={"condition": other}))
    assert torch.allclose(refitted(IMAGE), model(IMAGE, other), atol=1e-4)
    assert torch.allclose(compiled(IMAGE), model(IMAGE, one), atol=1e-4)


def test_refit_twice_and_of_some_weights() -> None:
    first, second = conv_bn(0), conv_bn(1)
    compiled = refold.fold(first, (IMAGE,), recipe=True)
    mixed = copy.deepcopy(second)
    mixed[3].load_state_dict(first[3].state_dict())
    chained = compiled.refit(second).refit(
        {k: v for k, v in first.state_dict().items() if k.startswith("3.")}, strict=False
    )
    assert_equal_folds(chained, refold.fold(mixed, (IMAGE,)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("0.weight"), "missing: '0.weight'"),
        (lambda s: s.update({"0.weigth": s["0.weight"]}), "no weight '0.weigth'.*'0.weight'"),
        (lambda s: s.update({"3.bias": torch.zeros(3)}), r"3.bias is \[2\].*got \[3\]"),
        (lambda s: s.update({"3.bias": torch.zeros(2).double()}), "3.bias is torch.float32"),
        (lambda s: s.update({"1.num_batches_tracked": torch.zeros(2)}), "num_batches_tracked"),
    ],
)
def test_keys_that_do_not_fit_are_named(change: Any, message: str) -> None:
    compiled = refold.fold(conv_bn(0), (IMAGE,), recipe=True)
    state = dict(conv_bn(1).state_dict())
    change(state)
    with pytest.raises(RefitError, match=message):
        compiled.refit(state)


def test_what_the_graph_does_not_read_may_be_missing() -> None:
    compiled = refold.fold(conv_bn(0), (IMAGE,), recipe=True)
    state = dict(conv_bn(1).state_dict())
    del state["1.num_batches_tracked"]
    compiled.refit(state)


def test_a_bias_that_was_zero_at_a_border_must_stay_zero() -> None:
    compiled = refold.fold(Twin(0.0), (IMAGE,), recipe=True)
    assert compiled.report.after.census["conv"] == 1
    assert_equal_folds(compiled.refit(new := Twin(0.0)), refold.fold(new, (IMAGE,)))
    with pytest.raises(RefitError, match=r"looked at inner\.bias; compile again"):
        compiled.refit(Twin(0.1))


def test_a_scale_that_passed_a_relu_must_stay_positive() -> None:
    class Scaled(nn.Module):
        def __init__(self, sign: float) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.scale = nn.Parameter((torch.rand(4) + 0.5) * sign)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.linear(x)) * self.scale

    x = torch.randn(2, 4)
    compiled = refold.fold(Scaled(1.0), (x,), recipe=True)
    assert compiled.report.after.nodes == 2
    assert_equal_folds(compiled.refit(new := Scaled(1.0)), refold.fold(new, (x,)))
    with pytest.raises(RefitError, match="scale"):
        compiled.refit(Scaled(-1.0))


def test_a_channel_that_was_dropped_must_stay_zero() -> None:
    def wide(seed: int) -> nn.Sequential:  # an eighth of the channels must go
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 17, 3), nn.ReLU(), nn.Conv2d(17, 2, 3)).eval()

    dead = wide(0)
    with torch.no_grad():
        dead[0].weight[1:4], dead[0].bias[1:4] = 0.0, 0.0
    compiled = refold.fold(dead, (IMAGE,), recipe=True)
    assert any(run.name == "drop-zero-channels" and run.applied for run in compiled.report.passes)
    with pytest.raises(RefitError, match=r"0\.weight"):
        compiled.refit(wide(1))


def test_weights_may_have_other_zeros_as_long_as_no_channel_goes() -> None:
    compiled = refold.fold(conv_bn(0), (IMAGE,), recipe=True)
    sparse = conv_bn(1)
    with torch.no_grad():
        sparse[0].weight[0, 0, :2] = 0.0
        sparse[3].weight[1, 0] = 0.0
    assert_equal_folds(compiled.refit(sparse), refold.fold(sparse, (IMAGE,)))


def test_tied_weights_must_stay_tied() -> None:
    case = MODELS["tied weights"]
    compiled = refold.fold(case.model(0), case.inputs(), recipe=True)
    state = dict(case.model(1).state_dict())
    state["second.weight"] = state["second.weight"] + 1
    with pytest.raises(RefitError, match="were one tensor"):
        compiled.refit(state)


def test_kept_weights_that_were_written_since_are_refused() -> None:
    model = conv_bn(0)
    compiled = refold.fold(model, (IMAGE,), recipe=True)
    with torch.no_grad():
        model[3].bias.add_(1)
    some = {"0.weight": conv_bn(1)[0].weight}
    with pytest.raises(RefitError, match=r"'3\.bias' was written after"):
        compiled.refit(some, strict=False)


def test_a_recipe_has_to_be_asked_for() -> None:
    model = conv_bn(0)
    with pytest.raises(UsageError, match="recipe=True"):
        refold.fold(model, (IMAGE,)).refit(model)
    with pytest.raises(UsageError, match="consume=True"):
        refold.fold(model, (IMAGE,), recipe=True, consume=True)


# --- the tape -------------------------------------------------------------------------------------


def taped(compute: Any, *sources: Tensor) -> Any:
    """Records a computation; returns what computes it again from other sources."""
    named = {str(i): t for i, t in enumerate(sources)}
    recorder = Recorder(named)
    with recorder:
        result = compute(*sources)
    tape = recorder.finish({"result": result})
    return lambda *others: tape.run({str(i): t for i, t in enumerate(others)})["result"]


def test_writes_in_place_and_through_views_are_computed_again() -> None:
    def compute(a: Tensor, b: Tensor) -> Tensor:
        out, other = torch.zeros(4, 3), torch.zeros(4, 3)  # alike, until one is written
        out[1:3] += a
        view = out.t()
        view.mul_(2)
        out[0] = b
        return out + 2 * other + out.sum() * b.new_ones(4, 1)

    again = taped(compute, torch.randn(2, 3), torch.randn(3))
    new = torch.randn(2, 3), torch.randn(3)
    for _ in range(2):  # a run leaves nothing behind
        assert torch.equal(again(*new), compute(*new))


@pytest.mark.parametrize(
    "look",
    [
        lambda t: bool((t > 0).all()),
        lambda t: t.sum().item(),
        lambda t: t.tolist(),
        lambda t: t.numpy().sum(),
        lambda t: torch.equal(t, torch.ones(3)),
        lambda t: t[t > 0].shape,
        lambda t: t.data.tolist(),
    ],
)
def test_every_look_at_a_value_is_an_assumption(look: Any) -> None:
    def compute(t: Tensor) -> Tensor:
        look(t * 1)
        return t + 1

    again = taped(compute, torch.ones(3))
    assert torch.equal(again(torch.ones(3)), torch.full((3,), 2.0))
    with pytest.raises(RefitError, match="looked at 0"):
        again(torch.tensor([1.0, -2.0, 3.0]))


def test_what_no_operator_call_shows_is_unknown() -> None:
    hidden = torch.ones(3)
    recorder = Recorder({"a": torch.ones(3)})
    recorder._kept["hidden"] = hidden
    with recorder:
        result = recorder._kept["a"] + hidden  # made before the recording, and no source
    assert recorder.finish({"result": result}).unknown == {"result"}


def test_steps_that_nothing_needs_are_dropped() -> None:
    recorder = Recorder({"a": (a := torch.ones(3))})
    with recorder:
        _ = a * 3
        result = a.detach() + 1
        _ = a + 1
    assert [str(s.op) for s in recorder.finish({"result": result}).steps] == ["aten.add.Tensor"]


# --- ONNX -----------------------------------------------------------------------------------------


def initializers(compiled: refold.CompiledModel) -> dict[str, Any]:
    model = compiled._compilation.artifact.content.model  # type: ignore[union-attr]
    return {n: v.const_value.numpy() for n, v in model.graph.initializers.items()}


def assert_equal_files(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert (value == theirs[name]).all(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["lora conv", *(pytest.param(n, marks=pytest.mark.slow) for n in ("ssf vit", "repvgg"))]
)
def test_onnx_refit_equals_a_fresh_export(name: str) -> None:
    pytest.importorskip("onnxruntime")
    case = MODELS[name]
    compiled = refold.compile_for_inference(
        with_weights(name, 0), case.inputs(), target="ort", recipe=True, verify=False
    )
    refitted = compiled.refit(with_weights(name, 1))
    fresh = refold.compile_for_inference(
        with_weights(name, 1), case.inputs(), target="ort", verify=False
    )
    assert_equal_files(initializers(refitted), initializers(fresh))
    assert refitted.report.numerics is not None
    with pytest.raises(AssertionError):
        assert_equal_files(initializers(compiled), initializers(fresh))


@pytest.mark.slow
@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: (x * 2, s.p * 3),
        lambda s, x: (s.p, x),
        lambda s, x: (x + s.p, s.p),
        lambda s, x: (s.p * 3, x, s.p * 3),
        lambda s, x: (x @ s.p.t(), s.p, s.p.t()),
        lambda s, x: torch.add(x, s.p, alpha=2),
        lambda s, x: torch.sub(s.p, x, alpha=3) + s.p,
    ],
)
def test_outputs_that_are_weights_are_refitted(forward: Callable[..., Any], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.randn(3, 3), requires_grad=False)

        def forward(self, x: Tensor) -> Any:
            return forward(self, x)

    x, net = torch.randn(3, 3), Net()
    compiled = refold.compile_for_inference(Net(), (x,), target="ort", recipe=True)
    path = compiled.save(tmp_path / "net.onnx")
    torch.testing.assert_close(compiled.refit(net)(x), net(x))
    fitted = refit_file(path, net.state_dict(), tmp_path / "new.onnx")
    session = onnxruntime.InferenceSession(fitted, providers=["CPUExecutionProvider"])
    results = session.run(None, {i.name: x.numpy() for i in session.get_inputs()})
    expected = net(x) if isinstance(net(x), tuple) else (net(x),)
    for got, want in zip(results, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(got), want)


@pytest.mark.slow
def test_weights_that_the_exporter_merged_are_refused() -> None:
    pytest.importorskip("onnxruntime")

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.LayerNorm(4), nn.LayerNorm(4)  # weights of one, biases of zero

        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(self.b(torch.sigmoid(self.a(x))))

    x = torch.randn(2, 4)
    compiled = refold.compile_for_inference(Two(), (x,), target="ort", recipe=True)
    with pytest.raises(RefitError, match="the exporter simplified"):
        compiled.refit(randomise(Two(), (x,)))


@pytest.mark.slow
def test_refit_of_a_file(tmp_path: Path, run: Any) -> None:
    pytest.importorskip("onnxruntime")
    safetensors = pytest.importorskip("safetensors.torch")
    import onnx_ir

    model = randomise(Hypernetwork(), (IMAGE, torch.randn(1, 3))).eval()
    new = randomise(Hypernetwork(), (IMAGE, torch.randn(1, 3)), seed=3).eval()
    one, other = torch.randn(1, 3), torch.randn(1, 3)
    compiled = refold.compile_for_inference(
        model, (IMAGE,), target="onnx", bind={"condition": one}, recipe=True
    )
    file = compiled.save(tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx.recipe").is_file()
    safetensors.save_file(new.state_dict(), tmp_path / "new.safetensors")
    safetensors.save_file({"condition": other}, tmp_path / "condition.safetensors")
    code, _, err = run(
        "refit", file, "--weights", tmp_path / "new.safetensors", "-o", tmp_path / "new.onnx",
        "--bind", f"condition={tmp_path / 'condition.safetensors'}",
    )  # fmt: skip
    assert code == 0, err
    stored = onnx_ir.load(tmp_path / "new.onnx").graph.initializers
    fresh = refold.compile_for_inference(
        new, (IMAGE,), target="onnx", bind={"condition": other}, verify=False
    )
    assert_equal_files({n: v.const_value.numpy() for n, v in stored.items()}, initializers(fresh))

    safetensors.save_file({"norm.bias": torch.zeros(4)}, tmp_path / "few.safetensors")
    code, _, err = run(
        "refit", file, "--weights", tmp_path / "few.safetensors", "-o", tmp_path / "x.onnx"
    )
    assert code == 1
    assert "missing" in err
    assert not (tmp_path / "x.onnx").exists()


def test_a_recipe_calls_nothing_but_operators_of_torch() -> None:
    from refold.backends.onnx import recipe_file

    for name in ("os.system.default", "aten.from_file.default", "aten.none_such.default"):
        with pytest.raises(UsageError, match="the recipe calls"):
            recipe_file._operator(name)
