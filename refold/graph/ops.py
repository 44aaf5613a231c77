"""The one table of operators: what each is called in reports, and the facts that passes ask for.

A row is a kind, the traits, and the names that share them; an operator stands in one row. A trait
is a fact about the mathematics of an operator, or about its memory, never a decision of a pass.
What stands in no row is unknown: nothing is taken for granted of it, and the report names it.
Spellings that mean another operator of the table (``concat``, ``multiply``, ``swapaxes``) have no
row: :mod:`refold.frontends.canonical` writes them out.

    ops.has(node, ops.VIEW)          the result has the elements of the input, in the same order
    ops.has(node, ops.VIEW | ops.PERMUTE)    either
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

_bit = itertools.count()


def _trait() -> int:
    return 1 << next(_bit)


# --- traits: where elements come from. Every element of the result is one of the first tensor's ---
VIEW = _trait()  # the same elements in the same order, in another shape
UNIT_AXES = _trait()  # a view that adds or drops axes of size 1
SIZED = _trait()  # its arguments state the sizes of the result, and so its rank
PERMUTE = _trait()  # the axes in another order
EXPAND = _trait()  # repeats along axes of size 1, without storing it
ALIAS = _trait()  # the input itself
COPY = _trait()  # the input's values in storage of their own
PART = _trait()  # a range of one axis, or one index of it
SPLIT = _trait()  # gives several parts of one axis
PICK = _trait()  # elements chosen by fixed arguments: repeated, turned round, shuffled
NEAREST = _trait()  # a resize that picks the nearest element
MOVES = VIEW | PERMUTE | EXPAND | ALIAS | COPY | PART | SPLIT | PICK  # computes nothing
CAST = _trait()  # the input's values in another dtype or on another device

# --- traits: what is computed ---------------------------------------------------------------------
ELEMENTWISE = _trait()  # each element of the result depends on one element of each tensor
MIXES = _trait()  # reads several tensors alike
LINEAR = _trait()  # linear in all its tensors together: f(a x + b y) = a f(x) + b f(y)
BILINEAR = _trait()  # linear in the first tensor, and in the second, while the other stays
NONLINEAR = _trait()  # not linear in the first tensor, whatever the other arguments are
ARITHMETIC = _trait()  # sums, differences, products and quotients, element by element
COMMUTATIVE = _trait()  # the first two operands may change places
COMPARISON = _trait()  # booleans, element by element
HOMOGENEOUS = _trait()  # f(s x) = s f(x) for s > 0
ORDER = _trait()  # picks the largest of a window: f(s x + t) = s f(x) + t for s > 0
MEAN = _trait()  # a mean of windows that cover the input: f(s x + t) = s f(x) + t
RESIZE = _trait()  # interpolates between elements with weights that add up to 1, or picks them
STEP = _trait()  # a small change of the input can move the value by a step
ROUNDS = _trait()  # gives a neighbour of the number that it reads, or stores
BOUNDED = _trait()  # finite for whatever it reads; NaN of NaN, and of what has no limit
FINITE = _trait()  # element by element: finite ones of finite ones, NaN of NaN
KEEPS_NAN = _trait()  # element by element: NaN of NaN
INDEXED = _trait()  # where it gives two results, the second says where the first were
DRAWS = _trait()  # draws random numbers, or gives unwritten memory
DROPOUT = _trait()  # its input, where it does not train

# --- traits: memory -------------------------------------------------------------------------------
READS_STRIDES = _trait()  # its values, not only its layout, depend on the strides that it reads
READS_FORMAT = _trait()  # another kernel for another memory format, which rounds worse; see below
CONTIGUOUS = _trait()  # its result is contiguous, whatever strides it reads
MAY_ALIAS = _trait()  # may return its input, or a view of it, though its schema does not say so

# READS_FORMAT was measured: of 8 x 256 x 256 values of 20 +- 0.1 in float32, relative to the
# largest result and as contiguous / channels last, group_norm 1e-6 / 2e-1, batch statistics
# 3e-6 / 3e-4, norms over several axes 2e-7 / 3e-6. Within twice of each other (PyTorch 2.13, CPU):
# layer, RMS and instance norm, sums, means, variances, softmax, pools, resizes, convolutions,
# products of matrices.

_E, _N = ELEMENTWISE, NONLINEAR
_UNARY = ELEMENTWISE | NONLINEAR
_LAYOUT = "layout"

# (kind, traits, names); the kind is the operator's own name where it is empty
_TABLE: tuple[tuple[str, int, str], ...] = (
    # moves
    (_LAYOUT, VIEW | SIZED | LINEAR, "view reshape"),
    (_LAYOUT, VIEW | SIZED | LINEAR | MAY_ALIAS, "_unsafe_view"),
    (_LAYOUT, VIEW | LINEAR, "flatten unflatten view_as reshape_as"),
    (_LAYOUT, VIEW | UNIT_AXES | LINEAR, "squeeze unsqueeze"),
    ("", LINEAR, "squeeze_copy"),  # tracing leaves it of a squeeze whose rank follows the sizes
    (_LAYOUT, PERMUTE | LINEAR, "permute transpose t movedim"),
    (_LAYOUT, EXPAND | SIZED | LINEAR, "expand"),
    (_LAYOUT, EXPAND | LINEAR, "expand_as"),
    (_LAYOUT, ALIAS | LINEAR, "alias detach"),
    ("", ALIAS | LINEAR, "lift lift_fresh"),
    (_LAYOUT, COPY | LINEAR | ELEMENTWISE, "contiguous clone"),
    ("", COPY | LINEAR, "lift_fresh_copy"),
    (_LAYOUT, PART | LINEAR, "slice select narrow"),
    (_LAYOUT, SPLIT | LINEAR, "split split_with_sizes chunk unbind tensor_split"),
    (_LAYOUT, PICK | LINEAR, "getitem roll flip unfold channel_shuffle pixel_shuffle "
     "pixel_unshuffle"),
    (_LAYOUT, PICK | SIZED | LINEAR, "repeat"),
    ("", PICK | LINEAR, "native_channel_shuffle index_select repeat_interleave tile diagonal rot90"
     " fft_fftshift fft_ifftshift hsplit vsplit dsplit linalg_diagonal"),
    ("", RESIZE | NEAREST | LINEAR, "upsample_nearest1d upsample_nearest2d upsample_nearest3d"
     " _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d"),
    (_LAYOUT, MIXES | LINEAR, "cat stack"),
    ("", LINEAR, "index gather take take_along_dim diag diag_embed diagflat tril triu trace "
     "pad_sequence block_diag masked_select im2col col2im real imag view_as_real "
     "select_scatter slice_scatter diagonal_scatter copy index_put index_add scatter_add"),
    ("", MIXES, "scatter scatter_reduce index_copy index_fill index_reduce masked_scatter put "
     "_unsafe_index _unsafe_index_put _index_put_impl"),
    ("", MAY_ALIAS | LINEAR, "meshgrid broadcast_tensors atleast_1d atleast_2d atleast_3d"
     " cartesian_prod type_as sum_to_size"),
    (_LAYOUT, 0, "sym_size"),
    ("", READS_STRIDES, "as_strided as_strided_copy as_strided_scatter view_as_complex sym_stride "
     "sym_storage_offset sym_is_contiguous stride is_contiguous set set_"),
    ("", READS_STRIDES | STEP, "view.dtype"),
    # what torch's frontends and refold's copy: the value, where nothing is converted
    ("", CAST | ROUNDS, "to _to_copy"),
    ("pad", MAY_ALIAS, "pad"),
    ("pad", 0, "constant_pad_nd"),
    ("", LINEAR, "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
     "replication_pad2d replication_pad3d _pad_circular"),
    # layers
    ("conv", 0, "conv1d conv2d conv3d convolution _convolution _convolution_mode conv_tbc"),
    ("conv-transpose", 0, "conv_transpose1d conv_transpose2d conv_transpose3d"),
    ("linear", CONTIGUOUS, "linear addmm"),
    ("matmul", BILINEAR | CONTIGUOUS, "mm bmm"),
    ("matmul", BILINEAR, "matmul"),
    ("matmul", BILINEAR | MAY_ALIAS, "einsum"),
    ("matmul", 0, "baddbmm"),
    ("", BILINEAR, "mv dot outer inner tensordot kron linalg_vecdot vdot cross linalg_cross"),
    ("", MIXES, "bilinear"),
    ("", MIXES, "addmv addr addbmm chain_matmul"),
    ("embedding", 0, "embedding"),
    ("", 0, "embedding_bag one_hot grid_sampler grid_sampler_2d grid_sampler_3d"
     " affine_grid_generator"),
    ("attention", 0, "scaled_dot_product_attention"),
    ("", NONLINEAR, "_native_multi_head_attention _transformer_encoder_layer_fwd"),
    ("", NONLINEAR, "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell"),
    # norms
    ("batch-norm", 0, "batch_norm _native_batch_norm_legit_no_training"),
    ("", 0, "_native_batch_norm_legit native_batch_norm _batch_norm_impl_index"
     " _batch_norm_with_update _batch_norm_no_update"),
    ("layer-norm", NONLINEAR | CONTIGUOUS, "layer_norm native_layer_norm"),
    ("group-norm", NONLINEAR | READS_FORMAT, "group_norm native_group_norm"),
    ("rms-norm", NONLINEAR, "rms_norm"),
    ("", NONLINEAR, "_fused_rms_norm"),
    ("instance-norm", 0, "instance_norm"),
    ("", NONLINEAR, "renorm cosine_similarity"),
    ("", NONLINEAR | READS_FORMAT, "norm linalg_vector_norm linalg_norm linalg_matrix_norm"
     " frobenius_norm nuclear_norm"),
    ("", 0, "_weight_norm _weight_norm_interface"),
    # arithmetic
    ("add", _E | MIXES | LINEAR | ARITHMETIC | COMMUTATIVE, "add"),
    ("sub", _E | MIXES | LINEAR | ARITHMETIC, "sub rsub"),
    ("mul", _E | MIXES | BILINEAR | ARITHMETIC | COMMUTATIVE, "mul"),
    ("div", _E | MIXES | ARITHMETIC | ROUNDS, "div"),
    ("neg", _E | LINEAR | ARITHMETIC | FINITE, "neg"),
    ("addcmul", _E | MIXES, "addcmul"),
    ("", _E | MIXES, "xlogy special_xlog1py addcdiv lerp where masked_fill copysign ldexp complex "
     "polar fill"),
    ("", _E | LINEAR, "deg2rad rad2deg"),
    # activations: element by element
    ("", _UNARY | HOMOGENEOUS | FINITE, "relu leaky_relu"),
    ("", NONLINEAR | HOMOGENEOUS | MIXES, "prelu"),  # its slopes lie along axis 1
    ("", _UNARY | HOMOGENEOUS | MIXES, "_prelu_kernel"),
    ("", _UNARY | FINITE, "abs silu gelu elu selu celu softplus mish hardswish"
     " clamp_min clamp_max"),
    ("", _UNARY | KEEPS_NAN, "clamp hardtanh"),
    ("", _UNARY | BOUNDED | KEEPS_NAN, "tanh sigmoid hardsigmoid relu6 sin cos erf atan"),
    ("", _UNARY, "log_sigmoid hardshrink softshrink threshold exp exp2 expm1 log "
     "log2 log10 log1p logit sqrt rsqrt square reciprocal pow float_power tan sinc sinh cosh asin "
     "acos asinh acosh atanh erfc erfinv lgamma digamma polygamma mvlgamma i0 "
     "angle special_i0e special_i1 special_i1e special_erfcx special_entr "
     "special_ndtr special_ndtri special_log_ndtr special_bessel_j0 special_bessel_j1 "
     "special_bessel_y0 special_bessel_y1 special_airy_ai special_modified_bessel_i0 "
     "special_modified_bessel_i1 special_modified_bessel_k0 special_modified_bessel_k1 "
     "special_scaled_modified_bessel_k0 special_scaled_modified_bessel_k1 "
     "special_spherical_bessel_j0"),
    ("", _UNARY | MIXES, "atan2 hypot logaddexp logaddexp2 special_zeta "
     "igamma igammac"),
    ("", _UNARY | MIXES | COMMUTATIVE, "maximum minimum"),
    ("", _UNARY | MIXES, "fmax fmin"),
    ("", NONLINEAR, "glu log_sigmoid_forward"),
    ("", NONLINEAR | MAY_ALIAS | DRAWS, "rrelu rrelu_with_noise"),
    ("", _E, "nan_to_num conj _conj_physical _conj _neg_view resolve_conj resolve_neg"),
    ("", _E | MAY_ALIAS, "conj_physical"),
    # softmax and other reductions
    ("", NONLINEAR | BOUNDED, "softmax _softmax"),
    ("", NONLINEAR, "log_softmax _log_softmax _safe_softmax _masked_softmax logsumexp logcumsumexp "
     "prod cumprod var std var_mean std_mean linalg_vander cdist pdist pairwise_distance dist "
     "_cdist_forward _pdist_forward _logcumsumexp norm_except_dim _aminmax "
     "_euclidean_dist cov linalg__powsum quantile nanquantile"),
    ("", LINEAR, "sum mean cumsum diff"),
    ("", 0, "corrcoef nansum nanmean trapezoid cumulative_trapezoid"),
    ("", NONLINEAR, "amax amin"),
    ("", NONLINEAR, "aminmax"),
    ("", NONLINEAR | INDEXED, "max min cummax cummin"),
    # pools
    ("avg-pool", 0, "avg_pool1d avg_pool2d avg_pool3d"),
    ("avg-pool", LINEAR, "_adaptive_avg_pool2d _adaptive_avg_pool3d"),
    ("avg-pool", MEAN | LINEAR, "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"),
    ("max-pool", NONLINEAR | ORDER, "max_pool1d max_pool2d max_pool3d"),
    ("", NONLINEAR | ORDER | INDEXED, "max_pool1d_with_indices max_pool2d_with_indices "
     "max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"),
    ("", LINEAR, "max_unpool2d max_unpool3d"),
    ("", NONLINEAR | DRAWS, "fractional_max_pool2d fractional_max_pool3d"),
    # resizes
    ("", RESIZE | LINEAR, "upsample_linear1d upsample_bilinear2d upsample_trilinear3d "
     "upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_lanczos2d_aa"),
    # transforms
    ("", LINEAR, "fft_fft fft_fft2 fft_fftn fft_ifft fft_ifft2 fft_ifftn fft_rfft fft_rfft2 "
     "fft_rfftn fft_irfft fft_irfft2 fft_irfftn fft_hfft fft_hfft2 fft_hfftn fft_ihfft "
     "fft_ihfft2 fft_ihfftn _fft_r2c _fft_c2r _fft_c2c"),
    ("", MIXES, "stft istft"),
    # linear algebra of one matrix
    ("", NONLINEAR, "linalg_inv linalg_inv_ex linalg_pinv pinverse linalg_det _linalg_det "
     "linalg_slogdet "
     "_linalg_slogdet logdet slogdet linalg_cholesky linalg_cholesky_ex cholesky cholesky_inverse "
     "linalg_matrix_exp linalg_matrix_power linalg_qr linalg_lu "
     "linalg_lu_factor linalg_lu_factor_ex lu_unpack qr linalg_eigvals linalg_eigvalsh "
     "linalg_svdvals linalg_cond linalg_tensorinv linalg_householder_product"),
    ("", STEP | NONLINEAR, "linalg_svd _linalg_svd svd linalg_eigh _linalg_eigh linalg_eig "
     "linalg_matrix_rank"),
    ("", 0, "cholesky_solve linalg_solve linalg_solve_ex _linalg_solve_ex linalg_solve_triangular "
     "linalg_lu_solve linalg_lstsq linalg_tensorsolve linalg_ldl_factor "
     "linalg_ldl_factor_ex linalg_ldl_solve linalg_multi_dot triangular_solve ormqr geqrf"),
    # steps: comparisons, roundings, orders
    ("", _E | MIXES | STEP | COMPARISON, "eq ne lt le gt ge isclose"),
    ("", _E | MIXES | STEP | COMPARISON | COMMUTATIVE, "logical_and logical_or"),
    ("", _E | MIXES | STEP | COMPARISON, "logical_xor"),
    ("", _E | STEP | COMPARISON, "logical_not isnan isinf isfinite isposinf isneginf isreal"
     " signbit"),
    ("", STEP, "equal allclose isin any all is_nonzero"),
    ("", _E | MIXES, "bitwise_and bitwise_or bitwise_xor __and__ __or__ __xor__"
     " bitwise_left_shift bitwise_right_shift __lshift__ __rshift__ gcd lcm"),
    ("", _E, "bitwise_not"),
    ("", _E | STEP | ROUNDS | FINITE, "round floor ceil trunc"),
    ("", _E | STEP | ROUNDS, "frac"),
    ("", _E | STEP | BOUNDED, "sign sgn"),
    ("", _E | MIXES | STEP, "heaviside remainder fmod nextafter"),
    ("", _E | MIXES | STEP | ROUNDS, "floor_divide"),
    ("", _E | STEP, "frexp"),
    ("", STEP | INDEXED, "topk sort msort kthvalue mode median nanmedian"),
    ("", STEP, "argsort argmax argmin _unique _unique2 unique_dim unique_consecutive "
     "unique_dim_consecutive nonzero nonzero_static nonzero_numpy argwhere count_nonzero bucketize "
     "searchsorted histc histogram bincount"),
    # quantisers
    ("", STEP | ROUNDS, "fake_quantize_per_tensor_affine fake_quantize_per_channel_affine "
     "fake_quantize_per_tensor_affine_cachemask fake_quantize_per_channel_affine_cachemask "
     "quantize_per_tensor quantize_per_channel quantize_per_tensor_dynamic quantize"),
    ("", 0, "dequantize dequantize_per_tensor dequantize_per_channel int_repr q_scale q_zero_point"
     " _int_mm _scaled_mm _weight_int8pack_mm _weight_int4pack_mm choose_qparams"),
    # random numbers and unwritten memory; a dropout is its input where it does not train
    ("dropout", DROPOUT | MAY_ALIAS, "dropout"),
    ("", DROPOUT | MAY_ALIAS | DRAWS, "alpha_dropout feature_dropout native_dropout"),
    ("", DROPOUT | MAY_ALIAS, "feature_alpha_dropout"),
    ("", DRAWS, "uniform rand randn randint randperm rand_like randn_like randint_like normal "
     "bernoulli poisson exponential geometric cauchy log_normal random binomial "
     "_standard_gamma _sample_dirichlet normal_functional"),
    ("", DRAWS | STEP, "multinomial"),
    ("", DRAWS, "empty empty_like empty_strided new_empty new_empty_strided empty_permuted"),
    # constants, sizes and checks
    ("", 0, "zeros ones full eye arange linspace logspace scalar_tensor zeros_like ones_like "
     "full_like new_zeros new_ones new_full tril_indices triu_indices hann_window hamming_window "
     "blackman_window bartlett_window kaiser_window fft_fftfreq fft_rfftfreq vander combinations"),
    ("", 0, "sym_numel sym_constrain_range sym_constrain_range_for_size item _local_scalar_dense"
     " numel size dim"),
    ("", 0, "_assert_scalar _assert_async _assert_tensor_metadata _functional_assert_async "
     "_functional_assert_scalar"),
    # losses, which networks compute in their last calls
    ("", NONLINEAR, "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy "
     "binary_cross_entropy_with_logits cross_entropy_loss nll_loss nll_loss_nd nll_loss2d kl_div "
     "soft_margin_loss margin_ranking_loss hinge_embedding_loss cosine_embedding_loss "
     "triplet_margin_loss multi_margin_loss multilabel_margin_loss poisson_nll_loss ctc_loss"),
)  # fmt: skip


def _rows() -> dict[str, tuple[str, int]]:
    found: dict[str, tuple[str, int]] = {}
    for kind_, traits, names in _TABLE:
        for name in names.split():
            assert name not in found, f"{name} stands in two rows"
            found[name] = (kind_ or name.strip("_").replace("_", "-"), traits)
    return found


ROWS = _rows()
# Whose operators mean what the table says of their names; a relu of another library is any formula.
_LIBRARIES = frozenset({"aten", "prim", "refold", "quantized_decomposed"})


def op_name(node: fx.Node) -> str:
    """The bare operator name of a call (``conv2d`` for ``aten.conv2d.default``).

    An operator of another library keeps its namespace where ATen has one of that name.
    """
    return _name(node.target)


@functools.cache
def _name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[-1]
        alike = target.namespace in _LIBRARIES or not hasattr(torch.ops.aten, name)
        return name if alike else target._schema.name
    return getattr(target, "__name__", str(target))


def has(node: object, traits: int) -> bool:
    """True for a call whose operator has one of some traits; of an unknown one nothing is true."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    return bool(_traits(node.target) & traits)


