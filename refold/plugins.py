"""What other packages offer through entry points: found by name, imported only when asked for."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from refold.errors import UsageError


def offered(group: str) -> dict[str, list[EntryPoint]]:
    """The entry points of a group by name; several packages may offer one name."""
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=group):
        found.setdefault(entry.name, []).append(entry)
    return found


def package(entry: EntryPoint) -> str:
    """The package that an entry point is of."""
    return entry.dist.name if entry.dist is not None else "a package"


def load(entries: list[EntryPoint], what: str) -> Any:
    """What a name of a group stands for, made: a class is called without arguments.

    Args:
        entries: all that are offered under the name.
        what: what it should be, in words.

    Raises:
        UsageError: several packages offer it, or what is offered cannot be imported or made.
    """
    first = entries[0]
    if len({entry.value for entry in entries}) > 1:
        names = " and ".join(sorted(map(package, entries)))
        raise UsageError(f"{what} {first.name!r} is offered by {names}: uninstall all but one")
    try:
        found = first.load()
        return found() if callable(found) else found
    except Exception as error:  # it is code of somebody else, which may fail in any way
        raise UsageError(
            f"{what} {first.name!r} of {package(first)} ({first.value}) cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error


def strangers(group: str, own: Iterable[str]) -> dict[str, list[EntryPoint]]:
    """What packages offer under names that are not refold's own; those stay refold's."""
    known = set(own)
    return {name: entries for name, entries in offered(group).items() if name not in known}


def namesakes(group: str, own: Iterable[str]) -> list[str]:
    """Sentences on what is offered under a name of refold's own, and so never used."""
    found, known = offered(group), set(own)
    return [
        f"{package(entry)} offers {name!r}, which is refold's own: it is not used"
        for name in sorted(known & set(found))
        for entry in found[name]
    ]
