"""Judges an artifact by the results of the original model that it carries."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from refold.backends.base import missing
from refold.backends.tensorrt import artifact, build, reference
from refold.backends.tensorrt import library as libraries
from refold.errors import MissingDependencyError, UsageError, VerificationError

_TORCH = {
    "FLOAT": torch.float32, "FLOAT16": torch.float16, "BFLOAT16": torch.bfloat16,
    "DOUBLE": torch.float64, "INT8": torch.int8, "INT16": torch.int16, "INT32": torch.int32,
    "INT64": torch.int64, "UINT8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

Run = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Signed:
    """What a verification found; written beside the engine.

    Attributes:
        artifact: SHA-256 of ``build.json``, which holds those of all other files.
        engine: SHA-256 of the engine; empty where ONNX Runtime ran the model instead.
        executed_by: library and version that computed the results.
        device: where.
        time: when, in UTC.
        verdicts: distance and tolerance of each output.
        passed: whether all are within.
    """

    artifact: str
    engine: str
    executed_by: str
    device: str
    time: str
    verdicts: tuple[reference.OutputDistance, ...]
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        """The record with a digest over all of it."""
        data = asdict(self)
        text = json.dumps(data, sort_keys=True)
        return {**data, "sha256": hashlib.sha256(text.encode()).hexdigest()}

    @property
    def summary(self) -> str:
        worst = max(self.verdicts, key=lambda v: v.error / v.tolerance if v.tolerance else v.error)
        return (
            f"executed by {self.executed_by} on {self.device}: {worst.output} is {worst.error:.1e} "
            f"from the float64 reference, allowed are {worst.tolerance:.1e}"
        )


def verify_engine(folder: Path, library: str | None = None) -> Signed:
    """Runs the engine of this machine, and signs the result.

    Raises:
        UsageError: there is no engine yet.
        VerificationError: an output is past its tolerance.
    """
    from refold.backends.tensorrt.runner import Engine

    made_of = artifact.read(folder)
    found = build.find(folder, made_of, libraries.need(library))
    if found is None:
        raise UsageError(f"{folder} has no engine for this machine: run `refold build {folder}`")
    engine, record = Engine(found), found.record

    def run(given: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        results = engine(*(given[n].cuda() for n in engine.inputs))
        return dict(zip(engine.outputs, results, strict=True))

    signed = _judge(
        folder, made_of, run, record.sha256, f"{record.library} {record.version}", record.device
    )
    artifact.replace_file(
        found.path.with_suffix(".verified.json"), lambda p: artifact.write_json(p, signed.to_dict())
    )
    return _passed(folder, signed)


def verify_onnx(folder: Path) -> Signed:
    """Runs the ONNX file in ONNX Runtime: what an engine is made of, and no engine."""
    reason = missing(("onnxruntime",), "ort")
    if reason:
        raise MissingDependencyError(reason)
    import onnxruntime

    from refold.backends.onnx.session import open_session, run_session

    made_of = artifact.read(folder)
    session = open_session(folder / artifact.MODEL, accuracy_level=0)
    inputs = [n.name for n in session.get_inputs()]
    outputs = [n.name for n in session.get_outputs()]

    def run(given: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return dict(zip(outputs, run_session(session, [given[n] for n in inputs]), strict=True))

    ran = f"onnxruntime {onnxruntime.__version__}"
    return _passed(folder, _judge(folder, made_of, run, "", ran, "CPU"))


def _judge(
    folder: Path, made_of: artifact.Build, run: Run, engine: str, executed_by: str, device: str
) -> Signed:
    if made_of.verify is None:
        raise UsageError(
            f"{folder} was exported without verification data: export again without --no-verify"
        )
    dtypes = {t.name: _TORCH[t.dtype] for t in made_of.inputs}
    stored = reference.read(folder, made_of.verify, dtypes)
    verdicts = tuple(reference.judge(stored, run))
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Signed(
        artifact.digest(folder / artifact.MARKER), engine, executed_by, device, now, verdicts,
        all(v.passed for v in verdicts),
    )  # fmt: skip


def _passed(folder: Path, signed: Signed) -> Signed:
    wrong = [v for v in signed.verdicts if not v.passed]
    if wrong:
        told = "; ".join(f"{v.output}: {v.error:.2e}, allowed {v.tolerance:.2e}" for v in wrong)
        raise VerificationError(
            f"{folder}, executed by {signed.executed_by} on {signed.device}, is too far from the "
            f"float64 reference (relative to each output's scale): {told}"
        )
    return signed
