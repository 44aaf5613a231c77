"""``torch.compile(model, backend="refold")``, compared with eager; Inductor in the slow tests."""

from __future__ import annotations

import copy
import gc
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import refold
from refold.backends.pytorch import inductor
from refold.errors import UsageError
from refold.graph.ops import census
from refold.passes import PIPELINES
from refold.rewrite.context import Context
from refold.torch_compile import backend as torch_compile
from tests.compare import SINGLE, call, double, relative_error
from tests.examples import few
from tests.models import counts
from tests.models.timm_networks import NETWORKS, network
from tests.small_nets import ConvNet, seeded

HALF = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float32: SINGLE, torch.float64: 1e-12}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch_compile._warn_once.cache_clear()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
    torch._dynamo.reset()


class Inner:
    """An inner backend that runs eagerly and keeps what it was given."""

    def __init__(self) -> None:
        self.graphs: list[dict[str, int]] = []
        self.modules: list[torch.fx.GraphModule] = []

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs.append(dict(census(gm.graph)))
        self.modules.append(gm)
        return gm

    @property
    def norms(self) -> list[int]:
        return [g.get("batch-norm", 0) for g in self.graphs]


def compiled(model: Any, **options: Any) -> tuple[Any, Inner]:
    inner = Inner()
    dynamic = options.pop("dynamic", None)
    backend = refold.backend(inner=inner, **options)
    return torch.compile(model, backend=backend, dynamic=dynamic), inner


def check(fast: Any, model: Any, *inputs: Any, dtype: torch.dtype = torch.float32) -> None:
    expected = model(*[i.clone() for i in inputs])
    got = fast(*[i.clone() for i in inputs])
    assert relative_error(got, expected) <= HALF[dtype]


def image(batch: int = 2, size: int = 8) -> torch.Tensor:
    return torch.randn(batch, 3, size, size)


