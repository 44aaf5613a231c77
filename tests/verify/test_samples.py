"""Generated inputs are distributed like the example."""

from __future__ import annotations

import torch

from refold.verify.samples import _random_like

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