def named(name: str, traits: int) -> bool:
    """:func:`has` for a name by itself; ``add_``, which writes, has the traits of ``add``."""
    row = ROWS.get(name) or ROWS.get(name.rstrip("_"))
    return row is not None and bool(row[1] & traits)


@functools.cache
def _traits(target: Any) -> int:
    row = _row(target)
    return 0 if row is None else row[1]


@functools.cache
def _row(target: Any) -> tuple[str, int] | None:
    name = _name(target)
    if isinstance(target, torch._ops.OpOverload):
        own = ROWS.get(f"{name}.{target._overloadname}")
        if own is not None:
            return own
    elif target is not operator.getitem and not name.startswith("sym_"):
        return None
    return ROWS.get(name)


def known(node: fx.Node) -> bool:
    """True if the operator of a call stands in the table."""
    return _row(node.target) is not None


def names(traits: int) -> frozenset[str]:
    """The names of all operators that have one of some traits."""
    return frozenset(name for name, (_, own) in ROWS.items() if own & traits)


def packets(traits: int) -> tuple[Any, ...]:
    """The operators of ATen that have one of some traits, for patterns."""
    found = (getattr(torch.ops.aten, n, None) for n in sorted(names(traits)) if "." not in n)
    return tuple(p for p in found if p is not None)


def kind(node: fx.Node) -> str:
    """The kind of a node: ``conv``, ``batch-norm``, ``linear``, ``add``, or its operator's name."""
    if node.op != "call_function":
        return node.op
    found = _kind(node.target)
    return op_name(node).strip("_").replace("_", "-") if found == _LAYOUT else found


@functools.cache
def _kind(target: Any) -> str:
    row = _row(target) or ROWS.get(_name(target).rstrip("_"))
    return _name(target).strip("_").replace("_", "-") if row is None else row[0]


def is_layout(node: fx.Node) -> bool:
    """True for a call that reports count as ``layout``: it moves elements and computes nothing."""
    return node.op == "call_function" and _kind(node.target) == _LAYOUT


def census(graph: fx.Graph) -> Counter[str]:
    """Calls by kind; layout calls count together as ``layout``."""
    return Counter(_kind(node.target) for node in graph.nodes if node.op == "call_function")


def unknown(graphs: Iterable[fx.Graph]) -> Counter[str]:
    """The operators that stand in no row, by name, with the number of their calls."""
    return Counter(
        op_name(node)
        for graph in graphs
        for node in graph.nodes
        if node.op == "call_function" and not known(node)
    )
