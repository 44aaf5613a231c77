"""Layers of binary planes: the native kernel against torch in float32 and ONNX Runtime in 4 bits.

One layer of each shape, batch 1 with weights that no cache holds, and larger batches. Run from the
repository's root, on a machine that does nothing else:
``python -m bench.shift_add_kernel [--rounds 40] [--threads 1 2]``. The forms run in turn, in a new
order each round; each is measured through what users call: torch's operator, a session's ``run``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper

from bench.common import interleaved, ratio, save
from refold import native
from refold.native import op  # noqa: F401  (registers the operator)
from refold.native.layer import pack
from refold.ops import bcq_linear

GROUP = 128
COLD = 64 << 20  # bytes of weights between two uses of one: twice the largest cache here
SHAPES = ((4096, 4096), (4096, 11008))  # outputs, features

Run = Callable[[], Any]


def copies(size: int) -> int:
    """Layers that make weights cold."""
    return max(2, -(-COLD // size))


def torch_float(rows: int, features: int, x: torch.Tensor) -> tuple[Run, int, int]:
    """A chain of float32 layers: the call, its layers, bytes of each."""
    size = 4 * rows * features
    weights = [torch.randn(rows, features) for _ in range(copies(size))]
    return (
        lambda: [torch.nn.functional.linear(x, w) for w in weights],
        len(weights),
        size,
    )


def native_planes(
    q: int, rows: int, features: int, x: torch.Tensor, *, exact: bool, uniform: bool = False
) -> tuple[Run, int, int]:
    """The same of binary planes with float16 scales."""
    groups = -(-features // GROUP)

    def layer() -> Any:
        planes = torch.randint(0, 256, (q, rows, features // 8), dtype=torch.uint8)
        alpha = torch.rand(1 if uniform else q, rows, groups).half()
        packed = pack(planes, alpha, GROUP)
        call = torch.ops.refold.bcq_linear_packed
        expected = bcq_linear.reference(x[:1].double(), planes[:, :64], alpha[:, :64], None, GROUP)
        got = call(x, packed.planes, packed.scales, None, rows, GROUP, exact)[:1, :64]
        error = float((got - expected).norm() / expected.norm())
        assert error <= (1e-6 if exact else 1.2e-2), error
        return packed

    first = layer()
    size = first.planes.nbytes + first.scales.nbytes
    layers = [first, *(layer() for _ in range(copies(size) - 1))]
    call = torch.ops.refold.bcq_linear_packed
    return (
        lambda: [call(x, p.planes, p.scales, None, rows, GROUP, exact) for p in layers],
        len(layers),
        size,
    )


def onnxruntime_int4(
    rows: int, features: int, x: torch.Tensor, threads: int
) -> tuple[Run, int, int]:
    """The same of blocks of 4-bit integers: DequantizeLinear and MatMul, which the runtime fuses.

    All layers are in one session and read one input, so that its overhead is paid once.
    """
    size = rows * features // 2 + 4 * rows * (features // GROUP)
    count = copies(size)
    generator = np.random.default_rng(0)
    constants, calls = [], []
    for i in range(count):
        codes = generator.integers(0, 256, features * rows // 2, dtype=np.uint8)
        constants.append(
            helper.make_tensor(
                f"w{i}", TensorProto.INT4, (features, rows), codes.tobytes(), raw=True
            )
        )
        scales = generator.random((features // GROUP, rows), dtype=np.float32)
        constants.append(onnx.numpy_helper.from_array(scales, f"s{i}"))
        calls.append(
            helper.make_node(
                "DequantizeLinear", [f"w{i}", f"s{i}"], [f"d{i}"], axis=0, block_size=GROUP
            )
        )
        calls.append(helper.make_node("MatMul", ["x", f"d{i}"], [f"y{i}"]))
    graph = helper.make_graph(
        calls,
        "layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [
            helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [x.shape[0], rows])
            for i in range(count)
        ],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its threads would go on spinning, on cores that the other forms are to use.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {"x": x.numpy()}
    return lambda: session.run(None, feed), count, size


def timed(
    runs: Mapping[str, tuple[Run, int, int]], rounds: int, threads: int
) -> dict[str, list[float]]:
    """Seconds a layer: CPU time of one thread, which a shared machine can measure, else wall."""
    clock = time.process_time if threads == 1 else time.perf_counter
    seconds = interleaved({n: run for n, (run, _, _) in runs.items()}, rounds, 1, clock=clock)
    return {name: [s / runs[name][1] for s in taken] for name, taken in seconds.items()}


def forms(rows: int, features: int, batch: int, threads: int) -> dict[str, tuple[Run, int, int]]:
    x = torch.randn(batch, features, generator=torch.Generator().manual_seed(0))
    made = {
        "torch float32": torch_float(rows, features, x),
        "native q=2 exact": native_planes(2, rows, features, x, exact=True, uniform=True),
        "native q=3 exact": native_planes(3, rows, features, x, exact=True),
    }
    if batch > 1:
        made["native q=3"] = native_planes(3, rows, features, x, exact=False)
    else:
        made["native q=2"] = native_planes(2, rows, features, x, exact=False, uniform=True)
        made["native q=3"] = native_planes(3, rows, features, x, exact=False)
        made["native q=4"] = native_planes(4, rows, features, x, exact=False)
        made["ONNX Runtime 4 bits"] = onnxruntime_int4(rows, features, x, threads)
    return made


def measure(rows: int, features: int, batch: int, threads: int, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    runs = forms(rows, features, batch, threads)
    taken = timed(runs, rounds, threads)
    peers = [n for n in ("torch float32", "ONNX Runtime 4 bits") if n in runs]
    return {
        "rows": rows,
        "features": features,
        "batch": batch,
        "threads": threads,
        "bytes": {name: size for name, (_, _, size) in runs.items()},
        "least ms": {name: 1e3 * min(s) for name, s in taken.items()},
        "of minima": {
            f"{peer} / {name}": min(taken[peer]) / min(taken[name])
            for peer in peers
            for name in runs
            if name not in peers
        },
        "of medians": {
            f"{peer} / {name}": ratio(taken[peer], taken[name])
            for peer in peers
            for name in runs
            if name not in peers
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="paired rounds")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16, 32, 128])
    parser.add_argument("--output", default="shift_add_kernel", help="name of the result")
    options = parser.parse_args()
    reason = native.status()
    if reason:
        raise SystemExit(f"the native kernel does not run here: {reason}")
    rows = []
    for threads in options.threads:
        for batch in options.batches:
            for shape in SHAPES:
                # What larger batches cost does not depend on what is cold.
                rounds = options.rounds if batch == 1 else max(5, options.rounds // 4)
                rows.append(measure(*shape, batch, threads, rounds))
                print(rows[-1], flush=True)
    print(save(options.output, vars(options), rows))


if __name__ == "__main__":
    main()