class Conv(nn.Module):
    """conv, batch norm, relu in place, linear."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 4)
        seeded(self, seed)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True).mean((2, 3))

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.features(x))


# --- folding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_folds(mode: Any) -> None:
    model = Conv()
    fast, inner = compiled(model)
    with mode():
        for batch in (2, 3, 1, 5):
            check(fast, model, image(batch))
    assert set(inner.norms) == {0}


def test_parameters_are_never_written_or_copied() -> None:
    model = Conv()
    before = copy.deepcopy(model.state_dict())
    given: list[torch.Tensor] = []

    def inner(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        given.extend(gm.parameters())
        return gm

    with torch.no_grad():
        torch.compile(model, backend=refold.backend(inner=inner))(image())
    assert any(p is model.head.weight for p in given)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_excluded_modules_stay() -> None:
    model = Conv()
    fast, inner = compiled(model, exclude="b*")
    with torch.no_grad():
        check(fast, model, image())
    assert inner.norms == [1]


def test_exclude_may_match_in_one_graph_of_several() -> None:
    fast, inner = compiled(Broken(), exclude="second")
    with torch.no_grad():
        fast(image())
    assert inner.norms == [0, 1]


# --- usage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline": "defualt"}, "did you mean 'default'"),
        ({"inner": "inducter"}, "did you mean 'inductor'"),
    ],
)
def test_wrong_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        refold.backend(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"piplines": "default"}, "did you mean 'pipeline'"),
        ({"max_autotun": True}, "did you mean 'max_autotune'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    fast = torch.compile(Conv(), backend=torch_compile.compile_graph, options=options)
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message):
        fast(image())


def test_options_reach_the_backend() -> None:
    inner = Inner()
    options = {"inner": inner, "exclude": ["bn"], "max-autotune": True}
    fast = torch.compile(Conv(), backend=torch_compile.compile_graph, options=options)
    with torch.no_grad():
        fast(image())
    assert inner.norms == [1]


def test_entry_point_is_announced() -> None:
    from importlib.metadata import entry_points

    names = [e.name for e in entry_points(group="torch_dynamo_backends")]
    if "refold" not in names:
        pytest.skip("refold is not installed")
    assert "refold" in torch._dynamo.list_backends()
    model = Conv()
    fast = torch.compile(model, backend="refold", options={"inner": "eager"})
    with torch.no_grad():
        check(fast, model, image())


# --- weights that change --------------------------------------------------------------------------


def _optimizer_step(model: Conv) -> Conv:
    with torch.enable_grad():
        model(image()).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return model


def _fused_step(model: Conv) -> Conv:
    with torch.enable_grad():
        model(image()).sum().backward()
    version = model.conv.weight._version
    torch.optim.SGD(model.parameters(), lr=0.1, fused=True).step()
    assert model.conv.weight._version == version, "if torch counts it, the observer can go"
    return model


def _load(model: Conv) -> Conv:
    model.load_state_dict(Conv(7).state_dict())
    return model


def _assign(model: Conv) -> Conv:
    model.load_state_dict(Conv(7).state_dict(), assign=True)
    return model


def _reassign(model: Conv) -> Conv:
    model.conv.weight = nn.Parameter(torch.randn_like(model.conv.weight))
    return model


def _data(model: Conv) -> Conv:
    model.conv.weight.data = torch.randn_like(model.conv.weight)
    return model


def _buffer(model: Conv) -> Conv:
    model.bn.running_mean.add_(1)
    return model


def _statistics(model: Conv) -> Conv:
    version = model.bn.running_mean._version
    model.train()(image())
    assert model.bn.running_mean._version == version, "if torch counts it, the comparison can go"
    return model.eval()


def _new_buffer(model: Conv) -> Conv:
    model.bn.running_var = torch.rand(4) + 0.5
    return model


def _new_module(model: Conv) -> Conv:
    model.bn = Conv(9).bn
    return model


def _lora(model: Conv) -> Conv:
    down, up = torch.randn(1, 27), torch.randn(4, 1)
    model.conv.weight.add_((up @ down).reshape(4, 3, 3, 3))
    return model


def _rounded(model: Conv) -> Conv:
    return model.bfloat16().float()


def _second(model: Conv) -> Conv:
    return Conv(5)


CHANGES = [
    _optimizer_step, _fused_step, _load, _assign, _reassign, _data, _buffer, _statistics,
    _new_buffer, _new_module, _lora, _rounded, _second,
]  # fmt: skip


@pytest.mark.parametrize("native", few(["1", "0"], 1))
@pytest.mark.parametrize("change", few(CHANGES, 7), ids=lambda c: c.__name__.strip("_"))
def test_changed_weights_are_noticed(
    change: Callable[[Conv], Conv], native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFOLD_NATIVE", native)
    inner = Inner()
    run = torch.compile(lambda m, x: m(x), backend=refold.backend(inner=inner))
    model = Conv()
    x = image()
    with torch.no_grad():
        old = run(model, x).clone()
        model = change(model)
        for _ in range(3):
            got = run(model, x)
            assert relative_error(got, model(x)) <= SINGLE
            assert relative_error(got, old) > 2e-4, "the change makes no difference"
    assert set(inner.norms) == {0}, "folded again"


def test_an_address_cannot_come_back() -> None:
    model = Conv()
    first = model.conv.weight.data_ptr()
    fast, _ = compiled(model)
    with torch.no_grad():
        fast(image())
        for _ in range(200):
            model.conv.weight.data = torch.randn(4, 3, 3, 3)
            assert model.conv.weight.data_ptr() != first
        check(fast, model, image())


def test_variants_are_kept_and_not_folded_again() -> None:
    models = [Conv(s) for s in range(3)]
    inner = Inner()
    run = torch.compile(lambda m, x: m(x), backend=refold.backend(inner=inner))
    with torch.no_grad():
        for model in models * 2:
            run(model, image())
            run(model, image())
        count = len(inner.graphs)
        for model in models * 5:
            x = image()
            assert relative_error(run(model, x), model(x)) <= SINGLE
    assert len(inner.graphs) == count


def test_weights_that_never_rest_are_not_folded_each_time() -> None:
    model = Conv()
    fast, inner = compiled(model)
    with torch.no_grad():
        for _ in range(20):
            check(fast, model, image())
            model.conv.weight.mul_(1.1)
    assert len(inner.graphs) == 1


def test_folding_ends_after_many_changes_with_a_warning() -> None:
    model = Conv()
    fast, inner = compiled(model)

    def change_often() -> None:
        for _ in range(12):
            for _ in range(2):
                check(fast, model, image())
            model.conv.weight.mul_(1.1)

    with torch.no_grad(), pytest.warns(UserWarning, match="changed too often"):
        change_often()
    assert len(inner.graphs) == torch_compile._FOLDS


@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.data.mul_(2),
        lambda p: p.detach().numpy().__imul__(2),
        lambda p: p.data.copy_(p.data.flip(0)),
    ],
    ids=["data", "numpy", "exchange"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_checksum_finds_writes_without_a_trace(write: Any, dtype: torch.dtype) -> None:
    model = Conv().to(dtype)
    fast, _ = compiled(model, checksum=True)
    with torch.no_grad():
        check(fast, model, image().to(dtype), dtype=dtype)
        write(model.conv.weight)
        for _ in range(3):
            check(fast, model, image().to(dtype), dtype=dtype)


@pytest.mark.parametrize(
    "change",
    few(
        [_optimizer_step, _fused_step, _assign, _reassign, _new_buffer, _new_module, _second], 3
    ),
    ids=lambda c: c.__name__.strip("_"),
)  # fmt: skip
def test_frozen_still_notices_other_parameters_and_steps(change: Callable[[Conv], Conv]) -> None:
    run = torch.compile(lambda m, x: m(x), backend=refold.backend(inner=Inner(), frozen=True))
    model = Conv()
    with torch.no_grad():
        run(model, image())
        model = change(model)
        for _ in range(3):
            x = image()
            assert relative_error(run(model, x), model(x)) <= SINGLE


def test_frozen_does_not_read_the_parameters() -> None:
    model, x = Conv(), image()
    fast, _ = compiled(model, frozen=True)
    with torch.no_grad():
        old = fast(x)
        model.conv.weight.mul_(2)
        assert torch.equal(fast(x), old)


@pytest.mark.parametrize("frozen", [False, True])
def test_only_frozen_calls_pass_no_parameters(frozen: bool, monkeypatch: Any) -> None:
    passed: list[int] = []
    run = torch_compile._Guarded.__call__

    def count(self: Any, *args: Any) -> Any:
        passed.append(len(args))
        return run(self, *args)

    monkeypatch.setattr(torch_compile._Guarded, "__call__", count)
    model = Conv()
    fast, _ = compiled(model, frozen=frozen)
    with torch.no_grad():
        check(fast, model, image())
        check(fast, model, image())
    assert passed == 2 * [1 if frozen else 9]


@pytest.mark.slow
@pytest.mark.parametrize("inside", few(["argument", "list", "closure", "module"], 1))
def test_frozen_tells_models_apart_without_module_guards(inside: str) -> None:
    skip = torch.compiler.skip_guard_on_all_nn_modules_unsafe
    options = {"inner": "eager", "frozen": True, "guard_filter_fn": skip}

    def compile_one(model: Conv) -> Any:
        if inside == "module":
            return torch.compile(model, backend="refold", options=options)
        held = [model]
        run: Any = {
            "argument": lambda x, m=model: m(x),
            "list": lambda x, m=held: m[0](x),
            "closure": lambda x: model(x),
        }[inside]
        return torch.compile(run, backend="refold", options=options)

    with torch.no_grad():
        models = [Conv(seed) for seed in range(2)]
        fast = [compile_one(m) for m in models]
        for _ in range(2):
            for f, m in zip(fast, models, strict=True):
                check(f, m, image())
        for seed in range(2):  # another model where one has lain
            del f, m
            models[0] = fast[0] = None  # type: ignore[call-overload]
            gc.collect()
            models[0] = Conv(9 + seed)
            fast[0] = compile_one(models[0])
            for f, m in zip(fast, models, strict=True):
                check(f, m, image())


def test_frozen_parameters_stand_anywhere_among_the_arguments() -> None:
    class Between(Conv):
        def forward(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> Any:
            z.mul_(2)  # written: the same tensor may not come twice
            written = self.bn(z.repeat(1, 2, 1, 1)).sum()
            return self.features(x) + self.head(y.mean((2, 3))) + written

    model = Between()
    fast, inner = compiled(model, frozen=True)
    with torch.no_grad():
        for _ in range(2):
            x, y, z = image(), torch.randn(2, 4, 8, 8), torch.randn(2, 2, 8, 8)
            mine, theirs = z.clone(), z.clone()
            assert relative_error(fast(x, y, mine), model(x, y, theirs)) <= SINGLE
            assert torch.equal(mine, theirs)
        model.head.weight.grad = torch.ones_like(model.head.weight)
        torch.optim.SGD([model.head.weight], lr=0.1).step()
        for _ in range(3):
            z = torch.randn(2, 2, 8, 8)
            expected = model(x, y, z.clone())
            assert relative_error(fast(x, y, z), expected) <= SINGLE
    assert inner.graphs


def test_frozen_outside_of_a_compilation_takes_all_arguments() -> None:
    model, graphs = Conv(), []

    def keep(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append((gm, inputs))
        return gm

    x = image()
    with torch.no_grad():
        expected = torch.compile(model, backend=keep)(x)
        (gm, inputs) = graphs[0]
        run = refold.backend(inner="eager", frozen=True)(gm, inputs)
        assert relative_error(run(*inputs)[0], expected) <= SINGLE


def test_frozen_and_checksum_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="give one of them"):
        refold.backend(frozen=True, checksum=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.uint8])
def test_checksum_sees_every_single_change(dtype: torch.dtype) -> None:
    t = torch.randn(7, 3).to(dtype)
    before = torch_compile._checksum(t)
    for i in range(t.numel()):
        u = t.clone()
        u.view(-1)[i] = 1 - u.view(-1)[i].int()
        assert torch.equal(u, t) or torch_compile._checksum(u) != before


def test_inference_tensors_have_no_version() -> None:
    with torch.inference_mode():
        model = Conv()
        fast, inner = compiled(model)
        check(fast, model, image())
        model.conv.weight = nn.Parameter(torch.randn(4, 3, 3, 3), requires_grad=False)
        for _ in range(3):
            check(fast, model, image())
    assert set(inner.norms) == {0}


# --- training and gradients -----------------------------------------------------------------------


def test_gradients_work_and_are_warned_of_once() -> None:
    model = Conv()
    fast, inner = compiled(model)
    x = image()
    with pytest.warns(UserWarning, match="gradients are required.*no_grad") as caught:
        (fast(x).sum() + 0 * fast(image(3)).sum()).backward()
    assert len([w for w in caught if "refold" in str(w.message)]) == 1
    got = model.conv.weight.grad.clone()
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(got, model.conv.weight.grad)
    assert inner.norms[0] == 1
    with torch.no_grad():
        check(fast, model, image())
    assert inner.norms[-1] == 0


def test_no_gradient_is_required_of_frozen_models_and_inner_no_grad() -> None:
    model = Conv().requires_grad_(False)
    fast, inner = compiled(model)
    check(fast, model, image())
    other = Conv()

    def quiet(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return other(x)

    fast, second = compiled(quiet)
    check(fast, quiet, image())
    assert inner.norms + second.norms == [0, 0]


def test_gradient_of_an_input() -> None:
    model = Conv().requires_grad_(False)
    fast, _ = compiled(model)
    x = image().requires_grad_()
    with pytest.warns(UserWarning, match="gradients are required"):
        fast(x).sum().backward()
    assert x.grad.abs().sum() > 0


class Dropped(Conv):
    def forward(self, x: torch.Tensor) -> Any:
        return self.head(F.dropout(self.features(x), 0.5, self.training))


@pytest.mark.parametrize("kind", [Conv, Dropped])
def test_training_mode_is_not_folded(kind: type[Conv]) -> None:
    model = kind().train()
    fast, inner = compiled(model)
    twin = copy.deepcopy(model)
    x = image()
    torch.manual_seed(1)
    with torch.no_grad(), pytest.warns(UserWarning, match=r"training mode.*model\.eval"):
        got = fast(x)
    torch.manual_seed(1)
    with torch.no_grad():
        assert relative_error(got, twin(x)) <= SINGLE
    assert torch.equal(model.bn.running_mean, twin.bn.running_mean)
    assert inner.norms == [1]
    model.eval()
    with torch.no_grad():
        check(fast, model, x)
    assert inner.norms[-1] == 0


# --- what models do -------------------------------------------------------------------------------


class Broken(nn.Module):
    """A graph break between two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = seeded(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)), 1)
        self.second = seeded(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)), 2)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.first(x)
        torch._dynamo.graph_break()
        return self.second(F.relu(y))


