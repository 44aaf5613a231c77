"""What all targets that run their artifact on the CPU have in common."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import refold
from refold.backends.registry import find_target
from refold.backends.tensorrt import artifact
from refold.cli import exit_codes
from refold.errors import BackendError
from tests.backends import runtimes
from tests.backends.quantised_nets import Int8Net
from tests.small_nets import ConvNet, seeded


@dataclass(frozen=True)
class Edge:
    """A target, what it needs, and what it says.

    Attributes:
        name: of the target.
        suffix: of its file.
        batch: of the examples.
        damaged: what the command line says of a file that is none.
        refused: what is said of a model in a dtype that the target does not list.
        beside: whether `make test-edge` runs it, with packages that lie beside the environment.
    """

    name: str
    suffix: str
    batch: int
    damaged: str = ""
    refused: str = ""
    beside: bool = True

    @property
    def param(self) -> Any:
        return pytest.param(self, id=self.name, marks=(pytest.mark.edge,) if self.beside else ())


EDGES = (
    Edge("ort-format", ".ort", 2, "ONNX Runtime cannot load", "try model.float()", beside=False),
    Edge("openvino", ".xml", 2, "OpenVINO cannot", "compile a float32 or float16", beside=False),
    Edge("executorch", ".pte", 2, "ExecuTorch cannot load"),
    Edge("litert", ".tflite", 2, "LiteRT cannot load", "try model.float()"),
    Edge("ncnn", ".param", 1, "ncnn cannot load", "convert the model with .float()"),
)
OTHERS = tuple(
    Edge(name, suffix, 1, beside=False)
    for name, suffix in (("torch", ".pt2"), ("onnx", ".onnx"), ("trt", ".trt"))
)

every_edge = pytest.mark.parametrize("edge", [e.param for e in EDGES])


@every_edge
def test_calls(edge: Edge) -> None:
    compiled, model, _ = runtimes.compile_net(edge.name, edge.batch)
    runtimes.check_calls(compiled, model, edge.batch)


@pytest.mark.slow
@every_edge
def test_folding_leaves_fewer_operators(edge: Edge) -> None:
    runtimes.check_residual(edge.name, edge.batch)


@pytest.mark.slow
@every_edge
@pytest.mark.parametrize("net", runtimes.NETS)
def test_numbers_of_small_networks(net: type[torch.nn.Module], edge: Edge) -> None:
    runtimes.check_numbers(net, edge.name, edge.batch)


@pytest.mark.slow
@every_edge
def test_strides_of_the_example_do_not_matter(edge: Edge) -> None:
    model = seeded(ConvNet())
    x = torch.randn(edge.batch, 3, 8, 8).to(memory_format=torch.channels_last)
    compiled = refold.compile_for_inference(model, x, target=edge.name)
    for given in (x, x.contiguous()):
        torch.testing.assert_close(compiled(given), model(given))


@pytest.mark.slow
@every_edge
def test_zero_pad_before_max_pool(edge: Edge) -> None:
    runtimes.check_zero_pad(edge.name, edge.batch)


@pytest.mark.slow
@pytest.mark.parametrize("edge", [e.param for e in EDGES[:3]])
def test_structure(edge: Edge) -> None:
    runtimes.check_structure(edge.name, edge.batch)


@pytest.mark.slow
@every_edge
def test_command_line_verifies_the_file(edge: Edge, run: Any, tmp_path: Path) -> None:
    net, path = "tests.small_nets:ConvNet", tmp_path / f"net{edge.suffix}"
    code, out, err = run(
        "export", net, "--shape", "1x3x8x8", "--target", edge.name, "-o", path, "--randomize-bn"
    )
    assert code == 0, err
    command = out.strip().splitlines()[-1].split("check it again: refold ")[1].split()
    code, out, err = run(*command)
    assert code == 0, err
    assert "relative error" in out
    code, _, err = run(*command, "--seed", 1)
    assert code == exit_codes.NUMBERS
    assert "from the float64 reference" in err
    path.write_bytes(b"no network" * 100)
    code, _, err = run(*command)
    assert code == exit_codes.ERROR
    assert edge.damaged in err


def compiled_net(target: str) -> refold.CompiledModel:
    options = {"build": False} if target == "trt" else {}
    x = torch.randn(1, 3, 8, 8)
    return refold.compile_for_inference(
        seeded(ConvNet()), x, target=target, verify=False, **options
    )


@pytest.mark.slow
@pytest.mark.parametrize("edge", [e.param for e in (*OTHERS, *EDGES)])
def test_full_disk(edge: Edge, tmp_path: Path) -> None:
    """torch's own writer would end the process."""
    compiled = compiled_net(edge.name)
    path = tmp_path / f"net{edge.suffix}"
    compiled.save(path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    most = max(map(len, before.values())) - 1
    with runtimes.small_files(most), pytest.raises(BackendError, match="nothing was written"):
        compiled.save(path, force=True)
    with runtimes.small_files(most), pytest.raises(BackendError, match="nothing was written"):
        compiled.save(tmp_path / f"other{edge.suffix}")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_two_writers_of_one_directory(tmp_path: Path) -> None:
    """Each finds a whole artifact, its own or the other's, or says that it wrote nothing."""
    compiled, path = compiled_net("trt"), tmp_path / "net.trt"
    compiled.save(path)
    start, told = threading.Barrier(2), []

    def write() -> None:
        for _ in range(20):
            start.wait()
            try:
                compiled.save(path, force=True)
            except BackendError as error:
                told.append(str(error))

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    artifact.read(path)
    assert all("nothing was written" in message for message in told)
    assert [p.name for p in tmp_path.iterdir()] == ["net.trt"]


@pytest.mark.slow
@every_edge
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_or_refused(edge: Edge, dtype: torch.dtype) -> None:
    model, x = seeded(ConvNet()).to(dtype), torch.randn(1, 3, 8, 8).to(dtype)
    taken = find_target(edge.name).capabilities.dtypes
    if str(dtype).removeprefix("torch.") not in taken:
        with pytest.raises(BackendError, match=re.escape(edge.refused)):
            refold.compile_for_inference(model, x, target=edge.name)
        return
    compiled = refold.compile_for_inference(model, x, target=edge.name)
    assert compiled.report.artifact_numerics["passed"]
    assert compiled(x).dtype == dtype


@pytest.mark.slow
@every_edge
def test_quantised_graph_is_compared_or_refused(edge: Edge) -> None:
    model, x = seeded(Int8Net()), torch.randn(1, 3, 8, 8)
    if edge.name in ("ort-format", "openvino"):
        compiled = refold.compile_for_inference(
            model, x, target=edge.name, expect={"batch-norm": 2}
        )
        assert compiled.report.artifact_numerics["error"] < 1e-6
        return
    with pytest.raises(BackendError, match="targets ort, openvino and trt take such graphs"):
        refold.compile_for_inference(model, x, target=edge.name)


@pytest.mark.edge
def test_fixed_shapes_of_executorch_are_not_named(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "net.pte"
    path.write_bytes(b"")
    code, _, err = run("verify", "tests.small_nets:ConvNet", path, "--shape", "1x3xH=8x8")
    assert code == exit_codes.USAGE
    assert "has fixed shapes: write them in --shape as numbers" in err


def test_what_can_be_verified_is_listed(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "net.mlpackage"
    path.write_bytes(b"")
    code, _, err = run("verify", "tests.small_nets:ConvNet", path, "--shape", "1x3x8x8")
    assert code == exit_codes.USAGE
    for suffix in (".pt2", ".onnx", *(e.suffix for e in EDGES), "trt target"):
        assert suffix in err
