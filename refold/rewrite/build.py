"""Makes the nodes of a replacement."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from refold.graph import constants, nodes, provenance


class Builder:
    """Makes the nodes of a replacement: ``build(aten.relu, x)``.

    Every node gets its fake value, and its provenance from the calls that the match covers.
    """

    def __init__(self, gm: fx.GraphModule, rule: str, sources: Iterable[fx.Node]) -> None:
        self.gm = gm
        self.rule = rule
        # The root last: its place in the user's code is the replacement's.
        self.sources = tuple(reversed(tuple(sources)))

    @property
    def graph(self) -> fx.Graph:
        """The graph, positioned before the node that is replaced."""
        return self.gm.graph

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Adds a call of an operator; its overload is resolved from the arguments if not given."""
        if isinstance(target, torch._ops.OpOverloadPacket):
            values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
            name = torch._C._jit_resolve_packet(target._qualified_op_name, *values[0], **values[1])
            target = getattr(target, name or "default")
        return nodes.call(self.graph, target, args, kwargs, rule=self.rule, sources=self.sources)

    def constant(self, name: str, data: torch.Tensor) -> fx.Node:
        """Adds a constant; ``name`` tells people what it is."""
        node = constants.add(self.gm, name, data)
        provenance.derive(node, list(self.sources), self.rule)
        return node
