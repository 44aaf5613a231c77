"""What every target that runs its artifact must keep, for the tests of each."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import refold
from tests.small_nets import ConvNet, PaddedMaxPool, Structured, assert_same, seeded

# Nothing of the builder's own folders may travel with an artifact.
_FOLDERS = (str(Path(__file__).parent).encode(), str(Path(torch.__file__).parents[1]).encode())


class Caller(nn.Module):
    """Gives ``Structured`` its keyword input by position."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = seeded(Structured())

    def forward(self, x, a, b):
        return self.inner(x, extra={"a": a, "b": b})


class Residual(nn.Module):
    """Two branches, a skip and a pooled head: what folding merges and runtimes fuse."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.wide_bn, self.point_bn = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.point = nn.Conv2d(4, 4, 1, bias=False)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        y = F.relu(self.wide_bn(self.wide(x)) + self.point_bn(self.point(x)))
        y = F.gelu(y + x).mean((2, 3))
        return self.head(self.norm(y))


class Gated(nn.Module):
    """What mobile networks are made of: layers a channel, hard gates, squeezed means, growth."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.wide_bn = nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.each = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False)
        self.each_bn = nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.grow, self.grow_bn = nn.ConvTranspose2d(8, 4, 2, stride=2), nn.BatchNorm2d(4)

    def forward(self, x):
        y = F.relu6(self.wide_bn(self.wide(x)))
        y = F.hardswish(self.each_bn(self.each(y)))
        gate = self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True))))
        return torch.cat([self.grow_bn(self.grow(y * F.hardsigmoid(gate))), F.silu(x)], 1)


class Attention(nn.Module):
    """A block of a transformer over the pixels of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.bn = nn.Conv2d(4, 8, 2, stride=2, bias=False), nn.BatchNorm2d(8)
        self.before, self.after = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        x = self.bn(self.patches(x)).flatten(2).transpose(1, 2)
        parts = self.qkv(self.before(x)).chunk(3, -1)
        q, k, v = (p.reshape(*p.shape[:2], 2, 4).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(self.after(x))))


NETS = (Residual, Gated, Attention)


def check_numbers(net: type[nn.Module], target: str, batch: int) -> refold.CompiledModel:
    """The artifact is judged by refold; here it is compared once more, with float64."""
    model, x = seeded(net()), torch.randn(batch, 4, 8, 8)
    compiled = refold.compile_for_inference(model, x, target=target)
    assert compiled.report.artifact_numerics["passed"]
    for _ in range(2):
        x = torch.randn(batch, 4, 8, 8)
        with torch.no_grad():
            want = copy.deepcopy(model).double()(x.double())
        torch.testing.assert_close(compiled(x).double(), want, rtol=1e-4, atol=1e-4)
    return compiled


def compile_net(target: str, batch: int, **options: Any):
    """A small folded network, its model and an input."""
    model, x = seeded(ConvNet()), torch.randn(batch, 3, 8, 8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    compiled = refold.compile_for_inference(
        model, x, target=target, expect={"batch-norm": 1}, **options
    )
    assert compiled.report.artifact_numerics["passed"]
    assert compiled.report.artifact_numerics["inputs"] >= 4
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    return compiled, model, x


def check_calls(compiled, model, batch: int) -> None:
    """Equal numbers for new inputs; a result is not overwritten by the next call."""
    inputs = [torch.randn(batch, 3, 8, 8) for _ in range(3)]
    gc.collect()
    results = [compiled(x) for x in inputs]
    for x, result in zip(inputs, results, strict=True):
        torch.testing.assert_close(result, model(x))


def check_residual(target: str, batch: int) -> None:
    """Folding leaves fewer operators and weights than the runtime's own fusions do."""
    model, x = seeded(Residual()), torch.randn(batch, 4, 8, 8)
    plain = refold.Pipeline("plain", ())
    unfolded = refold.compile_for_inference(model, x, target=target, pipeline=plain)
    folded = refold.compile_for_inference(model, x, target=target)
    after, before = folded.report.artifact, unfolded.report.artifact
    assert 0 < after["nodes"] < before["nodes"]
    assert 0 < after["bytes"] < before["bytes"]
    torch.testing.assert_close(folded(x), model(x))


def check_zero_pad(target: str, batch: int) -> None:
    """Everything is about -100: a border taken as -inf would show."""
    model, x = seeded(PaddedMaxPool()), torch.randn(batch, 2, 9, 9)
    compiled = refold.compile_for_inference(model, x, target=target)
    torch.testing.assert_close(compiled(x), model(x))


def check_structure(target: str, batch: int) -> None:
    """Nested results, constants and integers come back as the model gives them."""
    model = Caller().eval()
    inputs = (torch.randn(batch, 3, 8, 8), torch.randn(batch, 2), torch.randn(batch, 2))
    compiled = refold.compile_for_inference(model, inputs, target=target)
    assert_same(compiled(*inputs), model(*inputs))


@contextlib.contextmanager
def small_files(most: int) -> Iterator[None]:
    """No file may grow past some bytes, as on a disk that is full."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def check_files(folder: Path, names: set[str]) -> None:
    """Exactly these files, and none of them tells where it was made."""
    files = [f for f in folder.rglob("*") if f.is_file()]
    assert {f.relative_to(folder).as_posix() for f in files} == names
    for file in files:
        data = file.read_bytes()
        assert data
        assert not any(path in data for path in _FOLDERS)
