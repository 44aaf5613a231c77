"""A call of every ATen operator that takes a tensor of floats: arguments made from its schema.

What fits is found by trying: an operator's arguments are guessed by type and name, and the first
guesses that eager PyTorch takes, for each shape of the data, are its calls. So operators of later
versions of PyTorch join by themselves.
"""

from __future__ import annotations

import functools
import itertools
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

# Four everywhere: an axis that is taken for another one is noticed by the numbers alone.
KINDS = ("floats", "integers", "complex")
SHAPES = ((2, 4, 4, 4), (2, 4, 4), (2, 4), (4, 4), (2, 4, 4, 4, 4), (4,), ())
_TRIES = 96
_KEPT = 3  # calls of each operator, of different shapes

# Why an operator is left out, by its name; what is not here is left out only for what its schema,
# or every try, says.
LEFT_OUT = {
    r"_.*backward.*|.*_backward.*": "a derivative",
    r"_foreach_.*|_fused_.*|_amp_.*|(un)?flatten_dense_tensors": "of optimisers",
    r"_nested_.*|_jagged.*|_padded_dense.*|nested_.*|to_padded_tensor": "of nested tensors",
    r".*sparse.*|.*_coo.*|.*_cs[rc].*|.*_bs[rc].*|.*crow.*|.*ccol.*|_spdiags|.*_indices_copy|"
    r"values.*|indices.*|_values.*|_indices.*|coalesce.*|row_indices.*": "of sparse tensors",
    r"(_?cudnn|_?mps|_?miopen|mkldnn|_mkldnn|_cslt|_scaled|_cutlass|_flash|_efficient).*|"
    r"_use_.*|.*_cuda.*|_to_cpu|.*int4pack.*|.*int8pack.*|_dyn_quant.*|_wrapped_.*|_weight_int.*|"
    r"_convert_weight.*|_grouped_mm|_int_mm": "of one device or library",
    r"_add_batch_dim|native_batch_norm|chalf|_nnpack_spatial_convolution|_native_batch_norm_legit|_remove_batch_dim|__interpolate|__upsample.*|_make_dual.*|_fw_primal.*|_unpack_dual.*|_test_.*|_has_.*|_is_.*|_assert.*|"
    r"_functional_assert.*|_functional_sym.*|sym_.*|_print|_debug.*|_neg_view.*|_conj_copy|"
    r"_lazy_.*|_propagate.*|_version|_reshape_alias.*|_pack_padded.*|_pad_packed.*|"
    r"_thnn.*|_philox.*|_resize_output.*|resize.*|set_.*|set|requires_grad_|retain_grad|"
    r"_coalesced.*|_dim.*|_nnz|data|is_.*|output_nr|__.*item__|item|"
    r"_local_scalar_dense|rename.*|align.*|refine_names|lift.*|.*[fF]ake_?[qQ]uant.*|"
    r"choose_qparams.*|fused_moving.*|quantize.*|dequantize.*|q_.*|qscheme|int_repr|"
    r"_quantize.*|quantized_.*|_make_per.*|fbgemm.*|.*_qat.*|_saturate.*|record_stream|"
    r"_choose_qparams.*|pin_memory|_pin_memory|from_file|_shape_as_tensor|"
    r"_efficientzerotensor|_batch_norm_no_update|_batch_norm_with_update.*|_masked_scale|"
    r"_transform_bias.*|_triton.*|_validate.*|_cast_.*|_transformer_encoder.*|_native_multi.*|"
    r"_rowwise_prune|_embedding_bag.*|special_.*polynomial.*": "internal, of training, or "
    "of another kind of tensor",
    r"_cholesky_solve_helper|_weight_norm.*|embedding_bag": "ends the process on sizes that it "
    "does not check",
    r"empty.*|new_empty.*|_empty.*|_compute_linear_combination|slow_conv.*|linalg_lstsq": "reads "
    "memory that nothing was written to",
    r"_linalg_eig.*|linalg_eig|linalg_eigvals|_linalg_svd|linalg_svd|svd|linalg_ldl.*|ormqr|"
    r"linalg_qr|qr|geqrf|_linalg_det|_linalg_slogdet|_linalg_solve_ex|linalg_lu.*|"
    r"lu_.*|_lu_.*|linalg_householder.*|orgqr": "its result is one of several equal ones, which "
    "rounding picks",
}


