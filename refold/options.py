"""Options as text: fields of a frozen dataclass, read by their annotations.

A pass and a target's options are dataclasses whose fields users set. The command line, and
pipelines written as one string, give them as ``name=value``.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from refold.errors import UsageError, did_you_mean

_WORDS = {"true": True, "false": False}
_LISTS = (collections.abc.Sequence, collections.abc.Iterable, tuple, list)
_MAPPINGS = (collections.abc.Mapping, dict)  # of names to integers, as a profile of sizes is
_NOT_OPTIONS = ("name", "exactness")  # what a pass says of itself


class _Unreadable(Exception):
    """A text that is no value of a kind."""


def spelled(name: str) -> str:
    """An option as users write it, with dashes; underscores are taken too."""
    return name.replace("_", "-")


def fields_of(owner: type) -> dict[str, dataclasses.Field[Any]]:
    """The options of a dataclass, as users write them: ``group-size``."""
    if not dataclasses.is_dataclass(owner):
        return {}
    return {
        spelled(f.name): f
        for f in dataclasses.fields(owner)
        if f.init and f.name not in _NOT_OPTIONS
    }


def read(owner: type, given: Mapping[str, str | None], whose: str) -> dict[str, Any]:
    """Keyword arguments of a dataclass from texts.

    Args:
        owner: the dataclass.
        given: texts by option, with dashes or underscores; ``None`` for a bare name, which is true.
        whose: what owns the options, for errors: ``pass 'fold-branches'``.

    Raises:
        UsageError: there is no such option, or the text is no value of it.
    """
    known = fields_of(owner)
    found: dict[str, Any] = {}
    for name, text in given.items():
        option = known.get(spelled(name))
        if option is None:
            hint = did_you_mean(name, known) if known else " (it has none)"
            raise UsageError(f"{whose} has no option {name!r}{hint}")
        kind = _kind(owner, option)
        try:
            found[option.name] = _value("true" if text is None else text, kind)
        except _Unreadable:
            takes = words(kind)
            expected = f"expected {takes}" if takes else "it can only be set from Python"
            shown = "no value" if text is None else repr(text)
            raise UsageError(f"{whose}: option {name} got {shown}, {expected}") from None
    return found


def check(owner: type, given: Mapping[str, Any], whose: str) -> None:
    """Checks values that were given in Python for the fields of a dataclass.

    Raises:
        UsageError: a value is of another kind than its field says.
    """
    for option in dataclasses.fields(owner):
        kind = _kind(owner, option)
        if option.name in given and not any(_is(given[option.name], k) for k in _choices(kind)):
            raise UsageError(
                f"{whose}: option {option.name} got {given[option.name]!r}, expected {words(kind)}"
            )


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind; of kinds that words() has no words for, any value is."""
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (bool, str, type(None)):
        return isinstance(value, kind)
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    return True


def assignments(texts: Iterable[str]) -> dict[str, str | None]:
    """``name=value`` and bare names, as a mapping; what comes last wins."""
    found: dict[str, str | None] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name:
            raise UsageError(f"option {text!r}: write name=value")
        found[name] = value if equals else None
    return found


def described(owner: type) -> dict[str, str]:
    """By option what it takes and its default, in words."""
    return {
        name: f"{words(_kind(owner, f)) or 'set from Python'}, default {_shown(f)}"
        for name, f in fields_of(owner).items()
    }


def _shown(option: dataclasses.Field[Any]) -> str:
    value = option.default
    if value is dataclasses.MISSING and option.default_factory is not dataclasses.MISSING:
        value = option.default_factory()
    if value is dataclasses.MISSING:
        return "none: it must be given"
    return "none" if value is None or value == () else _plain(value)


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _kind(owner: type, option: dataclasses.Field[Any]) -> Any:
    """The annotation of a field; that of its default where names in it are not known here."""
    try:
        return get_type_hints(owner).get(option.name, str)
    except NameError:
        return type(option.default)


def _choices(kind: Any) -> tuple[Any, ...]:
    """The alternatives of an annotation, ``None`` among them."""
    if get_origin(kind) in (Union, types.UnionType):
        return tuple(c for alternative in get_args(kind) for c in _choices(alternative))
    return (kind,)


def _value(text: str, kind: Any) -> Any:
    # text is read as the narrowest kind that takes it: 3 is a number where there may be one
    for choice in sorted(_choices(kind), key=lambda c: c is str):
        try:
            return _read(text, choice)
        except (_Unreadable, ValueError):
            continue
    raise _Unreadable


def _read(text: str, kind: Any) -> Any:
    if kind is type(None) and text.lower() == "none":
        return None
    if kind is bool and text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if kind in (int, float, str):
        return kind(text)
    if get_origin(kind) is Literal:
        for value in get_args(kind):
            if text == str(value):
                return value
    if get_origin(kind) in _LISTS and get_args(kind)[:1] in ((str,), (int,), (float,)):
        item = get_args(kind)[0]
        return tuple(item(part) for part in text.split(",") if part)
    if get_origin(kind) in _MAPPINGS:
        pairs = [part.partition("=") for part in text.split(",")]
        if all(name and numbers for name, _, numbers in pairs):
            return {name: tuple(map(int, numbers.split(":"))) for name, _, numbers in pairs}
    raise _Unreadable


def words(kind: Any) -> str:
    """What an option takes, in words; nothing where text can say none of it."""
    found = [_word(choice) for choice in _choices(kind)]
    return " or ".join(w for w in found if w)


def _word(kind: Any) -> str:
    if kind is type(None):
        return "none"
    plain = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    if kind in plain:
        return plain[kind]
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    if get_origin(kind) in _LISTS and get_args(kind)[:1] in ((str,), (int,), (float,)):
        return "values with commas between"
    if get_origin(kind) in _MAPPINGS:
        return "name=number:number:..., with commas between"
    return ""