class Twice(Conv):
    """One module called twice, on different tensors."""

    def forward(self, x: torch.Tensor) -> Any:
        return self.features(x) - self.features(x.flip(-1) * 2)


class Tied(Conv):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(4, 4)
        self.other.weight = self.head.weight

    def forward(self, x: torch.Tensor) -> Any:
        return self.other(F.relu(self.head(self.features(x))))


@dataclass
class Result:
    scores: torch.Tensor
    extra: dict[str, Any]


class Structured(Conv):
    def forward(self, x: torch.Tensor) -> Any:
        y = super().forward(x)
        return {"y": y, "result": (y.argmax(1), None, 3), "shape": x.shape[0], "x": x}


class WithDataclass(Conv):
    def forward(self, x: torch.Tensor) -> Any:
        y = super().forward(x)
        return Result(y, {"best": y.argmax(1)})


class WritesInput(Conv):
    def forward(self, x: torch.Tensor) -> Any:
        x.mul_(2).sub_(0.5)
        x[:, 0] = 1.0
        return super().forward(x), x


class WritesBuffer(Conv):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("cache", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> Any:
        self.calls += 1
        y = super().forward(x)
        self.cache.copy_(y[0])
        return y * self.calls


class ReturnsParameter(Conv):
    def forward(self, x: torch.Tensor) -> Any:
        return (
            super().forward(x),
            self.head.weight,
            self.conv.weight.detach()[0],
            self.head.bias * 2,
        )


class Sized(Conv):
    def forward(self, x: torch.Tensor) -> Any:
        y = self.bn(self.conv(x))
        return y.reshape(x.shape[0], -1) * x.shape[-1], torch.zeros(x.shape[0]) + x.size(2)


class UsesAutocast(Conv):
    def forward(self, x: torch.Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = super().forward(x)
            with torch.autocast("cpu", enabled=False):
                z = self.head(y.float())
        return y, z, torch.softmax(z, -1)


KINDS: list[tuple[type[nn.Module], torch.dtype, set[int]]] = [
    (Broken, torch.float32, {0}),
    (Twice, torch.float32, {0}),
    (Tied, torch.float32, {0}),
    (Structured, torch.float32, {0}),
    (WritesInput, torch.float32, {0}),
    (WritesBuffer, torch.float32, {0}),
    (ReturnsParameter, torch.float32, {0}),
    (Sized, torch.float32, {0}),
    (UsesAutocast, torch.bfloat16, {0}),
]


@pytest.mark.parametrize("dynamic", few([True, None, False], 1))
@pytest.mark.parametrize(
    ("kind", "dtype", "norms"), few(KINDS, 3), ids=lambda k: getattr(k, "__name__", "")
)
def test_models(
    kind: type[nn.Module], dtype: torch.dtype, norms: set[int], dynamic: bool | None
) -> None:
    model = seeded(kind())
    twin = copy.deepcopy(model)
    fast, inner = compiled(model, dynamic=dynamic)
    with torch.no_grad():
        for batch, size in ((2, 8), (3, 8), (3, 10), (1, 8)):
            check(fast, twin, image(batch, size), dtype=dtype)
    assert relative_error(model.state_dict(), twin.state_dict()) <= HALF[dtype]
    assert set(inner.norms) == norms


def test_dataclass_results() -> None:
    model = seeded(WithDataclass())
    fast, _ = compiled(model)
    x = image()
    with torch.no_grad():
        got, expected = fast(x), model(x)
    assert isinstance(got, Result)
    assert relative_error(got.scores, expected.scores) <= SINGLE
    assert torch.equal(got.extra["best"], expected.extra["best"])


def test_written_inputs_are_written() -> None:
    model = seeded(WritesInput())
    fast, inner = compiled(model)
    x = image()
    mine, theirs = x.clone(), x.clone()
    with torch.no_grad():
        got, expected = fast(mine), model(theirs)
    assert torch.equal(mine, theirs)
    assert got[1] is mine
    assert relative_error(got[0], expected[0]) <= SINGLE
    assert inner.graphs[0]["copy"] == 1


def test_written_inputs_that_share_storage() -> None:
    model = Conv()

    def run(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a.mul_(2)
        return model(b) + a.mean()

    fast, _ = compiled(run)
    with torch.no_grad():
        for shared in (False, True, False, True):
            base = torch.randn(4, 3, 8, 8)
            for f in (fast, run):
                x = base.clone()
                a, b = (x[:2], x[1:3]) if shared else (x[:2], x[2:].clone())
                result = f(a, b)
                if f is fast:
                    mine = (result, x)
            assert relative_error(mine, (result, x)) <= SINGLE


@pytest.mark.slow
def test_written_parameter_view_of_the_input() -> None:
    model = Conv()

    def run(x: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return model(image)

    fast, _ = compiled(run)
    pixels = image()
    with torch.no_grad():
        fast(torch.zeros(4), pixels)
        for _ in range(3):
            twin = copy.deepcopy(model)
            got = fast(model.bn.bias, pixels)
            twin.bn.bias.add_(1)
            assert relative_error(got, twin(pixels)) <= SINGLE


@pytest.mark.parametrize("dtype", few([torch.float16, torch.bfloat16, torch.float64], 1))
def test_dtypes(dtype: torch.dtype) -> None:
    model = Conv().to(dtype)
    fast, inner = compiled(model)
    with torch.no_grad():
        check(fast, model, image().to(dtype), dtype=dtype)
    assert inner.norms == [0]


@pytest.mark.slow
def test_ambient_autocast() -> None:
    model = Conv()
    fast, inner = compiled(model)
    x = image()
    with torch.no_grad():
        for on in (True, False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
                got, expected = fast(x), model(x)
            assert got.dtype == expected.dtype
            assert relative_error(got, expected) <= HALF[got.dtype]
    assert inner.norms == [0, 0]


def test_operator_that_casts_inside_runs_unfolded() -> None:
    model = Conv()

    def run(x: torch.Tensor) -> torch.Tensor:
        y = model(x)
        return torch.einsum("bi,bj->ij", y.float(), y.float())

    fast, inner = compiled(run)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        check(fast, run, image(), dtype=torch.bfloat16)
    assert inner.norms == [1]


@pytest.mark.slow
@pytest.mark.parametrize("model_too", [False, True])
def test_layouts(model_too: bool) -> None:
    class Features(Conv):
        def forward(self, x: torch.Tensor) -> Any:
            y = self.bn(self.conv(x))
            return y, y.stride(), y.is_contiguous()

    model = seeded(Features())
    if model_too:
        model = model.to(memory_format=torch.channels_last)
    fast, inner = compiled(model)
    with torch.no_grad():
        for x in (
            image(),
            image().to(memory_format=torch.channels_last),
            torch.randn(2, 3, 8, 16)[..., ::2],
            torch.randn(8, 8, 3, 2).permute(3, 2, 0, 1),
            torch.randn(1, 3, 8, 8).expand(2, 3, 8, 8),
        ):
            got, expected = fast(x), model(x)
            assert relative_error(got[0], expected[0]) <= SINGLE
            assert got[0].stride() == expected[0].stride()
            assert got[1:] == expected[1:]
    assert set(inner.norms) == {0}


def test_two_models_with_the_same_names_in_one_graph() -> None:
    one, other = Conv(1), Conv(2)

    def both(x: torch.Tensor) -> torch.Tensor:
        return one(x) - 2 * other(x)

    fast, inner = compiled(both)
    with torch.no_grad():
        check(fast, both, image())
    assert inner.norms == [0]


def test_graph_without_parameters_passes_through() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        return x.relu() + 1

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast, inner = compiled(run)
        check(fast, run, image())
    assert len(inner.graphs) == 1


def test_wrong_fold_runs_unfolded_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Breaks:
        name: str = "breaks"
        exactness: str = "exact"

        def run(self, gm: torch.fx.GraphModule, context: Context) -> Any:
            from refold.rewrite.result import PassResult

            for node in gm.graph.nodes:
                if node.target is torch.ops.aten.relu.default:
                    node.target = torch.ops.aten.sigmoid.default
            return PassResult(modified=True)

    model = Conv()
    fast, inner = compiled(model, pipeline=refold.Pipeline("broken", (Breaks(),)))
    with torch.no_grad(), pytest.warns(UserWarning, match="not folded.*float64 reference"):
        check(fast, model, image())
    assert inner.norms == [1]


# --- everything at once ---------------------------------------------------------------------------


class Loop:
    """Random changes of weights, shapes, dtypes and modes between calls."""

    def __init__(self, backend: Any, seed: int, sizes: list[tuple[int, int]]) -> None:
        self.random = random.Random(seed)
        self.sizes = sizes
        self.models: list[Any] = [Conv(1), Conv(2), seeded(Twice()), seeded(WritesInput())]
        self.run = torch.compile(lambda m, x: m(x), backend=backend)
        self.log: list[str] = []

    def step(self) -> None:
        at = self.random.randrange(len(self.models))
        model = self.models[at]
        for _ in range(self.random.choice([0, 0, 0, 1, 2])):
            change = self.random.choice(CHANGES[2:-1])
            self.log.append(change.__name__)
            if type(model) in (Conv, Twice, WritesInput) and _dtype(model) == torch.float32:
                with torch.no_grad():
                    model = change(model)
        if self.random.random() < 0.1:
            dtype = self.random.choice([torch.bfloat16, torch.float64, torch.float32])
            self.log.append(str(dtype))
            model = model.to(dtype)
        self.models[at] = model
        dtype = _dtype(model)
        x = image(*self.random.choice(self.sizes)).to(dtype)
        if self.random.random() < 0.2:
            x = x.to(memory_format=torch.channels_last)
        training = self.random.random() < 0.05
        mode = self.random.choice([torch.no_grad, torch.no_grad, torch.inference_mode])
        if self.random.random() < 0.05:
            mode = torch.enable_grad
        autocast = dtype == torch.float32 and self.random.random() < 0.1
        self.log.append(f"{at} {list(x.shape)} {mode.__name__} {training} {autocast}")
        model.train(training)
        twin = copy.deepcopy(model)
        with mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            expected = twin(x.clone())
            got = self.run(model, x.clone())
        tolerance = HALF[torch.bfloat16 if autocast else dtype]
        with torch.no_grad():
            error = relative_error(got, expected)
        assert error <= tolerance, f"relative error {error:.1e} after {self.log}"
        # A batch norm in training mode has written its buffers.
        error = relative_error(model.state_dict(), twin.state_dict())
        assert error <= tolerance, f"state off by {error:.1e} after {self.log}"


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:refold")
def test_200_random_changes() -> None:
    loop = Loop(refold.backend(inner="eager"), 0, [(2, 8), (3, 8), (1, 8), (2, 10)])
    for _ in range(200):
        loop.step()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:refold")
def test_random_changes_with_inductor() -> None:
    loop = Loop(refold.backend(), 1, [(2, 8), (3, 8)])
    loop.models = loop.models[:1] + loop.models[3:]
    for _ in range(60):
        loop.step()


@pytest.mark.sweep
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_fold_as_far_as_through_export(name: str) -> None:
    model, images = network(name, NETWORKS[name])
    plain: list[int] = []

    def count(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        plain.append(1)
        return gm

    recorded = Inner()

    def record_and_compile(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        recorded(gm, inputs)
        return inductor.compile_graph(gm, inputs, {})

    with torch.no_grad():
        torch.compile(model, backend=count)(images)
        torch._dynamo.reset()
        got = torch.compile(model, backend=refold.backend(inner=record_and_compile))(images)
    assert len(recorded.graphs) == len(plain), "no graph break that dynamo itself does not have"
    found: Counter[str] = Counter()
    for graph in recorded.modules:
        found += counts(graph)
    # What calls of layers cost in a compiler of the caller's own is not known: none are merged.
    pipeline = PIPELINES["default"].without("merge-parallel-layers")
    folded = refold.fold(model, (images,), pipeline=pipeline, verify=False)
    assert found["conv-like"] == counts(folded.graph_module)["conv-like"]
    expected = call(copy.deepcopy(model).double(), double((images,)))
    own = relative_error(call(model, (images,)), expected)
    assert relative_error(got, expected) <= 4 * own + SINGLE


@pytest.mark.slow
def test_inductor() -> None:
    model = seeded(ConvNet())
    fast = torch.compile(model, backend=refold.backend())
    x = image()
    with torch.no_grad():
        check(fast, model, x)
        model.bn.running_mean.add_(1)
        for _ in range(3):
            check(fast, model, x)
        other = seeded(ConvNet(), 4)
        second = torch.compile(other, backend=refold.backend(), dynamic=True)
        for batch in (2, 3, 7):
            check(second, other, image(batch))
    with pytest.warns(UserWarning, match="gradients"):
        fast(x).sum().backward()
    assert model.conv.weight.grad is not None


@pytest.mark.parametrize("value", [[0.0], [1.0, 2.0], []])
def test_equal_tensors_are_not_the_same_ones(value) -> None:
    known, other = torch.tensor(value), torch.tensor(value).neg().neg()
    state = torch_compile._State.of([known], checksum=False, frozen=True)
    assert state.matches((known,))
    assert not state.matches((other,))
    assert not state.matches((torch.ones(3, 5),))
