"""A readable, stable text of a graph: the form of golden tests, dumps and verifier messages."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx

from refold.graph import nodes, provenance
from refold.graph.ops import op_name

_DTYPES = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8",
    torch.uint8: "u8", torch.bool: "b8", torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip
_SYMBOL = re.compile(r"\b[suz]+\d+\b")


def render(gm: fx.GraphModule) -> str:
    """The graph as text, one node a line, constants inline, outputs last.

    Symbols of dynamic sizes are renamed in order of appearance, so that the text does not depend
    on the tracer's counters.
    """
    return "\n".join(text for _, text in lines(gm)) + "\n"


def lines(gm: fx.GraphModule) -> list[tuple[fx.Node, str]]:
    """The lines of :func:`render`, each with its node."""
    printer = _Printer()
    return [
        (node, printer.line(node))
        for node in gm.graph.nodes
        if not (node.op == "get_attr" and printer.inlined(node))
    ]


def excerpt(gm: fx.GraphModule, node: fx.Node, context: int = 3) -> str:
    """The lines around ``node``, with a mark at its own."""
    texts = lines(gm)
    at = next((i for i, (n, _) in enumerate(texts) if n is node), None)
    if at is None:  # a constant: show where it is first read
        at = next((i for i, (n, _) in enumerate(texts) if node in n.all_input_nodes), 0)
    first = max(0, at - context)
    shown = texts[first : at + context + 1]
    return "\n".join(("> " if first + i == at else "  ") + t for i, (_, t) in enumerate(shown))


class _Printer:
    def __init__(self) -> None:
        self._symbols: dict[str, str] = {}
        self._introduced: set[str] = set()

    def inlined(self, node: fx.Node) -> bool:
        return "val" in node.meta and isinstance(node.meta["val"], torch.Tensor)

    def line(self, node: fx.Node) -> str:
        if node.op == "output":
            return "return " + self._value(node.args[0])
        head = f"%{node.name} : {self._type(node.meta.get('val'))} = "
        if node.op == "placeholder":
            return head + "input"
        if node.op == "get_attr":
            return head + f"@{node.target}"
        return head + f"{op_name(node)}({self._arguments(node)}){self._origin(node)}"

    def _arguments(self, node: fx.Node) -> str:
        if not isinstance(node.target, torch._ops.OpOverload):
            shown = [self._value(a) for a in node.args]
            return ", ".join(shown + [f"{k}={self._value(v)}" for k, v in node.kwargs.items()])
        parts: list[str] = []
        positional = True
        for argument in node.target._schema.arguments:
            value = nodes.arguments(node)[argument.name]
            required = not argument.has_default_value()
            if not required and _is_default(value, argument.default_value):
                positional = False
                continue
            if argument.kwarg_only:
                positional = False
            bare = positional and (required or isinstance(value, fx.Node))
            positional = positional and bare
            text = self._value(value)
            parts.append(text if bare else f"{argument.name}={text}")
        return ", ".join(parts)

    def _value(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self._reference(value)
        if isinstance(value, (list, tuple)):
            inner = ", ".join(self._value(v) for v in value)
            if isinstance(value, list):
                return f"[{inner}]"
            return f"({inner},)" if len(value) == 1 else f"({inner})"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k}: {self._value(v)}" for k, v in value.items()) + "}"
        if isinstance(value, torch.dtype):
            return _DTYPES.get(value, str(value).removeprefix("torch."))
        return str(value).removeprefix("torch.") if value is not None else "None"

    def _reference(self, node: fx.Node) -> str:
        if node.op != "get_attr":
            return f"%{node.name}"
        name = f"@{node.target}"
        if name in self._introduced or not self.inlined(node):
            return name
        self._introduced.add(name)
        return f"{name}:{self._type(node.meta['val'])}"

    def _type(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            sizes = ", ".join(self._size(s) for s in value.shape)
            device = "" if value.device.type in ("cpu", "meta") else f" {value.device}"
            return f"{_DTYPES.get(value.dtype, str(value.dtype))}[{sizes}]{device}"
        if isinstance(value, (list, tuple)):
            return "(" + ", ".join(self._type(v) for v in value) + ")"
        if isinstance(value, torch.SymInt):
            return self._size(value)
        return "none" if value is None else type(value).__name__

    def _size(self, size: Any) -> str:
        if isinstance(size, torch.SymInt):
            return _SYMBOL.sub(self._rename, str(size.node.expr))
        return str(size)

    def _rename(self, match: re.Match[str]) -> str:
        return self._symbols.setdefault(match.group(), f"s{len(self._symbols)}")

    def _origin(self, node: fx.Node) -> str:
        origin = provenance.of(node)
        modules, rules = origin["modules"], origin["rules"]
        text = ", ".join(modules[:3]) + (", ..." if len(modules) > 3 else "")
        if rules:
            text = f"{text} [{', '.join(rules)}]".strip()
        return f"  # {text}" if text else ""


def _is_default(value: Any, default: Any) -> bool:
    if isinstance(value, fx.Node):
        return False
    if isinstance(value, (list, tuple)) and isinstance(default, (list, tuple)):
        return list(value) == list(default)
    if isinstance(value, torch.memory_format) and isinstance(default, int):
        return default == 0 and value is torch.contiguous_format
    return type(value) is type(default) and bool(value == default)