@dataclass(frozen=True)
class OperatorCall:
    """``operator`` of a tensor of floats (``None`` among the arguments' leaves) and the rest."""

    operator: Any
    shape: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: str

    def __str__(self) -> str:
        return f"{self.operator} of {list(self.shape)} as {self.place}"

    def __call__(self, data: torch.Tensor) -> Any:
        as_data = data.is_floating_point()
        args, kwargs = pytree.tree_map(
            lambda v: data if v is DATA else v.to(data.dtype) if as_data and _floating(v) else v,
            (self.args, self.kwargs),
        )
        return self.operator(*args, **kwargs)


class _Data:
    """Stands where the data goes."""


DATA = _Data()


def _floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


@functools.cache
def operators() -> tuple[dict[str, Any], dict[str, str]]:
    """Every functional operator of tensors by name, and why each other one is left out."""
    found, left_out = {}, {}
    for schema in torch._C._jit_get_all_schemas():
        if not schema.name.startswith("aten::"):
            continue
        name = schema.name.removeprefix("aten::")
        label = f"{name}.{schema.overload_name or 'default'}"
        reason = _unsuited(name, schema)
        operator = getattr(getattr(torch.ops.aten, name, None), label.rpartition(".")[2], None)
        if reason is None and operator is None:
            reason = "TorchScript's alone"
        if operator is not None and torch.Tag.nondeterministic_seeded in operator.tags:
            reason = reason or "draws random numbers"
        if reason is None:
            found[label] = operator
        else:
            left_out[label] = reason
    return dict(sorted(found.items())), dict(sorted(left_out.items()))


def _unsuited(name: str, schema: Any) -> str | None:
    if any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments):
        return "writes into its arguments"
    if not any("Tensor" in str(a.type) for a in schema.arguments):
        return "takes no tensor"
    if not any("Tensor" in str(r.type) for r in schema.returns):
        return "returns no tensor"
    if any("Generator" in str(a.type) or "Dimname" in str(a.type) for a in schema.arguments):
        return "takes a generator or names"
    for pattern, reason in LEFT_OUT.items():
        if re.fullmatch(pattern, name):
            return reason
    return None


def calls_of(operator: Any) -> list[OperatorCall]:
    """A few calls of an operator that eager PyTorch takes, of data of different shapes."""
    found: list[OperatorCall] = []
    for shape in SHAPES:
        found += calls_on(operator, shape)[:1]
        if len(found) == _KEPT:
            break
    return found


@functools.cache
def calls_on(
    operator: Any, shape: tuple[int, ...], most: int = 1, kind: str = "floats"
) -> tuple[OperatorCall, ...]:
    """Calls of an operator that eager PyTorch takes, of data of one shape and kind.

    The kinds are ``floats`` (between 0.25 and 0.95), ``integers`` (from 0 to 3) and ``complex``.
    """
    tensors = [a.name for a in operator._schema.arguments if "Tensor" in str(a.type)]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        guesses = (c for place in tensors[:3] for c in _guesses(operator, shape, place))
        fitting = (call for call in guesses if _runs(call, _data(shape, kind)))
        return tuple(itertools.islice(fitting, most))


def _runs(call: OperatorCall, data: torch.Tensor) -> bool:
    try:
        # clones: some operators write where their schema does not say so
        first, second = (pytree.tree_leaves(call(data.clone())) for _ in range(2))
        if not first or not all(isinstance(v, torch.Tensor) for v in first):
            return False
        if not all(v.layout is torch.strided and not v.is_quantized for v in first):
            return False
        return all(map(_equal, first, second))
    except Exception:  # whatever eager raises: it does not take these arguments
        return False


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num())


