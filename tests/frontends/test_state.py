"""State between calls: buffers that are assigned live on, what a trace cannot record is refused."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import refold
from refold.errors import BackendError, FrontendError
from refold.frontends.export import trace
from refold.frontends.state import Calls, ModelSnapshot
from refold.graph import constants
from tests.examples import few

ROW = (2, 4)


class Model(nn.Module):
    """``forward(x) = formula(self, x)`` with buffers, and a linear layer ``lin``."""

    def __init__(self, formula: Callable[[Any, Tensor], Any], **held: Any) -> None:
        super().__init__()
        self.formula = formula
        self.lin = nn.Linear(4, 4)
        for name, value in held.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.formula(self, x)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def lives_on(model: nn.Module, shape: tuple[int, ...] = ROW, **settings: Any) -> Any:
    """Compiles, calls four times, writes into what earlier calls returned where eager allows it."""
    model = model.eval()
    torch.manual_seed(1)
    inputs = [torch.randn(shape) for _ in range(4)]
    before = state_of(model)
    compiled = refold.compile_for_inference(copy.deepcopy(model), inputs[0], **settings)
    assert all(torch.equal(before[n], b) for n, b in model.named_buffers())
    kept: list[tuple[Any, Any]] = []
    for x in inputs:
        with torch.no_grad():
            want = model(x.clone())
        given = x.clone()
        got = compiled(given)
        assert torch.equal(given, x)
        pairs = zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b)
            kept.append((a, a.clone()))
        held = constants.stored(compiled.graph_module)
        for name, buffer in model.named_buffers():
            if name in held:
                torch.testing.assert_close(held[name], buffer)
    for output, value in kept:  # what was returned is not overwritten by later calls
        assert torch.equal(output, value)
    return compiled


# --- assigned buffers -----------------------------------------------------------------------------


def past(s: Any, x: Tensor) -> Tensor:
    s.past = torch.cat([s.past, x])[-6:]
    return s.lin(s.past) * 2


def two(s: Any, x: Tensor) -> Tensor:
    s.a, s.b = s.b, s.a + x
    return s.lin(s.a) + s.b


def swapped(s: Any, x: Tensor) -> Tensor:
    s.a, s.b = s.b, s.a
    return s.lin(x) * s.a + s.b


def twice(s: Any, x: Tensor) -> Tensor:
    s.a = s.a + x
    y = s.a * 3
    s.a = s.a * 0.5
    return s.lin(y) + s.a


def then_in_place(s: Any, x: Tensor) -> Tensor:
    s.a = s.a * 0.5
    s.a.add_(x)
    return s.lin(s.a)


def in_place_then_assigned(s: Any, x: Tensor) -> Tensor:
    s.a.add_(x)
    s.a = s.a.flip(0)
    return s.lin(s.a)


def returns_the_old(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    old = s.a
    s.a = s.lin(x) + s.a
    return old, old[:1]


def returns_the_new(s: Any, x: Tensor) -> Tensor:
    s.a = s.lin(x) + s.a
    return s.a


def transposed(s: Any, x: Tensor) -> Tensor:
    s.square = s.square.t()
    return s.lin(x) @ s.square


def the_input(s: Any, x: Tensor) -> Tensor:
    y = s.lin(x) - s.a
    s.a = x
    return y


def by_its_dictionary(s: Any, x: Tensor) -> Tensor:
    s._buffers["a"] = s._buffers["a"] * 0.5 + x
    return s.lin(s.a)


def by_its_name(s: Any, x: Tensor) -> Tensor:
    setattr(s, "a", getattr(s, "a") * 0.5 + x)  # noqa: B009, B010
    return s.lin(s.a)


def chosen(s: Any, x: Tensor) -> Tensor:
    if x.shape[1] == 4:
        s.a = torch.where(x > 0, x, s.a)
    return s.lin(s.a)


def counted(s: Any, x: Tensor) -> Tensor:
    s.n = s.n + 1
    return s.lin(x) * s.n


def overwritten(s: Any, x: Tensor) -> Tensor:
    y = s.lin(x) + s.a
    s.a = torch.ones_like(s.a)
    return y


@pytest.mark.parametrize(
    "formula",
    few([past, two, swapped, twice, then_in_place, in_place_then_assigned, returns_the_old,
     returns_the_new, transposed, the_input, by_its_dictionary, by_its_name, chosen, counted,
     overwritten], 8),
)  # fmt: skip
def test_assigned_buffer_lives_on(formula: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model = Model(
        formula,
        past=torch.zeros(6, 4),
        a=torch.randn(ROW),
        b=torch.randn(ROW),
        square=torch.randn(4, 4),
        n=torch.tensor(0),
    )
    compiled = lives_on(model)
    assert any("state" in note for note in compiled.report.notes)


class Cell(nn.Module):
    """A recurrent cell with its hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 3)
        self.register_buffer("hidden", torch.zeros(2, 3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.cell(x, self.hidden)
        return self.hidden


class Causal(nn.Module):
    """A causal convolution over a stream, with its past."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, bias=False)
        self.norm = nn.BatchNorm1d(4)
        self.norm.running_mean.uniform_(-1, 1)
        self.register_buffer("past", torch.zeros(1, 4, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.past, x], 2)
        self.past = x[..., -2:]
        return self.norm(self.conv(x))


@pytest.mark.slow
def test_state_of_submodules() -> None:
    torch.manual_seed(0)
    lives_on(nn.Sequential(nn.Linear(4, 4), Cell(), nn.Linear(3, 2)))
    compiled = lives_on(nn.Sequential(Causal(), nn.ReLU(), Causal()), (1, 4, 5))
    census = compiled.report.after.census
    assert census["conv"] == 2
    assert not census.get("batch-norm")


@pytest.mark.slow
def test_state_lives_on_in_inductor() -> None:
    torch.manual_seed(0)
    lives_on(Model(twice, a=torch.randn(ROW)), target="inductor")
    lives_on(Model(returns_the_old, a=torch.randn(ROW)), target="inductor")
    lives_on(Model(returns_the_new, a=torch.randn(ROW)), target="inductor")


def test_state_lives_on_in_files_and_with_bound_inputs(tmp_path) -> None:
    class Decays(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)
            self.register_buffer("a", torch.zeros(ROW))

        def forward(self, x: Tensor, by: Tensor) -> Tensor:
            self.a = self.lin(x) + self.a * by
            return self.a

    model, x, by = Decays().eval(), torch.randn(ROW), torch.tensor(0.5)
    compiled = refold.compile_for_inference(copy.deepcopy(model), (x,), bind={"by": by})
    loaded = torch.export.load(compiled.save(tmp_path / "net.pt2")).module()
    for _ in range(3):
        with torch.no_grad():
            want = model(x, by)
            torch.testing.assert_close(compiled(x), want)
            torch.testing.assert_close(loaded(x), want)


@pytest.mark.parametrize("target", ["aoti", "onnx", "ort", "openvino"])
def test_targets_without_state_name_it(target: str) -> None:
    if refold.backends.registry.find_target(target).available():
        pytest.skip("not installed")
    with pytest.raises(BackendError, match=r"writes its own state \(a\)"):
        refold.compile_for_inference(
            Model(twice, a=torch.randn(ROW)).eval(), torch.randn(ROW), target=target
        )


@pytest.mark.slow
def test_buffer_that_two_modules_share() -> None:
    class Part(nn.Module):
        def __init__(self, shared: Tensor) -> None:
            super().__init__()
            self.register_buffer("a", shared)

        def forward(self, x: Tensor) -> Tensor:
            self.a = self.a * 0.5 + x
            return self.a

    class Reader(Part):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.a

    shared = torch.randn(ROW)
    for kinds in ((Part, Reader), (Reader, Part), (Part, Part)):
        model = nn.Sequential(*[kind(shared) for kind in kinds])
        lives_on(model)


def test_state_that_is_assigned_for_two_at_once_is_refused_or_right() -> None:
    """From the first call on both names are one tensor, which is written in place."""

    def forward(s: Any, x: Tensor) -> Tensor:
        s.a.mul_(0.5)
        y = s.lin(x) + s.b
        s.a = s.b = x + 0
        return y

    model = Model(forward, a=torch.randn(ROW), b=torch.randn(ROW)).eval()
    with pytest.raises(FrontendError, match="keeps state between calls"):
        refold.compile_for_inference(model, torch.randn(ROW))


@pytest.mark.parametrize(
    ("formula", "text"),
    [
        (lambda s, x: torch.cat([s.a, x]), r"'part\.a'.* float32\[2, 4\].* float32\[4, 4\]"),
        (lambda s, x: s.a.double() + x, r"'part\.a'.* float32\[2, 4\].* float64\[2, 4\]"),
        (lambda s, x: s.a[0], r"'part\.a'.* float32\[4\]"),
    ],
)
def test_state_of_another_kind_is_refused_by_name(
    formula: Callable[..., Tensor], text: str
) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        new = formula(s, x)
        s.a = new
        return s.lin(x) + new.float().sum()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Model(forward, a=torch.randn(ROW))

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x)

    model = Outer().eval()
    with pytest.raises(FrontendError, match=text):
        refold.compile_for_inference(model, torch.randn(ROW))
    assert model.part.a.shape == ROW


def test_the_callers_tensors_are_not_the_state() -> None:
    def forward(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = s.lin(x) + s.a
        s.a = y
        return y, x.sum()

    model = Model(forward, a=torch.zeros(ROW)).eval()
    compiled = refold.compile_for_inference(copy.deepcopy(model), torch.randn(ROW))
    inputs = [torch.randn(ROW) for _ in range(3)]
    for x in inputs:
        with torch.no_grad():
            want = model(x)[0].clone()
        got = compiled(x)[0]
        torch.testing.assert_close(got, want)
        x.fill_(9.0)


def test_input_that_is_assigned_is_not_written_later() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        s.a.mul_(0.5)
        y = s.lin(x) + s.a
        s.a = x
        return y

    model = Model(forward, a=torch.zeros(ROW)).eval()
    compiled = refold.compile_for_inference(model, torch.randn(ROW))
    x, kept = torch.ones(ROW), torch.ones(ROW)
    compiled(x)
    compiled(torch.zeros(ROW))
    assert torch.equal(x, kept)


# --- plain attributes -----------------------------------------------------------------------------


class Holder:
    def __init__(self, **held: Any) -> None:
        vars(self).update(held)


def number(s: Any, x: Tensor) -> Tensor:
    s.part.step += 1
    return s.lin(x) * s.part.step


def tensor(s: Any, x: Tensor) -> Tensor:
    y = s.lin(x) + s.part.last
    s.part.last = x
    return y


def appended(s: Any, x: Tensor) -> Tensor:
    s.part.seen.append(x)
    return s.lin(x) + len(s.part.seen)


def item(s: Any, x: Tensor) -> Tensor:
    s.part.table["n"] = s.part.table["n"] * 2
    return s.lin(x) * s.part.table["n"]


def nested(s: Any, x: Tensor) -> Tensor:
    s.part.nest["a"][0] += 1
    return s.lin(x) * s.part.nest["a"][0]


def of_an_object(s: Any, x: Tensor) -> Tensor:
    s.part.held.count += 1
    return s.lin(x) * s.part.held.count


def of_a_namespace(s: Any, x: Tensor) -> Tensor:
    s.part.space.count += 1
    return s.lin(x) * s.part.space.count


def first_one(s: Any, x: Tensor) -> Tensor:
    """The first call decides what all later ones see."""
    if s.part.first is None:
        s.part.first = x.mean()
    return s.lin(x) - s.part.first


def flag(s: Any, x: Tensor) -> Tensor:
    s.part.even = not s.part.even
    return s.lin(x) if s.part.even else x


def third_call(s: Any, x: Tensor) -> Tensor:
    s.part.step += 1
    return s.lin(x) * (2 if s.part.step > 2 else 1)


def in_a_set(s: Any, x: Tensor) -> Tensor:
    s.part.keys.add(len(s.part.keys))
    return s.lin(x) * len(s.part.keys)


def emptied(s: Any, x: Tensor) -> Tensor:
    y = s.lin(x) + (0 if s.part.optional is None else s.part.optional)
    s.part.optional = y
    return y


class Part(nn.Module):
    """What the cases keep; not in ``Model`` itself, so that errors have a path to name."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0
        self.even = False
        self.last: Any = torch.zeros(ROW)
        self.first: Any = None
        self.seen: Any = deque(maxlen=3)
        self.table = {"n": 1}
        self.nest = {"a": [0]}
        self.held = Holder(count=0)
        self.space = SimpleNamespace(count=0)
        self.keys: set[int] = set()
        self.shapes: dict[Any, Any] = {}
        self.register_buffer("optional", None)


def _facts(part: Part) -> dict[str, Any]:
    """What a part holds, deeply, by value; tensors by identity and version."""

    def deep(value: Any) -> Any:
        if isinstance(value, Tensor):
            return (id(value), value._version)
        if isinstance(value, dict):
            return {k: deep(v) for k, v in value.items()}
        if isinstance(value, (list, deque, tuple, set)):
            return [deep(v) for v in value]
        if isinstance(value, (Holder, SimpleNamespace)):
            return (id(value), deep(vars(value)))
        return value

    held = {k: v for k, v in vars(part).items() if not k.startswith("_")}
    return {k: (id(v) if not isinstance(v, int) else 0, deep(v)) for k, v in held.items()}


LOST = {
    number: "part.step", tensor: "part.last", appended: "part.seen", item: "part.table",
    nested: "part.nest", of_an_object: "part.held.count", of_a_namespace: "part.space.count",
    first_one: "part.first", flag: "part.even", third_call: "part.step", in_a_set: "part.keys",
    emptied: "part.optional",
}  # fmt: skip


@pytest.mark.parametrize("formula", LOST)
def test_state_in_a_plain_attribute_is_refused_by_name(formula: Callable[..., Any]) -> None:
    model = Model(formula).eval()
    model.part = Part()
    before = _facts(model.part)
    with pytest.raises(FrontendError) as raised:
        refold.compile_for_inference(model, torch.randn(ROW))
    assert LOST[formula] in str(raised.value)
    assert _facts(model.part) == before


def remembered_map(s: Any, x: Tensor) -> Tensor:
    s.part.last = torch.softmax(s.lin(x), -1)
    return s.part.last @ s.part.last.t()


def counted_for_the_log(s: Any, x: Tensor) -> Tensor:
    s.part.step += 1
    return s.lin(x)


def positions(s: Any, x: Tensor) -> Tensor:
    if x.shape[1] not in s.part.shapes:
        s.part.shapes[x.shape[1]] = torch.arange(x.shape[1]).to(x.dtype)
    return s.lin(x) + s.part.shapes[x.shape[1]]


def history(s: Any, x: Tensor) -> Tensor:
    s.part.seen.append(x)
    s.part.held.count += 1
    return s.lin(x)


def lazily(s: Any, x: Tensor) -> Tensor:
    if s.part.optional is None:
        s.part.optional = torch.full((4,), 2.0)
    return s.lin(x) * s.part.optional


@pytest.mark.parametrize(
    "formula", [remembered_map, counted_for_the_log, positions, history, lazily]
)
def test_caches_that_change_no_result_are_accepted(formula: Callable[..., Any]) -> None:
    model = Model(formula).eval()
    model.part = Part()
    before = _facts(model.part)
    compiled = refold.compile_for_inference(model, torch.randn(ROW))
    assert _facts(model.part) == before
    for _ in range(3):
        x = torch.randn(ROW)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))


