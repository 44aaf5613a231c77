"""A drawn network as Python: a module that runs, as it is printed of a fault."""

from __future__ import annotations

import inspect
import itertools
import linecache
import operator
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from refold.fuzz.network import (
    Cond,
    Drawn,
    DrawnCall,
    DrawnNetwork,
    Held,
    Value,
    draw_tensor,
    leaves,
)

_files = itertools.count()
_HOME = "refold_fuzz_network"


def code_of(network: DrawnNetwork) -> str:
    """A module ``Net``, and its ``inputs``."""
    return "\n".join(_code(network))


def module_of(network: DrawnNetwork) -> nn.Module:
    """The module that the code defines."""
    file, code = f"<fuzz {next(_files)}>", code_of(network)
    linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)
    home = types.ModuleType(_HOME)
    sys.modules[_HOME] = home  # where torch.cond's tracer looks for the names of a function
    exec(compile(code, file, "exec"), vars(home))
    made: nn.Module = home.Net()
    return made.eval()


def drawn_code(drawn: Drawn) -> str:
    """The call that makes a tensor in the printed module."""
    detail = f", {_text(drawn.detail, {})}" if drawn.detail != 0 else ""
    return f"draw_tensor({drawn.kind!r}, {list(drawn.shape)}, {drawn.dtype}, {drawn.seed}{detail})"


def _code(network: DrawnNetwork) -> Iterator[str]:
    yield from ("from __future__ import annotations", "", "import torch", "from torch import nn")
    yield from ("", "", *inspect.getsource(draw_tensor).splitlines(), "", "")
    parts: dict[int, list[int]] = {}
    for at, step in enumerate(network.steps):
        parts.setdefault(step.part, []).append(at)
    nested = len(parts) > 1 and _in_order(network)
    inside: dict[int, list[str]] = {p: [] for p in parts}
    for step in network.steps:
        for name in _held_by(step):
            if not any(name in names for names in inside.values()):
                inside[step.part if nested else 0 if 0 in inside else step.part].append(name)
    count = len(network.inputs)
    body: list[str] = []
    if nested:
        for part, steps in parts.items():
            given, made = _borders(network, steps)
            yield from (f"class Part{part}(nn.Module):", "    def __init__(self):",
                        "        super().__init__()")  # fmt: skip
            yield from (_register(name, network.held[name]) for name in inside[part])
            yield from ("", f"    def forward(self, {', '.join(f'v{i}' for i in given)}):")
            owners = {n: f"self.{n}" for n in inside[part]}
            for at in steps:
                yield from _lines(network.steps[at], count + at, owners)
            yield from (f"        return {', '.join(f'v{i}' for i in made)}", "", "")
            takes = ", ".join(f"v{i}" for i in given)
            body.append(f"        {', '.join(f'v{i}' for i in made)} = self.part{part}({takes})")
    yield from ("class Net(nn.Module):", "    def __init__(self):", "        super().__init__()")
    if nested:
        yield from (f"        self.part{part} = Part{part}()" for part in parts)
    else:
        names = [n for part in inside.values() for n in part]
        yield from (_register(name, network.held[name]) for name in names)
        owners = {n: f"self.{n}" for n in names}
        for at, step in enumerate(network.steps):
            body += _lines(step, count + at, owners)
    takes = "given" if network.wraps else ", ".join(f"v{i}" for i in range(count))
    yield from ("", f"    def forward(self, {takes}):")
    if network.wraps:
        yield from (f"        v{i} = given['x{i}'][0]" for i in range(count))
    yield from body
    yield f"        return {_text(network.outputs, {})}"
    yield from ("", "", f"inputs = [{', '.join(drawn_code(d) for d in network.inputs)}]")


def _in_order(network: DrawnNetwork) -> bool:
    """Whether the steps of each part follow each other, and no part reads another's tensors."""
    order = [s.part for s in network.steps]
    owners: dict[str, int] = {}
    for step in network.steps:
        for name in _held_by(step):
            if owners.setdefault(name, step.part) != step.part:
                return False
    return order == sorted(order)


def _held_by(step: DrawnCall) -> list[str]:
    names = step.holds
    if isinstance(step.target, Cond):
        names = [*names, *step.target.then.held, *step.target.otherwise.held]
    return names


def _borders(network: DrawnNetwork, steps: Sequence[int]) -> tuple[list[int], list[int]]:
    """The values that a part takes, and those that it gives."""
    count = len(network.inputs)
    own = {count + at for at in steps}
    read = dict.fromkeys(i for at in steps for i in network.steps[at].reads if i not in own)
    outside = {i for at, s in enumerate(network.steps) if at not in steps for i in s.reads}
    outside |= {v.index for v in leaves(network.outputs) if isinstance(v, Value)}
    made = sorted(own & outside) or [max(own)]
    return list(read), made


def _register(name: str, drawn: Drawn) -> str:
    if drawn.buffer or not drawn.dtype.is_floating_point:
        return f"        self.register_buffer({name!r}, {drawn_code(drawn)})"
    return f"        self.{name} = nn.Parameter({drawn_code(drawn)}, requires_grad=False)"


def _lines(step: DrawnCall, number: int, owners: Mapping[str, str]) -> Iterator[str]:
    if isinstance(step.target, Cond):
        for name, branch in (("then", step.target.then), ("otherwise", step.target.otherwise)):
            yield from _function(f"{name}{number}", branch, owners)
        pick, *given = (_text(a, owners) for a in step.args)
        yield f"        v{number} = torch.cond({pick}, then{number}, otherwise{number}, ({', '.join(given)},))"  # noqa: E501
        return
    if step.target is operator.getitem:
        yield f"        v{number} = {_text(step.args[0], owners)}[{step.args[1]}]"
        return
    given = [*(_text(a, owners) for a in step.args),
             *(f"{k}={_text(v, owners)}" for k, v in step.kwargs.items())]  # fmt: skip
    yield f"        v{number} = torch.ops.{step.target}({', '.join(given)})"


def _function(name: str, network: DrawnNetwork, owners: Mapping[str, str]) -> Iterator[str]:
    takes = ", ".join(f"v{i}" for i in range(len(network.inputs)))
    yield f"        def {name}({takes}):"
    for at, step in enumerate(network.steps):
        for line in _lines(step, len(network.inputs) + at, owners):
            yield f"    {line}"
    yield f"            return {_text(network.outputs, owners)}"


def _text(operand: Any, owners: Mapping[str, str]) -> str:
    if isinstance(operand, Value):
        return f"v{operand.index}"
    if isinstance(operand, Held):
        return owners[operand.name]
    if isinstance(operand, tuple):
        return f"({', '.join(_text(o, owners) for o in operand)}{',' * (len(operand) == 1)})"
    if isinstance(operand, list):
        return f"[{', '.join(_text(o, owners) for o in operand)}]"
    if isinstance(operand, Mapping):
        return f"{{{', '.join(f'{k!r}: {_text(v, owners)}' for k, v in operand.items())}}}"
    if isinstance(operand, float) and operand in (float("inf"), float("-inf")):
        return f"float('{operand}')"
    return repr(operand)
