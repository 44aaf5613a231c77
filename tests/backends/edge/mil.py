"""Reads a Core ML package back and computes what its program says, call by call, in float64.

Core ML itself runs on Apple's systems alone: this shows that the program and the weights in the
package are the model's, not what Apple's runtime makes of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def _conv(x: Tensor, weight: Tensor, bias: Tensor, **how: Any) -> Tensor:
    top, bottom, left, right = how["pad"] if how["pad_type"] == "custom" else (0, 0, 0, 0)
    padded = F.pad(x, (left, right, top, bottom))
    return F.conv2d(padded, weight, bias, how["strides"], 0, how["dilations"], how["groups"])


def _conv_transpose(x: Tensor, weight: Tensor, bias: Tensor, **how: Any) -> Tensor:
    assert how["pad_type"] == "valid"
    grown = F.conv_transpose2d(
        x, weight, bias, how["strides"], groups=how["groups"], dilation=how["dilations"]
    )
    assert list(grown.shape) == how["output_shape"]
    return grown


def _layer_norm(x: Tensor, axes: list[int], gamma: Tensor, beta: Tensor, epsilon: float) -> Tensor:
    assert axes == [-1]
    return F.layer_norm(x, x.shape[-1:], gamma, beta, epsilon)


def _matmul(x: Tensor, y: Tensor, transpose_x: bool, transpose_y: bool) -> Tensor:
    return (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)


def _concat(values: list[Tensor], axis: int, interleave: bool) -> Tensor:
    assert not interleave
    return torch.cat(values, axis)


def _gelu(x: Tensor, mode: str) -> Tensor:
    assert mode == "EXACT"
    return F.gelu(x)


_CALLS: dict[str, Callable[..., Any]] = {
    "add": lambda x, y: x + y,
    "concat": _concat,
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "gelu": _gelu,
    "layer_norm": _layer_norm,
    "linear": lambda x, weight, bias: F.linear(x, weight, bias),
    "matmul": _matmul,
    "mul": lambda x, y: x * y,
    "reduce_mean": lambda x, axes, keep_dims: x.mean(axes, keep_dims),
    "relu": lambda x: F.relu(x),
    "relu6": lambda x: F.relu6(x),
    "reshape": lambda x, shape: x.reshape(shape),
    "sigmoid_hard": lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1),
    "silu": lambda x: F.silu(x),
    "softmax": lambda x, axis: x.softmax(axis),
    "split": lambda x, split_sizes, axis: x.split(split_sizes, axis),
    "thresholded_relu": lambda x, alpha: torch.where(x >= alpha, x, 0),
    "transpose": lambda x, perm: x.permute(perm),
}
_TENSORS = ("weight", "bias", "gamma", "beta", "x", "y")


def run_package(path: Path, x: Tensor) -> Tensor:
    """The only result of a package with one input."""
    from coremltools.converters.mil.frontend.milproto.load import load
    from coremltools.models import MLModel

    model = MLModel(str(path), skip_model_load=True)
    program = load(
        model.get_spec(),
        specification_version=model.get_spec().specificationVersion,
        file_weights_dir=model.weights_dir,
    )
    main = program.functions["main"]
    (name,) = main.inputs
    values: dict[str, Any] = {name: x.double()}
    for op in main.operations:
        if op.op_type == "const":
            values[op.outputs[0].name] = op.outputs[0].val
            continue
        arguments = {k: _read(k, v, values) for k, v in op.inputs.items() if v is not None}
        result = _CALLS[op.op_type](**arguments)
        results = [result] if isinstance(result, Tensor) else result
        values.update({o.name: r for o, r in zip(op.outputs, results, strict=True)})
    (output,) = main.outputs
    return values[output.name]


def _read(name: str, given: Any, values: dict[str, Any]) -> Any:
    if isinstance(given, (tuple, list)):
        return [values[v.name] for v in given]
    value = values[given.name]
    if isinstance(value, (np.ndarray, np.generic)):
        return torch.tensor(value).double() if name in _TENSORS else value.tolist()
    return value