def test_lists_that_the_original_keeps_are_not_appended_to() -> None:
    """A deque and an object are the caller's own also where a trace calls the model."""
    model = Model(history).eval()
    model.part = Part()
    trace(model, (torch.randn(1, 4),))
    assert len(model.part.seen) == 0
    assert model.part.held.count == 0


def test_state_of_a_class_is_seen() -> None:
    class Counts(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            return x * type(self).calls

    with pytest.raises(FrontendError, match="calls"):
        refold.compile_for_inference(Counts().eval(), torch.randn(ROW))
    assert Counts.calls == 0


def test_a_model_that_changes_nothing_is_called_once() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x)

    calls = Calls.of(Counts(), ((torch.randn(ROW),), {}))
    assert len(calls.outputs) == 1
    assert calls.changed == []
    model = Model(counted_for_the_log)
    model.part = Part()
    calls = Calls.of(model, ((torch.randn(ROW),), {}))
    assert len(calls.outputs) == 3
    assert calls.changed == ["part.step"]
    assert model.part.step == 0


def in_place(s: Any, x: Tensor) -> Tensor:
    s.total.add_(x)
    return s.lin(s.total)


def in_place_by_a_view(s: Any, x: Tensor) -> Tensor:
    s.view.add_(x[0])
    return s.lin(s.total)


