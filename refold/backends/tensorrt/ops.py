"""What a version of TensorRT accepts, by name, dtype and attribute: facts known without it.

The operators and dtypes are those that the parser's documentation states for 10.15 (opset 9 to
24), corrected where the parser of TensorRT-RTX 1.7 was asked and said otherwise (it takes cubic
Resize and pooling over one dimension, and no HardSwish in bfloat16). A table of names
cannot decide everything: where the library is installed its own parser has the last word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from refold.errors import UsageError

_DTYPES = {
    "FP32 FP16 BF16": (
        "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv "
        "ConvTranspose Cos Cosh CumSum Dropout Einsum Elu Erf Exp Floor GRU Gemm "
        "GlobalAveragePool GlobalLpPool GlobalMaxPool GroupNormalization HardSigmoid Hardmax "
        "InstanceNormalization IsInf LRN LSTM LayerNormalization LeakyRelu Log LogSoftmax "
        "LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization PRelu QuantizeLinear "
        "RMSNormalization RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike "
        "Reciprocal Resize RotaryEmbedding Round Scan Selu Sigmoid Sin Sinh Softmax Softplus "
        "Softsign Sqrt Swish Tan Tanh ThresholdedRelu Upsample"
    ),
    "FP32 FP16 BF16 INT32 INT64": (
        "Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less "
        "LessOrEqual Max Min Mod Mul Neg Pad Pow Range ReduceL1 ReduceL2 ReduceLogSum "
        "ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu "
        "ScatterElements ScatterND Scatter Shrink Sign SpaceToDepth Sub Sum TopK"
    ),
    "FP32 FP16 BF16 INT32 INT64 BOOL": (
        "Concat Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot "
        "Reshape ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze "
        "Where"
    ),
    # The documentation lists BF16 for HardSwish; the parser rejects it.
    "FP32 FP16": (
        "BlackmanWindow DeformConv GridSample HammingWindow HannWindow HardSwish Mish "
        "NonMaxSuppression NonZero RoiAlign"
    ),
    "BOOL": "And Not Or Xor",
    "FP32 FP16 BF16 INT32 INT64 UINT8 BOOL": "Cast CastLike",
    "FP32 FP16 BF16 FP8 FP4 INT4 INT32 INT64 BOOL": "Constant ConstantOfShape",
    "FP32 FP16 BF16 INT8 FP8": "Attention",
    "FP32 FP16 BF16 INT8 INT32 INT64": "Gelu",
    "FP32 FP16 BF16 FP8 INT32 INT64": "Mean",
    "FP32 FP16 BF16 INT32": "TensorScatter",
    "INT8 FP8 FP4 INT4": "DequantizeLinear",
    "FP32": "STFT",
}
_SUPPORTED: dict[str, frozenset[str]] = {
    op: frozenset(dtypes.split()) for dtypes, ops in _DTYPES.items() for op in ops.split()
}
_SINCE = {"Swish": (11, 0)}
_PLUGINS = frozenset({"DeformConv"})  # TensorRT-RTX has no plugin library
_OPSETS = (((11, 0), 25), ((10, 15), 24), ((10, 0), 20))
_FIRST_OPSET = 9
_TOP_K = 3840
_ONNX_DTYPES = {
    "FLOAT": "FP32", "FLOAT16": "FP16", "BFLOAT16": "BF16", "FLOAT8E4M3FN": "FP8",
    "FLOAT4E2M1": "FP4",
}  # fmt: skip

LOWEST = (10, 3)
_DOCUMENTED = (10, 15)


@dataclass(frozen=True)
class Version:
    """A product and its version; ``number`` is empty where none was asked for."""

    product: str
    number: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Version:
        """Reads ``10.3``, ``11``, ``rtx`` or ``rtx-1.7``; empty for the documented version."""
        found = re.fullmatch(r"(rtx)?-?(\d+(?:\.\d+)*)?", text)
        if found is None:
            raise UsageError(
                f"TensorRT version {text!r}: write a number (10.3, 11), rtx, or rtx-1.7"
            )
        number = tuple(int(n) for n in (found[2] or "").split(".") if n)
        product = "TensorRT-RTX" if found[1] else "TensorRT"
        if product == "TensorRT" and number and number < LOWEST[: len(number)]:
            raise UsageError(f"TensorRT {found[2]}: the oldest version that is supported is 10.3")
        return cls(product, number)

    @property
    def rtx(self) -> bool:
        return self.product == "TensorRT-RTX"

    @property
    def comparable(self) -> tuple[int, ...]:
        """The version of TensorRT whose operators these are."""
        if self.rtx:
            return (11, 0)
        if not self.number:
            return _DOCUMENTED
        # "11" means any of 11.x, "10" the oldest that is supported.
        return self.number if len(self.number) > 1 else max((*self.number, 0), LOWEST)

    @property
    def last_opset(self) -> int:
        return next(opset for since, opset in _OPSETS if self.comparable >= since)

    def __str__(self) -> str:
        number = ".".join(map(str, self.number or (() if self.rtx else _DOCUMENTED)))
        return f"{self.product} {number}".strip()


@dataclass(frozen=True)
class Objection:
    """Why a node is not accepted, and a fix that is known."""

    reason: str
    fix: str


def opset_objection(opset: int, version: Version) -> Objection | None:
    """Says whether the version reads the operator set."""
    if _FIRST_OPSET <= opset <= version.last_opset:
        return None
    return Objection(
        f"opset {opset} is outside of {_FIRST_OPSET} to {version.last_opset}",
        f"export with opset={version.last_opset}",
    )


def objections(
    op: str,
    domain: str,
    dtypes: Mapping[str, str],
    attributes: Mapping[str, Any],
    constants: Mapping[int, Any],
    ranks: Mapping[int, int],
    outputs: int,
    version: Version,
) -> Iterator[Objection]:
    """What stands against one node.

    Args:
        op: the operator.
        domain: its domain; empty for the standard one.
        dtypes: ONNX dtype names by the names of the values that are read or written as data.
        attributes: Python values of its attributes.
        constants: values of its constant inputs, by position.
        ranks: ranks of its inputs, as far as they are known.
        outputs: number of outputs that are used.
        version: what shall accept it.
    """
    if domain not in ("", "ai.onnx"):
        yield Objection(
            f"operators of domain {domain!r} are not read",
            "export without an optimizer for another runtime; its own operators must be functions",
        )
        return
    accepted = _SUPPORTED.get(op)
    if accepted is None:
        yield Objection(f"operator {op} is not supported", known_fix(op))
        return
    if op in _SINCE and version.comparable < _SINCE[op]:
        since = ".".join(map(str, _SINCE[op]))
        yield Objection(f"operator {op} is read since {since}", "export with a lower opset")
    if op in _PLUGINS and version.rtx:
        yield Objection(
            f"operator {op} is a plugin, which TensorRT-RTX does not have", "use TensorRT itself"
        )
    for name, dtype in dtypes.items():
        short = _ONNX_DTYPES.get(dtype, dtype)
        if short not in accepted:
            takes = f"it takes {', '.join(sorted(accepted))}: cast around it"
            fix = _DTYPE_FIXES.get((op, short), _OPERATOR_FIXES.get(op, takes))
            yield Objection(f"{op} does not take {short} ({name})", fix)
            break
    yield from _attribute_objections(op, attributes, constants, ranks, outputs)


def _attribute_objections(
    op: str,
    attributes: Mapping[str, Any],
    constants: Mapping[int, Any],
    ranks: Mapping[int, int],
    outputs: int,
) -> Iterator[Objection]:
    dilated = any(d != 1 for d in attributes.get("dilations", ()))
    if op in ("MaxPool", "AveragePool", "LpPool") and dilated:
        yield Objection(f"{op} with dilation", "use dilation 1")
    if op == "MaxPool" and outputs > 1:
        yield Objection("MaxPool that returns indices", "use return_indices=False")
    if op == "Resize" and attributes.get("antialias"):
        yield Objection("Resize with antialias", "use antialias=False")
    if op.startswith("Reduce") and 1 in ranks and 1 not in constants:
        yield Objection(f"{op} over axes that are computed", "give the dimensions as numbers")
    if op in ("Squeeze", "Unsqueeze", "CumSum") and 1 in ranks and 1 not in constants:
        yield Objection(f"{op} over an axis that is computed", "give the dimension as a number")
    if op == "TopK" and 1 in constants and int(constants[1].max()) >= _TOP_K:
        yield Objection(f"TopK of {int(constants[1].max())}", f"K must be below {_TOP_K}")
    if op in ("QuantizeLinear", "DequantizeLinear") and 2 in constants and constants[2].any():
        yield Objection(f"{op} with a zero point", _SYMMETRIC)
    if op == "ScatterND" and attributes.get("reduction", "none") not in ("none", b"none"):
        yield Objection(f"ScatterND with reduction {attributes['reduction']}", _REWRITE)


_SYMMETRIC = "quantise symmetrically, to int8 or float8_e4m3fn with zero point 0"
_DTYPE_FIXES = {
    ("Cast", "FP8"): "clamp to -448 to 448 before it, for float8_e4m3fn: it is then a quantiser",
}
_REWRITE = "write the layer with other operators, or keep it outside of the exported model"
_OPERATOR_FIXES = {
    "QuantizeLinear": _SYMMETRIC,
    "DequantizeLinear": _SYMMETRIC,
    "QLinearConv": "export QuantizeLinear / DequantizeLinear pairs, not quantised operators",
    "QLinearMatMul": "export QuantizeLinear / DequantizeLinear pairs, not quantised operators",
    "ConvInteger": "export QuantizeLinear / DequantizeLinear pairs, not quantised operators",
    "MatMulInteger": "export QuantizeLinear / DequantizeLinear pairs, not quantised operators",
    "DynamicQuantizeLinear": "quantise with fixed scales",
    "MaxUnpool": "use an upsampling or a transposed convolution",
    "AffineGrid": "compute the grid with a matrix product",
}


def known_fix(op: str) -> str:
    """What helps where an operator is rejected."""
    return _OPERATOR_FIXES.get(op, _REWRITE)
