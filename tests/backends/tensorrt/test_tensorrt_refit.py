"""Engines for other weights: what is checked before a library is asked. No engine is made here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import refold
from refold.backends.tensorrt import artifact, library
from refold.backends.tensorrt.refit import difference, refit
from refold.backends.tensorrt.target import TensorRTOptions
from refold.errors import BackendError, UsageError
from tests.small_nets import ConvNet, seeded

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def written(folder: Path, model: nn.Module, **options: Any) -> Path:
    given = {"refittable": True, "build": False, **options}
    x = torch.randn(2, 3, 8, 8)
    return refold.compile_for_inference(model, x, target="trt", **given).save(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("refit") / "base.trt", seeded(ConvNet(), 0))


def told(folder: Path, base: Path) -> str:
    return difference(folder, artifact.read(folder), base, artifact.read(base))


@pytest.mark.slow
def test_other_weights_are_no_difference(base: Path, tmp_path: Path) -> None:
    other = written(tmp_path / "other.trt", seeded(ConvNet(), 1))
    files = [(path / artifact.MODEL).read_bytes() for path in (base, other)]
    assert files[0] != files[1]
    assert told(other, base) == ""
    build = artifact.read(base)
    assert build.flags == {"TF32": False, "REFIT": True}
    assert " --refit " in build.trtexec["11"]


class Wider(ConvNet):
    """Another stride of the convolution: the same weights, another graph."""

    def __init__(self) -> None:
        super().__init__()
        self.conv.stride = (2, 2)


@pytest.mark.slow
def test_another_graph_is_built_anew(base: Path, tmp_path: Path) -> None:
    other = written(tmp_path / "other.trt", seeded(Wider()))
    assert told(other, base) == "their graphs"
    with pytest.raises(UsageError, match=r"differ in their graphs: run refold build .*other\.trt"):
        refit(other, base)


@pytest.mark.parametrize(("dtype", "found"), [("INT64", "their graphs"), ("FLOAT", "")])
def test_integers_are_part_of_the_graph(dtype: str, found: str, base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.trt"
    shutil.copytree(base, other)
    model = onnx.load(other / artifact.MODEL)
    kind = getattr(onnx.TensorProto, dtype)
    constant = next(i for i in model.graph.initializer if i.data_type == kind)
    value = onnx.numpy_helper.to_array(constant)
    constant.CopyFrom(onnx.numpy_helper.from_array(value + 1, constant.name))
    onnx.save(model, other / artifact.MODEL)
    data = json.loads((other / artifact.MARKER).read_text())
    artifact.write_json(other / artifact.MARKER, {**data, "files": artifact.describe_files(other)})
    assert told(other, base) == found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "key"),
    [({"precision": "fp16"}, "precision"), ({"profile": {"batch": (1, 2, 16)}}, "inputs")],
)
def test_other_settings_are_a_difference(
    options: Any, key: str, base: Path, tmp_path: Path
) -> None:
    other = written(tmp_path / "other.trt", seeded(ConvNet()), **options)
    assert told(other, base) == key


@pytest.mark.slow
def test_both_have_to_be_refittable(base: Path, tmp_path: Path) -> None:
    plain = written(tmp_path / "plain.trt", seeded(ConvNet()), refittable=False)
    for pair in ((plain, base), (base, plain)):
        with pytest.raises(UsageError, match=r"plain\.trt was exported without refittable=True"):
            refit(*pair)


def test_there_has_to_be_an_engine(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = library.Library(None, "tensorrt", "11.4.0.106")
    monkeypatch.setattr(library, "find", lambda name=None: here)
    with pytest.raises(UsageError, match=r"has no engine for this machine: run refold build"):
        refit(base, base)


@pytest.mark.slow
def test_damage_is_noticed_before(base: Path, tmp_path: Path) -> None:
    other = written(tmp_path / "other.trt", seeded(ConvNet(), 1))
    data = bytearray((other / artifact.MODEL).read_bytes())
    data[-1] ^= 1
    (other / artifact.MODEL).write_bytes(data)
    with pytest.raises(BackendError, match="changed or damaged"):
        refit(other, base)


@pytest.mark.slow
def test_command(run: Any, tmp_path: Path) -> None:
    net, path = "tests.small_nets:ConvNet", tmp_path / "net.trt"
    code, _, err = run(
        "export", net, "--shape", "1x3x8x8", "--target", "trt", "--refittable", "-o", path
    )
    assert code == 0, err
    assert artifact.read(path).flags["REFIT"]
    code, _, err = run("build", path, "--refit", tmp_path)
    assert code == 2
    assert "has no build.json" in err


def test_a_cuda_graph_needs_an_engine() -> None:
    with pytest.raises(UsageError, match="cuda_graph=True is for an engine that runs here"):
        TensorRTOptions(build=False, cuda_graph=True)
