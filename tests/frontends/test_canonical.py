"""One spelling an operator: what each form becomes, that it is equal, and where it stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import refold
from refold.errors import VerifierError
from refold.frontends.canonical import check_dialect
from refold.frontends.canonical import forms as canonical_forms
from refold.frontends.export import trace
from refold.graph import ops
from tests.compare import EXACT, relative_error
from tests.tracing import ops as calls

FORMS = canonical_forms() | {"cat", "relu", "permute", "transpose", "mul"}
X = torch.linspace(-2, 2, 48).reshape(2, 4, 6)
SQUARE = torch.linspace(-1, 1, 32).reshape(2, 4, 4)


class Net(nn.Module):
    def __init__(self, formula: Callable[..., Any], **held: Any) -> None:
        super().__init__()
        self.formula = formula
        for name, value in held.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.formula(self, x)


def traced(formula: Callable[..., Any], x: Tensor = X, **held: Any) -> Counter[str]:
    """The calls of the trace, which is right on the example bit for bit."""
    net = Net(formula, **held).eval()
    program = trace(net, (x,), {})
    check_dialect(program.graph_module)
    torch.testing.assert_close(program.graph_module(x), net(x), rtol=1e-6, atol=1e-6)
    return calls(program.graph_module)


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        (lambda s, x: torch.concat([x, x], 1), {"cat": 1}),
        (lambda s, x: torch.concatenate([x, x], 1), {"cat": 1}),
        (lambda s, x: torch.hstack([x, x]), {"cat": 1}),
        (lambda s, x: torch.vstack([x, x]), {"cat": 1}),
        (lambda s, x: torch.dstack([x, x]), {"cat": 1}),
        (lambda s, x: torch.column_stack([x, x]), {"cat": 1}),
        (lambda s, x: torch.multiply(x, 2.0), {"mul": 1}),
        (lambda s, x: torch.subtract(x, x.square(), alpha=2), {"square": 1, "sub": 1}),
        (lambda s, x: torch.true_divide(x, 3.0), {"div": 1}),
        (lambda s, x: torch.divide(x, 3.0, rounding_mode="floor"), {"div": 1}),
        (lambda s, x: torch.negative(x), {"neg": 1}),
        (lambda s, x: torch.moveaxis(x, 1, 2), {"permute": 1}),
        (lambda s, x: torch.movedim(x, (0, 1), (2, 0)), {"permute": 1}),
        (lambda s, x: torch.swapaxes(x, 1, 2), {"transpose": 1}),
        (lambda s, x: torch.swapdims(x, 0, 2), {"transpose": 1}),
        (lambda s, x: x.mT, {"transpose": 1}),
        (lambda s, x: x.mH, {"transpose": 1}),
        (lambda s, x: x.adjoint(), {"transpose": 1}),
        (lambda s, x: torch.clip(x, -1, 1), {"clamp": 1}),
        (lambda s, x: torch.clamp(x, min=0), {"relu": 1}),
        (lambda s, x: torch.clamp_min(x, 0.0), {"relu": 1}),
        (lambda s, x: torch.clamp(x, min=0, max=1), {"clamp": 1}),
        (lambda s, x: torch.clamp(x, min=-0.0), {"clamp": 1}),
        (lambda s, x: torch.maximum(x, x.square()), {"square": 1, "maximum": 1}),
        (lambda s, x: torch.max(x, x.square()), {"square": 1, "maximum": 1}),
        (lambda s, x: torch.min(x, x.square()), {"square": 1, "minimum": 1}),
        (lambda s, x: x.narrow(2, 1, 3) * 2, {"slice": 1, "mul": 1}),
        (lambda s, x: x.narrow(2, -3, 3) * 2, {"slice": 1, "mul": 1}),
        (lambda s, x: torch.special.expit(x), {"sigmoid": 1}),
        (lambda s, x: torch.special.softmax(x, 1), {"softmax": 1}),
        (lambda s, x: torch.special.round(x), {"round": 1}),
        (lambda s, x: torch.special.round(x, decimals=1), {"round": 1}),
        (lambda s, x: torch.fliplr(x), {"flip": 1}),
        (lambda s, x: torch.flipud(x), {"flip": 1}),
        (lambda s, x: torch.greater(x, 0.5), {"gt": 1}),
        (lambda s, x: torch.absolute(x), {"abs": 1}),
        (lambda s, x: x[0].T, {"select": 1, "permute": 1}),
    ],
)
def test_spellings(formula, expected) -> None:
    assert traced(formula) == expected


def test_unique_slices_are_asked_for_what_they_give_anyway() -> None:
    unique = torch.ops.aten.unique_dim.default
    gm = trace(Net(lambda s, x: unique(x, 1)[1:]).eval(), (X,)).graph_module
    (call,) = gm.graph.find_nodes(op="call_function", target=unique)
    assert call.args[-2:] == (True, True)


def test_a_clamp_keeps_nan_and_integers_stay() -> None:
    program = trace(Net(lambda s, x: torch.clamp(x, min=0)).eval(), (X,), {})
    spiked = X.clone()
    spiked[0, 0, 0] = torch.nan
    assert program.graph_module(spiked)[0, 0, 0].isnan()
    assert traced(lambda s, x: torch.clamp(x, min=0), torch.arange(4) - 2) == {"clamp": 1}


def test_complex_adjoints_conjugate() -> None:
    assert "adjoint" in traced(lambda s, x: torch.complex(x, x).adjoint().real * 2)


@pytest.mark.parametrize(
    ("alpha", "beta", "expected"),
    [
        (1, 1, {"addmm": 1}),
        (2.0, 1, {"mm": 1, "mul": 1, "add": 1}),
        (1, 0.5, {"mm": 1, "mul": 1, "add": 1}),
        (2.0, 0, {"mm": 1, "mul": 1}),
        (1, 0, {"mm": 1}),
    ],
)
def test_addmm_is_written_out(alpha, beta, expected) -> None:
    held = {"w": torch.randn(6, 5), "b": torch.randn(5)}
    formula = lambda s, x: torch.addmm(s.b, x, s.w, alpha=alpha, beta=beta)
    assert traced(formula, X[0], **held) == expected


def test_a_beta_of_zero_leaves_nan_out() -> None:
    held = {"w": torch.randn(6, 5), "b": torch.full((5,), torch.nan)}
    net = Net(lambda s, x: torch.addmm(s.b, x, s.w, beta=0), **held).eval()
    assert refold.compile_for_inference(net, X[0])(X[0]).isfinite().all()


def test_products_of_data_stay_one_call() -> None:
    formula = lambda s, x: torch.baddbmm(x.new_zeros(1), x, x, beta=0, alpha=0.5)
    assert traced(formula, SQUARE)["baddbmm"] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_addmm_of_narrow_floats_stays(dtype) -> None:
    """The product of 6 * 400 * 40 leaves float16, and comes back by its factor."""
    held = {"w": torch.full((6, 5), 400.0, dtype=dtype), "b": torch.ones(5, dtype=dtype)}
    formula = lambda s, x: torch.addmm(s.b, x, s.w, alpha=0.125)
    assert traced(formula, torch.full((3, 6), 40.0, dtype=dtype), **held) == {"addmm": 1}


def test_an_alpha_of_zero_may_leave_infinities_out() -> None:
    held = {"w": torch.full((6, 5), torch.inf), "b": torch.randn(5)}
    assert traced(lambda s, x: torch.addmm(s.b, x, s.w, alpha=0), X[0], **held) == {"addmm": 1}


def test_ravel_is_flatten_of_contiguous_memory() -> None:
    assert traced(lambda s, x: x.ravel()) == {"flatten": 1}
    assert traced(lambda s, x: x.sum().ravel()) == {"sum": 1, "flatten": 1}
    column = traced(lambda s, x: x[:, 0, 0].ravel())
    assert column == {"select": 2, "slice": 1, "contiguous": 1, "flatten": 1}


def test_ravel_copies_what_is_not_contiguous() -> None:
    net = Net(lambda s, x: x[:, 0].ravel()).eval()
    x = X[0].clone()
    given = refold.compile_for_inference(net, x)(x)
    assert given.stride() == net(x).stride() == (1,)
    assert given.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    pair = Net(lambda s, x: torch.as_strided(x[:, 0].ravel(), (2,), (1,)) * 2).eval()
    torch.testing.assert_close(refold.compile_for_inference(pair, x)(x), pair(x))


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_one_sample_is_a_batch_of_one(spatial, transposed) -> None:
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{spatial}d")
    x = torch.randn(3, *(5,) * spatial)
    found = traced(lambda s, x: s.c(x), x, c=kind(3, 4, 2))
    assert found["unsqueeze"] == found["squeeze"] == 1
    net = Net(lambda s, x: s.c(x) * s.g, c=kind(3, 4, 2), g=torch.rand(4, *(1,) * spatial)).eval()
    compiled = refold.compile_for_inference(net, x, dynamic_shapes=({},))
    assert len(calls(compiled.graph_module)) == 1, compiled.graph_module.graph
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("operation", ["add", "sub", "mul", "div"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("of", [torch.float32, torch.float16])
def test_integer_constants_are_floats_beside_floats(operation, dtype, of) -> None:
    if operation == "sub" and dtype == torch.bool:
        return  # PyTorch refuses it
    held = {"t": torch.tensor([1, 3, 0, 200, 7, 1]).to(dtype)}
    formula = lambda s, x: getattr(torch, operation)(x, s.t)
    assert traced(formula, X.to(of), **held) == {operation: 1, "_to_copy": 1}


@pytest.mark.parametrize("operation", ["add", "mul", "div"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_number_beside_narrow_floats_stays(operation, shape) -> None:
    """The call reads 70000 in float32; in float16 it would be infinite."""
    held = {"t": torch.full(shape, 70000)}
    x = torch.linspace(-1e-2, 1e-2, 7).half()
    assert traced(lambda s, x: getattr(torch, operation)(x, s.t), x, **held) == {operation: 1}


def test_integer_constants_beside_constants_and_large_masks_stay() -> None:
    quantised = {"w": torch.randint(-8, 8, (5, 6), dtype=torch.int8), "s": torch.rand(5, 1)}
    assert "_to_copy" not in traced(lambda s, x: F.linear(x, s.w * s.s), **quantised)
    mask = torch.rand(4, 300, 300) > 0.5
    assert traced(lambda s, x: x * s.m, torch.randn(2, 4, 300, 300), m=mask) == {"mul": 1}


def test_integer_constants_fold() -> None:
    net = Net(lambda s, x: s.l(x) / s.t, l=nn.Linear(6, 4), t=torch.tensor([8, 16, 32, 24])).eval()
    compiled = refold.compile_for_inference(net, X[0])
    assert calls(compiled.graph_module) == {"linear": 1}
    torch.testing.assert_close(compiled(X[0]), net(X[0]))


@pytest.mark.parametrize("amounts", [(0, -1), (-1, -2), (-1, 0, 0, -2), (0, 0, -1, -1)])
def test_a_scale_passes_a_crop(amounts) -> None:
    net = Net(lambda s, x: s.b(F.pad(s.c(x), amounts)), c=nn.Conv2d(3, 4, 1), b=nn.BatchNorm2d(4))
    with torch.no_grad():
        net.b.running_mean.normal_(), net.b.running_var.uniform_(0.5, 2.0)
    x = torch.randn(2, 3, 6, 6)
    compiled = refold.compile_for_inference(net.eval(), x)
    assert calls(compiled.graph_module) == {"conv2d": 1, "pad": 1}
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-6)


def test_a_pad_that_crops_and_pads_keeps_its_border() -> None:
    net = Net(lambda s, x: s.b(F.pad(s.c(x), (-1, 2))), c=nn.Conv2d(3, 4, 1), b=nn.BatchNorm2d(4))
    with torch.no_grad():
        net.b.running_mean.normal_(), net.b.bias.normal_()
    x = torch.randn(2, 3, 6, 6)
    compiled = refold.compile_for_inference(net.eval(), x)
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-6)


ROW = torch.linspace(-2, 2, 6)


@pytest.mark.parametrize(
    ("formula", "x", "expected"),
    [
        (lambda s, x: torch.hstack([x, x]), ROW, {"cat": 1}),
        (lambda s, x: torch.vstack([x, x]), ROW, {"vstack": 1}),
        (lambda s, x: torch.column_stack([x, x]), ROW, {"column_stack": 1}),
        (lambda s, x: torch.column_stack([x, x.reshape(6, 1)]), ROW,
         {"reshape": 1, "column_stack": 1}),
        (lambda s, x: torch.column_stack([x.reshape(6, 1), x]), ROW,
         {"reshape": 1, "column_stack": 1}),
        (lambda s, x: torch.hstack([x, x]), X[0], {"cat": 1}),
        (lambda s, x: torch.vstack([x, x]), X[0], {"cat": 1}),
        (lambda s, x: torch.column_stack([x, x]), X[0], {"cat": 1}),
        (lambda s, x: torch.dstack([x, x]), X[0], {"dstack": 1}),
        (lambda s, x: x.narrow(1, 0, 6) * 2, X[0], {"slice": 1, "mul": 1}),
        (lambda s, x: x.max(1).values + x.min(1).values, X[0],
         {"max": 1, "min": 1, "getitem": 2, "add": 1}),
        (lambda s, x: x.max() + x.min(), X[0], {"max": 1, "min": 1, "add": 1}),
        (lambda s, x: torch.clamp(x, min=1), X, {"clamp": 1}),
        (lambda s, x: torch.clamp(x, min=-1.5), X, {"clamp": 1}),
        (lambda s, x: torch.clamp(x, max=0), X, {"clamp": 1}),
        (lambda s, x: torch.clamp(x, min=s.t), X, {"clamp": 1}),
        (lambda s, x: torch.clamp(x, min=0.0), torch.arange(6) - 2, {"clamp": 1}),
        (lambda s, x: torch.special.round(x * 8, decimals=0), X, {"mul": 1, "round": 1}),
        (lambda s, x: x.conj().mT.real * 1.5, torch.complex(X, X), {"transpose": 1, "mul": 1}),
        (lambda s, x: torch.ops.aten.matrix_H.default(x) * 2, X[0], {"permute": 1, "mul": 1}),
        (lambda s, x: torch.ops.aten.matrix_H.default(x).imag * 2, torch.complex(X[0], X[0]),
         {"matrix_H": 1, "mul": 1}),
    ],
)  # fmt: skip
def test_which_form_it_is_depends_on_ranks_bounds_and_dtypes(formula, x, expected) -> None:
    found = traced(formula, x, t=torch.zeros(()))
    kept = {name: count for name, count in found.items() if name in {*expected, *FORMS}}
    assert kept == expected


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("baddbmm", {"alpha": 2.0}, {"bmm": 1, "mul": 1, "add": 1}),
        ("baddbmm", {"beta": 3}, {"bmm": 1, "mul": 1, "add": 1}),
        ("baddbmm", {"alpha": 2.0, "beta": 0}, {"bmm": 1, "mul": 1}),
        ("baddbmm", {"alpha": 0.5, "beta": 0.25}, {"bmm": 1, "mul": 2, "add": 1}),
        ("baddbmm", {}, {"baddbmm": 1}),
        ("baddbmm", {"alpha": 0, "beta": 2}, {"baddbmm": 1}),
    ],
)
@pytest.mark.parametrize("left", [False, True])
def test_batched_products_with_a_constant_are_written_out(name, values, expected, left) -> None:
    held = {"w": torch.randn(2, 6, 6), "b": torch.randn(2, 4, 6)}
    x = torch.linspace(-1, 1, 72).reshape(2, 6, 6) if left else X
    if left:
        held["b"] = torch.randn(2, 6, 6)
    formula = lambda s, x: torch.baddbmm(s.b, *((s.w, x) if left else (x, s.w)), **values)
    assert traced(formula, x, **held) == expected


def test_addmm_of_integers_and_of_no_constant_stays() -> None:
    whole = torch.arange(24).reshape(4, 6)
    held = {"w": torch.arange(12).reshape(6, 2), "b": torch.arange(2)}
    formula = lambda s, x: torch.addmm(s.b, x, s.w, alpha=2)
    assert traced(formula, whole, **held) == {"addmm": 1}
    found = traced(lambda s, x: torch.addmm(s.b, x, x.t(), alpha=2), X[0], b=torch.randn(4))
    assert found == {"t": 1, "addmm": 1}


@pytest.mark.parametrize(("size", "wide"), [(1 << 16, 1), ((1 << 16) + 1, 0)])
def test_integer_constants_are_widened_up_to_so_many_bytes(size: int, wide: int) -> None:
    held = {"t": torch.arange(size).remainder(100).to(torch.int8)}
    found = traced(lambda s, x: x * s.t, torch.linspace(-1, 1, size), **held)
    assert found == Counter({"mul": 1} | ({"_to_copy": 1} if wide else {}))


def test_which_constants_become_floats() -> None:
    """Neither floats, nor complex numbers, nor what is computed, nor beside integers."""
    narrow = torch.linspace(-1, 1, 2).half()
    held = {"t": torch.tensor([3, 5])}
    assert traced(lambda s, x: x * s.t, narrow, **held) == {"mul": 1, "_to_copy": 1}
    assert traced(lambda s, x: x * s.t, torch.tensor([2, 7]), **held) == {"mul": 1}
    assert traced(lambda s, x: x * s.t, narrow.double(), t=torch.rand(2)) == {"mul": 1}
    found = traced(lambda s, x: x * (x > 0), narrow)
    assert found == {"gt": 1, "mul": 1}
    found = traced(lambda s, x: (x * s.t).real * 2, narrow.float(), t=torch.tensor([1j, 2j]))
    assert "_to_copy" not in found


def test_operators_of_other_libraries_stay() -> None:
    """``flipud`` of another library may be any formula."""
    with torch.library._scoped_library("canonical", "DEF") as library:
        for name, schema in (
            ("flipud", "(Tensor x)"),
            ("clamp", "(Tensor self, float min)"),
            ("negative", "(Tensor x)"),
        ):
            library.define(f"{name}{schema} -> Tensor")
            library.impl(name, lambda x, *_: x * 3, "CompositeExplicitAutograd")
        mine = torch.ops.canonical
        found = traced(lambda s, x: mine.flipud(mine.negative(x)) + mine.clamp(x, 0.0))
    assert found == {
        "canonical::negative": 1, "canonical::flipud": 1, "canonical::clamp": 1, "add": 1,
    }  # fmt: skip


def test_what_a_frontend_must_not_leave() -> None:
    program = trace(Net(lambda s, x: x * 2.0).eval(), (X,), {})
    node = next(n for n in program.graph_module.graph.nodes if ops.op_name(n) == "mul")
    node.target = torch.ops.aten.multiply.Tensor
    with pytest.raises(VerifierError, match=r"multiply\.Tensor is not canonical"):
        check_dialect(program.graph_module)


def test_what_passes_take_for_granted_is_checked() -> None:
    def broken(change: Callable[[Any, Any], object]) -> Any:
        program = trace(Net(lambda s, x: (x * 2.0, x + 1)).eval(), (X,), {})
        graph = program.graph_module.graph
        change(graph, next(n for n in graph.nodes if ops.op_name(n) == "mul"))
        return program.graph_module

    def method(graph, node) -> None:
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.call_method("neg", (node.args[0],)))

    def written(graph, node) -> None:
        with graph.inserting_after(node):
            graph.call_function(torch.ops.aten.add_.Tensor, (node, node)).meta["val"] = 0

    for change, words in (
        (method, "call_method is no call of an operator"),
        (lambda graph, node: node.meta.pop("val"), "has no fake value"),
        (written, "writes a value that is no state and no input"),
    ):
        with pytest.raises(VerifierError, match=words):
            check_dialect(broken(change))
    # what nothing reads needs none
    unread = broken(lambda graph, node: node.replace_all_uses_with(node.args[0]))
    next(n for n in unread.graph.nodes if ops.op_name(n) == "mul").meta.pop("val")
    check_dialect(unread)


def test_a_part_of_a_size_that_is_not_known_stays() -> None:
    found = traced(lambda s, x: x.narrow(0, 1, x.shape[0] - 1) * 2, X)
    assert found["narrow"] == 1


def test_a_conjugate_that_is_resolved_has_memory_of_its_own() -> None:
    class Conjugate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.conj().resolve_conj(), self.l(x.real)

    net, x = Conjugate().eval(), torch.complex(X[0], X[0])
    kept, _ = refold.compile_for_inference(net, x)(x)
    assert torch.equal(kept, x.conj())
    assert kept.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_a_linear_of_a_vector_folds_as_one_of_a_batch_of_one() -> None:
    layer, scale = torch.nn.Linear(6, 5).double(), torch.randn(5, dtype=torch.float64)

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer
            self.register_buffer("scale", scale)

        def forward(self, x):
            return self.layer(x) * self.scale

    x = torch.randn(6, dtype=torch.float64)
    folded = refold.fold(Scaled(), (x,), dynamic_shapes=({},))
    called = [n for n in folded.graph_module.graph.nodes if n.op == "call_function"]
    assert [str(n.target) for n in called] == ["aten.linear.default"]
    assert relative_error(folded(x), Scaled()(x)) <= EXACT