def in_place_by_a_slice(s: Any, x: Tensor) -> Tensor:
    s.total[:1] += x[:1]
    return s.lin(s.total)


@pytest.mark.parametrize("formula", [in_place, in_place_by_a_view, in_place_by_a_slice])
def test_plain_tensor_that_is_written_in_place_is_refused_by_name(
    formula: Callable[..., Any],
) -> None:
    total = torch.zeros(ROW)
    model = Model(formula).eval()
    model.total, model.view = total, total[0]
    with pytest.raises(FrontendError, match=r"state between calls.*(total|view)"):
        refold.compile_for_inference(model, torch.randn(ROW))
    assert not total.any()


def test_buffers_that_are_written_are_not_the_callers_either() -> None:
    """Nor do their version counters move: other compiled models of this one look at them."""
    model = Model(in_place_then_assigned, a=torch.zeros(ROW)).eval()
    version, kept = model.a._version, model.a
    refold.compile_for_inference(model, torch.randn(ROW))
    assert model.a is kept
    assert model.a._version == version


def test_snapshot_names_what_changed_and_puts_it_back() -> None:
    model = nn.Sequential(Part())
    held = model[0]
    snapshot = ModelSnapshot(model)
    held.seen.append(1)
    held.nest["a"][0] = 5
    held.held.count = 2
    held.new = 3
    with torch.no_grad():
        held.last.add_(1)
    assert snapshot.changed() == ["0.new", "0.last", "0.seen", "0.nest", "0.held.count"]
    snapshot.restore()
    assert snapshot.changed() == ["0.last"]
    assert not hasattr(held, "new")


