"""Every ATen operator between layers: what passes do not know, they leave; they never crash on it.

A norm and a scale are put before and behind each operator, so that every pass tries to push
through it. The numbers are those of the original, in float64.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import refold
from refold.errors import FrontendError
from refold.fuzz.calls import OperatorCall, calls_of, operators
from tests.examples import few

# What rounding may do to a value that a few operators amplify, of the largest value; float64. A
# dropped bias, or a scale that went to another axis, is at least 1e-3.
_ROUNDING = 1e-9
_TOGETHER = 12  # calls that share a trace
_SHARDS = 12
# Operators of each family; the quick suite has them, ``-m slow`` has all.
_QUICK = re.compile(
    r"(adaptive_(max|avg)_pool[12]d|max_pool2d|avg_pool2d|max_pool2d_with_indices|_unique2|nonzero|"
    r"topk|sort|max|aminmax|var_mean|frexp|unbind|split|split_with_sizes|tensor_split|chunk|cat|"
    r"stack|hstack|einsum|matmul|dot|outer|mv|bmm|addmm|linear|conv2d|layer_norm|native_layer_norm|"
    r"group_norm|instance_norm|moveaxis|swapdims|rot90|flip|roll|repeat|repeat_interleave|expand|"
    r"unfold|as_strided|diagonal|tril|index|index_select|gather|scatter|index_add|masked_fill|"
    r"masked_select|where|reflection_pad2d|constant_pad_nd|sum|mean|amax|prod|cumsum|cummax|"
    r"pixel_shuffle|channel_shuffle|upsample_nearest2d|fft_rfft|view_as_real|complex|"
    r"clamp|relu|prelu|softmax|gelu|round|sign|gt|to|lerp|addcmul|addcdiv|pow|rsub|div|mul|add)"
)


class _Affine(nn.Module):
    """A scale and a shift for each channel: of axis 1 as a norm has them, else of the last."""

    def __init__(self, shape: Sequence[int], *, negative: bool) -> None:
        super().__init__()
        axis = 1 if len(shape) > 2 else -1
        size = shape[axis] if shape else 1
        full = [1] * len(shape)
        if shape:
            full[axis] = size
        scale = torch.linspace(0.5, 1.5, size)
        if negative:
            scale[0] = -0.75
        self.scale = nn.Parameter(scale.reshape(full))
        self.shift = nn.Parameter(torch.linspace(0.1, 0.4, size).reshape(full))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def _norm(shape: Sequence[int]) -> nn.Module:
    kinds = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    if len(shape) not in kinds or not shape[1]:
        return _Affine(shape, negative=True)
    norm = kinds[len(shape)](shape[1])
    norm.running_var.uniform_(0.5, 2)
    norm.running_mean.normal_()
    return norm


def _layer(shape: Sequence[int]) -> nn.Module:
    kinds = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
    if len(shape) in kinds and shape[1]:
        return kinds[len(shape)](shape[1], 4, 1)
    return nn.Linear(shape[-1], 4) if shape and shape[-1] else nn.Identity()


class _Between(nn.Module):
    """``norm(op(layer(x)))``, ``layer(op(norm(x)))`` and the two with a scale."""

    def __init__(self, call: OperatorCall) -> None:
        super().__init__()
        self.call = call
        self.before = nn.ModuleList([_layer(call.shape), _Affine(call.shape, negative=False)])
        self.behind = nn.ModuleList()
        (example,) = _inputs([call])
        for at, part in enumerate(self.double().before):
            made = pytree.tree_leaves(call(part(example)))
            makes = (_norm, _layer) if at == 0 else (_layer, _norm)
            self.behind.append(
                nn.ModuleList(
                    nn.ModuleList(make(v.shape) for make in makes if _is_float(v)) for v in made
                )
            )
        self.double().eval()

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for before, behind in zip(self.before, self.behind, strict=True):
            made = pytree.tree_leaves(self.call(before(x)))
            for value, parts in zip(made, behind, strict=True):
                found += [part(value) for part in parts] or [value * 2]
        return found


def _is_float(value: Tensor) -> bool:
    return value.dtype == torch.float64 and value.numel() > 0


class _Several(nn.Module):
    def __init__(self, calls: Sequence[OperatorCall]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(_Between(c) for c in calls)

    def forward(self, *xs: Tensor) -> list[list[Tensor]]:
        return [part(x) for part, x in zip(self.parts, xs, strict=True)]


def _inputs(calls: Sequence[OperatorCall]) -> tuple[Tensor, ...]:
    """Between 0.25 and 0.95, as the calls were tried: some ask for numbers between 0 and 1."""
    return tuple(torch.rand(c.shape, dtype=torch.float64) * 0.7 + 0.25 for c in calls)


def _is_quick(name: str) -> bool:
    return _QUICK.fullmatch(name.rpartition(".")[0]) is not None


def _compare(calls: Sequence[OperatorCall], *, dynamic: bool) -> None:
    """Compiles the calls as one program, unverified, and compares it with eager PyTorch."""
    torch.manual_seed(0)
    net, xs = _Several(calls), _inputs(calls)
    shapes = None if dynamic else (tuple({} for _ in xs),)
    done = refold.compile_for_inference(net, xs, verify=False, dynamic_shapes=shapes)
    assert str(done.report)
    with torch.no_grad():
        got, want = pytree.tree_leaves(done(*xs)), pytree.tree_leaves(net(*xs))
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        _assert_close(*(_real(v.resolve_conj().resolve_neg()) for v in (a, b)))


def _real(value: Tensor) -> Tensor:
    return (torch.view_as_real(value) if value.is_complex() else value).double()


def _assert_close(a: Tensor, b: Tensor) -> None:
    finite = b.isfinite()
    assert torch.equal(a.isfinite(), finite), "NaN or infinity in other places"
    if finite.any():
        scale = b[finite].abs().max().clamp_min(1e-3)
        error = float((a - b)[finite].abs().max() / scale)
        assert error <= _ROUNDING, f"relative error {error:.1e}"


def _sweep(calls: Sequence[OperatorCall], *, dynamic: bool = True) -> None:
    """Compares calls, those of one shape together; one by one where that fails, to name it."""
    faults = []
    by_shape = sorted(calls, key=lambda c: len(c.shape))
    for start in range(0, len(by_shape), _TOGETHER):
        group = by_shape[start : start + _TOGETHER]
        try:
            _compare(group, dynamic=dynamic)
            continue
        except Exception:  # of whichever call: each is tried by itself
            pass
        for call in group:
            try:
                _compare([call], dynamic=dynamic)
            except FrontendError:
                continue  # torch.export does not take it either
            except Exception as error:
                faults.append(
                    f"{call}: {type(error).__name__}: {' '.join(str(error).split())}"[:300]
                )
    assert not faults, "\n".join(faults)


_QUICK_SHARDS = 10


@pytest.mark.parametrize("shard", few(range(_QUICK_SHARDS), 1))
def test_operators_of_every_family(shard: int) -> None:
    names = [n for n in operators()[0] if _is_quick(n)]
    _sweep([c for n in names[shard::_QUICK_SHARDS] for c in calls_of(operators()[0][n])[:1]])


@pytest.mark.sweep
@pytest.mark.parametrize("shard", range(_SHARDS))
def test_every_operator(shard: int) -> None:
    _sweep([c for n in list(operators()[0])[shard::_SHARDS] for c in calls_of(operators()[0][n])])


@pytest.mark.sweep
@pytest.mark.parametrize("shard", range(_SHARDS))
def test_every_operator_of_fixed_sizes(shard: int) -> None:
    names = list(operators()[0])[shard::_SHARDS]
    _sweep([c for n in names for c in calls_of(operators()[0][n])[:1]], dynamic=False)


@pytest.mark.sweep
def test_nearly_every_operator_is_called() -> None:
    """What is left out says why; of the rest, eager PyTorch takes some guess of nearly each."""
    taken, left_out = operators()
    called = [n for n in taken if calls_of(taken[n])]
    assert len(called) >= 740, f"{len(called)} of {len(taken)}"
    assert all(left_out.values())
