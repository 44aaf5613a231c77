"""Each sketch fits some value, and what does not fit leaves nothing behind."""

from __future__ import annotations

import random

import pytest
import torch

from refold.fuzz.draw import Draw, Unfit
from refold.fuzz.network import Drawn, DrawnNetwork, Value
from refold.fuzz.sketches import EFFECTS, SKETCHES

# An image of four channels, a sequence of four features, and one whose sizes all coincide.
SHAPES = ((2, 4, 4, 6), (2, 3, 4), (2, 8, 4, 4), (4, 4, 4), (2, 4))


def drawing(seed: int) -> Draw:
    draw = Draw(random.Random(seed), effects=True)
    shape = SHAPES[seed % len(SHAPES)]
    draw.inputs += [Drawn("normal", shape, seed=seed), Drawn("normal", shape, seed=seed + 1)]
    draw.inputs.append(Drawn("integers", (2, 3), torch.int64, seed, 4))
    draw.values += [d.make() for d in draw.inputs]
    return draw


@pytest.mark.parametrize("name", [*SKETCHES, *EFFECTS])
def test_a_sketch_fits_and_runs(name: str) -> None:
    function, _ = (SKETCHES | EFFECTS)[name]
    for seed in range(60):
        draw = drawing(seed)
        if not draw.grow(function, Value(0)):
            assert not draw.steps
            assert len(draw.values) == 3
            assert not draw.held
            continue
        last = Value(len(draw.values) - 1)
        network = DrawnNetwork(
            tuple(draw.inputs), draw.held, tuple(draw.steps), (last,), (True, True, True)
        )
        (result,) = network.run(network.example(), network.weights())
        assert torch.equal(result, draw.values[-1]), "it runs as it was drawn"
        return
    pytest.fail("it fits nothing")


def test_what_does_not_fit_is_taken_back() -> None:
    draw = drawing(0)

    def half(d: Draw, x: Value) -> Value:
        d.call("mul_", x, 3.0)
        d.call("add", x, d.hold("normal", 6))
        raise Unfit

    before = draw.values[0].clone()
    assert not draw.grow(half, Value(0))
    assert torch.equal(draw.values[0], before)
    assert (draw.steps, draw.held, draw.weights) == ([], {}, {})
