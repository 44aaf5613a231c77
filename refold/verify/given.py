"""The model as it was given, run beside its trace: what tracing did is refold's own doing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from refold.frontends import state
from refold.graph import constants
from refold.graph.program import Call

Factory = Callable[[], nn.Module]
Visit = Callable[[Any], None]


class Given:
    """The original in its own dtype: the module itself where there is one, else its trace.

    Each run starts from the state that the module was given with, and writes copies of it.

    Args:
        graph: the trace.
        make: gives a copy of the module, with eval semantics, to be left as it is.
    """

    def __init__(self, graph: fx.GraphModule, make: Factory | None) -> None:
        self._graph = graph
        self._state = [n for n in constants.written(graph.graph) if n.op == "get_attr"]
        self._module = None if make is None else make()

    @property
    def has_state(self) -> bool:
        """Whether a call changes what later calls return."""
        return bool(self._state)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Leaves what the module holds beside its state (lists, caches) as it was."""
        with contextlib.nullcontext() if self._module is None else state.kept(self._module):
            yield

    def stored(self) -> list[torch.Tensor]:
        """The tensors that the model holds; in ``after`` of a run those that it works on."""
        held = [] if self._module is None else [*self._module.parameters(), *self._module.buffers()]
        return [*held, *constants.stored(self._graph).values()]

    def run(self, calls: Sequence[Call], reference: Any, after: Visit | None = None) -> list[Any]:
        """The results of some calls, one after the other on one state; inside of :meth:`kept`.

        Args:
            calls: copies of the inputs; the model may write them.
            reference: what the trace returns, for the structure of the results.
            after: called with each result, while the model has the state that the call left.
        """
        with torch.no_grad():
            if self._module is not None:
                try:
                    return self._run_module(self._module, calls, reference, after)
                except _NotAlikeError:
                    self._module = None
            return self._run_graph(calls, after)

    def _run_module(
        self, module: nn.Module, calls: Sequence[Call], reference: Any, after: Visit | None
    ) -> list[Any]:
        results = []
        with self._own_state(module):
            for args, kwargs in calls:
                results.append(_like(module(*args, **kwargs), reference))
                if after is not None:
                    after(results[-1])
        return results

    def _own_state(self, module: nn.Module) -> AbstractContextManager[None]:
        if not self._state:
            return contextlib.nullcontext()
        parameters = {id(p) for p in module.parameters()}
        return state.kept(module, lambda t: id(t) not in parameters)

    def state_after(self, calls: Sequence[Call]) -> dict[str, torch.Tensor]:
        """What the trace's state holds after some calls, by name."""
        with torch.no_grad(), state_kept(self._graph):
            for args, kwargs in calls:
                self._graph(*args, **kwargs)
            return held_state(self._graph)

    def _run_graph(self, calls: Sequence[Call], after: Visit | None) -> list[Any]:
        results = []
        with state_kept(self._graph):
            for args, kwargs in calls:
                results.append(self._graph(*args, **kwargs))
                if after is not None:
                    after(results[-1])
            return [copied(result) for result in results]


def held_state(gm: fx.GraphModule) -> dict[str, torch.Tensor]:
    """Copies of the tensors that a graph writes, by name."""
    written = [n for n in constants.written(gm.graph) if n.op == "get_attr"]
    return {str(n.target): constants.tensor(n).detach().clone() for n in written}


@contextmanager
def state_kept(*graphs: fx.GraphModule) -> Iterator[None]:
    """Runs with the graphs' state as it was, and puts it back afterwards."""
    written = [n for gm in graphs for n in constants.written(gm.graph)]
    state = [constants.tensor(n) for n in written if n.op == "get_attr"]
    saved = [t.clone() for t in state]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(state, saved, strict=True):
                tensor.copy_(value)


class _NotAlikeError(Exception):
    """The module's results have not the structure of its trace's."""


def copied(tree: Any) -> Any:
    """A result whose tensors are its own."""
    return pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), tree)


def _like(result: Any, reference: Any) -> Any:
    """The module's result in the structure of its trace's."""
    leaves, expected = pytree.tree_leaves(result), pytree.tree_leaves(reference)
    if len(leaves) != len(expected) or any(
        isinstance(a, torch.Tensor) != isinstance(b, torch.Tensor)
        or (isinstance(a, torch.Tensor) and a.shape != b.shape)
        for a, b in zip(leaves, expected, strict=True)
    ):
        raise _NotAlikeError
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in leaves]
    return pytree.tree_unflatten(detached, pytree.tree_structure(reference))
