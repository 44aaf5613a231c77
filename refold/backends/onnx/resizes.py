"""Smooth resizes by a factor, of which the exporter keeps the size alone.

PyTorch reads positions by the factor that it was asked for, the exported ``Resize`` by the sizes:
4 elements resized by 1.7 are 6, which is by 1.5.
"""

from __future__ import annotations

from torch import fx

from refold.errors import BackendError
from refold.graph import nodes
from refold.graph.ops import op_name

_SMOOTH = ("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_upsample_lanczos2d_aa")


def check(graph: fx.Graph) -> None:
    """Looks at every resize with ``antialias=True``.

    Raises:
        BackendError: its factors are not those of its sizes.
    """
    for node in graph.nodes:
        if node.op != "call_function" or op_name(node) not in _SMOOTH:
            continue
        args = nodes.arguments(node)
        factors = args.get("scale_factors") or [args.get("scales_h"), args.get("scales_w")]
        source = args["input"] if "input" in args else args["self"]
        sizes, results = nodes.shape(source)[2:], nodes.shape(node)[2:]
        for factor, size, result in zip(factors, sizes, results, strict=True):
            if factor is None:
                continue
            exact = int(factor) if factor == int(factor) else factor
            if not nodes.same(size * exact, result):
                raise BackendError(
                    f"{node.name} resizes {size} elements by {factor:g} with antialias=True, and "
                    f"ONNX would by {result} / {size}\n  fix: pass size= or "
                    "recompute_scale_factor=True to interpolate, in both places alike"
                )
