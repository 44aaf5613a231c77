"""Which sizes shall vary, and which of them do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from refold.errors import FrontendError


def batch_size(example: Any) -> int | None:
    """The leading size that most tensors share, the first one's where that is undecided."""
    sizes = [t.shape[0] for t in pytree.tree_leaves(example) if _is_tensor(t) and t.ndim]
    if not sizes or not sizes[0]:
        return None
    counts = Counter(sizes)
    most = max(counts.values())
    return int(next(s for s in sizes if counts[s] == most)) or None


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def has_batch(leaf: Any, batch: int) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch


def repeated(example: Any) -> Any:
    return pytree.tree_map(lambda t: t.repeat_interleave(2, 0) if has_batch(t, 1) else t, example)


def is_symbolic(size: Any) -> bool:
    # AUTO may leave a SymInt behind whose expression has become a number.
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


@dataclass(frozen=True)
class _Request:
    """What the caller's ``dynamic_shapes`` say of one dimension of an input."""

    node: fx.Node
    axis: int
    dim: Any

    @property
    def size(self) -> Any:
        return self.node.meta["val"].shape[self.axis]


def requests(program: ExportedProgram, asked: Any, example: Any) -> list[_Request]:
    if isinstance(asked, ShapesCollection):
        return []
    wanted: list[Any] = []

    def walk(spec: Any, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            wanted.append(spec)
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(spec.get(key) if isinstance(spec, dict) else None, item)
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                walk(spec[i] if isinstance(spec, (list, tuple)) and i < len(spec) else None, item)
        else:
            wanted.append(None)

    args, kwargs = example
    if isinstance(asked, dict):
        names = [n.name for n in user_placeholders(program)]
        if not kwargs and len(asked) == len(args):
            walk(list(asked.values()), args)
        else:
            bound = {**dict(zip(names, args, strict=False)), **kwargs}
            walk(asked, bound)
    else:
        walk([*asked, *([None] * len(kwargs))], [*args, *kwargs.values()])
    nodes = user_placeholders(program)
    if len(wanted) != len(nodes):
        return []
    found = [
        _Request(node, axis, dim)
        for node, spec in zip(nodes, wanted, strict=True)
        for axis, dim in (spec.items() if isinstance(spec, dict) else enumerate(spec or ()))
    ]
    for request in found:  # torch.export says nothing of those that are not there
        rank = request.node.meta["val"].dim()
        if not isinstance(request.axis, int) or not -rank <= request.axis < rank:
            raise FrontendError(
                f"dynamic_shapes names dimension {request.axis!r} of {request.node.name}, which "
                f"has {rank}"
            )
    return found


def static_despite(requests: Sequence[_Request]) -> list[str]:
    """Sentences about dimensions that were asked to be dynamic and came out static."""
    return [
        f"dimension {r.axis} of {r.node.name} was asked to be dynamic and is static at "
        f"{r.size}: the model fixes it"
        for r in requests
        if not (r.dim is None or isinstance(r.dim, int) or r.dim is Dim.STATIC)
        and not is_symbolic(r.size)
    ]


def given_names(requests: Sequence[_Request]) -> dict[str, str]:
    """The names of the user's ``Dim`` objects, by the symbols that the trace made of them."""
    return {
        str(r.size): r.dim.__name__
        for r in requests
        if hasattr(r.dim, "__name__") and is_symbolic(r.size) and r.size.node.expr.is_symbol
    }


def user_placeholders(program: ExportedProgram) -> list[fx.Node]:
    user = set(program.graph_signature.user_inputs)
    specs = program.graph_signature.input_specs
    nodes = program.graph.find_nodes(op="placeholder")
    kind = torch.export.graph_signature.InputKind.USER_INPUT
    return [n for n, s in zip(nodes, specs, strict=True) if s.kind == kind or n.name in user]
