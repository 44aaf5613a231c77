"""Pipelines as one string: ``default,substitute-shift-add{bits=3 group-size=64}``.

    spec  =  item , item , ...
    item  =  name                      a pipeline, which stands for its passes, or a pass
          |  name{option=value ...}    with options: fields of the pass, with dashes

The first item starts the pipeline; each pass that follows goes where ``Pipeline.with_`` puts it,
behind the others but before what closes a pipeline. Options of a pipeline go to each pass of it
that has them. A flag may stand alone: ``{convolutions}`` is ``{convolutions=true}``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from refold import options, plugins
from refold.errors import UsageError, did_you_mean
from refold.rewrite.pipeline import Pipeline
from refold.rewrite.result import Pass

ENTRY_POINT_GROUP = "refold.passes"
_ITEM = re.compile(r"\s*([\w.-]+)\s*(?:\{([^{}]*)\})?\s*")

Options = Mapping[str, str | None]


def parse(text: str, passes: Mapping[str, type], pipelines: Mapping[str, Pipeline]) -> Pipeline:
    """Makes a pipeline of what a string says; it has that string for a name.

    Args:
        text: the string.
        passes: refold's own passes by id; packages offer others.
        pipelines: refold's own pipelines.

    Raises:
        UsageError: it names no pass or pipeline, an option that there is not, or is no spec.
    """
    if text in pipelines:
        return pipelines[text]
    made: Pipeline | None = None
    for name, given in _items(text):
        if name in pipelines:
            found = _with_options(pipelines[name], given)
        else:
            found = Pipeline(name, (_set(load_pass(name, passes, pipelines), given),))
        made = found if made is None else _joined(made, found)
    assert made is not None
    return replace(made, name=text)


def _items(text: str) -> Iterator[tuple[str, Options]]:
    at = 0
    while True:
        item = _ITEM.match(text, at)
        if item is None or (item.end() < len(text) and text[item.end()] != ","):
            raise UsageError(
                f"pipeline {text!r} cannot be read at {text[at:]!r}: write names with commas "
                "between, and options in braces: 'default,substitute-shift-add{bits=3}'"
            )
        yield item.group(1), options.assignments((item.group(2) or "").split())
        at = item.end() + 1
        if item.end() == len(text):
            return


def _joined(pipeline: Pipeline, other: Pipeline) -> Pipeline:
    for item in other.passes:
        pipeline = pipeline.with_(item)
    return pipeline


def _with_options(pipeline: Pipeline, given: Options) -> Pipeline:
    """A pipeline whose passes have options, each of them those that it knows."""
    known = {name for item in pipeline.passes for name in options.fields_of(type(item))}
    for name in given:
        if options.spelled(name) not in known:
            raise UsageError(
                f"no pass of pipeline {pipeline.name!r} has an option {name!r}"
                f"{did_you_mean(name, known)}"
            )
    changed = []
    for item in pipeline.passes:
        own = options.fields_of(type(item))
        changed.append(_set(item, {n: t for n, t in given.items() if options.spelled(n) in own}))
    return replace(pipeline, passes=tuple(changed))


def _set(item: Pass, given: Options) -> Pass:
    if not given:
        return item
    values = options.read(type(item), given, f"pass {item.name!r}")
    return replace(item, **values)  # type: ignore[type-var]


def load_pass(
    name: str, builtin: Mapping[str, type], pipelines: Mapping[str, Pipeline] | None = None
) -> Pass:
    """Makes a pass by its id: one of refold's own, or one that a package offers.

    Packages offer passes through the entry point group ``refold.passes``; a package is imported
    only when its pass is asked for.

    Args:
        name: id of the pass.
        builtin: refold's own passes by id.
        pipelines: whose names may have been meant.

    Raises:
        UsageError: nobody offers a pass of that name, or what is offered is none.
    """
    if name in builtin:
        made = builtin[name]()
    else:
        offered = plugins.offered(ENTRY_POINT_GROUP)
        if name not in offered:
            hint = did_you_mean(name, {*builtin, *(pipelines or ()), *offered})
            raise UsageError(f"unknown pipeline or pass {name!r}{hint}")
        made = plugins.load(offered[name], "pass")
        if isinstance(made, Pass) and made.name != name:
            raise UsageError(
                f"pass {name!r} of {plugins.package(offered[name][0])} calls itself {made.name!r}: "
                "its entry point must have the name of the pass"
            )
    if not isinstance(made, Pass):
        raise UsageError(f"{name!r} does not name a pass: {made!r} has no name, exactness and run")
    return made
