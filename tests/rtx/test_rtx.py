"""What TensorRT-RTX itself accepts and builds, on a machine without a GPU. Nothing is executed."""

from __future__ import annotations

import _thread
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from refold.backends.tensorrt import artifact, build, check, library, ops
from refold.backends.tensorrt.target import TensorRTOptions, TensorRTTarget
from refold.errors import BackendError, UsageError
from refold.frontends.export import trace
from refold.passes import PIPELINES
from tests.backends import runtimes
from tests.backends.quantised_nets import Float8Net, Int8Net
from tests.models.timm_networks import NETWORKS, network
from tests.small_nets import ConvNet, seeded

pytestmark = pytest.mark.rtx
RTX = "tensorrt_rtx"
TARGET = TensorRTTarget()
COMPARED = ("mobileone_s0", "repvgg_a0", "fastvit_t8", "ghostnetv3_050")
PRECISIONS = (None, "fp16")


def lowered(model, x, folder, *, fold=True, batch=True, **options):
    """The artifact of a model, unverified: the numbers are other tests' business."""
    program = trace(model, (x,), {}, dynamic_batch=batch)
    gm = program.graph_module
    if fold:
        PIPELINES["default"].run(gm)
    return save(program, folder, **options)


def save(program, folder, **options):
    with torch.no_grad():
        made = TARGET.lower(program, program.graph_module, TensorRTOptions(build=False, **options))
    TARGET.save(made, folder, "net.trt")
    return folder / "net.trt"


@pytest.fixture
def small(tmp_path):
    return lowered(seeded(ConvNet()), torch.randn(2, 3, 8, 8), tmp_path)


# --- networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", NETWORKS)
def test_network_is_accepted_and_built(name, batch, tmp_path):
    model, x = network(name, NETWORKS[name])
    program = trace(model, (x,), {}, dynamic_batch=batch)
    PIPELINES["default"].run(program.graph_module)
    for precision in PRECISIONS:
        folder = tmp_path / str(precision)
        folder.mkdir()
        path = save(program, folder, precision=precision)
        (given,) = artifact.read(path).inputs
        assert (given.profile is not None) == batch
        found = check.preflight(path / artifact.MODEL, ops.Version.parse("rtx"), library.find(RTX))
        assert not found.rejections, "the table, too, has to accept what the parser does"
        built = build.build(path, library=RTX)
        assert built.record.layers
        assert built.path.stat().st_size > 10_000


@pytest.mark.parametrize("name", COMPARED)
def test_folding_never_adds_an_engine_layer(name, tmp_path, record_property):
    model, x = network(name, NETWORKS[name])
    layers = {}
    for fold in (False, True):
        program = trace(model, (x,), {})
        if fold:
            PIPELINES["default"].run(program.graph_module)
        for precision in PRECISIONS:
            folder = tmp_path / f"{fold}-{precision}"
            folder.mkdir()
            built = build.build(save(program, folder, precision=precision), library=RTX)
            layers[precision, fold] = built.record.layers
    for precision in PRECISIONS:
        unfolded, folded = layers[precision, False], layers[precision, True]
        record_property("layers", (name, precision or "fp32", unfolded, folded))
        assert folded <= unfolded


# --- rejections -----------------------------------------------------------------------------------


