"""Once an input is bound, its generator is gone and the report says what vanished."""

from __future__ import annotations

import inspect
import re

import pytest
from torch import nn

import refold
from refold.graph.constants import constant_nodes
from tests.examples import few
from tests.models.systems import bound
from tests.models.systems.case import settings_of

# The sequence of known rows and queries keeps the layers that both run through.
WHOLE = [name for name, system in bound.SYSTEMS.items() if not system.fails]


@pytest.mark.parametrize("name", few(WHOLE, 4))
def test_the_generator_is_gone_and_said_so(name: str) -> None:
    system = bound.SYSTEMS[name]
    model, settings = system.model(), settings_of(system)
    folded = refold.fold(model, system.inputs(), verify=False, **settings)
    report = folded.report
    assert {b.name for b in report.bound} == set(settings["bind"])
    assert sum(b.bytes for b in report.bound) == sum(
        value.numel() * value.element_size() for value in settings["bind"].values()
    )
    (note,) = (n for n in report.notes if "only serve the bound inputs" in n)
    gone, served = map(int, re.findall(r"(\d+) of (\d+) tensors", note)[0])
    assert gone == served > 0
    assert not [n for n in constant_nodes(folded.graph_module.graph) if n.op == "call_function"]
    free = [n for n in inspect.signature(model.forward).parameters if n not in settings["bind"]]
    assert [record.name for record in report.inputs] == free


def test_a_map_of_places_is_stored_for_every_pixel() -> None:
    """What is bound per pixel grows: two maps of 8 channels instead of one of 2."""
    system = bound.SYSTEMS["location-aware norm"]
    report = refold.fold(
        system.model(), system.inputs(), verify=False, **settings_of(system)
    ).report
    maps, generators, statistics = (2 * 8 - 2) * 72, 2 * (8 * 2 + 8), 2 * 8
    assert report.after.bytes - report.before.bytes == 4 * (maps - generators - statistics)


def test_without_the_binding_the_generator_stays() -> None:
    system = bound.SYSTEMS["hypernetwork"]
    model: nn.Module = system.model()
    values = settings_of(system)["bind"]
    folded = refold.fold(model, (*system.inputs(), *values.values()), verify=False)
    assert folded.report.after.census["linear"] == 3
    assert not folded.report.bound
