"""The shallow copy of a module that is traced in its place."""

from __future__ import annotations

import functools
import inspect
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

_TABLES = frozenset(k for k, v in vars(nn.Module()).items() if isinstance(v, (dict, set)))


def eval_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree in eval mode that shares every parameter and buffer.

    Modules that other modules reach through plain attributes, containers, hooks, bound methods or
    closures are the copies there too. ``train()`` is not called: some modules merge weights in it.
    """
    originals = list(model.modules())
    if any(isinstance(m, torch.jit.ScriptModule) for m in originals):
        return model
    memo: dict[int, Any] = {}
    for module in originals:
        memo[id(module)] = object.__new__(type(module))
    keep: list[Any] = []  # ids in the memo must not be reused
    for module in originals:
        copy = memo[id(module)]
        # most of what a module holds are empty tables of hooks, which no two modules share
        state = {
            k: type(v)() if k in _TABLES and not v else _rewired(v, memo, keep, 0)
            for k, v in vars(module).items()
        }
        state["training"] = False
        copy.__dict__.update(state)
    copied: nn.Module = memo[id(model)]
    return copied


def _rewired(value: Any, memo: dict[int, Any], keep: list[Any], depth: int) -> Any:
    """``value`` with modules replaced by their copies; containers are copied, tensors shared."""
    if id(value) in memo:
        return memo[id(value)]
    if depth > 6 or isinstance(value, (torch.Tensor, str, int, float, bytes, type(None))):
        return value
    new: Any = value
    if type(value) in (list, dict, OrderedDict, set):
        new = type(value)()
        memo[id(value)] = new
        keep.append(value)
        _fill(new, value, functools.partial(_rewired, memo=memo, keep=keep, depth=depth + 1))
        return new
    if type(value) is tuple:
        new = tuple(_rewired(v, memo, keep, depth + 1) for v in value)
    elif isinstance(value, types.MethodType):
        owner = _rewired(value.__self__, memo, keep, depth + 1)
        if owner is not value.__self__:
            new = types.MethodType(value.__func__, owner)
    elif isinstance(value, functools.partial):
        inner = [_rewired(v, memo, keep, depth + 1) for v in (value.func, value.args)]
        new = functools.partial(
            inner[0], *inner[1], **_rewired(value.keywords, memo, keep, depth + 1)
        )
    elif inspect.isfunction(value) and value.__closure__:
        new = _rewired_closure(value, memo, keep, depth)
    if new is not value:
        memo[id(value)] = new
        keep.append(value)
    return new


def _fill(new: Any, old: Any, rewire: Callable[[Any], Any]) -> None:
    if isinstance(new, list):
        new.extend(rewire(v) for v in old)
    elif isinstance(new, set):
        new.update(rewire(v) for v in old)
    else:
        new.update((k, rewire(v)) for k, v in old.items())


def _rewired_closure(
    function: types.FunctionType, memo: dict[int, Any], keep: list[Any], depth: int
) -> types.FunctionType:
    cells: Iterable[types.CellType] = function.__closure__ or ()
    contents = [c.cell_contents if _is_set(c) else None for c in cells]
    if not any(isinstance(c, nn.Module) and id(c) in memo for c in contents):
        return function
    new_cells = tuple(
        types.CellType(memo[id(v)]) if isinstance(v, nn.Module) and id(v) in memo else c
        for c, v in zip(cells, contents, strict=True)
    )
    new = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        new_cells,
    )
    new.__kwdefaults__ = function.__kwdefaults__
    new.__dict__.update(function.__dict__)
    return new


def _is_set(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
