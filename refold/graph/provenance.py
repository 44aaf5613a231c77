"""Where a node came from: nodes, module paths and rules; kept in ``meta["custom"]``.

``custom`` is the one metadata key that survives re-export, decomposition and save/load.
"""

from __future__ import annotations

import re
from typing import Any

from torch import fx

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


_LAST = object()


def derive(node: fx.Node, sources: list[fx.Node], rule: str, *, value: object = _LAST) -> None:
    """Stamps ``node`` with the union of its sources' origins and with ``rule``.

    Args:
        node: the new or changed node.
        sources: what it stands for.
        rule: the id of the rule.
        value: the node whose value it has now; the last source unless said otherwise, ``None`` if
            it computes something that the original never did.
    """
    if value is _LAST:
        value = sources[-1] if sources else None
    has = value_of(value) if isinstance(value, fx.Node) else ""
    if sources:
        last = sources[-1]
        for key in ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn", "from_node"):
            if key in last.meta:
                node.meta[key] = last.meta[key]
    names: dict[str, None] = {}
    modules: dict[str, None] = {}
    rules: dict[str, None] = {}
    for source in sources:
        origin = of(source)
        names.update(dict.fromkeys(origin["nodes"]))
        modules.update(dict.fromkeys(origin["modules"]))
        rules.update(dict.fromkeys(origin["rules"]))
    rules[rule] = None
    custom = dict(node.meta.get("custom") or {})
    custom["refold"] = {
        "nodes": list(names),
        "modules": list(modules),
        "rules": list(rules),
        "value": has,
    }
    node.meta["custom"] = custom


def value_of(node: fx.Node) -> str:
    """The name of the original node whose value a node has, or ``""``."""
    stamped: dict[str, Any] | None = (node.meta.get("custom") or {}).get("refold")
    return node.name if stamped is None else str(stamped.get("value", ""))


def of(node: fx.Node) -> dict[str, list[str]]:
    """The origin of a node: original node names, module paths, rules applied so far."""
    stamped: dict[str, Any] | None = (node.meta.get("custom") or {}).get("refold")
    if stamped is not None:
        return {key: list(stamped.get(key, [])) for key in ("nodes", "modules", "rules")}
    path = module_path(node)
    return {"nodes": [node.name], "modules": [path] if path else [], "rules": []}


def module_path(node: fx.Node) -> str:
    """The dotted path of the innermost module that the node was traced in, or ``""``."""
    if node.op == "get_attr":
        return str(node.target).rpartition(".")[0]
    stack = node.meta.get("nn_module_stack") or {}
    for path, _ in reversed(list(stack.values())):
        cleaned = re.sub(r"^L\['self'\]\.?", "", str(path)).replace("._modules[", ".").strip(".")
        # The tracer's own mark on nodes that it adds outside of every module.
        if cleaned and not cleaned.startswith("_empty_nn_module_stack"):
            return re.sub(r"['\]]", "", cleaned)
    return ""


def source_line(node: fx.Node) -> str:
    """``file.py:123`` of the user's own line (the innermost frame outside torch), or ``""``."""
    trace = node.meta.get("stack_trace") or ""
    frames = _FRAME.findall(trace)
    own = [f for f in frames if "/torch/" not in f[0]]
    if not own:
        return ""
    path, line, _ = own[-1]
    return f"{path}:{line}"
