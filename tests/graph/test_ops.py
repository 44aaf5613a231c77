"""The table of operators: every operator of ATen has a place, and the traits are facts.

The facts are asked of PyTorch, by calling each operator as ``refold.fuzz.calls.py`` does.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from refold.frontends import canonical
from refold.fuzz.calls import OperatorCall, calls_of, operators
from refold.graph import ops

aten = torch.ops.aten

# Why a functional operator has no row: nothing is known of it, and reports say so.
_NO_ROW = {
    r"_.*": "a kernel that another operator dispatches to",
    r".*_forward|slow_conv.*|thnn_conv2d|conv_depthwise3d|convolution_overrideable|glu_jvp":
    "a kernel that another operator dispatches to",
    r"batch_norm_.*|native_norm|embedding_renorm|grad|gradient|hash_tensor|segment_reduce|"
    r"slice_inverse|histogramdd|zero": "of training and of statistics",
    r"dict|items|keys|sorted|as_tensor|cpu|cuda|to_dense|to_mkldnn": "no call of a network",
    r"smm|sspaddmm|hspmm|col_indices": "of sparse tensors",
}  # fmt: skip


def base(label: str) -> str:
    return label.partition(".")[0]


def is_placed(name: str) -> bool:
    """In the table, or written as an operator of it."""
    plain = name.removesuffix("_copy")
    return any(n in ops.ROWS or n in canonical.ALIASES for n in (name, plain)) or (
        name in canonical.forms()
    )


def test_every_operator_has_a_place() -> None:
    """Operators of a new version of PyTorch fail here: they get a row, a spelling, or a reason."""
    missing = {
        base(label)
        for label in operators()[0]
        if not is_placed(base(label))
        and not any(re.fullmatch(pattern, base(label)) for pattern in _NO_ROW)
    }
    assert not missing


def test_what_has_no_row_is_no_family_of_a_known_operator() -> None:
    """A kernel with an underscore may stay unknown; an operator that users call may not."""
    unknown = {n for n in map(base, operators()[0]) if not n.startswith("_") and not is_placed(n)}
    assert len(unknown) <= 40, sorted(unknown)


def test_rows_are_operators() -> None:
    """No row is a misspelling: each is an operator of ATen, or of Python's for tuples and sizes."""
    if torch.torch_version.TorchVersion(torch.__version__) < (2, 13):
        return  # some came later
    other = {"getitem", "quantize", "dequantize_per_tensor", "dequantize_per_channel"}
    other |= {"choose_qparams", "index_copy"}
    for name in ops.ROWS:
        packet = getattr(aten, name.partition(".")[0], None)
        assert packet is not None or name in other, name


def test_aliases_name_rows() -> None:
    for alias, name in canonical.ALIASES.items():
        assert alias not in ops.ROWS, f"{alias} has a row, and is written as {name}"
        assert name in ops.ROWS or name in canonical.forms(), f"{alias} -> {name}"


