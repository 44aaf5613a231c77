"""One word for what a node is, as reports and ``expect=`` count it."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import torch
from torch import fx

_KINDS: dict[str, str] = {
    "conv1d": "conv", "conv2d": "conv", "conv3d": "conv", "convolution": "conv",
    "conv_transpose1d": "conv-transpose", "conv_transpose2d": "conv-transpose",
    "conv_transpose3d": "conv-transpose",
    "linear": "linear", "addmm": "linear", "matmul": "matmul", "mm": "matmul", "bmm": "matmul",
    "baddbmm": "matmul", "einsum": "matmul", "scaled_dot_product_attention": "attention",
    "batch_norm": "batch-norm", "_native_batch_norm_legit_no_training": "batch-norm",
    "layer_norm": "layer-norm", "native_layer_norm": "layer-norm", "group_norm": "group-norm",
    "native_group_norm": "group-norm", "rms_norm": "rms-norm", "instance_norm": "instance-norm",
    "add": "add", "sub": "sub", "rsub": "sub", "mul": "mul", "div": "div", "neg": "neg",
    "addcmul": "addcmul",
    "avg_pool1d": "avg-pool", "avg_pool2d": "avg-pool", "avg_pool3d": "avg-pool",
    "adaptive_avg_pool1d": "avg-pool", "adaptive_avg_pool2d": "avg-pool",
    "adaptive_avg_pool3d": "avg-pool",
    "max_pool1d": "max-pool", "max_pool2d": "max-pool", "max_pool3d": "max-pool",
    "pad": "pad", "constant_pad_nd": "pad", "cat": "cat",
    "dropout": "dropout", "embedding": "embedding",
}  # fmt: skip

LAYOUT = frozenset({
    "view", "_unsafe_view", "reshape", "flatten", "unflatten", "permute", "transpose", "t",
    "movedim", "unsqueeze", "squeeze", "expand", "slice", "select", "split", "split_with_sizes",
    "chunk", "unbind", "getitem", "cat", "stack", "contiguous", "clone", "roll", "flip",
    "channel_shuffle", "pixel_shuffle", "pixel_unshuffle", "repeat", "narrow", "unfold",
    "alias", "detach", "sym_size", "expand_as", "view_as", "reshape_as", "swapaxes", "numpy_T",
    "mT",
})  # fmt: skip

# Not linear in the tensor that they read first, whatever their other arguments are. What stands
# nowhere may be linear: nothing is known of it.
NONLINEAR = frozenset({
    "sigmoid", "hardsigmoid", "log_sigmoid", "tanh", "gelu", "silu", "mish", "elu", "selu", "celu",
    "hardswish", "hardtanh", "relu", "relu6", "leaky_relu", "prelu", "_prelu_kernel", "rrelu",
    "softplus", "hardshrink", "softshrink", "threshold", "glu", "softmax", "_softmax",
    "log_softmax", "_log_softmax", "_safe_softmax", "exp", "exp2", "expm1", "log", "log2", "log10",
    "log1p", "logit", "logsumexp", "logcumsumexp", "sqrt", "rsqrt", "square", "reciprocal", "abs",
    "absolute", "pow", "clamp", "clamp_min", "clamp_max", "clip", "sin", "cos", "tan", "sinc",
    "sinh", "cosh", "asin", "acos", "atan", "asinh", "acosh", "atanh", "arcsin", "arccos", "arctan",
    "arcsinh", "arccosh", "arctanh", "atan2", "arctan2", "hypot", "erf", "erfc", "erfinv", "lgamma",
    "digamma", "polygamma", "i0", "prod", "cumprod", "var", "std", "var_mean", "std_mean", "norm",
    "linalg_vector_norm", "linalg_norm", "linalg_matrix_norm", "cdist", "pairwise_distance",
    "cosine_similarity", "layer_norm", "native_layer_norm", "group_norm", "native_group_norm",
    "instance_norm", "rms_norm", "_fused_rms_norm", "normalize", "renorm", "max", "min", "amax",
    "amin", "aminmax", "maximum", "minimum", "fmax", "fmin", "cummax", "cummin", "max_pool1d",
    "max_pool2d", "max_pool3d", "max_pool1d_with_indices", "max_pool2d_with_indices",
    "max_pool3d_with_indices", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell",
    "rnn_relu_cell", "inverse", "linalg_inv", "linalg_det", "det", "logdet", "nan_to_num",
})  # fmt: skip
# They give a neighbour of the number that they read, or store.
ROUNDING = frozenset({
    "round", "floor", "ceil", "trunc", "fix", "to", "_to_copy", "floor_divide", "frac",
    "fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine", "quantize_per_tensor",
    "quantize_per_channel", "quantize", "div", "divide",
})  # fmt: skip


def op_name(node: fx.Node) -> str:
    """The bare operator name of a call (``conv2d`` for ``aten.conv2d.default``)."""
    return _name(node.target)


@functools.cache
def _name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return getattr(target, "__name__", str(target))


def kind(node: fx.Node) -> str:
    """The kind of a node: ``conv``, ``batch-norm``, ``linear``, ``add``, or its operator's name."""
    if node.op != "call_function":
        return node.op
    return _kind(op_name(node))


@functools.cache
def _kind(name: str) -> str:
    return _KINDS.get(name, _KINDS.get(name.rstrip("_"), name.strip("_").replace("_", "-")))


def census(graph: fx.Graph) -> Counter[str]:
    """Calls by kind; layout calls count together as ``layout``."""
    counts: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op == "call_function":
            counts["layout" if op_name(node).rstrip("_") in LAYOUT else kind(node)] += 1
    return counts
