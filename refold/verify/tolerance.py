"""What rounding explains: the distance of an output from its reference, and the bound on it.

An output is judged in each call by its own scale, as a whole and cut along each of its axes
(samples, channels, ...): one large element hides nothing in the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from refold.errors import VerificationError
from refold.graph.program import Call
from refold.verify.samples import shapes_of

OWN_ERROR_FACTOR = 4.0
FLOOR_UNITS = 64.0  # units in the last place that reassociation may always cost
_NARROW_UNITS = 8.0  # the same for half precision, where 64 units would hide a wrong result
_DOUBLE_FLOOR = 1e-12  # float64 has no wider oracle: the original's own distance reads 0
_CEILING = 1e-2  # an own error past it makes a tolerance that would hide a wrong result
_CEILING_UNITS = 16.0  # the same in units of half precision, where rounding alone costs as much
_FEW = 0.125  # share of elements that rounding may move far off, where choices flip


@dataclass(frozen=True)
class _Part:
    """Largest distances and scales of an output in one call, in slices along one axis."""

    axis: int | None
    scale: torch.Tensor
    distance: torch.Tensor
    own: torch.Tensor

    def relative(self, whole: float, allowed: float) -> tuple[float, float, int]:
        """The error and own error of the worst slice, relative to its scale, and which it is.

        Slices smaller than half of them are judged by the scale of the middle one: an element
        that is near zero by chance is no measure of what it was computed from.
        """
        sizes = self.scale[self.scale > 0]
        middle = float(sizes.sort().values[(len(sizes) - 1) // 2]) if len(sizes) else whole
        norm = self.scale.clamp_min(middle)
        error = torch.where(self.distance <= allowed * whole, 0.0, self.distance) / norm
        worst = int(error.argmax())
        return float(error[worst]), float((self.own / norm).max()), worst


@dataclass
class Leaf:
    """One output over all inputs."""

    index: int
    name: str
    dtype: torch.dtype
    error: float = 0.0
    own_error: float = 0.0
    tolerance: float = 0.0
    scale: float = 0.0
    worst_call: int = 0
    place: str = ""
    count: int = 0
    compares: bool = False
    is_blind: bool = False
    blind: list[int] = field(default_factory=list)
    parts: dict[int, list[_Part]] = field(default_factory=dict)
    shares: dict[int, tuple[float, float]] = field(default_factory=dict)
    differing: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]] = field(
        default_factory=list
    )

    def settle(self, allowed: float = 0.0) -> None:
        """Finds the call and the slice that are the furthest past what is allowed there.

        A call whose own error is past the ceiling is ``blind``: the rule holds there too, but says
        little.
        """
        if not self.parts:
            return
        pooled = max((float(p[0].scale[0]) for p in self.parts.values()), default=0.0) or 1.0
        wholes = {at: float(parts[0].scale[0]) or pooled for at, parts in self.parts.items()}
        self.tolerance, highest = tolerance(0.0, self.dtype), ceiling(self.dtype)
        found: list[tuple[float, ...]] = []
        hidden: list[tuple[float, ...]] = []
        axes = max((len(parts) for parts in self.parts.values()), default=0)
        for kind in range(axes):
            some = {at: parts[kind] for at, parts in self.parts.items() if len(parts) > kind}
            bound = 0.0 if kind == 0 else allowed
            errors = {at: part.relative(wholes[at], bound) for at, part in some.items()}
            owns = sorted(own for _, own, _ in errors.values())
            usual = owns[len(owns) // 2]
            for at, (error, own, where) in errors.items():
                limit = tolerance(max(own, min(usual, highest)), self.dtype)
                if kind == 0:
                    limit = max(limit, allowed)
                    if own > highest:
                        self.blind.append(at)
                judged = (error / limit, at, kind, where, error, own, limit)
                if at not in self.blind or (kind == 0 and error > limit):
                    found.append(judged)
                elif kind == 0:
                    hidden.append(judged)
        self.is_blind = not found
        if not found and not hidden:
            return
        found = found or hidden
        worst = max(found)
        self.error, self.own_error, self.tolerance = worst[4:]
        self.worst_call, of, index = (int(v) for v in worst[1:4])
        part = self.parts[self.worst_call][of]
        self.scale = float(part.scale[index]) or wholes[self.worst_call]
        if part.axis is not None:
            self.place = f" at index {index} of axis {part.axis}"

    def widen(self, at: int, b: torch.Tensor, r: torch.Tensor) -> None:
        """Takes another run of the original as a measure of its own rounding in a call."""
        if at not in self.parts or b.shape != r.shape:
            return
        apart = (b.detach().cpu() - r.detach().cpu()).abs().double()
        apart = torch.where(apart.isfinite(), apart, 0.0)
        self.parts[at] = [
            _Part(p.axis, p.scale, p.distance, torch.maximum(p.own, _slices(apart, p.axis)))
            for p in self.parts[at]
        ]

    @property
    def is_void(self) -> bool:
        """A floating output of which no element was finite in any call."""
        return self.compares and not self.parts

    def few_apart(self, at: int) -> bool | None:
        """In a blind call: do no more elements differ than in the original itself, up to a few?

        ``None`` where so many differ in the original that this says nothing either.
        """
        ours, theirs = self.shares.get(at, (1.0, 1.0))
        if OWN_ERROR_FACTOR * theirs > 4 * _FEW:
            return None
        return ours <= max(OWN_ERROR_FACTOR * theirs, _FEW)


def widen(leaves: dict[int, Leaf], at: int, results: Any, reference: Any) -> None:
    """Takes another run of the original as a measure of its own rounding in a call."""
    others, exact = pytree.tree_leaves(results), pytree.tree_leaves(reference)
    for leaf in leaves.values():
        leaf.widen(at, others[leaf.index], exact[leaf.index])


def tolerance(own_error: float, dtype: torch.dtype) -> float:
    """What rounding explains at an output: see the module docstring."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return 0.0
    info = torch.finfo(dtype)
    floor = (FLOOR_UNITS if info.bits >= 32 else _NARROW_UNITS) * info.eps
    if dtype in (torch.float64, torch.complex128):
        floor = max(floor, _DOUBLE_FLOOR)
    return max(OWN_ERROR_FACTOR * own_error, floor)


