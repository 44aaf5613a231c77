"""The judge: right models pass, slightly wrong ones do not, and the message says where."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from refold.errors import VerificationError
from refold.frontends.export import trace
from refold.graph import constants, provenance
from refold.graph.program import Program
from refold.verify import compare
from refold.verify.compare import MORE_RUNS, verify_widely
from refold.verify.references import References, add_nearby, references
from refold.verify.result import Numerics
from refold.verify.tolerance import tolerance


def verify(original, candidate, program, **options) -> Numerics:
    """Compares a candidate with the references of its original."""
    return compare.verify(original, candidate, references(original, program), **options)


class Does(nn.Module):
    def __init__(self, function: Callable[..., object], **buffers: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.body(self.stem(x)).mean((2, 3))
        return {"logits": self.head(y), "class": self.head(y).argmax(1)}


def two(model: nn.Module, x: Tensor, **options: object) -> tuple[fx.GraphModule, Program]:
    """The original graph over its own tensors, and a program whose graph may be broken."""
    import copy

    program = trace(model.eval(), (x,), **options)
    original = copy.deepcopy(program.graph_module)
    return original, program


def test_the_same_graph_passes() -> None:
    original, program = two(Net(), torch.randn(2, 3, 6, 6))
    result = verify(original, program.graph_module, program, folded_gm=program.graph_module)
    assert isinstance(result, Numerics)
    assert result.passed
    assert result.inputs >= 4
    assert result.error == result.own_error
    assert result.flips == 0
    record = result.to_dict()
    assert record["passed"]
    assert "relative error" in record["summary"]


def weight(gm: fx.GraphModule, name: str) -> Tensor:
    """A tensor of the candidate alone, to be broken."""
    path, _, attribute = name.rpartition(".")
    owner = gm.get_submodule(path)
    fresh = nn.Parameter(getattr(owner, attribute).detach().clone(), requires_grad=False)
    setattr(owner, attribute, fresh)
    return fresh


@pytest.mark.parametrize("size", [1e-4, 1.0])
def test_a_wrong_weight_fails_and_the_layer_is_named(size: float) -> None:
    original, program = two(Net(), torch.randn(2, 3, 6, 6))
    weight(program.graph_module, "body.0.weight").view(-1)[:] += size
    with pytest.raises(VerificationError) as caught:
        verify(original, program.graph_module, program, folded_gm=program.graph_module)
    text = str(caught.value)
    assert "conv2d_1 in module 'body.0'" in text
    assert "allowed" in text
    assert caught.value.layer is not None
    assert "conv2d_1" in caught.value.layer


def test_a_dropped_bias_fails() -> None:
    original, program = two(Net(), torch.randn(2, 3, 6, 6))
    weight(program.graph_module, "head.bias")[2] = 0
    with pytest.raises(VerificationError, match="linear"):
        verify(original, program.graph_module, program, folded_gm=program.graph_module)


def test_rewritten_nodes_are_compared_by_their_origin() -> None:
    original, program = two(Net(), torch.randn(2, 3, 6, 6))
    gm = program.graph_module
    old = next(n for n in gm.graph.nodes if n.name == "conv2d_1")
    with gm.graph.inserting_before(old):
        new = gm.graph.call_function(old.target, old.args, old.kwargs)
        new.meta["val"] = old.meta["val"]
        provenance.derive(new, [old], "some-rule")
    old.replace_all_uses_with(new)
    gm.graph.erase_node(old)
    gm.recompile()
    assert verify(original, gm, program, folded_gm=gm).passed
    weight(gm, "body.0.weight").mul_(1.01)
    with pytest.raises(VerificationError, match=r"'body\.0'"):
        verify(original, gm, program, folded_gm=gm)


def test_loss_after_folding_is_told_apart() -> None:
    original, program = two(Net(), torch.randn(2, 3, 6, 6))

    def backend(x: Tensor) -> dict[str, Tensor]:
        out = program.graph_module(x)
        return {**out, "logits": out["logits"] * 1.01}

    with pytest.raises(VerificationError, match="comes after folding"):
        verify(original, backend, program, folded_gm=program.graph_module)


def test_a_wrong_batch_size_is_seen() -> None:
    original, program = two(Does(lambda s, x: x * 2), torch.randn(2, 4))
    with pytest.raises(VerificationError, match=r"\[3, 4\]"):
        verify(original, lambda x: x * 2 if len(x) < 3 else x, program)


def test_a_crash_at_another_batch_size_is_seen() -> None:
    original, program = two(Does(lambda s, x: x * 2), torch.randn(2, 4))
    with pytest.raises(VerificationError, match="fails on inputs"):
        verify(original, lambda x: (x * 2).reshape(2, 4), program)


@pytest.mark.parametrize(
    ("candidate", "says"),
    [
        (lambda x: (x * 2,), "structure"),
        (lambda x: {"a": x * 2, "b": 1}, "'b'|is 1"),
        (lambda x: {"a": (x * 2).double(), "b": 3}, "float64"),
        (lambda x: {"a": (x * 2)[:, :1], "b": 3}, r"\[2, 1\]"),
    ],
)
def test_structure_shape_and_dtype(candidate: Callable, says: str) -> None:
    model = Does(lambda s, x: {"a": x * 2, "b": 3})
    original, program = two(model, torch.randn(2, 4))
    with pytest.raises(VerificationError, match=says):
        verify(original, candidate, program)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tolerance_follows_the_dtype(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).to(dtype)
    original, program = two(model, torch.randn(4, 16, dtype=dtype))
    result = verify(original, program.graph_module, program)
    assert result.passed
    assert result.error <= result.tolerance
    eps = torch.finfo(dtype).eps
    with pytest.raises(VerificationError):
        verify(original, lambda x: original(x) * (1 + 600 * eps) + 1e-10, program)


def test_tolerance_rule() -> None:
    eps = torch.finfo(torch.float32).eps
    assert tolerance(0.0, torch.float32) == 64 * eps
    assert tolerance(1e-3, torch.float32) == 4e-3
    assert tolerance(0.0, torch.bfloat16) == 8 * torch.finfo(torch.bfloat16).eps
    assert tolerance(0.0, torch.float64) == 1e-12
    assert tolerance(0.0, torch.int64) == 0.0


def test_a_better_candidate_passes_where_the_original_is_poor() -> None:
    model = Does(lambda s, x: (x.half() * s.g.half()).float() / 3, g=torch.rand(4) + 1)
    original, program = two(model, torch.randn(2, 4))
    result = verify(original, lambda x: (x.double() * model.g.double() / 3).float(), program)
    assert result.error < result.own_error


# --- NaN, infinities, zero ------------------------------------------------------------------------


def test_nan_patterns_must_match() -> None:
    model = Does(lambda s, x: x / s.d, d=torch.tensor([1.0, 0.0, 2.0, 3.0]))
    original, program = two(model, torch.tensor([[1.0, 0.0, 2.0, 1.0], [0.0, 1.0, 1.0, 1.0]]))
    assert verify(original, program.graph_module, program).passed
    with pytest.raises(VerificationError, match="NaN or infinite"):
        verify(original, lambda x: torch.nan_to_num(x / model.d), program)
    with pytest.raises(VerificationError, match="NaN or infinite"):
        verify(
            original, lambda x: (x / model.d).index_fill(1, torch.tensor([3]), torch.nan), program
        )


def test_nan_weights_pass_when_both_are_nan() -> None:
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight[0] = float("nan")
    original, program = two(model, torch.randn(2, 4))
    assert verify(original, program.graph_module, program).passed


def test_overflow_that_the_candidate_avoids_passes() -> None:
    model = Does(lambda s, x: (x * 60000 * 2) / 4)
    original, program = two(model, torch.ones(2, 4, dtype=torch.float16))
    assert verify(original, lambda x: x * 30000, program).passed


def test_zero_output() -> None:
    original, program = two(Does(lambda s, x: x - x), torch.randn(2, 4))
    assert verify(original, program.graph_module, program).passed
    with pytest.raises(VerificationError):
        verify(original, lambda x: x * 1e-3, program)


# --- integers -------------------------------------------------------------------------------------


def test_flips_within_rounding_are_reported() -> None:
    original, program = two(Does(lambda s, x: x.argmax(1)), torch.randn(2, 4))
    with torch.no_grad():
        tie = torch.zeros(2, 4)
    program.example[0][0].copy_(tie)

    def other_end(x: Tensor) -> Tensor:
        return 3 - x.flip(1).argmax(1)

    result = verify(original, other_end, program)
    assert result.flips > 0
    assert any("flipped" in note for note in result.notes)


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: x.argmax(1),
        lambda s, x: x.topk(2, 1).indices,
        lambda s, x: x > 0,
        lambda s, x: x.sort(1).indices,
        lambda s, x: (x * 10).long(),
    ],
)
def test_wrong_integers_fail(function: Callable) -> None:
    original, program = two(Does(function), torch.randn(2, 4))
    assert verify(original, program.graph_module, program).flips == 0
    with pytest.raises(VerificationError, match="differ"):
        verify(original, lambda x: program.graph_module(-x), program)
    gm = program.graph_module
    with pytest.raises(VerificationError, match="differ"):
        verify(original, lambda x: gm(-x), program, folded_gm=gm)


def test_flip_behind_agreeing_floats_is_explained_by_the_folded_graph() -> None:
    weights = torch.randn(4, 64)

    def function(s: Does, x: Tensor) -> Tensor:
        return (x @ s.w.T - (x.flip(1) @ s.w.flip(1).T)) > 0  # zero up to rounding

    original, program = two(Does(function, w=weights), torch.randn(8, 64))
    gm = program.graph_module
    difference = next(n for n in gm.graph.nodes if n.name == "sub")
    difference.args = (difference.args[1], difference.args[1])  # the same sum in one order: zero
    gm.recompile()
    result = verify(original, gm, program, folded_gm=gm)
    assert result.flips > 0

    def unrelated(x: Tensor) -> Tensor:
        return torch.ones(x.shape[0], 4, dtype=torch.bool)

    with pytest.raises(VerificationError, match="differ"):
        verify(original, unrelated, program, folded_gm=gm)


@pytest.mark.parametrize(("moved", "passes"), [(1e-7, True), (1e-3, False)])
def test_a_comparison_flips_within_rounding_of_its_threshold(moved: float, passes: bool) -> None:
    x = torch.linspace(-4, 4, 20000).view(2, -1)
    original, program = two(Does(lambda s, x: x * 3 - 1 > 0.3), x)

    def threshold(x: Tensor) -> Tensor:
        return x > 1.3 / 3 + moved

    program.example[0][0][:, 0] = 1.3 / 3 + 5e-8  # a number that lies between
    if passes:
        assert verify(original, threshold, program).flips > 0
    else:
        with pytest.raises(VerificationError, match="differ"):
            verify(original, threshold, program)


def test_integer_inputs_stay_in_the_examples_values() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3))
    original, program = two(model, torch.tensor([[1, 9, 3], [0, 2, 2]]))
    assert verify(original, program.graph_module, program).inputs >= 4


# --- what cannot be compared ----------------------------------------------------------------------


def test_random_numbers_are_said() -> None:
    original, program = two(Does(lambda s, x: x + torch.rand(4)), torch.randn(2, 4))
    result = verify(original, program.graph_module, program)
    assert result.inputs == 0
    assert "random" in result.notes[0]
    assert "not compared" in result.summary


@pytest.mark.parametrize(
    "model",
    [nn.LSTM(4, 5, 2, dropout=0.5, batch_first=True), nn.TransformerEncoderLayer(4, 2, 8)],
)
def test_dropout_that_is_off_does_not_draw(model: nn.Module) -> None:
    original, program = two(model, torch.randn(2, 3, 4))
    assert verify(original, program.graph_module, program).inputs >= 4


def test_candidate_with_a_state_of_its_own() -> None:
    model = Does(lambda s, x: (s.n.add_(1), x + s.n)[1], n=torch.zeros(4))
    original, program = two(model, torch.randn(2, 4))
    gm = program.graph_module
    assert verify(original, gm, program, folded_gm=gm).passed


def test_state_is_as_before() -> None:
    model = Does(lambda s, x: (s.n.add_(1), x + s.n)[1], n=torch.zeros(4))
    program = trace(model, (torch.randn(2, 4),))
    gm = program.graph_module
    assert verify(gm, gm, program, folded_gm=gm).passed
    assert float(gm(torch.zeros(2, 4))[0, 0]) == 1


def test_static_shapes_get_random_inputs() -> None:
    original, program = two(nn.Linear(4, 4), torch.randn(2, 4), dynamic_batch=False)
    seen: list[Tensor] = []

    def candidate(x: Tensor) -> Tensor:
        seen.append(x)
        return original(x)

    result = verify(original, candidate, program)
    assert result.inputs == len(seen) - 1 == 4
    assert all(x.shape == (2, 4) for x in seen)
    assert torch.equal(seen[0], seen[1])  # the example is called twice
    assert not torch.equal(seen[2], seen[3])
    low, high = float(seen[0].min()), float(seen[0].max())
    assert all(low <= float(x.min()) and float(x.max()) <= high for x in seen[1:])


def test_a_folded_layer_stands_for_what_it_took_in():
    """The layer that absorbed a batch norm has the norm's value; a layer above it has a new one."""
    from refold.graph import provenance
    from refold.passes.batch_norm.fold_batch_norm import FoldBatchNorm
    from tests.folding import Net, image, run

    net = Net(
        lambda s, x: s.b(torch.nn.functional.avg_pool2d(s.c(x), 2)) + s.e(s.d(x)).mean(),
        c=torch.nn.Conv2d(4, 4, 3), b=torch.nn.BatchNorm2d(4), d=torch.nn.Conv2d(4, 4, 3),
        e=torch.nn.BatchNorm2d(4),
    )  # fmt: skip
    gm, _ = run(FoldBatchNorm(), net, image())
    values = {n.name: provenance.value_of(n) for n in gm.graph.nodes}
    assert values["conv2d"] == ""
    assert values["avg_pool2d"] == "batch_norm"
    assert values["conv2d_1"] == "batch_norm_1"