class InPart(nn.Module):
    """Two buffers that are one in memory; ``forward`` writes either."""

    def __init__(self, written: str) -> None:
        super().__init__()
        whole = torch.zeros(4)
        self.register_buffer("whole", whole)
        self.register_buffer("part", whole[:2])
        self.written = written

    def forward(self, x: Tensor) -> Tensor:
        getattr(self, self.written).add_(1.0)
        return x * self.part + self.whole.sum()


@pytest.mark.parametrize("written", ["whole", "part"])
def test_a_buffer_that_views_one_that_is_written_is_refused_by_name(written: str) -> None:
    with pytest.raises(FrontendError, match="whole, part, which share memory"):
        refold.compile_for_inference(InPart(written), torch.randn(3, 2))


class Tied(nn.Module):
    """One tensor under two names: what one writes, the other reads."""

    def __init__(self, writes: str, assigns: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.first = nn.BatchNorm1d(4)
        self.second = self.first
        self.register_buffer("h", torch.zeros(4))
        self.register_buffer("g", self.h)
        self.writes, self.assigns = writes, assigns

    def forward(self, x: Tensor) -> Tensor:
        self.first.running_mean.add_(1.0)
        if self.assigns:
            setattr(self, self.writes, getattr(self, self.writes) + 1)
        else:
            getattr(self, self.writes).add_(1.0)
        return self.second(self.layer(x)) + self.h + 2 * self.g


@pytest.mark.parametrize("writes", ["h", "g"])
@pytest.mark.parametrize("assigns", [True, False])
def test_a_tensor_of_two_names_is_one(writes: str, assigns: bool) -> None:
    torch.manual_seed(0)
    model = Tied(writes, assigns).eval()
    compiled = refold.compile_for_inference(model, torch.randn(3, 4))
    original = copy.deepcopy(model)
    for _ in range(3):
        x = torch.randn(3, 4)
        with torch.no_grad():
            assert torch.allclose(compiled(x), original(x), atol=1e-5)
