"""Reads the guards that ``torch.export`` recorded on the sizes of inputs."""

from __future__ import annotations

import ast
import inspect
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from refold.graph.guards import DerivedSize, Guard

_SIZE = re.compile(r"L((?:\['[^']+'\]|\[\d+\]|\.(?!size\(\))\w+)*)\.size\(\)\[(\d+)\]")
_COMPARISON = re.compile(r"([\w\s+*()-]+)([<>=!]=|[<>])([\w\s+*()-]+)")
_TORCH = os.path.dirname(torch.__file__) + os.sep

Size = int | str


def read(
    program: ExportedProgram,
    gm: fx.GraphModule,
    sizes: Sequence[Sequence[Size]],
    names: Mapping[str, str],
    signature: inspect.Signature | None,
) -> tuple[list[Guard], list[str]]:
    """The guards of a program over the symbols of its input sizes, each once.

    Args:
        program: as ``torch.export`` gave it.
        gm: the same, unlifted; its inputs are in the order of ``sizes``.
        sizes: of each flattened input, as numbers, symbols and expressions of symbols.
        names: the user's names of symbols.
        signature: of the traced forward, where there is a module.

    Returns:
        The guards that not every size fulfils, and those that cannot be checked, as they came.
    """
    found: dict[str, Guard] = {}
    unread: list[str] = []
    codes = list(getattr(program, "_guards_code", ()))
    if not codes:
        return [], []
    paths = _paths(gm, signature)
    for code, line in zip(codes, _lines(program, codes), strict=True):
        guard = _guard(code, line, paths, sizes, names)
        if guard is None:
            unread.append(code)
        elif guard.symbols and guard.code not in found and not _always(guard.code):
            found[guard.code] = guard
    return list(found.values()), unread


def _guard(
    code: str,
    line: str,
    paths: Mapping[str, int],
    sizes: Sequence[Sequence[Size]],
    names: Mapping[str, str],
) -> Guard | None:
    known = True

    def symbol(found: re.Match[str]) -> str:
        nonlocal known
        at = paths.get(found[1])
        if at is None or int(found[2]) >= len(sizes[at]):
            known = False
            return "0"
        size = sizes[at][int(found[2])]
        return size if isinstance(size, str) and size.isidentifier() else f"({size})"

    def user(found: re.Match[str]) -> str:
        at = paths.get(found[1])
        size = None if at is None else sizes[at][int(found[2])]
        if isinstance(size, str) and size in names:
            return names[size]
        return f"{input_name(found[1])}.shape[{found[2]}]"

    over_symbols = _SIZE.sub(symbol, code)
    if not known or "L[" in over_symbols:
        return None
    return Guard(_tidy(over_symbols), _tidy(_SIZE.sub(user, code)), line)


def input_name(path: str) -> str:
    """``['x'][0]`` as the user writes it, ``x[0]``."""
    return re.sub(r"^\['([^']+)'\]", r"\1", path)


def _tidy(code: str) -> str:
    return ast.unparse(ast.parse(" ".join(code.split()), mode="eval"))


def _paths(gm: fx.GraphModule, signature: inspect.Signature | None) -> dict[str, int]:
    """The place of each flattened input by its path in the arguments of ``forward``."""
    info: Any = gm.graph._codegen.pytree_info  # type: ignore[attr-defined]
    args, kwargs = pytree.tree_unflatten(list(range(info.in_spec.num_leaves)), info.in_spec)
    if signature is not None:
        arguments = dict(signature.bind(*args, **kwargs).arguments)
    else:
        arguments = dict(zip(info.orig_args, [*args, *kwargs.values()], strict=False))
    leaves, _ = pytree.tree_flatten_with_path(arguments)
    return {pytree.keystr(path): leaf for path, leaf in leaves}


def _lines(program: ExportedProgram, codes: Sequence[str]) -> list[str]:
    """The user's line behind each guard, where the trace still knows it."""
    env = shape_env(program.graph)
    recorded = [] if env is None else [g for g in env.guards if _of_inputs(g.expr, env)]
    if len(recorded) != len(codes):
        return [""] * len(codes)
    return [_line(getattr(g.sloc, "framework_loc", None)) for g in recorded]


def _line(frame: Any) -> str:
    """``file:line in function`` of a frame of the user's; nothing of one inside of PyTorch."""
    file = getattr(frame, "filename", "")
    if not file or file.startswith((_TORCH, "<")):
        return ""
    return f"{file}:{frame.lineno} in {frame.name}"


def _of_inputs(expression: Any, env: Any) -> bool:
    """Whether a guard is on sizes of inputs alone, as those are that a program keeps."""
    sources = env.var_to_sources
    return all(
        s in sources and not any(type(o).__name__ == "ConstantSource" for o in sources[s])
        and not any("L['self']" in str(getattr(o, "name", "")) for o in sources[s])
        for s in expression.free_symbols
    )  # fmt: skip


def shape_env(graph: fx.Graph) -> Any:
    """The shape environment behind a trace, if any size is symbolic."""
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and hasattr(value, "fake_mode"):
            return value.fake_mode.shape_env
    return None


def _always(code: str) -> bool:
    """Whether all sizes from one on fulfil a comparison of two polynomials."""
    parts = _COMPARISON.fullmatch(code)
    if parts is None:
        return False
    try:
        difference = sympy.sympify(f"({parts[1]}) - ({parts[3]})")
    except (sympy.SympifyError, TypeError):
        return False
    sizes = {s: ValueRanges(1, sympy.oo) for s in difference.free_symbols}
    bounds = bound_sympy(difference, sizes)
    low, high = bounds.lower, bounds.upper
    holds = {
        "!=": low > 0 or high < 0,
        ">=": low >= 0,
        ">": low > 0,
        "<=": high <= 0,
        "<": high < 0,
        "==": low == high == 0,
    }
    return bool(holds[parts[2]])


def derived(sizes: Sequence[Sequence[Size]], inputs: Sequence[str]) -> list[DerivedSize]:
    """Sizes that are expressions of symbols, and how a symbol follows that nothing else tells."""
    plain = {s for row in sizes for s in row if isinstance(s, str) and s.isidentifier()}
    found: list[DerivedSize] = []
    for at, row in enumerate(sizes):
        for axis, size in enumerate(row):
            if isinstance(size, int) or size.isidentifier():
                continue
            name, root, solved = f"_{at}_{axis}", "", ""
            expression = sympy.sympify(size)
            missing = [s for s in expression.free_symbols if str(s) not in plain]
            if len(missing) == 1:
                step, start = expression.coeff(missing[0], 1), expression.coeff(missing[0], 0)
                if sympy.expand(step * missing[0] + start - expression) == 0 and step.is_Integer:
                    root, solved = str(missing[0]), f"({name} - ({start})) // {step}"
                    plain.add(root)
            where = f"dimension {axis} of {inputs[at]!r}"
            found.append(DerivedSize(name, size, where, root, solved))
    return found
