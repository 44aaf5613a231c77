"""Outputs of a compiled graph share memory only where those of its graph do.

A compiler may hand out a constant that it has folded, one tensor for two outputs that are equal, a
part of a larger one, or an input for what is equal to it. A caller who writes into such an output
changes something else, at once or in the next call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from refold.graph import aliasing, constants

Flat = Callable[..., Any]


class OwnOutputs:
    """Copies the outputs of calls that share memory with what they should not."""

    def __init__(self, gm: fx.GraphModule) -> None:
        inputs = gm.graph.find_nodes(op="placeholder")
        outputs = aliasing.outputs(gm.graph)
        fixed = constants.constant_nodes(gm.graph)
        roots = [aliasing.roots(n) for n in outputs]
        self._count = len(outputs)
        self._constant = [i for i, n in enumerate(outputs) if n in fixed]
        # Inputs are counted from -1 downwards.
        self._may_share = [
            {j for j in range(i) if roots[i] & roots[j]}
            | {-1 - j for j, n in enumerate(inputs) if n in roots[i]}
            for i in range(self._count)
        ]

    def of(self, function: Flat) -> Flat:
        """The same function; its outputs, a sequence of leaves, have memory of their own."""
        return lambda *inputs: self(function(*inputs), inputs)

    def __call__(self, results: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        """The results of a call, in the order of the graph's outputs that are nodes."""
        own = list(results)
        assert len(own) == self._count
        for i in self._constant:
            own[i] = own[i].clone() if isinstance(own[i], torch.Tensor) else own[i]
        # One output may be an input; for several the storages tell, at four times the time.
        identity = _storage if len(own) > 1 else _address
        seen: dict[Any, int] = {}
        for i, value in enumerate(inputs):
            if isinstance(value, torch.Tensor):
                seen.setdefault(identity(value), -1 - i)
        for i, value in enumerate(own):
            if not isinstance(value, torch.Tensor) or not value.numel():
                continue
            first = seen.setdefault(identity(value), i)
            if first != i and first not in self._may_share[i]:
                own[i] = value.clone()
        return own


_address = torch.Tensor.data_ptr


def _storage(value: torch.Tensor) -> int:
    return int(value.untyped_storage()._cdata)