@pytest.mark.parametrize("alias", sorted(canonical.ALIASES))
def test_aliases_compute_the_same(alias: str) -> None:
    """Each overload of an alias that is written anew gives the same numbers under its name."""
    compared = 0
    for overload in getattr(aten, alias).overloads():
        target = getattr(getattr(aten, alias), overload)
        renamed = canonical._renamed(target)
        if "out" in overload or renamed is None or "Dimname" in str(target._schema):
            continue
        for call in calls_of(target):
            data = torch.rand(call.shape) + 0.25
            expected = call(data)
            got = OperatorCall(renamed, call.shape, call.args, call.kwargs, call.place)(data)
            for a, b in zip(pytree.tree_leaves(expected), pytree.tree_leaves(got), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
            compared += 1
    skipped = {"orgqr", "special_polygamma", "multigammaln"}  # no argument guessed fits
    assert compared or alias in skipped


# --- traits are facts -----------------------------------------------------------------------------


@functools.cache
def rows(traits: int) -> tuple[tuple[str, tuple[OperatorCall, ...]], ...]:
    """The overloads of operators with one of some traits, with the calls that fit."""
    found = []
    for label, target in operators()[0].items():
        named = label if label in ops.ROWS else base(label)
        row = ops.ROWS.get(named)
        if row is not None and row[1] & traits:
            calls = tuple(calls_of(target))
            if calls:
                found.append((label, calls))
    return tuple(found)


def first(calls: Iterable[OperatorCall]) -> Iterator[OperatorCall]:
    """The calls whose data is the first argument."""
    for call in calls:
        if call.place == call.operator._schema.arguments[0].name:
            yield call


def draw(call: OperatorCall, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(call.shape, generator=generator, dtype=torch.float64)


def floats(result: object) -> list[Tensor]:
    leaves = [v for v in pytree.tree_leaves(result) if isinstance(v, Tensor)]
    return [v.double() for v in leaves if v.dtype in (torch.float64, torch.float32)]


def apart(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference; that of NaN to NaN is none."""
    gaps = [
        (torch.where(x == y, 0.0, x - y)).nan_to_num(nan=0.0).abs().max().item()
        for x, y in zip(a, b, strict=True)
        if x.numel()
    ]
    return max(gaps, default=0.0)


def combined(call: OperatorCall, base: float = 0.0, reach: float = 1.0) -> float:
    """How far f(c + x + y) - f(c + x) - f(c + y) + f(c) is from zero: an affine f has zero."""
    x, y, c = reach * draw(call, 1), reach * draw(call, 2), torch.full(call.shape, base).double()
    try:
        whole, one, two, none = (floats(call(v)) for v in (c + x + y, c + x, c + y, c))
    except torch.linalg.LinAlgError:  # of a singular matrix; a linear function has a value anywhere
        return torch.inf
    return apart([a + d for a, d in zip(whole, none, strict=True)],
                 [b + c for b, c in zip(one, two, strict=True)])  # fmt: skip


@pytest.mark.slow
def test_linear_operators_are_linear() -> None:
    """In one of their tensors, the others fixed: that is affine."""
    for label, calls in rows(ops.LINEAR | ops.BILINEAR):
        for call in calls:
            assert combined(call) <= 1e-9, f"{label}: {call}"


# The targets and thresholds that are guessed for them leave nothing of the input.
_CONSTANT_GUESSES = {
    "linalg_pinv.default", "margin_ranking_loss.default", "multi_margin_loss.default",
    "poisson_nll_loss.default", "soft_margin_loss.default", "triplet_margin_loss.default",
}  # fmt: skip


@pytest.mark.slow
def test_nonlinear_operators_are_not_linear() -> None:
    """A reason says "not linear" only of these."""
    linear = []
    for label, calls in rows(ops.NONLINEAR):
        mine = list(first(calls))
        if mine and any(floats(c(draw(c, 1))) for c in mine):
            tried = [(c, *at) for at in ((0.0, 1.0), (0.5, 0.05), (2.0, 0.1)) for c in mine]
            if not any(combined(*t) > 1e-6 for t in tried):
                linear.append(label)
    assert set(linear) == _CONSTANT_GUESSES


def test_homogeneous_operators_pass_positive_scales() -> None:
    for label, calls in rows(ops.HOMOGENEOUS):
        for call in first(calls):
            x = draw(call, 3)
            assert apart(floats(call(2.5 * x)), [2.5 * v for v in floats(call(x))]) <= 1e-12, label


def test_what_picks_or_averages_passes_scales_and_shifts() -> None:
    for label, calls in rows(ops.ORDER | ops.MEAN | ops.RESIZE):
        for call in first(calls):
            x = draw(call, 4)
            expected = [2.5 * v - 0.75 for v in floats(call(x))]
            assert apart(floats(call(2.5 * x - 0.75)), expected) <= 1e-12, label


def test_moves_give_elements_of_their_input() -> None:
    for label, calls in rows(ops.MOVES | ops.NEAREST):
        for call in first(calls):
            x = draw(call, 5)
            held = set(x.reshape(-1).tolist())
            for value in floats(call(x)):
                assert set(value.reshape(-1).tolist()) <= held, label


def test_views_keep_the_order() -> None:
    for label, calls in rows(ops.VIEW | ops.ALIAS | ops.COPY):
        for call in first(calls):
            x = draw(call, 6)
            for value in floats(call(x)):
                assert torch.equal(value.reshape(-1), x.reshape(-1)), label


def test_elementwise_operators_mix_no_elements() -> None:
    """Another first element changes the first element of the result alone."""
    for label, calls in rows(ops.ELEMENTWISE):
        for call in calls:
            if not call.shape:
                continue
            x = draw(call, 7).abs() + 0.1
            other = x.clone()
            other.view(-1)[0] += 0.3
            for a, b in zip(floats(call(x)), floats(call(other)), strict=True):
                if a.shape == x.shape:
                    same = (a == b) | (a.isnan() & b.isnan())
                    assert bool(same.view(-1)[1:].all()), label


def test_elementwise_is_what_torch_calls_pointwise() -> None:
    pointwise = {base(n) for n, op in operators()[0].items() if torch.Tag.pointwise in op.tags}
    # Of polynomials and the like nothing else is known; rrelu draws, where it trains.
    unlisted = {n for n in pointwise if n in ops.ROWS and not ops.named(n, ops.ELEMENTWISE)}
    assert unlisted <= {"rrelu", "max", "min", "fill"}


def test_bounded_operators_are_finite_or_nan() -> None:
    for label, calls in rows(ops.BOUNDED):
        for call in first(calls):
            x = draw(call, 8)
            for big in (1e30, -1e30, torch.inf, -torch.inf):
                spiked = torch.where(x > 0, big, x)
                for value in floats(call(spiked)):
                    assert not value.isinf().any(), f"{label} of {big}"


def test_finite_operators_keep_finite_and_nan() -> None:
    for label, calls in rows(ops.FINITE | ops.KEEPS_NAN):
        for call in first(calls):
            x = draw(call, 9)
            assert all(v.isfinite().all() for v in floats(call(x))), label
            for value in floats(call(torch.full_like(x, torch.nan))):
                assert value.isnan().all(), label


def test_commutative_operators_commute() -> None:
    a, b = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    for name in ops.names(ops.COMMUTATIVE):
        packet = getattr(aten, name)
        assert torch.equal(packet(a, b), packet(b, a)), name


def test_comparisons_are_booleans() -> None:
    for label, calls in rows(ops.COMPARISON):
        for call in calls:
            assert call(draw(call, 10)).dtype == torch.bool, label


# Where functions of one number tend to step.
_EDGES = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)


def test_what_is_no_step_is_continuous() -> None:
    """A known function of elements that is not listed as a step has none at the usual places."""
    allowed = {
        "where",  # of its condition, which is not what it computes with
        "div",  # with a rounding mode, which is asked for; and at zero
        "reciprocal", "logit", "atan2", "copysign", "angle", "tan", "digamma", "lgamma", "mvlgamma",
        "polygamma", "float_power", "pow", "addcdiv", "complex", "polar", "ldexp", "hardshrink",
        "threshold", "nan_to_num", "_prelu_kernel", "masked_fill",
    }  # fmt: skip
    for label, calls in rows(ops.ELEMENTWISE):
        name = base(label)
        if ops.named(name, ops.STEP | ops.COMPARISON) or name in allowed or "bit" in name:
            continue
        for call in first(calls):
            for edge in _EDGES:
                below = floats(call(torch.full(call.shape, edge - 1e-9, dtype=torch.float64)))
                above = floats(call(torch.full(call.shape, edge + 1e-9, dtype=torch.float64)))
                gaps = [(a - b).abs() for a, b in zip(below, above, strict=True)]
                gaps = [g[g.isfinite()] for g in gaps]
                assert all(not g.numel() or g.max() < 1e-3 for g in gaps), f"{label} at {edge}"


def test_contiguous_results_are_contiguous() -> None:
    for label, calls in rows(ops.CONTIGUOUS):
        for call in first(calls):
            x = draw(call, 11)
            turned = x.mT.contiguous().mT if x.dim() > 1 else x
            for value in floats(call(turned)):
                assert value.is_contiguous(), label


@pytest.mark.slow
def test_no_unlisted_operator_returns_its_input() -> None:
    """Storage that a result shares with an input is declared by the schema, or listed."""
    for label, calls in rows(-1):
        named = label if label in ops.ROWS else base(label)
        target = operators()[0][label]
        if any(r.alias_info is not None for r in target._schema.returns):
            continue
        if ops.ROWS[named][1] & (ops.MAY_ALIAS | ops.CAST):
            continue
        for call in calls:
            x = draw(call, 12).sigmoid()  # between 0 and 1, which some ask for
            for value in pytree.tree_leaves(call(x)):
                if isinstance(value, Tensor) and value.numel():
                    shared = value.untyped_storage()._cdata == x.untyped_storage()._cdata
                    assert not shared, label


def test_what_draws_is_listed() -> None:
    """What torch tags as random draws here too, or is known to draw in training alone."""
    in_training = {"lstm", "gru", "rnn_tanh", "rnn_relu", "scaled_dot_product_attention"}
    for schema in torch._C._jit_get_all_schemas():
        name = schema.name.removeprefix("aten::")
        if name in ops.ROWS and not schema.name.startswith("aten::_"):
            overload = getattr(getattr(aten, name), schema.overload_name or "default", None)
            tags = getattr(overload, "tags", ())
            if torch.Tag.nondeterministic_seeded in tags and name not in in_training:
                assert ops.named(name, ops.DRAWS | ops.DROPOUT), name


# --- readers --------------------------------------------------------------------------------------


def graph_of(*targets: Callable[..., object]) -> fx.Graph:
    graph = fx.Graph()
    node = graph.placeholder("x")
    for target in targets:
        node = graph.call_function(target, (node,))
    graph.output(node)
    return graph


def test_unknown_operators_are_counted_by_name() -> None:
    graph = graph_of(aten.relu.default, aten.hash_tensor.default, aten.hash_tensor.default)
    assert ops.unknown([graph]) == {"hash_tensor": 2}


def test_nothing_is_true_of_an_unknown_operator() -> None:
    graph = graph_of(aten.hash_tensor.default)
    node = next(n for n in graph.nodes if n.op == "call_function")
    assert not ops.known(node)
    assert not ops.has(node, -1)


def test_names_of_other_libraries_are_their_own() -> None:
    """A ``clone`` of another library may be any formula."""
    with torch.library._scoped_library("other", "DEF") as library:
        library.define("clone(Tensor x) -> Tensor")
        library.define("nms(Tensor x) -> Tensor")
        graph = graph_of(torch.ops.other.clone.default, torch.ops.other.nms.default)
        clone, nms = (n for n in graph.nodes if n.op == "call_function")
        assert ops.op_name(clone) == ops.kind(clone) == "other::clone"
        assert not ops.known(clone)
        assert not ops.has(clone, -1)
        assert ops.op_name(nms) == "nms"


def test_an_overload_may_have_a_row_of_its_own() -> None:
    graph = graph_of(aten.view.default, aten.view.dtype)
    plain, bits = (n for n in graph.nodes if n.op == "call_function")
    assert ops.has(plain, ops.VIEW)
    assert not ops.has(bits, ops.VIEW)
    assert ops.has(bits, ops.READS_STRIDES)


def test_calls_that_write_have_no_traits() -> None:
    graph = graph_of(aten.relu_.default)
    node = next(n for n in graph.nodes if n.op == "call_function")
    assert not ops.has(node, -1)
    assert ops.named("relu_", ops.HOMOGENEOUS)
    assert ops.kind(node) == "relu"
