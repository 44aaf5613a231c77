"""Programs off the beaten track: what no layer of a network does still compiles, and stays right.

Sizes that depend on data, operators with several results, numbers instead of tensors, axes that
broadcast or are skipped, layers of no width. The numbers are those of eager PyTorch in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import refold
from tests.compare import EXACT, call, relative_error
from tests.examples import few
from tests.folding import left, randomise_norms

R = torch.randn


class _Net(nn.Module):
    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and part.is_floating_point():
                part = nn.Parameter(part, requires_grad=False)
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        randomise_norms(self)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.data.abs_().add_(0.1)  # positive: it may pass a max pool
        self.double().eval()

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(self, *args)


def _compiled(net: nn.Module, *xs: torch.Tensor, batches: tuple[int, ...] = (3,)) -> Any:
    """Compiles and verifies; compares at the traced batch and at others."""
    done = refold.compile_for_inference(deepcopy(net), xs)
    assert str(done.report)
    for batch in (xs[0].shape[0], *batches):
        probe = tuple(R(batch, *x.shape[1:], dtype=x.dtype) for x in xs)
        error = relative_error(call(done, probe), call(net, probe))
        assert error <= EXACT, f"relative error {error:.1e}\n{done.graph_module.graph}"
    return done


MASK = torch.tensor([True, False] * 4)


def _grid(size: int = 9) -> torch.Tensor:
    return R(2, 3, size, size, dtype=torch.float64)


def _rows(*shape: int) -> torch.Tensor:
    return R(*(shape or (5, 8)), dtype=torch.float64)


DATA_DEPENDENT = {
    "rows by a mask": lambda s, x: s.l(x) @ x[x[:, 0] > 0].t(),
    "a norm behind": lambda s, x: s.n(s.l(x[x[:, 0] > 0])) * s.g + s.g,
    "nonzero": lambda s, x: s.l(x[torch.nonzero(x[:, 1] > 0).squeeze(1)]) * s.g,
    "masked select": lambda s, x: torch.masked_select(s.l(x), x > 0) * 2.0 + 1.0,
    "unique": lambda s, x: s.l(torch.unique(x.round(), dim=0)) * s.g,
    "repeated": lambda s, x: (s.l(x.repeat_interleave((x[:, 0] > 0).long() + 1, 0)) * s.g).sum(0),
    "a sum of two": lambda s, x: s.l(x[x[:, 0] > 0]) + s.l(x[x[:, 0] > 0]) * s.g,
    "concatenated": lambda s, x: torch.cat([s.l(x), s.l(x[x[:, 0] > 0])]) * s.g,
    "a column": lambda s, x: x[:, x[0] > 0].mean(1, keepdim=True) * s.l(x),
    "reshaped": lambda s, x: s.l(x[x[:, 0] > 0]).reshape(-1, 2, 4).transpose(1, 2) * 3.0,
    "softmax and matmul": lambda s, x: (x @ x[x[:, 0] > 0].t()).softmax(-1) @ s.l(
        x[x[:, 0] > 0]
    ),
    "where": lambda s, x: s.l(x) + torch.where(x > 0)[0].numel(),
    "split": lambda s, x: torch.cat([p * 2.0 for p in s.l(x[x[:, 0] > 0]).chunk(2, -1)], 1) * s.g,
    "as weights": lambda s, x: F.linear(s.l(x), x[x[:, 0] > 0]) * 2.0,
    "stacked": lambda s, x: torch.stack([x[x[:, 0] > 0]] * 2, 1).mean(1) @ s.l.weight,
}  # fmt: skip


@pytest.mark.parametrize("name", few(DATA_DEPENDENT, 8))
def test_sizes_that_depend_on_data(name: str) -> None:
    net = _Net(DATA_DEPENDENT[name], l=nn.Linear(8, 8), n=nn.LayerNorm(8), g=R(8))
    done = refold.compile_for_inference(deepcopy(net), _rows())
    for _ in range(3):
        x = _rows()
        assert relative_error(call(done, (x,)), call(net, (x,))) <= EXACT


SEVERAL = {
    "adaptive_max_pool2d": (4, lambda x: F.adaptive_max_pool2d(x, 2)),
    "max_pool2d with its indices": (4, lambda x: F.max_pool2d(x, 2, return_indices=True)[0]),
    "both of a max pool": (4, lambda x: F.max_pool2d(x, 2, return_indices=True)),
    "adaptive_max_pool1d": (3, lambda x: F.adaptive_max_pool1d(x, 2)),
    "adaptive_max_pool3d": (5, lambda x: F.adaptive_max_pool3d(x, 2)),
    "max of an axis": (4, lambda x: x.max(-1)),
    "values of max": (4, lambda x: x.max(-1).values),
    "median": (4, lambda x: x.median(-1)[0]),
    "topk": (4, lambda x: x.topk(2, 1)[0]),
    "sort": (4, lambda x: x.sort(1)),
    "kthvalue": (4, lambda x: x.kthvalue(2, 2)[0]),
    "aminmax": (4, lambda x: torch.aminmax(x, dim=1)),
    "var_mean": (4, lambda x: torch.var_mean(x, 1)),
    "frexp": (4, lambda x: torch.frexp(x)),
    "cummax": (4, lambda x: x.cummax(-1)[0]),
    "unbind": (4, lambda x: x.unbind(1)),
    "split": (4, lambda x: x.split(2, 1)),
    "tensor_split": (4, lambda x: torch.tensor_split(x, 3, 1)[0]),
    "layer norm with its statistics": (
        3, lambda x: torch.native_layer_norm(x, x.shape[-1:], None, None, 1e-5)
    ),
    "slogdet": (4, lambda x: torch.linalg.slogdet(x[..., :4, :4])),
    "std_mean": (4, lambda x: torch.std_mean(x, (2, 3))),
    "meshgrid": (3, lambda x: torch.meshgrid(x[0, 0], x[0, 1], indexing="ij")),
}  # fmt: skip


def _tensors(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value)


@pytest.mark.parametrize("name", few(SEVERAL, 11))
def test_operators_with_several_results(name: str) -> None:
    """Between a layer with a norm and a scale, so that both directions are tried."""
    rank, operator = SEVERAL[name]
    conv = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[rank]
    norm = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[rank]

    def forward(s: Any, x: torch.Tensor) -> Any:
        up = [v * 1.5 + 0.5 for v in _tensors(operator(s.c(x)))]
        down = [v * 1.5 for v in _tensors(operator(s.n(x.relu())))]
        return up, down

    _compiled(_Net(forward, c=conv(3, 4, 1), n=norm(3)), R(2, 3, *(6,) * (rank - 2)).double())


def test_a_norm_passes_a_max_pool_that_has_two_results() -> None:
    down = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8))
    net = _Net(
        lambda s, x: s.b(s.a(x)), a=nn.Sequential(*down, nn.AdaptiveMaxPool2d(2)),
        b=nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    assert "batch-norm" not in left(_compiled(net, _grid()).graph_module)
    up = _Net(lambda s, x: s.n(s.p(s.c(x))), c=nn.Conv2d(3, 8, 3), p=nn.AdaptiveMaxPool2d(2),
              n=nn.BatchNorm2d(8))  # fmt: skip
    assert "batch-norm" not in left(_compiled(up, _grid()).graph_module)


def test_a_norm_stays_where_the_places_of_a_max_pool_are_read() -> None:
    net = _Net(
        lambda s, x: [s.n(v) if v.is_floating_point() else v
                      for v in F.max_pool2d(s.c(x), 2, return_indices=True)],
        c=nn.Conv2d(3, 4, 3), n=nn.BatchNorm2d(4),
    )  # fmt: skip
    assert left(_compiled(net, _grid()).graph_module)["batch-norm"] == 1


NUMBERS = {
    "a product of two": lambda s, x: s.l(x).amax() * s.l(x).mean() + x.sum() * x.amin(),
    "a matrix times a number": lambda s, x: (s.l(x) * x.mean()) * s.g + x.sum(),
    "a dot product": lambda s, x: torch.dot(s.l(x)[0], x[1]) * s.g,
    "two vectors": lambda s, x: (s.l(x)[0] @ x[1]) * 2.0 + 1.0,
    "a vector times a matrix": lambda s, x: (x[0] @ s.l.weight) * s.g,
    "a matrix times a vector": lambda s, x: (s.l(x) @ s.g) * 2.0,
    "a stack of matrices": lambda s, x: (s.l(x).reshape(-1, 2, 4) @ s.g.reshape(4, 2)) * 3.0,
    "a linear of a vector": lambda s, x: s.l(x[0]) * s.g + s.g,
    "an outer product": lambda s, x: torch.outer(s.l(x)[0], x[1]) * s.g,
    "a bilinear form": lambda s, x: torch.einsum("bi,ij,bj->b", x, s.l.weight, x) * 2.0,
    "a sum as output": lambda s, x: s.l(x).sum(),
    "numbers joined": lambda s, x: torch.stack([s.l(x).sum(), x.mean(), x.amax() * 2.0]) * 0.5,
    "a scalar of the model": lambda s, x: s.l(x) * s.one + s.one * s.one,
    "gates of numbers": lambda s, x: s.l(x).mean() * x.amax() + s.l(x).amax() * x.mean() + 1.0,
}  # fmt: skip


@pytest.mark.parametrize("name", few(NUMBERS, 7))
def test_products_of_every_rank(name: str) -> None:
    net = _Net(NUMBERS[name], l=nn.Linear(8, 8), g=R(8), one=torch.tensor(0.5))
    _compiled(net, _rows())


EINSUMS = {
    "an axis of size 1 against four": ("bti,io->bto", (5, 1), (4, 3)),
    "four against an axis of size 1": ("bti,io->bto", (5, 4), (1, 3)),
    "the other way round": ("bti,oi->bto", (5, 1), (3, 4)),
    "experts that broadcast": ("bti,eio->bteo", (5, 1), (2, 4, 3)),
    "groups": ("btgi,gio->btgo", (5, 1, 4), (2, 4, 3)),
    "an ellipsis": ("...i,io->...o", (5, 1), (4, 3)),
    "a label that is summed away": ("bti,jo->bto", (5, 4), (2, 3)),
    "a label of one operand alone": ("bti,io->bo", (5, 4), (4, 3)),
    "no result": ("bti,io", (5, 4), (4, 3)),
    "a diagonal": ("btii,io->bto", (5, 4, 4), (4, 3)),
    "a scalar": ("bti,io->", (5, 4), (4, 3)),
    "experts weighed": ("bte,e->bt", (5, 1), (4,)),
    "spaces": ("b t i, i o -> b t o", (5, 1), (4, 3)),
}


@pytest.mark.parametrize("name", few(EINSUMS, 7))
def test_einsums_that_broadcast_or_skip(name: str) -> None:
    equation, data, weight = EINSUMS[name]

    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        first = torch.einsum(equation, x, s.w) * s.g
        return torch.relu(first) + torch.einsum(equation, x * 2.0, s.v)

    net = _Net(forward, w=R(weight), v=R(weight), g=torch.tensor(0.5))
    _compiled(net, R(2, *data, dtype=torch.float64))


JOINED = {
    "one tensor twice": lambda s, x: torch.cat([s.l(x), s.l(x)], 1) * 2.0,
    "a call's result twice": lambda s, x: s.m(torch.cat([y := s.l(x), y], 1)),
    "an empty vector": lambda s, x: torch.cat([s.l(x), s.none], 1) * s.g,
    "an empty vector first": lambda s, x: torch.cat([s.none, s.l(x)]) * s.g,
    "empty columns": lambda s, x: torch.cat([s.l(x), x[:, :0]], 1) * s.g,
    "one entry": lambda s, x: torch.cat([s.l(x)], 1) * s.g + s.g,
    "a stack of one tensor": lambda s, x: torch.stack([y := s.l(x), y, x], 1).sum(1) * s.g,
    "a sum with itself": lambda s, x: (y := s.l(x)) + y * s.g + y,
    "a constant twice": lambda s, x: torch.cat([s.l(x), s.g.expand_as(x), s.g.expand_as(x)]) * 2.0,
}


@pytest.mark.parametrize("name", JOINED)
def test_joined_tensors(name: str) -> None:
    net = _Net(JOINED[name], l=nn.Linear(8, 8), m=nn.Linear(16, 8), g=R(8), none=torch.zeros(0))
    _compiled(net, _rows())


@pytest.mark.parametrize("shape", [(2, 0), (0, 0), (8, 0)])
def test_linears_of_no_width(shape: tuple[int, int]) -> None:
    inner, width = shape
    net = _Net(
        lambda s, x: s.c(torch.relu(s.a(x) * s.g)) * s.h + s.h,
        a=nn.Linear(inner, width), c=nn.Linear(width, 4), g=R(width), h=R(4),
    )  # fmt: skip
    _compiled(net, _rows(3, inner))


def test_layers_of_no_width_stay_apart() -> None:
    """Empty weights have no memory that would tell them from each other."""
    net = _Net(
        lambda s, x: s.b(s.a(x)) + s.d(torch.relu(s.c(x))), a=nn.Linear(2, 0), b=nn.Linear(0, 4),
        c=nn.Linear(2, 0), d=nn.Linear(0, 4),
    )  # fmt: skip
    _compiled(net, _rows(3, 2))


EMPTY = {
    "no channels": lambda s, x: torch.cat([s.c(x), s.c(x)[:, :0]], 1) * s.g,
    "no channels kept": lambda s, x: s.c(x)[:, :0] * 2.0 + 1.0,
    "no rows": lambda s, x: s.n(s.c(x))[:, :, :0] * s.g,
    "a sum of none": lambda s, x: s.n(s.c(x)).mean((2, 3)) + s.c(x)[:, :, :0].sum((2, 3)),
    "the shuffle of none": lambda s, x: (s.c(x)[:, :0] * 3.0).permute(0, 2, 3, 1).flatten(1),
}


@pytest.mark.parametrize("name", EMPTY)
def test_tensors_of_no_elements(name: str) -> None:
    net = _Net(EMPTY[name], c=nn.Conv2d(3, 4, 1), n=nn.BatchNorm2d(4), g=R(4, 1, 1))
    _compiled(net, _grid())


KINDS = {
    "a mask": lambda s, x: (s.l(x) * s.g > 0, x),
    "a count": lambda s, x: ((s.l(x) * s.g > 0).sum(), x.argmax(1)),
    "complex numbers": lambda s, x: torch.fft.rfft(s.l(x) * s.g),
    "complex inside": lambda s, x: torch.view_as_real(torch.fft.fft(s.l(x)) * s.g).sum(-1),
    "the absolute of complex": lambda s, x: torch.fft.rfft(s.l(x)).abs() * 2.0,
    "nothing beside": lambda s, x: (s.l(x) * s.g, None),
    "a number beside": lambda s, x: (s.l(x) * s.g, 3, {"a": x * 2.0, "b": True}),
    "integers": lambda s, x: (x.long() * 2 + 1, (s.l(x) * s.g).int()),
}


@pytest.mark.parametrize("name", KINDS)
def test_outputs_of_every_kind(name: str) -> None:
    net = _Net(KINDS[name], l=nn.Linear(8, 8), g=R(8))
    done, x = refold.compile_for_inference(deepcopy(net), _rows()), _rows()
    got, want = call(done, (x,)), call(net, (x,))
    assert torch.utils._pytree.tree_structure(got) == torch.utils._pytree.tree_structure(want)
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, (got, want)), strict=True):
        if isinstance(b, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        else:
            assert a == b


@pytest.mark.parametrize(
    ("formula", "words"),
    [
        (lambda s, x: s.b(torch.moveaxis(s.c(x), 1, 1)), "moveaxis"),
        (lambda s, x: s.b(torch.tril(s.c(x))), "tril"),
        (lambda s, x: s.b(s.c(x).cumsum(2)), "cumsum"),
        (lambda s, x: s.b(torch.fft.fft(s.c(x)).real), "real"),
        (lambda s, x: s.b(torch.rot90(s.c(x), 2, (2, 3))), "rot90"),
        (lambda s, x: s.b(F.fold(s.c(x).flatten(2)[:, :, :4], 2, 1)), "col2im"),
    ],
)
def test_what_is_not_known_is_not_called_nonlinear(formula: Any, words: str) -> None:
    channels = 4
    net = _Net(formula, c=nn.Conv2d(3, channels, 1), b=nn.BatchNorm2d(channels))
    reasons = [d.reason for d in _compiled(net, _grid(4)).report.declined]
    assert not any(f"{words} is not linear" in r for r in reasons), reasons


def test_what_is_nonlinear_is_called_so() -> None:
    net = _Net(lambda s, x: s.b(s.c(x).sigmoid()), c=nn.Conv2d(3, 4, 1), b=nn.BatchNorm2d(4))
    reasons = [d.reason for d in _compiled(net, _grid(4)).report.declined]
    assert any("sigmoid is not linear in its input" in r for r in reasons), reasons


def test_a_scale_along_a_padded_axis_is_padded_too() -> None:
    net = _Net(lambda s, x: s.m(F.pad(x * s.g, (1, 1))), m=nn.Linear(10, 4), g=R(8))
    assert left(_compiled(net, _rows()).graph_module) == {"pad": 1, "linear": 1}


def test_a_scale_passes_a_reader_that_takes_nothing() -> None:
    net = _Net(
        lambda s, x: s.l(y := x.sigmoid() * s.g) + y.tile(1, 0).sum(1, keepdim=True),
        l=nn.Linear(8, 8), g=R(8),
    )  # fmt: skip
    assert "mul" not in left(_compiled(net, _rows()).graph_module)


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: x.sum().mean(0),
        lambda s, x: x.sum().mean(0) + x.mean(),
        lambda s, x: x.sum().transpose(0, -1) * 2,
        lambda s, x: torch.stack([x.sum(), x.mean()]).mean(0),
        lambda s, x: torch.repeat_interleave(torch.tensor([1, 0, 2]), output_size=3) + x.sum(),
        lambda s, x: torch.repeat_interleave(x.long(), output_size=4),
    ],
)
def test_numbers_and_counts_are_no_internal_error(forward: Any) -> None:
    x = torch.tensor([1.0, 2.0, 1.0, 0.0]).double()
    compiled = refold.compile_for_inference(_Net(forward), x, target="torch")
    assert not any(d.failed for d in compiled.report.declined)
    torch.testing.assert_close(compiled(x), forward(None, x))
