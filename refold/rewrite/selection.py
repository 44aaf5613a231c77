"""Which nodes a user means who names modules."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from torch import fx

from refold.errors import UsageError, did_you_mean
from refold.graph import provenance, subgraphs


def pin(gm: fx.GraphModule, exclude: Iterable[str]) -> None:
    """Marks the nodes of excluded module paths, so that no pass rewrites or removes them.

    Raises:
        UsageError: a glob matches no module path of the graph.
    """
    for node in matching(gm, exclude, "exclude"):
        node.meta["refold_pinned"] = True


def matching(gm: fx.GraphModule, globs: str | Iterable[str], option: str) -> set[fx.Node]:
    """The nodes of the modules that globs name, and of what lies inside these.

    Args:
        gm: the graph module.
        globs: globs of module paths.
        option: what the user calls them.

    Raises:
        UsageError: a glob matches no module path of the graph, which has no calls of a module that
            computes nothing.
    """
    globs = [globs] if isinstance(globs, str) else list(globs)
    if not globs:
        return set()
    inside = [n for g in subgraphs.walk(gm) for n in g.graph.nodes]
    chains = {n: _ancestors(provenance.module_path(n)) for n in inside}
    known = {path for chain in chains.values() for path in chain}
    for glob in globs:
        if not any(fnmatch.fnmatchcase(path, glob) for path in known):
            raise UsageError(
                f"{option}: no module matches {glob!r} among those that compute something"
                f"{did_you_mean(glob, known)}"
            )
    return {
        node
        for node, chain in chains.items()
        if any(fnmatch.fnmatchcase(path, glob) for path in chain for glob in globs)
    }


def _ancestors(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