class Indices(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(2, return_indices=True)

    def forward(self, x):
        return self.pool(x)


class Cubic(nn.Module):
    def forward(self, x):
        return nn.functional.interpolate(x, scale_factor=2.0, mode="bicubic")


class Pooled(nn.Module):
    def forward(self, x):
        return nn.functional.avg_pool1d(x.flatten(2), 2)


class Dilated(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(2, dilation=2)

    def forward(self, x):
        return self.pool(x)


class Bits(nn.Module):
    def forward(self, x):
        return x.to(torch.int32) & 7


@pytest.mark.parametrize("kind", [Indices, Dilated, Bits])
def test_parser_and_table_agree_on_rejections(kind, tmp_path):
    path = lowered(kind(), torch.randn(2, 3, 8, 8), tmp_path)
    model = path / artifact.MODEL
    version = ops.Version.parse("rtx")
    (by_table,) = check.preflight(model, version, None).rejections
    assert by_table.source.startswith("test_rtx.py:")
    real = library.find(RTX)
    messages = library.parse(real, model).messages
    assert by_table.node in {m.node for m in messages}
    with pytest.raises(BackendError) as error:
        build.build(path, library=RTX)
    assert by_table.node in str(error.value)
    assert by_table.source in str(error.value)
    assert "fix:" in str(error.value)
    assert not (path / artifact.ENGINES).exists()


@pytest.mark.parametrize("kind", [Cubic, Pooled])
def test_parser_and_table_agree_on_what_is_accepted(kind, tmp_path):
    path = lowered(kind(), torch.randn(2, 3, 8, 8), tmp_path)
    found = check.preflight(path / artifact.MODEL, ops.Version.parse("rtx"), library.find(RTX))
    assert not found.rejections
    assert build.build(path, library=RTX).record.layers


def test_parser_names_the_users_line_where_the_table_knows_nothing(small, monkeypatch):
    """A node that the table lets pass, and the parser does not."""
    path = small / artifact.MODEL
    model = onnx.load(path)
    conv = next(n for n in model.graph.node if n.op_type == "Conv")
    next(a for a in conv.attribute if a.name == "group").i = 2
    onnx.save(model, path)
    found = check.preflight(path, ops.Version.parse("rtx"), library.find(RTX))
    assert any("parser of tensorrt_rtx" in r.found_by for r in found.rejections)
    rejected = next(r for r in found.rejections if r.node == conv.name)
    assert rejected.source.startswith("small_nets.py:")
    assert "conv" in rejected.modules


@pytest.mark.parametrize("op", sorted(ops._SUPPORTED))
def test_table_agrees_with_the_parser_by_name(op, asked):
    accepted = op not in ops._PLUGINS
    assert asked.supports_operator(op) == accepted


@pytest.fixture(scope="module")
def asked():
    trt = library.find(RTX).module
    log = library.Log(library.find(RTX))
    builder = trt.Builder(log.logger)
    made = builder.create_network(0)
    return trt.OnnxParser(made, log.logger)


def test_bfloat16_with_hardswish_is_built(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return nn.functional.hardswish(self.conv(x))

    path = lowered(Net(), torch.randn(2, 3, 8, 8), tmp_path, precision="bf16")
    assert build.build(path, library=RTX).record.layers


@pytest.mark.parametrize("precision", [None, "fp16", "bf16"])
@pytest.mark.parametrize("kind", [Int8Net, Float8Net])
def test_quantised_network_is_built(kind, precision, tmp_path):
    path = lowered(seeded(kind()), torch.randn(2, 3, 8, 8), tmp_path, precision=precision)
    found = check.preflight(path / artifact.MODEL, ops.Version.parse("rtx"), library.find(RTX))
    assert not found.rejections
    assert build.build(path, library=RTX).record.layers


def test_zero_points_are_rejected_by_both(tmp_path):
    path = lowered(seeded(Int8Net(zero=120)), torch.randn(2, 3, 8, 8), tmp_path)
    model, version = path / artifact.MODEL, ops.Version.parse("rtx")
    by_table = {r.node for r in check.preflight(model, version, None).rejections}
    assert {m.node for m in library.parse(library.find(RTX), model).messages} & by_table
    with pytest.raises(BackendError, match="fix: quantise symmetrically"):
        build.build(path, library=RTX)


# --- files ----------------------------------------------------------------------------------------


def test_external_data_is_found(small):
    path = small / artifact.MODEL
    onnx.save(
        onnx.load(path), path, save_as_external_data=True, location="w.data", size_threshold=100
    )
    data = json.loads((small / "build.json").read_text())
    data["files"] = artifact.describe_files(small)
    artifact.write_json(small / "build.json", data)
    assert build.build(small, library=RTX).record.layers
    (small / "w.data").unlink()
    with pytest.raises(BackendError, match=r"w\.data is missing"):
        build.build(small, library=RTX)


def test_missing_profile_is_told(small):
    data = json.loads((small / "build.json").read_text())
    data["inputs"][0]["profile"] = None
    artifact.write_json(small / "build.json", data)
    with pytest.raises(BackendError, match="profile"):
        build.build(small, library=RTX)
    assert not (small / artifact.ENGINES).exists()


def test_engine_is_kept_and_remade_when_damaged(small):
    first = build.build(small, library=RTX)
    assert not first.cached
    again = build.build(small, library=RTX)
    assert again.cached
    assert again.record == first.record
    first.path.write_bytes(b"half an engine")
    repaired = build.build(small, library=RTX)
    assert not repaired.cached
    assert artifact.digest(repaired.path) == repaired.record.sha256
    told = []
    build.build(small, library=RTX, rebuild=True, progress=told.append)
    assert "last time" in told[0]
    assert len(list((small / artifact.ENGINES).glob("*.engine"))) == 1


def test_full_disk(small):
    first = build.build(small, library=RTX)
    most = first.path.stat().st_size - 1
    with runtimes.small_files(most), pytest.raises(BackendError, match="nothing was written"):
        build.build(small, library=RTX, rebuild=True)
    again = build.build(small, library=RTX)
    assert again.cached
    assert again.record == first.record
    assert not list((small / artifact.ENGINES).glob(".*"))


def test_two_builds_at_once(small):
    results, start = [], threading.Barrier(2)

    def one():
        start.wait()
        results.append(build.build(small, library=RTX, rebuild=True))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 2
    found = build.build(small, library=RTX)
    assert found.cached
    assert artifact.digest(found.path) == found.record.sha256
    assert not list((small / artifact.ENGINES).glob(".*"))


def test_interrupted_build_leaves_nothing(tmp_path):
    model, x = network("repvgg_a0", 64)
    path = lowered(model, x, tmp_path)

    def interrupt_soon(stage):
        threading.Timer(0.05, _thread.interrupt_main).start()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            build.build(path, library=RTX, progress=interrupt_soon)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (path / artifact.ENGINES).exists()
    assert build.build(path, library=RTX).record.layers


def test_wrong_profile_is_told(small):
    data = json.loads((small / "build.json").read_text())
    data["inputs"][0]["profile"] = [[8, 3, 8, 8], [2, 3, 8, 8], [1, 3, 8, 8]]
    artifact.write_json(small / "build.json", data)
    with pytest.raises(BackendError):
        build.build(small, library=RTX)


# --- without a GPU --------------------------------------------------------------------------------


def in_a_process(code, *arguments):
    """Some runtimes crash where they should answer."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, timeout=120, env=os.environ,
    )  # fmt: skip


LOAD = """
import sys
from pathlib import Path
from refold.backends.tensorrt import artifact, build, library
from refold.backends.tensorrt.runner import Engine
folder = Path(sys.argv[1])
try:
    Engine(build.find(folder, artifact.read(folder), library.find("tensorrt_rtx")))
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_engine_without_a_gpu_is_a_clean_error(small):
    built = build.build(small, library=RTX)
    done = in_a_process(LOAD, small)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("BackendError no GPU is visible")
    built.path.write_bytes(built.path.read_bytes()[:-100])
    done = in_a_process(LOAD, small)
    assert done.returncode == 0, done.stderr
    assert "is damaged" in done.stdout


DESERIALIZE = """
import sys
from pathlib import Path
from refold.backends.tensorrt import library
rtx = library.find("tensorrt_rtx")
log = library.Log(rtx)
runtime = rtx.module.Runtime(log.logger)
engine = runtime.deserialize_cuda_engine(Path(sys.argv[1]).read_bytes())
print("none" if engine is None else "engine", len(log.errors))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_library_itself_declines_a_corrupt_engine(tmp_path):
    path = tmp_path / "x.engine"
    path.write_bytes(bytes(range(256)) * 64)
    done = in_a_process(DESERIALIZE, path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "none"


@pytest.mark.parametrize("refittable", [False, True])
def test_flags_reach_the_builder(refittable, tmp_path):
    model, x = seeded(ConvNet()), torch.randn(2, 3, 8, 8)
    path = lowered(model, x, tmp_path, refittable=refittable)
    rtx = library.find(RTX)
    parsed = library.parse(rtx, path / artifact.MODEL)
    config = build._configuration(artifact.read(path), rtx, parsed)
    flags = rtx.module.BuilderFlag
    assert config.get_flag(flags.REFIT) == refittable
    assert not config.get_flag(flags.TF32)
    assert config.num_optimization_profiles == 1


def test_unknown_flags_are_told(small):
    data = json.loads((small / "build.json").read_text())
    data["flags"]["TURBO"] = True
    artifact.write_json(small / "build.json", data)
    with pytest.raises(UsageError, match="sets TURBO"):
        build.build(small, library=RTX)
    assert not (small / artifact.ENGINES).exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refittable_engine_without_a_gpu_is_a_clean_error(tmp_path):
    """TensorRT-RTX compiles those on the GPU alone."""
    path = lowered(seeded(ConvNet()), torch.randn(2, 3, 8, 8), tmp_path, refittable=True)
    code = "import sys; from refold import cli; sys.exit(cli.main(sys.argv[1:]))"
    done = in_a_process(code, "build", path, "--library", RTX)
    assert done.returncode == 1, done.stderr
    assert "cannot build the engine" in done.stderr
    assert not (path / artifact.ENGINES).exists()


def test_what_the_library_has_to_have_is_there():
    from tests.backends.tensorrt.test_tensorrt import EVERYWHERE

    trt = library.find(RTX).module
    for owner, names in EVERYWHERE.items():
        holder = getattr(trt, owner) if owner else trt
        assert not [n for n in names.split() if not hasattr(holder, n)], owner


def test_commands(small):
    refold = [sys.executable, "-m", "refold"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*refold, "check", small, "--target", "trt:rtx"],
        capture_output=True, text=True, timeout=120, cwd=root,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "the parser of tensorrt_rtx" in done.stdout
    done = subprocess.run(
        [*refold, "build", small, "--library", RTX], capture_output=True, text=True, timeout=120,
        cwd=root,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "not executed until it is verified" in done.stdout
