"""Models whose ``forward`` takes ``*args`` or ``**kwargs``, traced like those that name inputs.

``torch.export`` wants sizes of such inputs nested as its own signature nests them, and fails on
some. A call names them all: ``forward(*x, **more)`` with two inputs and ``mask=`` is traced as
``forward(x_0, x_1, *, mask)``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from inspect import Parameter
from typing import Any

from torch import nn

_VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def is_variadic(signature: inspect.Signature) -> bool:
    """Whether a signature takes any number of inputs."""
    return any(p.kind in _VARIADIC for p in signature.parameters.values())


def flat_arguments(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by name, each variadic one by a name of its own.

    Raises:
        TypeError: the call does not fit the signature.
    """
    found: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is Parameter.VAR_POSITIONAL:
            found.update((f"{name}_{i}", item) for i, item in enumerate(value))
        elif kind is Parameter.VAR_KEYWORD:
            found.update(value)
        else:
            found[name] = value
    return found


def name_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Gives a module of our own a forward that names the inputs of a call, where it does not."""
    forward = module.forward
    signature = inspect.signature(forward)
    if not is_variadic(signature):
        return
    try:
        given = flat_arguments(signature, args, kwargs)
    except TypeError:  # the call does not fit: the trace says so
        return
    named: list[Parameter] = []
    for name in given:
        kind = Parameter.KEYWORD_ONLY if name in kwargs else Parameter.POSITIONAL_OR_KEYWORD
        named.append(Parameter(name, kind))
    named += [
        p.replace(kind=Parameter.KEYWORD_ONLY)
        for name, p in signature.parameters.items()
        if name not in given and p.kind not in _VARIADIC
    ]

    def with_names(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    named.sort(key=lambda p: p.kind)
    with_names.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    module.forward = with_names


def flat_shapes(
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    shapes: Any,
) -> Any:
    """Dynamic shapes as a user gives them, by the names that :func:`name_inputs` gives.

    A tuple has an entry for each input, or for each parameter of ``forward``, with the inputs of
    ``*args`` and ``**kwargs`` nested in theirs; so has a dict by name.
    """
    if not is_variadic(signature) or not isinstance(shapes, (tuple, list, dict)):
        return shapes
    given = flat_arguments(signature, args, kwargs)
    bound = signature.bind(*args, **kwargs).arguments
    if not isinstance(shapes, dict):
        nested = len(shapes) == len(bound) and any(
            signature.parameters[name].kind in _VARIADIC and _nests(spec, bound[name])
            for name, spec in zip(bound, shapes, strict=True)
        )
        shapes = dict(zip(bound if nested else given, shapes, strict=False))
    flat: dict[str, Any] = dict.fromkeys(given)
    for name, spec in shapes.items():
        parameter = signature.parameters.get(name)
        if name in given or parameter is None or parameter.kind not in _VARIADIC:
            flat[name] = spec
        elif parameter.kind is Parameter.VAR_KEYWORD:
            flat.update(spec or {})
        else:
            flat.update((f"{name}_{i}", item) for i, item in enumerate(spec or ()))
    return flat


def _nests(spec: Any, value: Any) -> bool:
    """Whether an entry is of the inputs inside of a variadic parameter, not of one tensor."""
    if isinstance(value, dict):
        return isinstance(spec, dict) and set(spec) <= set(value)
    return (
        isinstance(spec, (tuple, list))
        and len(spec) == len(value)
        and all(item is None or isinstance(item, (dict, tuple, list)) for item in spec)
    )
