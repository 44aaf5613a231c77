"""What an engine is judged by: inputs, and what the original computes for them in float64."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx
from torch.utils import _pytree as pytree

from refold.errors import BackendError

if TYPE_CHECKING:
    from refold.backends.flat import Signature
    from refold.verify.references import References

_FILE = "cases.npz"
_MOST_BYTES = 64 * 2**20  # of stored inputs and results; the first case is stored always


@dataclass(frozen=True)
class Verification:
    """Inputs and float64 results of some calls, and what each output may be off.

    Attributes:
        inputs: tensors by name, one mapping a call.
        outputs: the same for the results.
        tolerance: allowed distance of each output, relative to its scale; of integer or boolean
            outputs the share of elements that rounding may flip.
        own_error: the distance that PyTorch has, in the precision of the artifact.
    """

    inputs: tuple[dict[str, torch.Tensor], ...]
    outputs: tuple[dict[str, torch.Tensor], ...]
    tolerance: dict[str, float]
    own_error: dict[str, float]


def at_precision(gm: fx.GraphModule, known: References) -> References:
    """The references with the results of the cast graph as the own ones."""
    own = []
    with torch.no_grad():
        for call in known.calls:
            args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, call)
            own.append(gm(*args, **kwargs))
    return replace(known, own=own)


def make(signature: Signature, known: References, dtype: torch.dtype | None) -> Verification:
    """Flattens the references to named tensors and settles the tolerances.

    Args:
        signature: how calls map onto the artifact's inputs and outputs.
        known: calls, float64 results, and the results in the artifact's precision.
        dtype: the lowest float dtype that the artifact computes in, if it was cast.
    """
    inputs: list[dict[str, torch.Tensor]] = []
    outputs: list[dict[str, torch.Tensor]] = []
    owns: list[dict[str, torch.Tensor]] = []
    stored = 0
    for call, exact, own in zip(known.calls, known.exact, known.own, strict=True):
        given = dict(zip(signature.input_names, signature.tensors(*call), strict=True))
        results = dict(zip(signature.output_names, signature.results(exact), strict=True))
        stored += sum(t.numel() * t.element_size() for t in [*given.values(), *results.values()])
        if inputs and stored > _MOST_BYTES:
            break
        inputs.append({n: t.detach().cpu() for n, t in given.items()})
        outputs.append({n: t.detach().cpu() for n, t in results.items()})
        owns.append(dict(zip(signature.output_names, signature.results(own), strict=True)))
    own_error = {n: distance(owns, outputs, n) for n in signature.output_names}
    tolerance = {n: _allowed(own_error[n], owns[0][n].dtype, dtype) for n in signature.output_names}
    return Verification(tuple(inputs), tuple(outputs), tolerance, own_error)


def _allowed(own_error: float, output: torch.dtype, computed: torch.dtype | None) -> float:
    from refold.verify.tolerance import OWN_ERROR_FACTOR, tolerance

    if not (output.is_floating_point or output.is_complex):
        return OWN_ERROR_FACTOR * own_error
    allowed = tolerance(own_error, output)
    return allowed if computed is None else max(allowed, tolerance(own_error, computed))


def distance(
    got: Sequence[Mapping[str, torch.Tensor]],
    expected: Sequence[Mapping[str, torch.Tensor]],
    name: str,
) -> float:
    """The largest distance of an output over all calls, relative to its scale.

    Infinite where shapes or the places of NaN and infinity differ. Of integers and booleans it is
    the share of elements that differ.
    """
    scale = apart = 0.0
    differing = count = 0
    for ours, theirs in zip(got, expected, strict=True):
        a, b = ours[name].detach().cpu(), theirs[name].detach().cpu()
        if a.shape != b.shape:
            return math.inf
        if not (b.is_floating_point() or b.is_complex()):
            differing, count = differing + int((a != b).sum()), count + b.numel()
            continue
        wide = torch.complex128 if b.is_complex() else torch.float64
        a, b = a.to(wide), b.to(wide)
        finite = b.isfinite()
        alike = (a == b) | (a.isnan() & b.isnan())
        if not (a.isfinite() == finite).all() or not alike[~finite].all():
            return math.inf
        if finite.any():
            scale = max(scale, float(b[finite].abs().max()))
            apart = max(apart, float((a - b)[finite].abs().max()))
    if count:
        return differing / count
    return apart / (scale or 1.0)


@dataclass(frozen=True)
class OutputDistance:
    """How far one output is off, and what it may be."""

    output: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


def judge(
    verification: Verification, run: Callable[[Mapping[str, torch.Tensor]], Mapping[str, Any]]
) -> list[OutputDistance]:
    """Runs something on the stored inputs and compares it with the stored results."""
    got = [run(given) for given in verification.inputs]
    return [
        OutputDistance(name, distance(got, verification.outputs, name), allowed)
        for name, allowed in verification.tolerance.items()
    ]


def write(verification: Verification, folder: Path) -> dict[str, Any]:
    """Writes the tensors; returns what ``build.json`` says about them."""
    folder.mkdir()
    arrays: dict[str, Any] = {}
    for kind, calls in (("in", verification.inputs), ("out", verification.outputs)):
        for index, call in enumerate(calls):
            for name, tensor in call.items():
                # NumPy has no bfloat16; float32 holds it exactly.
                plain = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
                arrays[f"{kind}.{index}.{name}"] = plain.numpy()
    np.savez(folder / _FILE, **arrays)
    return {
        "file": f"{folder.name}/{_FILE}",
        "calls": len(verification.inputs),
        "tolerance": verification.tolerance,
        "own_error": verification.own_error,
    }


def read(folder: Path, told: Mapping[str, Any], dtypes: Mapping[str, torch.dtype]) -> Verification:
    """Reads what :func:`write` wrote.

    Args:
        folder: the artifact.
        told: what ``build.json`` says about it.
        dtypes: of the inputs.
    """
    inputs: dict[int, dict[str, torch.Tensor]] = {}
    outputs: dict[int, dict[str, torch.Tensor]] = {}
    try:
        with np.load(folder / "verify" / _FILE, allow_pickle=False) as arrays:
            for key in arrays.files:
                kind, index, name = key.split(".", 2)
                tensor = torch.from_numpy(arrays[key])
                if kind == "in":
                    inputs.setdefault(int(index), {})[name] = tensor.to(dtypes[name])
                else:
                    outputs.setdefault(int(index), {})[name] = tensor
        tolerance, own_error = (
            {str(name): float(value) for name, value in told[key].items()}
            for key in ("tolerance", "own_error")
        )
        complete = all(tolerance.keys() == results.keys() for results in outputs.values())
        if not (inputs and tolerance and complete and inputs.keys() == outputs.keys()):
            raise ValueError("it is incomplete")
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile
    ) as error:  # fmt: skip
        raise BackendError(f"{folder / 'verify' / _FILE} cannot be read: {error}") from error
    return Verification(
        tuple(inputs[i] for i in sorted(inputs)), tuple(outputs[i] for i in sorted(inputs)),
        tolerance, own_error,
    )  # fmt: skip
