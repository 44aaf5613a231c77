"""Compares lowered shift-add layers with the graph that they came from, in ONNX Runtime.

The graph of the file is judged with dense float weights, to rounding. Kernels that round their
activations to int8 are judged layer by layer, on the activations that reach them: within 1e-2, or
within twice what rounding each block of these activations to 255 steps explains. What that does to
the outputs is judged beside a run of the graph that rounds its activations the same way, in torch:
they may be as far from exact ones as rounding makes that run, four times over.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from refold.backends.base import Checked, Runner
from refold.backends.onnx import export
from refold.backends.onnx import session as onnx_runtime
from refold.backends.onnx.export import OnnxContent
from refold.backends.onnx.shift_add.choice import REQUANTISED
from refold.backends.onnx.shift_add.rewrite import LoweredLayer, Written, effective_weight
from refold.errors import VerificationError
from refold.graph.copies import copy_sharing_tensors
from refold.graph.evaluate import Oracle, flat_inputs
from refold.ops.bcq_linear import dequantise
from refold.scratch import Scratch

if TYPE_CHECKING:
    from refold.graph.program import Call
    from refold.verify.references import References

INT8_BOUND = 1e-2  # relative L2 of one layer; 4e-3 to 9e-3 were measured on normal activations
_NOISE_FACTOR = 2.0
_TINY = 1e-30


def check(
    content: OnnxContent, gm: fx.GraphModule, known: References, accuracy_level: int
) -> Checked:
    """Judges the file, then the kernels.

    Args:
        content: the lowered model.
        gm: the graph that it was lowered from.
        known: the calls to compare on.
        accuracy_level: of the sessions that will run it.

    Raises:
        VerificationError: the file or a kernel computes something else.
    """
    from refold.verify import compare

    if not content.shift_add or not known.calls:
        return Checked()
    layers = [w.layer for w in content.shift_add]
    written = as_written(gm, layers)
    # Where nothing but rounding was allowed, the graph is what the references are of.
    same = written is gm and not known.allowed
    expected = known if same else rebase(written, known)
    dense = onnx_runtime.load(content, dense=True)
    result = compare.verify(None, dense, expected)
    told = [f"shift-add file against the substituted graph, weights dense: {result.summary}"]
    by = None if written is gm else expected
    if written is not gm:
        moved = _outputs_apart(written, gm, known)
        error, name = max((_rounding(x), x.name) for x in layers if _rounded(x))
        told.append(
            f"requantised weights: moved by at most {error:.1e} ({name}), an output by {moved:.1e} "
            "(relative L2)"
        )
    fused = [w for w in content.shift_add if w.layer.choice.bits]
    if fused and accuracy_level == 0:
        result = compare.verify(None, onnx_runtime.load(content, accuracy_level=0), expected)
        told.append(f"its kernels in float32: {result.summary}")
    elif fused:
        worst, name, past = _judge_kernels(content, fused, known)
        moved = _outputs_apart(onnx_runtime.load(content), dense, known)
        by = replace(expected, nearby=[[_with_int8(gm, layers, call)] for call in known.calls])
        told.append(
            f"int8 activations cost at most {worst:.1e} of a layer ({name}) and {moved:.1e} of an "
            "output (relative L2); accuracy_level=0 computes in float32"
        )
        if past:
            told.append(
                f"int8 activations cost more than {INT8_BOUND:.0e}, as their range explains, in "
                f"{', '.join(past)}"
            )
    return Checked(tuple(told), by)


def _rounded(layer: LoweredLayer) -> bool:
    return layer.choice.exactness == REQUANTISED


def _rounding(layer: LoweredLayer) -> float:
    """What requantising moved the weights by, relative L2."""
    exact = dequantise(layer.planes, layer.alpha, layer.features, layer.group_size, torch.float64)
    return float((effective_weight(layer) - exact).norm() / exact.norm().clamp_min(_TINY))


def rebase(gm: fx.GraphModule, known: References) -> References:
    """What a substituted graph computes, instead of the original, for the same calls."""
    oracle = Oracle(gm)
    exact, own = [], []
    with torch.no_grad():
        for call in known.calls:
            exact.append(oracle.run(*_copied(call)))
            args, kwargs = _copied(call)
            own.append(gm(*args, **kwargs))
    return replace(known, exact=exact, own=own, nearby=[[] for _ in own], allowed=0.0)


def _copied(call: Call) -> Call:
    copied: Call = pytree.tree_map_only(torch.Tensor, torch.clone, call)
    return copied


def as_written(gm: fx.GraphModule, layers: list[LoweredLayer]) -> fx.GraphModule:
    """The graph with the weights that a file has: its own, but for layers that were rounded."""
    if not any(map(_rounded, layers)):
        return gm
    copy = copy_sharing_tensors(gm)
    graph = copy.graph
    target = torch.ops.refold.bcq_linear.default
    found = [n for n in graph.nodes if n.op == "call_function" and n.target is target]
    for index, (node, layer) in enumerate(zip(found, layers, strict=True)):
        if not _rounded(layer):
            continue
        name = f"refold_requantised_{index}"
        weight = effective_weight(layer).to(node.meta["val"].dtype)
        copy.register_buffer(name, weight)
        with graph.inserting_before(node):
            constant = graph.get_attr(name)
            constant.meta["val"] = weight
            linear = torch.ops.aten.linear.default
            new = graph.call_function(linear, (node.args[0], constant, node.args[3]))
            new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    copy.recompile()
    return copy


def _with_int8(gm: fx.GraphModule, layers: list[LoweredLayer], call: Call) -> Any:
    """What a graph returns whose fused layers round each block of activations to 255 steps."""
    target = torch.ops.refold.bcq_linear.default
    found = [n for n in gm.graph.nodes if n.op == "call_function" and n.target is target]
    fused = {n: x for n, x in zip(found, layers, strict=True) if x.choice.bits}

    class Rounding(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n not in fused:
                return super().run_node(n)
            args, _ = self.fetch_args_kwargs_from_env(n)
            x, layer = args[0].double(), fused[n]
            y = _in_steps(x, layer.choice.block) @ effective_weight(layer).double().t()
            return (y if args[3] is None else y + args[3].double()).to(args[0].dtype)

    args, kwargs = _copied(call)
    with torch.no_grad():
        result = Rounding(gm).run(*flat_inputs(gm.graph, args, kwargs), enable_io_processing=False)
    return gm.graph.process_outputs(result)


def _in_steps(x: torch.Tensor, block: int) -> torch.Tensor:
    """Activations with each block rounded to 255 steps of its largest."""
    blocks = torch.nn.functional.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    step = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(_TINY)
    return ((blocks / step).round() * step).flatten(-2)[..., : x.shape[-1]]


def _judge_kernels(
    content: OnnxContent, fused: list[Written], known: References
) -> tuple[float, str, list[str]]:
    """The largest error of a layer, its name, and the layers past the bound for good reason."""
    worst, name, past = 0.0, fused[0].layer.name, dict[str, None]()
    for written, pairs in _traffic(content, fused, known):
        layer = written.layer
        weight = effective_weight(layer)
        block = layer.choice.block
        padding = (0, -layer.features % block)
        energy = torch.nn.functional.pad(weight.square().sum(0), padding).view(-1, block).sum(1)
        wrong = size = noise = 0.0
        for x, y in pairs:
            x, exact = x.double(), x.double() @ weight.t()
            wrong += float((y.double() - exact).square().sum())
            size += float(exact.square().sum())
            steps = torch.nn.functional.pad(x, padding).unflatten(-1, (-1, block)).abs().amax(-1)
            noise += float(((steps / 127).square() / 12 * energy).sum())
        error = (wrong / max(size, _TINY)) ** 0.5
        explained = _NOISE_FACTOR * (noise / max(size, _TINY)) ** 0.5
        if error > max(INT8_BOUND, explained):
            raise VerificationError(
                f"shift-add layer {layer.name} is {error:.1e} (relative L2) from its own weights, "
                f"allowed are {max(INT8_BOUND, explained):.1e}: this runtime's kernel for "
                f"{layer.choice.bits} bits is wrong here; pass accuracy_level=0",
                layer.name,
            )
        if error > INT8_BOUND:
            past[layer.name] = None
        if error > worst:
            worst, name = error, layer.name
    return worst, name, list(past)


def _traffic(
    content: OnnxContent, fused: list[Written], known: References
) -> Iterator[tuple[Written, list[tuple[torch.Tensor, torch.Tensor]]]]:
    """What each layer read and returned in a session with its kernels."""
    graph = content.model.graph
    inputs = [v.name for v in graph.inputs]
    kept = len(graph.outputs)
    present = {v.name for v in [*graph.inputs, *graph.outputs]}
    wanted = dict.fromkeys(name for w in fused for name in (w.read, w.returned))
    values = {v.name: v for node in graph for v in node.outputs}
    graph.outputs.extend(values[name] for name in wanted if name not in present)
    try:
        names = [v.name for v in graph.outputs]
        with Scratch() as folder:
            export.save(content.model, folder, "model.onnx")
            session = onnx_runtime.open_session(folder / "model.onnx")
    finally:
        del graph.outputs[kept:]
    seen: list[dict[str, torch.Tensor]] = []
    for args, kwargs in known.calls:
        tensors = content.signature.tensors(args, kwargs)
        results = onnx_runtime.run_session(session, tensors)
        seen.append(
            {**dict(zip(inputs, tensors, strict=True)), **dict(zip(names, results, strict=True))}
        )
    for written in fused:
        yield written, [(call[written.read], call[written.returned]) for call in seen]


def _outputs_apart(fast: Runner, exact: Runner, known: References) -> float:
    """How far floating outputs are apart over all calls, relative L2 of the worst."""
    found: dict[int, _Apart] = defaultdict(_Apart)
    for args, kwargs in known.calls:
        with torch.no_grad():
            both = [pytree.tree_leaves(run(*args, **kwargs)) for run in (fast, exact)]
        for index, (a, b) in enumerate(zip(*both, strict=True)):
            if isinstance(b, torch.Tensor) and b.is_floating_point() and b.numel():
                found[index].add(a.double(), b.double())
    return max((f.squared / max(f.size, _TINY) for f in found.values()), default=0.0) ** 0.5


@dataclass
class _Apart:
    squared: float = 0.0
    size: float = 0.0

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        finite = a.isfinite() & b.isfinite()
        a, b = torch.where(finite, a, 0.0), torch.where(finite, b, 0.0)
        self.squared += float((a - b).square().sum())
        self.size += float(b.square().sum())