def ceiling(dtype: torch.dtype) -> float:
    """The own error past which the rule would accept anything."""
    return max(_CEILING, _CEILING_UNITS * torch.finfo(dtype).eps)


def collect(leaves: dict[int, Leaf], got: Any, own: Any, reference: Any, call: Call) -> None:
    """Measures all outputs of one call.

    Raises:
        VerificationError: structure, shape, dtype or the NaN pattern differ.
    """
    ours, spec = pytree.tree_flatten(got)
    theirs, expected = pytree.tree_flatten(own)
    exact = pytree.tree_leaves(reference)
    if spec != expected:
        raise VerificationError(
            f"the compiled model returns {spec}, the original {expected}: the structure differs"
        )
    for index, (a, b, r) in enumerate(zip(ours, theirs, exact, strict=True)):
        name = f"output {index}" if len(ours) > 1 else "the output"
        if not isinstance(b, torch.Tensor):
            if isinstance(a, torch.Tensor) or a != b:
                raise VerificationError(f"{name} is {a!r}, the original's is {b!r}")
            continue
        if not isinstance(a, torch.Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            raise VerificationError(
                f"{name} is {_describe(a)}, the original's is {_describe(b)} for {shapes_of(call)}"
            )
        if r.shape != b.shape:  # float64 read as bits has more of them
            r = b
        leaf = leaves.setdefault(index, Leaf(index, name, b.dtype))
        if b.dtype.is_floating_point or b.dtype.is_complex:
            measure(leaf, a, b, r, call)
        elif not torch.equal(a.cpu(), b.cpu()):
            leaf.differing.append((leaf.count, a, b, r))
        leaf.count += 1


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return f"a {type(value).__name__}"


def measure(leaf: Leaf, a: torch.Tensor, b: torch.Tensor, r: torch.Tensor, call: Call) -> None:
    """Takes in one call: the candidate's value, the original's own and the reference."""
    wide = torch.complex128 if b.dtype.is_complex else torch.float64
    a, b, r = (t.detach().to("cpu", wide) for t in (a, b, r))
    leaf.compares |= bool(r.numel())
    distance, own, scale = (a - r).abs(), (b - r).abs(), r.abs()
    if not bool((distance + own).isfinite().all()):
        wrong = ~(_same_class(a, b) | _same_class(a, r))
        if wrong.any():
            raise VerificationError(
                f"{leaf.name}: {int(wrong.sum())} of {wrong.numel()} elements are NaN or infinite "
                f"on one side only, for inputs {shapes_of(call)}"
            )
        if not bool((a.isfinite() & r.isfinite()).any()):
            return
        distance, own, scale = (torch.where(t.isfinite(), t, 0.0) for t in (distance, own, scale))
    if not distance.numel():
        return
    axes = [None, *(range(r.ndim) if r.ndim > 1 or r.numel() > 1 else ())]
    leaf.parts[leaf.count] = [
        _Part(axis, *(_slices(t, axis) for t in (scale, distance, own))) for axis in axes
    ]
    whole = leaf.parts[leaf.count][0]
    if float(whole.own) > ceiling(leaf.dtype) * float(whole.scale):
        far = tolerance(0.0, leaf.dtype) * float(whole.scale)
        share = [float((t > far).double().mean()) for t in (distance, own)]
        leaf.shares[leaf.count] = (share[0], share[1])


def _slices(values: torch.Tensor, axis: int | None) -> torch.Tensor:
    """The largest value of each slice along an axis; the largest of all without one."""
    if axis is None:
        return values.amax().reshape(1)
    others = [i for i in range(values.ndim) if i != axis]
    return values.amax(others) if others else values


def _same_class(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Elementwise: both finite, both NaN, or the same infinity."""
    both_finite, both_nan = a.isfinite() & b.isfinite(), a.isnan() & b.isnan()
    return both_finite | both_nan | (a == b)
