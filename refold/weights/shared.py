"""The weights that a compiled model shares with the model that it was made from.

Folding makes new constants; what it leaves alone is not copied, since weights are large. A write
into such a weight would mix the old model with the new one. It is noticed by address, by version
and, for writes that count none, by the first bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import fx, nn

from refold.errors import UsageError
from refold.graph import aliasing, constants
from refold.weights.watch import watch

_SAMPLE = 16  # bytes of each weight that are compared: in one line of the cache
_SHOWN = 3


class SharedWeights:
    """What a graph shares with somebody, as it is now; holds nothing else of theirs."""

    def __init__(self, gm: fx.GraphModule, theirs: Iterable[torch.Tensor]) -> None:
        self._tensors = {name: tensor for _, name, tensor in _shared(gm, theirs)}
        self._stamps = {name: _stamp(t) for name, t in self._tensors.items()}
        held = list(self._tensors.values())
        self._unchanged: Callable[[], bool] | None = None
        if held:
            self._unchanged = watch(held, [False] * len(held), sample=_SAMPLE)

    def __len__(self) -> int:
        return len(self._tensors)

    def check(self) -> None:
        """Raises :class:`UsageError` if one of them is not as it was."""
        if self._unchanged is None or self._unchanged():
            return
        changed = [n for n, t in self._tensors.items() if _stamp(t) != self._stamps[n]]
        named = ", ".join(changed[:_SHOWN]) or "a write that counts no version"
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        raise UsageError(
            f"weights of the model were changed after it was compiled ({named}{more}); the "
            "compiled model shares those that were not folded, so it would mix old and new ones\n"
            "  fix: compile again, or keep a snapshot with copy_weights=True, or compile with "
            "recipe=True and take the new weights over with refit"
        )


def copy_shared(gm: fx.GraphModule, theirs: Iterable[torch.Tensor]) -> None:
    """Gives a graph copies of the tensors that it shares with somebody."""
    memory: dict[int, torch.UntypedStorage] = {}
    for module, name, tensor in list(_shared(gm, theirs)):
        last = name.rpartition(".")[2]
        copy = constants.copied(tensor, memory)
        if last in module._parameters:
            module._parameters[last] = nn.Parameter(copy, requires_grad=False)
        else:
            setattr(module, last, copy)


def tensors(gm: fx.GraphModule) -> list[torch.Tensor]:
    """All tensors that a graph module, or a branch of it, holds and does not write."""
    state = {id(constants.attribute(n)) for n in constants.written(gm.graph) if n.op == "get_attr"}
    return [tensor for _, _, tensor in _held(gm) if id(tensor) not in state]


def _shared(
    gm: fx.GraphModule, theirs: Iterable[torch.Tensor]
) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    memory = {aliasing.storage(t) for t in theirs} - {None}
    return (held for held in _held(gm) if aliasing.storage(held[2]) in memory)


def _held(gm: fx.GraphModule) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for path, module in gm.named_modules():
        for store in (module._parameters, module._buffers, vars(module)):
            for name, value in store.items():
                if isinstance(value, torch.Tensor):
                    yield module, f"{path}.{name}" if path else name, value


def _stamp(value: torch.Tensor) -> tuple[int, int]:
    return (0 if value.is_inference() else value._version), value.data_ptr()
