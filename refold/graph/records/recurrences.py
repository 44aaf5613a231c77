"""Recurrent layers: which of their weights read the input."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from refold.graph import constants
from refold.graph.nodes import arguments, aten, is_call, is_tensor

_LAYERS = (
    aten.lstm.input, aten.lstm.data, aten.gru.input, aten.gru.data,
    aten.rnn_tanh.input, aten.rnn_tanh.data, aten.rnn_relu.input, aten.rnn_relu.data,
)  # fmt: skip
_CELLS = (aten.lstm_cell, aten.gru_cell, aten.rnn_tanh_cell, aten.rnn_relu_cell)


@dataclass(frozen=True)
class Recurrence:
    """An LSTM, a GRU or a plain recurrent layer, or one cell of it.

    Its gates are ``act(x @ w_ih.T + b_ih + h @ w_hh.T + b_hh)``; ``x`` stands nowhere else.

    Attributes:
        node: the call.
        x: what it reads step by step; its features are the last axis.
        inputs: ``w_ih`` and ``b_ih`` of the first layer, one pair for each direction.
    """

    node: fx.Node
    x: fx.Node
    inputs: tuple[tuple[fx.Node, fx.Node | None], ...]


def recurrence(node: object) -> Recurrence | None:
    """Reads a recurrent layer whose first weights are constants."""
    if not isinstance(node, fx.Node):
        return None
    if is_call(node, *_CELLS):
        args = arguments(node)
        pairs = [(args["w_ih"], args["b_ih"])]
    elif is_call(node, *_LAYERS):
        args = arguments(node)
        directions = 2 if args["bidirectional"] else 1
        own = len(args["params"]) // (args["num_layers"] * directions)
        starts = [d * own for d in range(directions)]
        biased = args["has_biases"]
        pairs = [(args["params"][s], args["params"][s + 2] if biased else None) for s in starts]
    else:
        return None
    x = args["data"] if "data" in args else args["input"]
    held = [part for pair in pairs for part in pair if part is not None]
    if not is_tensor(x) or any(constants.exact(part) is None for part in held):
        return None
    return Recurrence(node, x, tuple(pairs))
