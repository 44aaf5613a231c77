"""Handing the layers of a graph to the kernel."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import refold
from refold import native
from refold.backends.pytorch.eager import constant_bytes
from refold.errors import VerificationError
from refold.native.check import rounding
from refold.native.interface import KernelLibrary
from refold.native.layer import multiply
from tests.native.layers import EXACT, LOOKUP, Layer, activations, layer, relative


class Planes(nn.Module):
    """Two layers of binary planes, the second read twice."""

    def __init__(self, first: Layer, second: Layer) -> None:
        super().__init__()
        self.groups = (first.group_size, second.group_size)
        for name, of in (("first", first), ("second", second)):
            self.register_buffer(f"{name}_planes", of.planes)
            self.register_buffer(f"{name}_alpha", of.alpha)
        self.bias = nn.Parameter(torch.randn(first.planes.shape[1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        call = torch.ops.refold.bcq_linear
        x = torch.relu(call(x, self.first_planes, self.first_alpha, self.bias, self.groups[0]))
        for _ in range(2):
            x = call(x, self.second_planes, self.second_alpha, None, self.groups[1])
        return x


def model(dtype: torch.dtype = torch.float16, q: int = 3) -> Planes:
    first = layer(q, 128, 192, 64, dtype=dtype)
    second = layer(q, 128, 128, 64, uniform=True, dtype=dtype, seed=5)
    return Planes(first, second).eval().requires_grad_(False)


def called(gm: torch.fx.GraphModule) -> list[str]:
    return [str(n.target) for n in gm.graph.nodes if "refold.bcq" in str(n.target)]


@pytest.mark.parametrize(("exact", "limit"), [(True, 2 * EXACT), (False, 2 * LOOKUP)])
def test_layers_run_on_the_kernel(kernel: KernelLibrary, exact: bool, limit: float) -> None:
    net, x = model(), activations(3, 192)
    compiled = refold.compile_for_inference(net, (x,), exact=exact)
    assert called(compiled.graph_module) == ["refold.bcq_linear_packed.default"] * 3
    double = deepcopy(net).double()
    for batch in (1, 3, 40):
        x = activations(batch, 192, seed=batch)
        assert relative(compiled(x), double(x.double())) <= limit
    note = next(n for n in compiled.report.notes if "native kernel" in n)
    assert "3 layers" in note
    assert kernel.isas[-1] in note
    assert compiled.report.artifact_numerics["passed"]


@pytest.mark.slow
def test_compiled_layers_run_on_the_kernel(kernel: KernelLibrary) -> None:
    net = model()
    compiled = refold.compile_for_inference(net, (activations(3, 192),), target="inductor")
    assert called(compiled.graph_module) == ["refold.bcq_linear_packed.default"] * 3
    assert any("3 layers" in n and "on the native kernel" in n for n in compiled.report.notes)
    assert compiled.report.artifact_numerics["passed"]
    double = deepcopy(net).double()
    for batch in (1, 3, 40):
        x = activations(batch, 192, seed=batch)
        assert relative(compiled(x), double(x.double())) <= 2 * EXACT


@pytest.mark.slow
def test_a_package_runs_where_the_operator_is_known(kernel: KernelLibrary, tmp_path: Path) -> None:
    net, x = model(), activations(3, 192)
    compiled = refold.compile_for_inference(net, (x,), target="aoti")
    assert called(compiled.graph_module) == ["refold.bcq_linear_packed.default"] * 3
    assert any("import refold.native.op" in n for n in compiled.report.notes)
    torch.save((x, compiled(x)), tmp_path / "pair.pt")
    script = """