def _lucky() -> tuple[fx.GraphModule, Program]:
    """A graph of large cancellations: exact on whole numbers, far off one rounding beside them."""
    model = Does(lambda s, x: (x * 4096 + 1) - x * 4096)
    return two(model, torch.arange(12, dtype=torch.float32).reshape(4, 3))


def test_the_original_s_conditioning_decides_where_its_own_run_was_lucky() -> None:
    original, program = _lucky()
    known = References()
    whole = program.example
    known.calls, known.exact = [whole], [original(*whole[0]).double()]
    known.own, known.nearby = [original(*whole[0])], [[]]
    assert torch.equal(known.own[0].double(), known.exact[0])

    def rounds_otherwise(x: Tensor) -> Tensor:
        return (x * (1 + 2**-23) * 4096 + 1) - x * 4096

    with pytest.raises(VerificationError):
        compare.verify(original, rounds_otherwise, known)
    add_nearby(original, known)
    assert compare.verify(original, rounds_otherwise, known).passed
    with pytest.raises(VerificationError):
        compare.verify(original, lambda x: rounds_otherwise(x) + 0.5, known)


def test_a_wrong_fold_is_refused_on_more_inputs_too() -> None:
    original, program = two(Net(), torch.randn(2, 3, 6, 6))
    gm = program.graph_module
    with torch.no_grad():
        gm.get_parameter("head.bias").add_(0.01)
    known = references(original, program)
    with pytest.raises(VerificationError):
        verify_widely(original, gm, program, known)


