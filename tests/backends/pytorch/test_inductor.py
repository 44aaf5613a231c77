import pytest
import torch
from torch import nn

import refold
from refold.backends.pytorch.inductor import Layouts, SizeGuards, _laid_out
from refold.errors import BackendError, UsageError
from tests.compare import SINGLE, relative_error
from tests.small_nets import ConvNet, Structured, assert_same, seeded, structured_call


def test_options_are_checked():
    with pytest.raises(UsageError, match=r"unknown mode 'max-autotun'.*did you mean"):
        refold.compile_for_inference(
            ConvNet(), torch.randn(2, 3, 8, 8), target="inductor", mode="max-autotun"
        )
    with pytest.raises(UsageError, match=r"no option 'mod'.*did you mean 'mode'"):
        refold.compile_for_inference(ConvNet(), target="inductor", mod="default")


def symbolic(size: int):
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv())
    return mode.from_tensor(torch.randn(size, 4)), mode.shape_env


def test_guards_on_sizes_are_checked():
    fake, env = symbolic(6)
    size = fake.shape[0]
    assert bool(size % 2 == 0)  # is recorded
    assert bool(size < 100)
    guards = SizeGuards.of([fake], [g.expr for g in env.guards])
    assert guards.hold([torch.randn(8, 4)])
    assert not guards.hold([torch.randn(7, 4)])
    assert not guards.hold([torch.randn(200, 4)])
    assert SizeGuards.of([size], [g.expr for g in env.guards]).hold([8])


def test_guards_on_what_no_input_tells_never_hold():
    fake, env = symbolic(6)
    assert bool(fake.shape[0] % 2 == 0)
    assert not SizeGuards.of([torch.randn(3)], [g.expr for g in env.guards]).hold([torch.randn(3)])
    assert SizeGuards.of([fake], []).hold([torch.randn(3, 4)])


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0)])
def test_layouts(order):
    x = torch.randn(2, 3, 4, 5)
    for given in (x, x.to(memory_format=torch.channels_last), x.expand(2, 3, 4, 5)[..., ::2]):
        out = _laid_out(given, order)
        assert torch.equal(out, given)
        assert out.permute(order).is_contiguous()
    settled = _laid_out(x, order)
    assert _laid_out(settled, order) is settled


def test_copies_of_written_inputs_are_written_back():
    def double(x: torch.Tensor) -> list[torch.Tensor]:
        return [x.mul_(2)]

    x = torch.randn(4, 3).t()
    expected = x * 2
    Layouts(((0, 1),), frozenset({0})).call(double, [x])
    assert torch.equal(x, expected)


class Sizes(nn.Module):
    """Height and width decide what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn(self.conv(x))
        return y.reshape(x.shape[0], 4, -1).softmax(-1) * (x.shape[2] + 2 * x.shape[3])


class Counts(nn.Module):
    """Writes its own state, and its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.bn(self.conv(x)) * self.calls


@pytest.mark.slow
def test_batches_layouts_and_structure():
    model = seeded(Structured())
    args, kwargs = structured_call(2)
    compiled = refold.compile_for_inference(
        _Keyword(model), _named(args, kwargs), target="inductor"
    )
    assert compiled.report.artifact_numerics["passed"]
    for batch in (1, 2, 3, 7):
        args, kwargs = structured_call(batch, reverse=True)
        for layout in (torch.contiguous_format, torch.channels_last):
            x = args[0].to(memory_format=layout)
            assert_same(compiled(x=x, **kwargs), model(x, **kwargs))


@pytest.mark.slow
def test_dynamic_height_and_width():
    model, x = seeded(Sizes()), torch.randn(2, 3, 8, 10)
    auto = torch.export.Dim.AUTO
    compiled = refold.compile_for_inference(
        model, x, target="inductor", dynamic_shapes=({0: auto, 2: auto, 3: auto},)
    )
    for sizes in ((2, 8, 10), (1, 8, 10), (3, 9, 12), (5, 32, 16), (2, 10, 8)):
        x = torch.randn(sizes[0], 3, *sizes[1:])
        with torch.no_grad():
            assert relative_error(compiled(x), model(x)) <= SINGLE


@pytest.mark.slow
def test_state_is_kept_between_calls():
    model, x = seeded(Counts()), torch.randn(2, 3, 8, 8)
    compiled = refold.compile_for_inference(model, x, target="inductor")
    with torch.no_grad():
        for _ in range(3):
            assert relative_error(compiled(x), model(x)) <= SINGLE


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    model, x = seeded(Sizes()).to(dtype), torch.randn(2, 3, 8, 8, dtype=dtype)
    compiled = refold.compile_for_inference(model, x, target="inductor")
    assert compiled.report.artifact_numerics["passed"]


@pytest.mark.slow
def test_there_is_no_file_of_it(tmp_path):
    compiled = refold.compile_for_inference(
        seeded(ConvNet()), torch.randn(2, 3, 8, 8), target="inductor", verify=False
    )
    with pytest.raises(BackendError, match="target='aoti'"):
        compiled.save(tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


class _Keyword(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x, extra):
        return self.inner(x, extra=extra)


def _named(args, kwargs):
    return {"x": args[0], **kwargs}
