"""Folds a real network from timm, runs it in ONNX Runtime and prints the report.

Nothing is downloaded: weights are random, batch-norm statistics are random and calibrated, so that
every fold really changes numbers.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

import refold
from refold.cli.model_spec import load_model, randomize_batch_norms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="timm:mobileone_s0")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    named = load_model(arguments.model)
    assert named.input_sizes is not None
    model, image = named.model, torch.randn(named.input_sizes)
    randomize_batch_norms(model, [torch.randn(8, *image.shape[1:])])

    # The same export with no pass at all, to compare with.
    nothing = refold.Pipeline("none", ())
    unfolded = refold.compile_for_inference(
        model, image, target="ort", pipeline=nothing, threads=1, verify=False
    )
    folded = refold.compile_for_inference(model, image, target="ort", threads=1)
    folded.report.model = named.name
    print(folded.report)

    with tempfile.TemporaryDirectory() as folder:
        path = folded.save(Path(folder) / "model.onnx")
        print(f"\nwrote {path.name}: {path.stat().st_size / 1e6:.1f} MB")

    batch = torch.randn(3, *image.shape[1:])
    with torch.no_grad():
        difference = (folded(batch) - model(batch)).abs().max() / model(batch).abs().max()
    print(
        f"on a batch of 3, ONNX Runtime differs from eager PyTorch by {difference:.1e} (relative)"
    )

    before, after = _cpu_times(unfolded, folded, image, arguments.rounds)
    print(
        f"CPU time in ONNX Runtime, 1 thread, median of {arguments.rounds} interleaved rounds: "
        f"{before * 1e3:.1f} ms unfolded, {after * 1e3:.1f} ms folded"
    )


def _cpu_times(a: object, b: object, image: torch.Tensor, rounds: int) -> tuple[float, float]:
    """Medians of two models run in turn, so that a busy machine slows both alike."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 2):
        for model, seen in zip((a, b), times, strict=True):
            start = time.process_time()
            model(image)  # type: ignore[operator]
            seen.append(time.process_time() - start)
    first, second = (sorted(seen[2:])[rounds // 2] for seen in times)
    return first, second


if __name__ == "__main__":
    main()
