"""Quantises the weights of dense layers: codes as they are stored, and how far off they are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import fx

from refold.algebra.binary_coding import BinaryCode, Family, encode
from refold.algebra.compensation import (
    InverseFactor,
    encode_compensated,
    inverse_factor,
    output_error,
)
from refold.calibrate.layers import Layer, hessian_of
from refold.calibrate.lockstep import Compute, Lockstep
from refold.errors import MissingDependencyError
from refold.graph.program import Call
from refold.ops.bcq_linear import dequantise, pack

WIDTHS = (2, 3, 4)

_ROWS = 1024  # rows of a weight that are one job
_HALF = (2.0**-10, 2.0**14)  # largest entries of a row whose scales float16 holds, with room below

T = TypeVar("T")


@dataclass(frozen=True)
class Coded:
    """What became of some layers, in the order of the graph.

    Attributes:
        codes: the codes of those that have one.
        too_far: for the others the code whose error was past the limit.
    """

    codes: dict[Layer, Code] = field(default_factory=dict)
    too_far: dict[Layer, Code] = field(default_factory=dict)


@dataclass(frozen=True)
class Coder:
    """How weights are quantised; what its options mean is said in the pass that has them."""

    group_size: int
    scales: Family
    rounds: int
    damping: float
    jobs: int
    limit: float

    def bytes(self, layer: Layer, width: int) -> int:
        """What the code of a layer takes: planes and scales."""
        rows, features = layer.weight.shape
        kinds = 1 if self.scales in ("uniform", "pot") else width
        scales = kinds * rows * math.ceil(features / self.group_size)
        stored = 2 if _suits_half(layer.weight.evaluate()) else 4
        return width * rows * math.ceil(features / 8) + stored * scales

    def code(
        self,
        gm: fx.GraphModule,
        widths: Mapping[Layer, int],
        calls: Sequence[Call],
        *,
        raising: bool = False,
    ) -> Coded:
        """Codes layers at widths, each on what those before it leave once they are coded.

        Args:
            gm: the graph module, which stays as it is.
            widths: the layers in the order of the graph, and the width of each.
            calls: inputs to calibrate on.
            raising: take the next width where the error is past the limit.
        """
        coded = Coded()
        lockstep = Lockstep(gm, calls)

        def encoded(layers: Sequence[Layer], hessian: torch.Tensor | None) -> dict[Layer, Code]:
            return self._within(layers, widths, hessian, raising=raising)

        for layer, code in in_order(lockstep, list(widths), encoded):
            if code.error <= self.limit:
                coded.codes[layer] = code
                lockstep.instead[layer.node] = code.computing(layer)
            else:
                coded.too_far[layer] = code
        return coded

    def _within(
        self,
        layers: Sequence[Layer],
        widths: Mapping[Layer, int],
        hessian: torch.Tensor | None,
        *,
        raising: bool,
    ) -> dict[Layer, Code]:
        """Codes at the widths asked for or, raising, the next whose errors are allowed."""
        done: dict[Layer, Code] = {}
        pending = [(layer, widths[layer]) for layer in layers]
        while pending:
            wider = []
            for (layer, width), code in zip(pending, self.encode(pending, hessian), strict=True):
                asked = widths[layer]
                raised_from = asked if width > asked else 0
                done[layer] = dataclasses.replace(code, raised_from=raised_from)
                if raising and code.error > self.limit and width < WIDTHS[-1]:
                    wider.append((layer, width + 1))
            pending = wider
        return done

    def encode(
        self, wanted: Sequence[tuple[Layer, int]], hessian: torch.Tensor | None
    ) -> Iterator[Code]:
        """Codes of layers at widths; jobs are made as they are taken, in memory a few at a time."""
        factor = None
        if hessian is not None and hessian.any():
            factor = inverse_factor(hessian, self.damping, self.group_size)
        sizes = [len(range(0, layer.weight.shape[0], _ROWS)) for layer, _ in wanted]
        parts = iter(self._in_parallel(self._jobs_of(wanted, factor)))
        for (layer, width), count in zip(wanted, sizes, strict=True):
            own = [next(parts) for _ in range(count)]
            planes = torch.cat([p for p, _ in own], 1)
            alpha = torch.cat([a for _, a in own], 1)
            yield Code.of(layer, width, planes, alpha, self.group_size, hessian)

    def _jobs_of(
        self, wanted: Sequence[tuple[Layer, int]], factor: InverseFactor | None
    ) -> Iterator[_Job]:
        for layer, width in wanted:
            weight = layer.weight.evaluate()
            half = _suits_half(weight)
            for rows in weight.split(_ROWS):
                yield _Job(
                    rows.clone(), factor, width, self.group_size, self.scales, self.rounds, half
                )

    def _in_parallel(self, jobs: Iterable[_Job]) -> Iterable[_Packed]:
        if self.jobs == 1:
            return map(_run_job, jobs)
        try:
            from joblib import Parallel, delayed
        except ImportError:
            raise MissingDependencyError(
                f"jobs={self.jobs} needs joblib: pip install 'refold[shiftadd]'"
            ) from None
        found: list[_Packed] = Parallel(n_jobs=self.jobs)(delayed(_run_job)(job) for job in jobs)
        return found


def in_order(
    lockstep: Lockstep,
    layers: Sequence[Layer],
    encoded: Callable[[Sequence[Layer], torch.Tensor | None], Mapping[Layer, T]],
) -> Iterator[tuple[Layer, T]]:
    """What ``encoded`` makes of each layer for its inputs; layers on one input come to it together.

    What the caller puts into ``lockstep.instead`` for a layer is what the layers after it see.
    """
    if not lockstep.inputs:
        yield from encoded(layers, None).items()
        return
    ready: dict[Layer, T] = {}
    for at, layer in enumerate(layers):
        lockstep.advance(layer.node)
        if layer not in ready:
            group = [other for other in layers[at:] if other.same_input(layer)]
            ready.update(encoded(group, hessian_of(layer, lockstep.values(layer.x))))
        yield layer, ready.pop(layer)


_Packed = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class _Job:
    """Rows of a weight to quantise, alone or for their inputs."""

    rows: torch.Tensor
    factor: InverseFactor | None
    bits: int
    group_size: int
    family: Family
    rounds: int
    half: bool


@dataclass(frozen=True)
class Code:
    """A quantised weight, and how far it is from what it stands for."""

    bits: int
    planes: torch.Tensor
    alpha: torch.Tensor
    group_size: int
    weight_error: float
    output_error: float
    calibrated: bool
    raised_from: int = 0

    @classmethod
    def of(
        cls,
        layer: Layer,
        bits: int,
        planes: torch.Tensor,
        alpha: torch.Tensor,
        group_size: int,
        hessian: torch.Tensor | None,
    ) -> Code:
        weight = layer.weight.evaluate()
        error = dequantise(planes, alpha, weight.shape[1], group_size, torch.float64) - weight
        relative = float(error.norm() / weight.norm().clamp_min(1e-300))
        of_outputs = math.nan
        if hessian is not None:
            size = output_error(weight, hessian)
            of_outputs = math.sqrt(max(output_error(error, hessian), 0.0) / size) if size else 0.0
        return cls(bits, planes, alpha, group_size, relative, of_outputs, hessian is not None)

    @property
    def error(self) -> float:
        return self.output_error if self.calibrated else self.weight_error

    @property
    def bytes(self) -> int:
        return self.planes.numel() + self.alpha.numel() * self.alpha.element_size()

    def computing(self, layer: Layer) -> Compute:
        """What computes the layer with this weight, in the model's own dtype."""
        features, like = layer.weight.shape[1], layer.node.meta["val"].dtype
        return layer.computing(lambda: self.dense(features, like))

    def dense(self, features: int, dtype: torch.dtype) -> torch.Tensor:
        """The weight, formed as the operator forms it."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return dequantise(self.planes, self.alpha, features, self.group_size, wide).to(dtype)


def _run_job(job: _Job) -> _Packed:
    """One job, on one thread: parallel runs give the same bits as this one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rounding = _to_half if job.half else _to_single
        if job.factor is None:
            code = encode(
                job.rows, job.bits, job.group_size, job.family,
                rounds=job.rounds, rounding=rounding,
            )  # fmt: skip
        else:
            code = encode_compensated(
                job.rows, job.factor, job.bits, job.group_size, job.family,
                rounds=job.rounds, rounding=rounding,
            )  # fmt: skip
        return _packed(code, torch.float16 if job.half else torch.float32)
    finally:
        torch.set_num_threads(threads)


def _packed(code: BinaryCode, stored: torch.dtype) -> _Packed:
    return pack(code.signs), code.alpha.to(stored)


def _to_half(alpha: torch.Tensor) -> torch.Tensor:
    return alpha.half().double()


def _to_single(alpha: torch.Tensor) -> torch.Tensor:
    return alpha.float().double()


def _suits_half(weight: torch.Tensor) -> bool:
    """True if every row's scales are normal numbers of float16."""
    largest = weight.abs().amax(1)
    low, high = _HALF
    return bool(((largest == 0) | ((largest >= low) & (largest <= high))).all())