@functools.cache
def _data(shape: tuple[int, ...], kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if kind == "integers":
        return torch.randint(0, 4, shape, generator=generator)
    if kind == "complex":
        return torch.randn(shape, generator=generator, dtype=torch.complex128)
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 0.7 + 0.25


def _guesses(operator: Any, shape: tuple[int, ...], place: str) -> Iterator[OperatorCall]:
    arguments = operator._schema.arguments
    guesses = [
        _options(a, shape, required=not a.has_default_value(), is_data=a.name == place)
        for a in arguments
    ]
    for values in itertools.islice(itertools.product(*guesses), _TRIES):
        pairs = list(zip(arguments, values, strict=True))
        args = tuple(v for a, v in pairs if not a.kwarg_only)
        kwargs = {a.name: v for a, v in pairs if a.kwarg_only}
        yield OperatorCall(operator, shape, args, kwargs, place)


def _options(argument: Any, shape: tuple[int, ...], *, required: bool, is_data: bool) -> list[Any]:
    kind, name = str(argument.type), argument.name
    if is_data:
        lists = {"List[Tensor]", "List[Optional[Tensor]]"}
        return [[DATA, DATA], [DATA]] if kind in lists else [DATA]
    if name in _AS_THEY_ARE:
        return [argument.default_value]
    optional = kind.startswith("Optional") or not required
    guesses = _by_type(kind, name, shape)
    if optional and name not in _WANTED:
        return [argument.default_value, *guesses]
    return guesses


# Numbers for these are no formats, layouts and devices; some end the process.
_AS_THEY_ARE = {"memory_format", "layout", "device", "pin_memory"}
_WANTED = {"dim", "weight", "bias", "output_size", "scale_factors", "align_corners"}


def _by_type(kind: str, name: str, shape: tuple[int, ...]) -> list[Any]:
    kind = re.sub(r"^Optional\[(.*)\]$", r"\1", kind)
    if kind == "Tensor":
        return _tensors(name, shape)
    if kind in ("List[Tensor]", "List[Optional[Tensor]]"):
        if "indices" in name:
            return [[torch.tensor([1, 0])], [torch.ones(shape, dtype=torch.bool)]]
        return [[_other(shape)], [_other((4, 4)), _other((4,))]]
    if "dtype" in name:
        return [torch.float32, torch.float64, torch.int64, torch.bool]
    if kind in ("int", "SymInt"):
        return {"dim": [1, 0, -1], "dim0": [0], "dim1": [1], "groups": [1]}.get(name, [2, 1, 4, 0])
    if kind in ("List[int]", "List[SymInt]", "List[Optional[int]]"):
        return _sizes(name, shape)
    if kind in ("number", "Scalar"):
        return [2, 0.5]
    if kind in ("float", "List[float]"):
        return [2.0, 0.5] if kind == "float" else [[2.0] * n for n in (2, 1, 3)]
    if kind == "bool":
        return [False]
    if kind == "str":
        words = {"reduce": ["sum"], "mode": ["constant"], "padding": ["same"], "equation": ["..."]}
        return words.get(name, ["reflect", "none"])
    return [None]


def _other(shape: Sequence[int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(tuple(shape), generator=generator) + 0.25


def _tensors(name: str, shape: tuple[int, ...]) -> list[torch.Tensor]:
    rank = len(shape)
    positions = torch.zeros(shape, dtype=torch.int64)
    short = torch.tensor([1, 0])
    mask = _other(shape) > 0.7
    if "mask" in name or name == "condition":
        return [mask]
    if name in ("index", "indices", "repeats", "target", "batch1_sizes", "lengths", "offsets"):
        return [positions, short, torch.zeros(shape[:1], dtype=torch.int64)]
    kernels = [_other((4, 4, *(1,) * n)) for n in (rank - 2,) if n > 0]
    plain = [_other(shape), _other((4,)), _other((4, 4)), torch.tensor(0.5)]
    if name in ("weight", "kernel"):
        return [*kernels, _other((4, 4)), _other((4,)), _other(shape)]
    if name in ("bias", "running_mean", "running_var", "mean", "invstd"):
        return [_other((4,))]
    if name == "grid":
        return [_other((2, 4, 4, 2)), _other((2, 4, 4, 4, 3))]
    return [*plain, _other((2, 4, 4)), mask, positions, short]


def _sizes(name: str, shape: tuple[int, ...]) -> list[list[int]]:
    pooled = [n for n in (len(shape) - 2, 1, 2, 3) if n > 0]
    if name in ("dim", "dims", "axis", "axes", "dim1", "dim2"):
        orders = [list(range(len(shape)))[::-1]] if name == "dims" else []
        return [*orders, [1], [0], [-1], [-2, -1]]
    if name in ("kernel_size", "output_size", "block_size"):
        return [[2] * n for n in pooled]
    if name in ("padding", "output_padding"):
        return [[0] * n for n in pooled] + [[1, 1] * n for n in pooled]
    if name in ("stride", "dilation", "scale_factor"):
        return [[1] * n for n in pooled]
    if name == "pad":
        return [[1, 1]]
    if name == "normalized_shape":
        return [[4]]
    if name in ("split_sizes", "split_size", "sections"):
        return [[1, 3], [1, 1]]
    return [list(shape), [-1], [1, 4], [4, 1], [2, 2], [1] * max(len(shape), 1)]
