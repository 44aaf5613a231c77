"""How a model treats memory, beside its numbers: what a caller sees who calls twice.

A caller may write into what a call returned, reuse the inputs, and call again. So the candidate
is called twice on the first input, its results written into between the calls: the second call
must return what the first did (or, of a model with a state, what the original's second does),
inputs must be as the original leaves them, and nothing may share more storage than in the original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from refold.errors import VerificationError
from refold.graph import constants
from refold.graph.aliasing import storage
from refold.graph.program import Call, fresh
from refold.verify.given import Given, copied, held_state, state_kept
from refold.verify.tolerance import ceiling, tolerance

_GARBAGE = 77.0


class MannersError(VerificationError):
    """A candidate treats memory otherwise than its original: no other input mends that."""


@dataclass(frozen=True)
class Manners:
    """What the original does on the first input.

    Attributes:
        shared: pairs of outputs, inputs and stored tensors that share storage, by name.
        overlapping: outputs of which several elements are one in memory: nobody can write them.
        written: inputs that the model writes, as it leaves them.
        later: what its second call returns, its first results written into; of a model with a
            state alone.
        state: what its state holds after these two calls, by name.
        may_leave: whether the candidate may leave inputs alone that the model writes: a file
            for a runtime that has no way to write them, which a note says.
    """

    shared: frozenset[tuple[str, str]] = frozenset()
    overlapping: frozenset[int] = frozenset()
    written: dict[int, torch.Tensor] = field(default_factory=dict)
    later: list[Any] | None = None
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    may_leave: bool = False


def observe(given: Given, call: Call, reference: Any) -> tuple[Any, Manners]:
    """Runs the original on a call: its result, and how it treats memory."""
    seen: list[tuple[Any, Manners]] = []
    calls = [fresh(call), fresh(call)] if given.has_state else [fresh(call)]

    def after(result: Any) -> None:
        stored = given.stored()
        if not seen:
            shared = _shared(result, calls[0], stored)
            manners = Manners(shared, _overlapping(result), _written(calls[0], call))
            seen.append((copied(result), manners))
            if given.has_state:  # else what it hands out may be the caller's own
                _scribble(result, stored)

    later = given.run(calls, reference, after)[-1]
    result, manners = seen[0]
    if not given.has_state:
        return result, manners
    state = given.state_after([fresh(call), fresh(call)])
    return result, replace(manners, later=_leaves(later), state=state)


def run_twice(
    candidate: Callable[..., Any], graphs: list[fx.GraphModule], call: Call, manners: Manners
) -> Any:
    """The result of a candidate's first call; its manners are compared with the original's.

    Raises:
        MannersError: it shares more memory, writes an input, or its second call is another.
    """
    module = candidate if isinstance(candidate, fx.GraphModule) else None
    stored = [] if module is None else list(constants.stored(module).values())
    with state_kept(*graphs), torch.no_grad():
        ran, again = fresh(call), fresh(call)
        result = candidate(*ran[0], **ran[1])
        _check_memory(result, ran, call, stored, manners)
        kept = copied(result)
        if manners.later is None or module is not None:
            _scribble(result, stored)
            _check_later(candidate(*again[0], **again[1]), kept, manners)
        if module is not None:
            _check_state(module, manners)
    return kept


def _check_memory(
    result: Any, ran: Call, call: Call, stored: list[torch.Tensor], manners: Manners
) -> None:
    more = _shared(result, ran, stored) - manners.shared
    if more:
        pairs = ", ".join(f"{a} and {b}" for a, b in sorted(more))
        raise MannersError(f"{pairs} share memory, in the original they do not")
    stuck = _overlapping(result) - manners.overlapping
    if stuck:
        raise MannersError(
            f"output {min(stuck)} cannot be written: several of its elements are one in memory, "
            "in the original they are not"
        )
    written = _written(ran, call)
    for index in written if manners.may_leave else written.keys() | manners.written.keys():
        now, then = _leaves(ran)[index], manners.written.get(index, _leaves(call)[index])
        if not _close(now, then, ceiling):
            raise MannersError(f"input {index} is written otherwise than by the original")


def _check_later(second: Any, first: Any, manners: Manners) -> None:
    stateless = manners.later is None
    expected = _leaves(first) if stateless else manners.later or []
    bound = _rounding if stateless else ceiling
    for index, (a, b) in enumerate(zip(_leaves(second), expected, strict=True)):
        if not _close(a, b, bound):
            raise MannersError(
                f"output {index} of a second call is not the original's: what a caller writes "
                "into the results of a call, or a state, is not kept apart"
            )


def _check_state(module: fx.GraphModule, manners: Manners) -> None:
    """What is written and not returned yet shows in some later call."""
    for name, now in held_state(module).items():
        then = manners.state.get(name)
        if then is not None and not _close(now, then, ceiling):
            raise MannersError(f"the state {name} is not the original's after two calls")


def _rounding(dtype: torch.dtype) -> float:
    return tolerance(0.0, dtype)


def _close(a: Any, b: Any, bound: Callable[[torch.dtype], float]) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return bool(a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not (b.is_floating_point() or b.is_complex()):
        return torch.equal(a, b)
    scale = b.abs()[b.isfinite()]
    size = bound(b.dtype) * float(scale.max()) if scale.numel() else 0.0
    return bool(torch.allclose(a, b, rtol=0.0, atol=size, equal_nan=True))


def _leaves(tree: Any) -> list[Any]:
    return pytree.tree_leaves(tree)


def _shared(result: Any, call: Call, stored: Iterable[torch.Tensor]) -> frozenset[tuple[str, str]]:
    """Pairs that share storage: an output with another, with an input or with a stored tensor."""
    outputs, inputs = _leaves(result), _leaves(call)
    kept = {storage(t) for t in stored}
    pairs = set()
    for i, a in enumerate(outputs):
        own = storage(a)
        if own is None or not a.numel():
            continue
        pairs |= {(f"output {j}", f"output {i}") for j in range(i) if storage(outputs[j]) == own}
        pairs |= {(f"output {i}", f"input {j}") for j, b in enumerate(inputs) if storage(b) == own}
        if own in kept:
            pairs.add((f"output {i}", "a stored tensor"))
    return frozenset(pairs)


def _overlapping(result: Any) -> frozenset[int]:
    return frozenset(
        i for i, t in enumerate(_leaves(result)) if isinstance(t, torch.Tensor) and not _writable(t)
    )


def _writable(tensor: torch.Tensor) -> bool:
    if tensor.layout is not torch.strided:
        return False
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return all(stride or size < 2 for size, stride in pairs)


def _written(ran: Call, call: Call) -> dict[int, torch.Tensor]:
    """The inputs that a call has changed, by their place."""
    return {
        i: a.detach().clone()
        for i, (a, b) in enumerate(zip(_leaves(ran), _leaves(call), strict=True))
        if isinstance(a, torch.Tensor) and not torch.equal(_numbers(a), _numbers(b))
    }


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    """The values without NaN; float8 computes nothing by itself."""
    narrow = tensor.is_floating_point() and tensor.element_size() == 1
    return (tensor.float() if narrow else tensor).nan_to_num()


def _scribble(result: Any, stored: Iterable[torch.Tensor]) -> None:
    """Writes into the results of a call, but for tensors of the model that it hands out."""
    kept = {storage(t) for t in stored}
    for leaf in _leaves(result):
        if isinstance(leaf, torch.Tensor) and storage(leaf) not in kept and _writable(leaf):
            leaf.detach().fill_(_GARBAGE)
