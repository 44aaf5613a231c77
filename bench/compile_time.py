"""What a compilation costs: CPU seconds of each stage, and of ``torch.export`` alone.

Run from the repository's root: ``python -m bench.compile_time [NAME ...] [--repeats N]``. To hold
two versions of refold against each other, run it with ``--package DIR`` too: each repeat then
compiles with both in turn, in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.common import quiet, save

_ROOT = Path(__file__).resolve().parents[1]


def seconds(name: str) -> dict[str, float]:
    """CPU seconds of export, of the whole compilation, and of its stages, warmed up by another."""
    import torch
    from torch import nn

    import refold
    from tests.models.timm_networks import NETWORKS, network

    torch.set_num_threads(1)
    with quiet():
        small = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
        refold.compile_for_inference(small, torch.randn(2, 3, 4, 4))
        model, image = network(name, NETWORKS[name])
        start = time.process_time()
        with torch.no_grad():
            torch.export.export(model, (image,), strict=False)
        export = time.process_time() - start
        stages = _Stages()
        start = time.process_time()
        refold.compile_for_inference(model, (image,), progress=stages)
        whole = time.process_time() - start
    return {"export": export, "compile": whole, **stages.seconds()}


class _Stages:
    """CPU seconds between the stages that a compilation announces."""

    def __init__(self) -> None:
        self.starts: list[tuple[str, float]] = []

    def __call__(self, stage: str) -> None:
        self.starts.append((stage, time.process_time()))

    def seconds(self) -> dict[str, float]:
        ends = [at for _, at in self.starts[1:]] + [time.process_time()]
        return {stage: end - at for (stage, at), end in zip(self.starts, ends, strict=True)}


def measured(name: str, package: Path) -> dict[str, float]:
    """One measurement in a process of its own, with the refold that lies in ``package``."""
    environment = {**os.environ, "PYTHONPATH": f"{package}{os.pathsep}{_ROOT}"}
    # by its path: with -m the folder of the caller would come before that of the package
    command = [sys.executable, str(Path(__file__).resolve()), "--one", name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def summary(rows: list[dict[str, Any]], form: str) -> str:
    """Median and extremes over the networks of compile / export."""
    ratios = [row[form]["compile / export"] for row in rows]
    return (
        f"{form}: compile / export {statistics.median(ratios):.2f} by median "
        f"({min(ratios):.2f} to {max(ratios):.2f}), {len(ratios)} networks"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", help="names of timm models (default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; the least counts")
    parser.add_argument("--package", type=Path, help="root of another version of refold")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--output", default="compile_time", help="name of the result")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(seconds(options.one)))
        return
    from tests.models.timm_networks import NETWORKS

    packages = {"refold": _ROOT}
    if options.package is not None:
        packages["before"] = options.package.resolve()
    rows: list[dict[str, Any]] = []
    for name in options.networks or NETWORKS:
        runs: dict[str, list[dict[str, float]]] = {form: [] for form in packages}
        for _ in range(options.repeats):
            for form, package in packages.items():
                runs[form].append(measured(name, package))
        # one export for both: it is the same work, and the yardstick
        export = min(run["export"] for found in runs.values() for run in found)
        row: dict[str, Any] = {"network": name, "export": export}
        for form, found in runs.items():
            least = min(found, key=lambda run: run["compile"])
            row[form] = {**least, "compile / export": least["compile"] / export}
        rows.append(row)
        print(row, flush=True)
    for form in packages:
        print(summary(rows, form))
    # where another version lies is of this machine alone
    settings = {"networks": options.networks, "repeats": options.repeats, "forms": list(packages)}
    print(save(options.output, settings, rows))


if __name__ == "__main__":
    main()
