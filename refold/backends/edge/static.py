"""Programs of fixed shapes, for runtimes that plan all their memory ahead of time."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from refold.backends import flat
from refold.backends.base import LEFT_ALONE, places
from refold.errors import BackendError, UsageError
from refold.graph.nodes import symbolic_dims
from refold.graph.ops import op_name

if TYPE_CHECKING:
    from refold.graph.program import Program


@dataclass(frozen=True)
class ThreadOptions:
    """Options of targets whose runtime takes a number of threads.

    Attributes:
        threads: threads of one inference.
    """

    threads: int = 1

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise UsageError(f"threads must be 1 or more, got {self.threads}")


@dataclass(frozen=True)
class StaticProgram:
    """A folded program over flat tensors of fixed shapes.

    Attributes:
        module: the graph, one tensor a placeholder.
        tensors: an input for each placeholder.
        signature: how the model's own calls map onto them.
        notes: what became static, for the report.
    """

    module: fx.GraphModule
    tensors: tuple[torch.Tensor, ...]
    signature: flat.Signature
    notes: tuple[str, ...]

    @classmethod
    def of(cls, program: Program, gm: fx.GraphModule, runtime: str) -> StaticProgram:
        """Flattens the program; raises if one of its dimensions is still symbolic."""
        module, signature = flat.flatten(gm, program)
        inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
        for node in inputs:
            dims = symbolic_dims(node)
            if dims:
                raise BackendError(
                    f"{runtime} needs fixed shapes, and dimension {dims[0]} of {node.name} is "
                    "dynamic: leave dynamic_shapes out, or export the program without them"
                )
        tensors = tuple(t.clone() for t in signature.tensors(program.args, program.kwargs))
        shapes = (
            f"{name} {list(t.shape)}"
            for name, t in zip(signature.input_names, tensors, strict=True)
        )
        notes = [f"{runtime} needs fixed shapes, the batch's too: {', '.join(shapes)}"]
        if signature.written:
            names = ", ".join(signature.written)
            notes.append(f"the model writes its input {names}; {LEFT_ALONE}")
        return cls(module, tensors, signature, tuple(notes))

    def export(self) -> torch.export.ExportedProgram:
        """The graph as an exported program of its own.

        Its inputs lie row by row, whatever the strides of the example: formats that keep the order
        of axes would expect them in that order, and runners give them row by row.
        """
        tensors = tuple(t.contiguous() for t in self.tensors)
        with torch.no_grad():
            return torch.export.export(self.module, tensors, strict=False)

    def hints(self, text: str) -> str:
        """What helps to find and mend the cause of a converter's message."""
        found = self.places(text) + flat.half_precision(self.module)
        calls = [n for n in self.module.graph.nodes if n.op == "call_function"]
        if any(op_name(n).startswith(("quantize_per", "dequantize_per")) for n in calls):
            found += "\n  the graph is quantised: targets ort, openvino and trt take such graphs"
        return found

    def places(self, text: str) -> str:
        """Where the operators come from that a converter's message names: lines, or nothing."""
        return places(self.module.graph, text)


def keep_pooled_dims(graph: fx.Graph) -> None:
    """Means over height and width keep their dimensions, and a view drops them.

    XNNPACK takes a mean for global average pooling in that spelling alone; the numbers are the
    same.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mean.dim):
        data, dims, keep, *dtype = [*node.args, False][:3] + list(node.args[3:])
        result = node.meta["val"]
        pools = data.meta["val"].dim() == 4 and sorted(d % 4 for d in dims or ()) == [2, 3]
        if keep or not pools or dtype or node.kwargs:
            continue
        sizes = [int(s) for s in result.shape]
        with graph.inserting_before(node):
            mean = graph.call_function(node.target, (data, dims, True))
            dropped = graph.call_function(torch.ops.aten.view.default, (mean, sizes))
        mean.meta = {**node.meta, "val": result.new_empty([*sizes, 1, 1])}
        dropped.meta = dict(node.meta)
        node.replace_all_uses_with(dropped)
        graph.erase_node(node)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the converters' chatter: deprecations of their own, a line for every stage."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    sink = io.StringIO()
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(sink),
            contextlib.redirect_stderr(sink),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
