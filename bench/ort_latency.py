"""ONNX Runtime: CPU time of the unfolded export, of refold, and of the author's deploy form.

Run from the repository's root: ``python -m bench.ort_latency [NAME ...] [--rounds 30]``.
Ratios are paired: the three run in turn, in a new order each round; each has a 95 % interval.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import refold
from bench.common import export_onnx, interleaved, quiet, ratio, save
from tests.models.timm_networks import NETWORKS, deploy_form, network


def session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Idle threads of one session must not spin beside the run of another.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def runner(path: Path, image: np.ndarray, threads: int) -> Callable[[], Any]:
    found = session(path, threads)
    feed = {found.get_inputs()[0].name: image}
    return lambda: found.run(None, feed)


def write_forms(name: str, size: int | None, folder: Path) -> tuple[dict[str, Path], np.ndarray]:
    """The three forms of a network as ONNX files, and one image."""
    model, images = network(name, size)
    image = images[:1]
    with quiet():
        folded = refold.compile_for_inference(
            model, (image,), target="onnx", dynamic_shapes=({},)
        )  # static like the others: sizes that are computed cost time of their own
        paths = {
            "unfolded": export_onnx(model, (image,), folder / "unfolded.onnx"),
            "deploy": export_onnx(deploy_form(model), (image,), folder / "deploy.onnx"),
            "refold": folded.save(folder / "refold.onnx"),
        }
    return paths, image.numpy()


def measure(name: str, size: int | None, threads: list[int], rounds: int) -> dict[str, Any]:
    row: dict[str, Any] = {"network": name, "threads": {}}
    with tempfile.TemporaryDirectory() as folder:
        paths, image = write_forms(name, size, Path(folder))
        row["image"] = list(image.shape)
        for count in threads:
            runs = {form: runner(path, image, count) for form, path in paths.items()}
            taken = interleaved(runs, rounds)
            row["threads"][str(count)] = {
                "median ms": {f: 1e3 * statistics.median(s) for f, s in taken.items()},
                "unfolded / refold": ratio(taken["unfolded"], taken["refold"]),
                "deploy / refold": ratio(taken["deploy"], taken["refold"]),
                "unfolded / deploy": ratio(taken["unfolded"], taken["deploy"]),
            }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help="names of timm models")
    parser.add_argument("--size", type=int, help="image size (default: the model's own)")
    parser.add_argument("--rounds", type=int, default=40, help="paired rounds")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", default="ort_latency", help="name of the result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.networks:
        rows.append(measure(name, options.size, options.threads, options.rounds))
        print(rows[-1], flush=True)
    print(save(options.output, vars(options), rows))


if __name__ == "__main__":
    main()
