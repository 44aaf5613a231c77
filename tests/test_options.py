"""Options as text: by the fields of a dataclass, and by their annotations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from refold import options
from refold.errors import UsageError


@dataclass(frozen=True)
class Knobs:
    name: str = "knobs"
    exactness: str = "exact"
    count: int = 3
    share: float = 0.5
    on: bool = False
    mode: Literal["fast", "small"] = "fast"
    width: int | Literal["auto"] = 4
    limit: float | None = None
    include: str | Sequence[str] = ()
    sizes: tuple[int, ...] = ()
    profile: Mapping[str, tuple[int, int]] | None = None
    calls: Sequence[Any] = field(default=(), repr=False)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("count=7", {"count": 7}),
        ("count=-1", {"count": -1}),
        ("share=inf", {"share": float("inf")}),
        ("share=1e-3", {"share": 1e-3}),
        ("on=true", {"on": True}),
        ("on=False", {"on": False}),
        ("on", {"on": True}),
        ("mode=small", {"mode": "small"}),
        ("width=2", {"width": 2}),
        ("width=auto", {"width": "auto"}),
        ("limit=none", {"limit": None}),
        ("limit=2.5", {"limit": 2.5}),
        ("include=head,blocks.*", {"include": ("head", "blocks.*")}),
        ("sizes=1,2", {"sizes": (1, 2)}),
        ("profile=n=1:8,m=2:3", {"profile": {"n": (1, 8), "m": (2, 3)}}),
    ],
)
def test_a_value_is_read_as_its_annotation_says(text: str, value: dict[str, Any]) -> None:
    read = options.read(Knobs, options.assignments([text]), "knobs")
    assert read == value
    assert [type(v) for v in read.values()] == [type(v) for v in value.values()]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("count=many", "option count got 'many', expected an integer"),
        ("count", "option count got no value, expected an integer"),
        ("count=1.5", "expected an integer"),
        ("on=maybe", "expected true or false"),
        ("mode=slow", "expected fast or small"),
        ("width=wide", "expected an integer or auto"),
        ("limit=x", "expected a number or none"),
        ("profile=1:8", "expected name=number:number:..., with commas between or none"),
        ("calls=1", "it can only be set from Python"),
        ("cuont=3", "knobs has no option 'cuont' (did you mean 'count'?)"),
        ("name=other", "knobs has no option 'name'"),
        ("=3", "write name=value"),
    ],
)
def test_what_cannot_be_read_says_what_is_expected(text: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        options.read(Knobs, options.assignments([text]), "knobs")
    assert words in str(error.value)


def test_dashes_and_underscores_are_one() -> None:
    @dataclass(frozen=True)
    class Grouped:
        group_size: int = 8

    assert options.read(Grouped, {"group-size": "16"}, "x") == {"group_size": 16}
    assert options.read(Grouped, {"group_size": "16"}, "x") == {"group_size": 16}
    assert options.described(Grouped) == {"group-size": "an integer, default 8"}


def test_options_are_described() -> None:
    assert options.described(Knobs)["width"] == "an integer or auto, default 4"
    assert options.described(Knobs)["limit"] == "a number or none, default none"
    assert options.described(Knobs)["on"] == "true or false, default false"
    assert options.described(Knobs)["calls"] == "set from Python, default none"
    assert options.described(object) == {}


@dataclass(frozen=True)
class Typed:
    threads: int = 0
    exact: bool = False
    level: Literal["low", "high"] = "low"
    limit: float | None = None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"threads": "2"}, "option threads got '2', expected an integer"),
        ({"threads": True}, "option threads got True, expected an integer"),
        ({"exact": "no"}, "option exact got 'no', expected true or false"),
        ({"level": "middle"}, "option level got 'middle', expected low or high"),
        ({"limit": "1"}, "option limit got '1', expected a number or none"),
    ],
)
def test_values_from_python_are_checked(given, said) -> None:
    with pytest.raises(UsageError, match=f"target 'mine': {said}"):
        options.check(Typed, given, "target 'mine'")


def test_values_from_python_that_fit() -> None:
    options.check(
        Typed, {"threads": 2, "exact": True, "level": "high", "limit": 1}, "target 'mine'"
    )
    options.check(Typed, {"limit": None}, "target 'mine'")