def test_other_sizes_than_the_batch_are_compared() -> None:
    class Pooled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.exp().mean((2, 3))

    dims = {"x": {0: torch.export.Dim("n"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}}
    program = trace(Pooled(), (torch.randn(2, 3, 8, 12),), {}, dynamic_shapes=dims)
    original = program.graph_module
    known = references(original, program)
    assert {tuple(call[0][0].shape[2:]) for call in known.calls} == {(8, 12), (4, 6)}
    with pytest.raises(VerificationError, match="4, 6"):  # right at the example's size alone
        compare.verify(original, lambda x: x.exp().sum((2, 3)) / 96, known)


def test_an_artifact_too_is_judged_on_more_inputs() -> None:
    original, program = two(Net(), torch.randn(2, 3, 6, 6))
    known = references(original, program)
    seen = []

    def candidate(x: Tensor) -> object:
        out = original(x)
        seen.append(x)
        first = len(seen) <= 2  # the first input is run twice
        return torch.utils._pytree.tree_map(lambda t: t + 1 if first else t, out)

    result, _ = verify_widely(original, candidate, program, known)
    assert result.passed
    assert result.inputs == MORE_RUNS


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("n", [4, 16])
def test_an_output_of_rounding_alone_has_no_scale_to_be_judged_by(
    n: int, dtype: torch.dtype
) -> None:
    """Each row of the weight sums to zero, and the input is constant: only rounding is left."""
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(n, n, generator=generator, dtype=torch.float64).to(dtype)

        def centred(s: nn.Module, x: Tensor) -> Tensor:
            rows = s.weight - s.weight.mean(1, keepdim=True)
            return nn.functional.linear(torch.ones_like(x) - 0.3, rows)

        original, program = two(Does(centred, weight=weight), torch.randn(2, n).to(dtype))
        known = references(original, program)
        rows = weight - weight.double().mean(1, keepdim=True).to(dtype)

        def folded(x: Tensor, rows: Tensor = rows) -> Tensor:
            return nn.functional.linear(torch.full_like(x, 0.7), rows)

        gm = fx.symbolic_trace(Does(lambda s, x: folded(x)))
        assert verify_widely(original, gm, program, known)[0].passed
        wrong = fx.symbolic_trace(Does(lambda s, x: folded(x) + 0.5))
        with pytest.raises(VerificationError):
            verify_widely(original, wrong, program, known)


def test_a_model_that_refuses_numbers_beside_its_own_is_judged_by_those_it_takes() -> None:
    def last(s: nn.Module, x: Tensor) -> Tensor:
        return x * s.table[s.at.ceil().long()]  # there is nothing behind the last one

    table, at = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0])
    original, program = two(Does(last, table=table, at=at), torch.randn(2, 4))
    assert constants.mutations(original.graph) == []
    wrong = fx.symbolic_trace(Does(lambda s, x: x * 3.1))
    with pytest.raises(VerificationError, match="the output"):
        verify_widely(original, wrong, program, references(original, program))