import sys, torch, refold.native.op
x, y = torch.load(sys.argv[2])
assert torch.equal(torch._inductor.aoti_load_package(sys.argv[1])(x), y)
"""
    saved = compiled.save(tmp_path / "net.pt2")
    subprocess.run(
        [sys.executable, "-c", script, str(saved), str(tmp_path / "pair.pt")], check=True
    )


def test_planes_are_kept_once(kernel: KernelLibrary) -> None:
    net = model()
    bits = 3 * 128 * (192 + 128)
    scales = 16 * 128 * (3 * 3 + 1 * 2)
    compiled = refold.compile_for_inference(net, (activations(3, 192),))
    assert constant_bytes(compiled.graph_module) == (bits + scales) // 8 + net.bias.nbytes
    assert compiled.report.artifact["bytes"] == (bits + scales) // 8 + net.bias.nbytes


@pytest.mark.parametrize(("q", "uniform", "least"), [(2, True, 14.5), (3, True, 9), (3, False, 9)])
def test_how_much_smaller_than_float32(q: int, uniform: bool, least: float) -> None:
    packed = layer(q, 256, 4096, 128, uniform=uniform, dtype=torch.float16).packed
    assert 4 * 256 * 4096 / (packed.planes.nbytes + packed.scales.nbytes) >= least


def test_origins_reach_the_lowered_weights(kernel: KernelLibrary) -> None:
    compiled = refold.compile_for_inference(model(), (activations(3, 192),))
    origins = compiled.state_dict_map()
    read = {key for entry in origins.values() for key in entry["from"]}
    assert {"first_planes", "first_alpha", "second_planes", "second_alpha"} <= read


def test_without_the_kernel_the_report_warns(
    kernel: KernelLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(native.OFF, "0")
    net, x = model(), activations(3, 192)
    compiled = refold.compile_for_inference(net, (x,))
    assert called(compiled.graph_module) == ["refold.bcq_linear.default"] * 3
    assert any("slowly" in n and native.OFF in n for n in compiled.report.notes)
    assert relative(compiled(x), net(x)) <= EXACT


@pytest.mark.parametrize("case", ["float64 scales", "five planes"])
def test_what_the_kernel_does_not_take_stays(kernel: KernelLibrary, case: str) -> None:
    net = model(q=5) if case == "five planes" else model(torch.float64)
    x = activations(3, 192)
    compiled = refold.compile_for_inference(net, (x,))
    assert called(compiled.graph_module) == ["refold.bcq_linear.default"] * 3
    assert any("3 layers" in n and "without the native kernel" in n for n in compiled.report.notes)
    assert relative(compiled(x), net(x)) <= EXACT


def test_other_graphs_are_left_alone(kernel: KernelLibrary) -> None:
    compiled = refold.compile_for_inference(nn.Linear(4, 4), (activations(2, 4),))
    assert not any("native" in n for n in compiled.report.notes)


def test_a_saved_program_runs_with_and_without_the_kernel(
    kernel: KernelLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = model(), activations(3, 192)
    path = refold.compile_for_inference(net, (x,), verify=False).save(tmp_path / "net.pt2")
    again = refold.compile_for_inference(path)
    assert relative(again(x), net(x)) <= 2 * EXACT
    assert any("3 layers" in n and "on the native kernel" in n for n in again.report.notes)
    monkeypatch.setenv(native.OFF, "0")
    without = refold.compile_for_inference(path)
    assert relative(without(x), net(x)) <= 2 * EXACT
    assert any("3 layers" in n and "slowly" in n for n in without.report.notes)


def test_sums_of_8_bits_are_judged_by_what_rounding_explains(kernel: KernelLibrary) -> None:
    net, x = model(), activations(3, 192)
    compiled = refold.compile_for_inference(net, (x,), exact=False)
    numbers = compiled.report.artifact_numerics
    assert numbers["passed"]
    # four times what a run with such noise is off, whatever the kernel returned
    assert EXACT < numbers["error"] < 2 * LOOKUP
    assert numbers["error"] <= numbers["tolerance"] < 6 * LOOKUP
    assert any("8-bit sums cost at most" in n for n in compiled.report.notes)


@pytest.mark.parametrize(("exact", "factor"), [(True, 1.001), (False, 1.05)])
def test_a_wrong_kernel_does_not_pass(
    kernel: KernelLibrary, monkeypatch: pytest.MonkeyPatch, exact: bool, factor: float
) -> None:
    right = KernelLibrary.multiply

    def wrong(self: KernelLibrary, *args: Any, exact: bool, isa: str | None = None) -> Any:
        return right(self, *args, exact=exact, isa=isa) * (1 if exact else factor)

    def wrong_alike(self: KernelLibrary, *args: Any, exact: bool, isa: str | None = None) -> Any:
        return right(self, *args, exact=exact, isa=isa) * factor

    monkeypatch.setattr(KernelLibrary, "multiply", wrong_alike if exact else wrong)
    with pytest.raises(VerificationError):
        refold.compile_for_inference(model(), (activations(3, 192),), exact=exact)


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize(("features", "group_size"), [(200, 64), (264, 24), (100, 128), (512, 128)])
def test_rounding_bounds_every_output(
    kernel: KernelLibrary, features: int, group_size: int, uniform: bool
) -> None:
    of, x = layer(3, 70, features, group_size, uniform=uniform), activations(5, features)
    got = multiply(kernel, x, of.packed, exact=False)
    bound = rounding(x, of.packed)
    assert ((got - of.reference(x)).abs() <= bound * 1.001).all()
    # It is a bound of the worst case, and not one that anything fulfils.
    assert (bound < 12 * of.reference(x).abs().mean()).all()


@pytest.mark.slow
def test_a_saved_program_loads_where_nothing_was_imported(
    kernel: KernelLibrary, tmp_path: Path
) -> None:
    net, x = model(), activations(3, 192)
    path = refold.compile_for_inference(net, (x,), verify=False).save(tmp_path / "net.pt2")
    torch.save((x, net(x)), tmp_path / "expected.pt")
    script = (
        "import sys, torch, refold\n"
        "x, expected = torch.load(sys.argv[2])\n"
        "got = refold.compile_for_inference(sys.argv[1], verify=False)(x)\n"
        "assert (got - expected).norm() <= 1e-5 * expected.norm()\n"
    )
    command = [sys.executable, "-c", script, str(path), str(tmp_path / "expected.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
