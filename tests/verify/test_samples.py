"""Generated inputs are distributed like the example."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from refold.frontends.export import trace
from refold.verify.samples import _random_like, calls_like, shapes_of

GENERATOR = torch.Generator()


def like(leaf: torch.Tensor, *sizes: int) -> torch.Tensor:
    return _random_like(leaf, list(sizes) or list(leaf.shape), GENERATOR.manual_seed(0))


def test_each_channel_has_its_mean_deviation_and_range() -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 3, 16, 16) * torch.tensor([1.0, 0.01, 50.0]).view(3, 1, 1)
    image += torch.tensor([0.0, 5.0, -100.0]).view(3, 1, 1)
    drawn = like(image, 4, 3, 16, 16)
    axes = (0, 2, 3)
    deviation = image.std(axes)
    assert ((drawn.mean(axes) - image.mean(axes)).abs() < 0.15 * deviation).all()
    assert ((drawn.std(axes) / deviation - 1).abs() < 0.15).all()
    assert (drawn.amin(axes) >= image.amin(axes)).all()
    assert (drawn.amax(axes) <= image.amax(axes)).all()


def test_a_rare_large_value_stays_rare() -> None:
    x = 0.1 * torch.randn(2, 64, generator=GENERATOR.manual_seed(1))
    x[0, 0] = 20.0
    drawn = like(x)
    assert float((drawn.abs() > 10).float().mean()) < 0.02  # of uniform values half would be
    assert float(drawn.std()) < 3


def test_one_value_a_channel_tells_nothing_of_it() -> None:
    x = torch.randn(1, 64, generator=GENERATOR.manual_seed(1))
    assert not torch.equal(like(x), x)
    assert float(like(x).std()) > 0.5


def test_masks_and_classes_are_drawn_from_the_values() -> None:
    mask = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    assert set(like(mask, 3, 3).unique().tolist()) == {0.0, 1.0}
    assert set(like(mask.long() * 7, 3, 3).unique().tolist()) <= {0, 7}


def test_a_constant_example_says_nothing_about_the_range() -> None:
    drawn = like(torch.ones(2, 8, 8))
    assert float(drawn.std()) > 0.1
    assert 0.0 <= float(drawn.min()) <= float(drawn.max()) <= 2.0


def test_no_values_and_infinite_ones() -> None:
    assert like(torch.empty(2, 0)).shape == (2, 0)
    assert like(torch.full((2, 3), float("-inf"))).isfinite().all()
    mask = torch.tensor([[0.0, float("-inf")], [0.0, 0.0]])
    assert like(mask).isfinite().all()


# --- which inputs ---------------------------------------------------------------------------------


def sizes(formula, example: torch.Tensor, runs: int, **options) -> list[tuple[int, ...]]:
    """The shapes of the inputs that a model is compared on; the first is the example itself."""

    class Model(nn.Module):
        def forward(self, x):
            return formula(x)

    program = trace(Model(), (example,), {}, **options)
    calls = list(calls_like(program, runs))
    assert calls[0][0] is program.example
    assert [drawn for _, drawn in calls] == [False] + [True] * (len(calls) - 1)
    return [tuple(call[0][0].shape) for call, _ in calls]


X = torch.randn(4, 6, 8)


def test_three_batches_then_the_sizes_of_the_example() -> None:
    def found(formula, runs: int = 5, **options) -> list[int]:
        shapes = sizes(formula, X, runs, **options)
        assert {shape[1:] for shape in shapes} == {(6, 8)}
        return [shape[0] for shape in shapes]

    assert found(torch.relu) == [4, 1, 2, 3, 4]
    assert found(torch.relu, 2) == [4, 1, 2, 3]
    assert found(torch.relu, 3, dynamic_batch=False) == [4, 4, 4]

    def bounded(low: int, high: int, runs: int = 2) -> list[int]:
        dims = {"x": {0: torch.export.Dim("n", min=low, max=high)}}
        return found(torch.relu, runs, dynamic_shapes=dims)

    assert bounded(3, 64) == [4, 3, 4, 5]
    assert bounded(4, 5) == [4, 4, 5]
    assert bounded(1, 4) == [4, 1, 2, 3]
    assert bounded(2, 64) == [4, 1, 2, 3]  # two is the tracer's own bound


def test_batches_are_those_that_the_guards_admit() -> None:
    dims = {"x": {0: 2 * torch.export.Dim("half", min=1, max=64)}}
    shapes = sizes(lambda x: x.reshape(2, -1, 8) * 2, X, 3, dynamic_shapes=dims)
    assert all(shape[0] % 2 == 0 for shape in shapes)


def test_other_sizes_are_halved_where_they_may_be() -> None:
    n, h = torch.export.Dim("n"), torch.export.Dim("h")
    assert sizes(torch.relu, X, 2, dynamic_shapes={"x": {0: n, 2: h}}) == [
        (4, 6, 8), (1, 6, 8), (2, 6, 8), (3, 6, 8), (4, 6, 4),
    ]  # fmt: skip
    for least, halves in ((4, True), (5, False)):
        h = torch.export.Dim("h", min=least, max=64)
        shapes = sizes(torch.relu, X, 6, dynamic_shapes={"x": {0: n, 2: h}})
        assert ((4, 6, 4) in shapes) is halves
        assert len(shapes) == 6


def test_what_is_drawn_has_dtype_and_kind_of_the_example() -> None:
    drawn = like(torch.complex(torch.zeros(3), torch.ones(3)), 5)
    assert (drawn.dtype, drawn.shape) == (torch.complex64, (5,))
    assert float(drawn.real.std()) > 0
    assert float(drawn.imag.std()) > 0
    assert like(torch.tensor([], dtype=torch.int64), 3).tolist() == [0, 0, 0]
    assert like(torch.tensor([2.0, 2.0]), 64).unique().numel() > 2  # no class: a constant
    assert set(like(torch.tensor([2.0, 5.0]), 64).tolist()) == {2.0, 5.0}
    assert like(torch.tensor([3.0]), 64).unique().numel() > 1
    eighth = torch.tensor([0.5, 1.5, 2.25]).to(torch.float8_e4m3fn)
    assert like(eighth, 7).dtype == torch.float8_e4m3fn


@pytest.mark.parametrize(("count", "own"), [(8, True), (7, False)])
def test_how_many_values_tell_of_a_channel(count: int, own: bool) -> None:
    """Two channels of other means: with too few values both are drawn like the whole."""
    x = torch.rand(1, 2, count) + torch.tensor([0.0, 100.0]).view(1, 2, 1)
    low, high = like(x, 1, 2, 64)[0]
    assert bool((low < 50).all() and (high > 50).all()) is own
    assert float(like(x, 1, 2, 64).min()) >= float(x.min())
    assert float(like(x, 1, 2, 64).max()) <= float(x.max())
    # of another number of channels: the whole's
    assert like(x, 1, 3, 64).shape == (1, 3, 64)


def test_a_constant_channel_beside_others_is_drawn_like_the_whole() -> None:
    x = torch.randn(1, 2, 32)
    x[:, 1] = 0.5
    assert float(like(x, 1, 2, 64)[0, 1].std()) > 0.3
    assert like(torch.full((2, 4), -3.0), 2, 4).min() >= -6.0
    assert like(torch.zeros(2, 64)).abs().max() <= 1.0


def test_shapes_are_said() -> None:
    assert shapes_of(((torch.ones(2, 3), 4), {"y": torch.ones(())})) == "[2, 3], []"
    assert shapes_of(((1,), {})) == "no tensors"
