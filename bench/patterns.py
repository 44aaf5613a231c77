"""One-pattern nets: compute nodes left by refold and by each installed peer.

Run from the repository's root: ``python -m bench.patterns [--only GLOB] [--inductor]``.
"""

from __future__ import annotations

import argparse
import fnmatch
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx

import refold
from bench.common import export_onnx, quiet, save
from refold.graph.ops import ROWS, kind, op_name
from tests.models.patterns import PATTERNS, Pattern
from tests.randomise import randomise

Count = dict[str, int]

_FX_LAYOUT = {name for name, (kind_, _) in ROWS.items() if kind_ == "layout"}
_FX_LAYOUT |= {"inductor_force_stride_order", "swapaxes", "numpy_T", "mT"}  # of other compilers
_FX_LINEAR = ("conv", "conv-transpose", "linear", "matmul")
_ONNX_LINEAR = {
    "Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul",
    "FusedMatMul", "Einsum",
}  # fmt: skip
_ONNX_LAYOUT = {
    "Cast", "CastLike", "Concat", "Constant", "DepthToSpace", "Expand", "Flatten", "Gather",
    "Identity", "ReorderInput", "ReorderOutput", "Reshape", "Shape", "Slice", "SpaceToDepth",
    "Split", "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip


def count_fx(graph: fx.Graph) -> Count:
    """Linear and other compute calls of an FX graph; ReLUs, which no fold removes, do not count."""
    found = {"linear": 0, "other": 0}
    for node in graph.nodes:
        if node.op not in ("call_function", "call_module", "call_method"):
            continue
        name = op_name(node).rstrip("_") if node.op == "call_function" else str(node.target)
        sizes = not isinstance(node.meta.get("val", torch.empty(0)), torch.Tensor | tuple | list)
        if name in _FX_LAYOUT or name == "relu" or sizes:
            continue
        fused = "mkldnn_fusion" in str(getattr(node.target, "__module__", ""))
        linear = kind(node) in _FX_LINEAR or fused or "convolution" in name or "linear" in name
        found["linear" if linear else "other"] += 1
    return found


def count_onnx(path: Path) -> Count:
    """The same for an ONNX file."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    found = {"linear": 0, "other": 0}
    for node in graph.node:
        if node.op_type not in _ONNX_LAYOUT and node.op_type != "Relu":
            found["linear" if node.op_type in _ONNX_LINEAR else "other"] += 1
    return found


def optimise_with_runtime(source: Path, target: Path) -> Path:
    """Writes the graph as ONNX Runtime rewrites it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(target)
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    return target


class Contest:
    """All contenders on one pattern; intermediate files live in one folder."""

    def __init__(self, pattern: Pattern, folder: Path) -> None:
        torch.manual_seed(0)
        self.inputs = (torch.randn(pattern.shape),)
        self.model = randomise(pattern.model(), self.inputs)
        self.folder = folder
        self._exported: Path | None = None

    @property
    def exported(self) -> Path:
        if self._exported is None:
            self._exported = export_onnx(self.model, self.inputs, self.folder / "exported.onnx")
        return self._exported

    def untouched(self) -> Count:
        with torch.no_grad():
            program = torch.export.export(self.model, self.inputs, strict=False)
            return count_fx(program.run_decompositions({}).graph)

    def refold(self) -> Count:
        return count_fx(refold.fold(self.model, self.inputs).graph_module.graph)

    def refold_runtime(self) -> Count:
        target = self.folder / "refold.onnx"
        with quiet():
            refold.compile_for_inference(self.model, self.inputs, target="onnx").save(target)
        return count_onnx(optimise_with_runtime(target, self.folder / "refold-ort.onnx"))

    def exporter(self) -> Count:
        return count_onnx(self.exported)

    def runtime(self) -> Count:
        return count_onnx(optimise_with_runtime(self.exported, self.folder / "ort.onnx"))

    def onnxslim(self) -> Count:
        import onnxslim

        target = self.folder / "slim.onnx"
        with quiet():
            onnxslim.slim(str(self.exported), str(target))
        return count_onnx(target)

    def onnxsim(self) -> Count:
        import onnx
        import onnxsim

        target = self.folder / "sim.onnx"
        with quiet():
            simplified, _ = onnxsim.simplify(onnx.load(str(self.exported)))
        onnx.save(simplified, str(target))
        return count_onnx(target)

    def fx_fuse(self) -> Count:
        from torch.fx.experimental.optimization import fuse

        with quiet(), torch.no_grad():
            fused = fuse(self.model.eval())
            program = torch.export.export(fused, self.inputs, strict=False)
            return count_fx(program.run_decompositions({}).graph)

    def inductor(self) -> Count:
        from torch._inductor import config

        graphs: list[Count] = []

        def watch(graph: fx.Graph) -> None:
            graphs.append(count_fx(graph))

        torch._dynamo.reset()
        settings = {
            "freezing": True,
            "post_grad_custom_post_pass": watch,
            "force_disable_caches": True,
        }
        with quiet(), config.patch(settings), torch.no_grad():
            torch.compile(self.model)(*self.inputs)
        return graphs[-1]


CONTENDERS: dict[str, Callable[[Contest], Count]] = {
    "traced": Contest.untouched,
    "refold": Contest.refold,
    "refold + ONNX Runtime": Contest.refold_runtime,
    "torch.onnx + onnxscript": Contest.exporter,
    "ONNX Runtime": Contest.runtime,
    "onnxslim": Contest.onnxslim,
    "onnxsim": Contest.onnxsim,
    "torch.fx fuse": Contest.fx_fuse,
    "Inductor freezing": Contest.inductor,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*", help="glob of pattern names")
    parser.add_argument("--inductor", action="store_true", help="also compile with Inductor (slow)")
    parser.add_argument("--output", default="patterns", help="name of the result")
    options = parser.parse_args()
    torch.set_num_threads(1)

    contenders = dict(CONTENDERS)
    if not options.inductor:
        del contenders["Inductor freezing"]
    rows: list[dict[str, Any]] = []
    for name, pattern in PATTERNS.items():
        if not fnmatch.fnmatch(name, options.only):
            continue
        row: dict[str, Any] = {"pattern": name, "optimum": pattern.optimum, "left": {}}
        with tempfile.TemporaryDirectory() as folder:
            contest = Contest(pattern, Path(folder))
            for contender, run in contenders.items():
                try:
                    row["left"][contender] = run(contest)
                except Exception as error:  # a peer that fails is a result too
                    row["left"][contender] = {"error": f"{type(error).__name__}: {error}"[:200]}
        rows.append(row)
        print(name, {c: _short(count) for c, count in row["left"].items()}, flush=True)
    print(save(options.output, vars(options), rows))


def _short(count: dict[str, Any]) -> str:
    return count["error"] if "error" in count else f"{count['linear']}+{count['other']}"


if __name__ == "__main__":
    main()
