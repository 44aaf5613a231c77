"""The TensorRT target without TensorRT: the artifact, the table, the casts, the sources' names."""

import _thread
import ast
import dataclasses
import json
import re
import signal
import threading
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import refold
from refold.backends.tensorrt import artifact, build, check, library, ops, precision, reference
from refold.backends.tensorrt import verify as judge
from refold.backends.tensorrt.target import TensorRTOptions, TensorRTTarget
from refold.cli import exit_codes
from refold.errors import (
    BackendError,
    MissingDependencyError,
    RefoldError,
    UsageError,
    VerificationError,
)
from refold.frontends.export import trace
from refold.graph.evaluate import Oracle
from tests.small_nets import ConvNet, seeded

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SOURCES = sorted(Path(library.__file__).parent.glob("*.py"))


def example(batch=2):
    return torch.randn(batch, 3, 8, 8)


def compiled(model, x, **options):
    return refold.compile_for_inference(model, x, target="trt", build=False, **options)


def lowered(model, x, dynamic_shapes=None, **options):
    """What the target alone makes of a model, unfolded and unverified."""
    program = trace(model, (x,), {}, dynamic_shapes=dynamic_shapes)
    return TARGET.lower(program, program.graph_module, TensorRTOptions(build=False, **options))


def written(made, folder):
    TARGET.save(made, folder, "net.trt")
    return folder / "net.trt"


TARGET = TensorRTTarget()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return seeded(ConvNet())


@pytest.fixture(scope="module")
def done(model):
    return compiled(model, example())


@pytest.fixture(scope="module")
def saved(done, tmp_path_factory):
    return done.save(tmp_path_factory.mktemp("trt") / "net.trt")


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may damage."""
    for path in saved.rglob("*"):
        if path.is_file():
            copy = tmp_path / "net.trt" / path.relative_to(saved)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return tmp_path / "net.trt"


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.setattr(library, "find", lambda name=None: None)


def reseal(folder):
    """What somebody who edits an artifact on purpose would do."""
    data = json.loads((folder / "build.json").read_text())
    data["files"] = artifact.describe_files(folder)
    (folder / "build.json").write_text(json.dumps(data))


# --- without a GPU --------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_two_commands_are_told(model):
    with pytest.raises(MissingDependencyError) as error:
        refold.compile_for_inference(model, example(), target="trt")
    assert "refold export MODEL --target trt -o DIR" in str(error.value)
    assert "refold build DIR && refold verify DIR" in str(error.value)


def test_what_was_executed_is_said(done):
    assert any(n.startswith("not executed by TensorRT") for n in done.report.notes)
    assert done.report.artifact_numerics["passed"]


def test_build_needs_a_library(saved, no_library):
    with pytest.raises(MissingDependencyError, match="pip install tensorrt"):
        build.build(saved)


def test_library_name_is_checked():
    with pytest.raises(UsageError, match="tensorrt or tensorrt_rtx"):
        library.find("cudnn")


# --- the artifact ---------------------------------------------------------------------------------


def test_directory_is_complete(saved):
    told = artifact.read(saved)
    assert set(told.files) == {
        "model.onnx", "provenance.json", "refit.json", "verify/cases.npz",
    }  # fmt: skip
    (x,) = told.inputs
    assert (x.name, x.dtype, x.shape) == ("x", "FLOAT", ("batch", 3, 8, 8))
    assert x.profile == ((1, 3, 8, 8), (2, 3, 8, 8), (8, 3, 8, 8))
    assert told.outputs[0].shape == ("batch", 5)
    assert told.flags == {"TF32": False}
    assert told.minimum_version == "10.3"
    assert "--noTF32" in told.trtexec["11"]
    assert "--minShapes=x:1x3x8x8 --optShapes=x:2x3x8x8 --maxShapes=x:8x3x8x8" in told.trtexec["11"]
    assert told.trtexec["10"].endswith("--stronglyTyped")
    assert "--stronglyTyped" not in told.trtexec["11"]


def test_provenance_and_refit_recipe(saved):
    origins = json.loads((saved / "provenance.json").read_text())
    (conv,) = [o for o in origins.values() if o["operator"] == "Conv"]
    assert set(conv["modules"].split(", ")) == {"conv", "bn"}
    assert conv["source"].startswith("small_nets.py:")
    weights = json.loads((saved / "refit.json").read_text())["weights"]
    graph = onnx.load(saved / "model.onnx").graph
    assert set(weights) <= {i.name for i in graph.initializer}
    folded = [w for w in weights.values() if w["rules"]]
    assert {"conv.weight", "bn.weight", "bn.running_var"} <= {k for w in folded for k in w["from"]}
    assert weights["head.weight"]["from"] == ["head.weight"]


def test_references_are_those_of_the_original_in_float64(saved, model):
    told = artifact.read(saved)
    stored = reference.read(saved, told.verify, {"x": torch.float32})
    model = deepcopy(model).double()
    for given, expected in zip(stored.inputs, stored.outputs, strict=True):
        with torch.no_grad():
            exact = model(given["x"].double())
        assert expected["output"].dtype == torch.float64
        assert (exact - expected["output"]).abs().max() < 1e-12
    assert len(stored.inputs) == 4


@pytest.mark.slow
def test_given_profile(model):
    build = lowered(model, example(4), profile={"batch": (2, 4, 32)}).content.build
    assert build.inputs[0].profile == ((2, 3, 8, 8), (4, 3, 8, 8), (32, 3, 8, 8))


@pytest.mark.slow
def test_profile_of_a_bounded_dimension(model):
    bounded = ({0: torch.export.Dim("n", min=3, max=20)},)
    build = lowered(model, example(4), bounded).content.build
    assert build.inputs[0].profile == ((3, 3, 8, 8), (4, 3, 8, 8), (20, 3, 8, 8))


@pytest.mark.slow
def test_static_model_has_no_profile(model):
    build = lowered(model, example(4), ({},)).content.build
    assert build.inputs[0].profile is None
    assert "Shapes" not in build.trtexec["11"]


@pytest.mark.slow
def test_unbounded_size_is_not_guessed(model):
    made = lowered(model, example(), ({2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},))
    assert made.content.build.inputs[0].profile == ((2, 3, 8, 8),) * 3
    assert sum("the engine takes" in n for n in made.notes) == 2


@pytest.mark.parametrize("sizes", [(4, 2, 8), (0, 2, 8), (1, 2)])
def test_wrong_profiles(sizes):
    with pytest.raises(UsageError, match="profile of 'batch'"):
        TensorRTOptions(profile={"batch": sizes}, build=False)


@pytest.mark.slow
def test_profile_of_an_unknown_dimension(model):
    with pytest.raises(UsageError, match=r"dimension 'size'; dynamic are: batch"):
        lowered(model, example(), profile={"size": (1, 2, 3)})


def test_options_are_checked():
    with pytest.raises(UsageError, match="precision 'int3'"):
        TensorRTOptions(precision="int3", build=False)
    with pytest.raises(UsageError, match="opset 30"):
        TensorRTOptions(opset=30, build=False)


def test_directory_is_replaced_whole_and_others_are_not_touched(done, tmp_path):
    path = tmp_path / "net.trt"
    path.mkdir()
    (path / "thesis.tex").write_text("mine")
    for force in (False, True):
        with pytest.raises(UsageError):
            done.save(path, force=force)
    assert [p.name for p in path.iterdir()] == ["thesis.tex"]
    path = done.save(tmp_path / "other.trt")
    (path / "stale").write_text("")
    with pytest.raises(UsageError, match="exists"):
        done.save(path)
    done.save(path, force=True)
    assert not (path / "stale").exists()
    artifact.read(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.trt", "other.trt"]


def test_nothing_is_left_of_a_directory_that_cannot_be_written(done, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "no space left")

    monkeypatch.setattr(artifact, "write_json", full)
    with pytest.raises(BackendError, match="no space left; nothing was written"):
        done.save(tmp_path / "net.trt")
    assert not list(tmp_path.iterdir())


# --- hostile directories --------------------------------------------------------------------------


def test_not_an_artifact(tmp_path):
    with pytest.raises(UsageError, match=r"no build\.json"):
        artifact.read(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}', '{"schema": 1, "inputs": 3}'])
def test_unreadable_description(folder, text):
    (folder / "build.json").write_text(text)
    with pytest.raises(BackendError, match="cannot be read"):
        artifact.read(folder)


def test_another_schema(folder):
    data = json.loads((folder / "build.json").read_text())
    (folder / "build.json").write_text(json.dumps({**data, "schema": 99}))
    with pytest.raises(UsageError, match="schema 99"):
        artifact.read(folder)


@pytest.mark.parametrize("value", [None, 3, "x", [], [[]], {}, {"a": 1}, [{"name": 1}]])
def test_wrong_types_are_errors_of_refold(folder, value):
    data = json.loads((folder / "build.json").read_text())
    for key in data:
        (folder / "build.json").write_text(json.dumps({**data, key: value}))
        try:
            judge.verify_onnx(folder)
        except RefoldError:
            continue
        # Nothing that these say is needed to run the file.
        assert key in ("outputs", "precision", "opset", "flags", "minimum_version", "versions",
                       "trtexec"), key  # fmt: skip


@pytest.mark.parametrize("name", ["model.onnx", "verify/cases.npz", "provenance.json"])
def test_damage_is_noticed(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(BackendError, match="changed or damaged"):
        artifact.read(folder)
    (folder / name).unlink()
    with pytest.raises(BackendError, match="is missing"):
        artifact.read(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname"])
def test_files_outside_are_not_read(folder, name):
    (folder.parent / "secret").write_text("")
    data = json.loads((folder / "build.json").read_text())
    data["files"][name] = {"sha256": "", "bytes": 0}
    (folder / "build.json").write_text(json.dumps(data))
    with pytest.raises(BackendError, match="outside of the directory"):
        artifact.read(folder)


def external(folder, location):
    """Moves the weights of an artifact's model to a file, and names another."""
    path = folder / "model.onnx"
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="w.data", size_threshold=100)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())
    reseal(folder)


@pytest.mark.parametrize("location", ["../w.data", "/etc/passwd", "", "a/../../w.data", "."])
def test_weights_outside_are_not_read(folder, location):
    (folder.parent / "w.data").write_bytes(bytes(10_000))
    (folder / "a").mkdir()
    external(folder, location)
    with pytest.raises(BackendError, match="outside of its own directory: not read"):
        artifact.read(folder)


def test_weights_behind_a_link_are_not_read(folder):
    (folder.parent / "w.data").write_bytes(bytes(10_000))
    external(folder, "link")
    (folder / "link").symlink_to(folder.parent / "w.data")
    with pytest.raises(BackendError, match="outside of its own directory: not read"):
        artifact.check_external_data(folder / "model.onnx")
    reseal(folder)
    with pytest.raises(BackendError, match="outside of the directory"):
        artifact.read(folder)


def test_weights_beside_are_read(folder):
    external(folder, "w.data")
    assert "w.data" in artifact.read(folder).files
    assert judge.verify_onnx(folder).passed
    data = json.loads((folder / "build.json").read_text())
    del data["files"]["w.data"]
    (folder / "build.json").write_text(json.dumps(data))
    with pytest.raises(BackendError, match="does not list"):
        artifact.read(folder)


def test_something_else_than_onnx(folder):
    (folder / "model.onnx").write_bytes(b"not a model")
    reseal(folder)
    with pytest.raises(BackendError, match="not an ONNX file"):
        artifact.read(folder)


# --- verification ---------------------------------------------------------------------------------


def test_onnx_file_is_verified(saved):
    signed = judge.verify_onnx(saved)
    assert signed.passed
    assert "executed by onnxruntime" in signed.summary
    record = signed.to_dict()
    assert record["artifact"] == artifact.digest(saved / "build.json")
    assert len(record["sha256"]) == 64


def test_other_weights_fail(folder):
    model = onnx.load(folder / "model.onnx")
    bias = next(i for i in model.graph.initializer if i.name == "head.bias")
    value = onnx.numpy_helper.to_array(bias) + np.float32(1e-3)
    bias.CopyFrom(onnx.numpy_helper.from_array(value, bias.name))
    onnx.save(model, folder / "model.onnx")
    reseal(folder)
    with pytest.raises(VerificationError, match="too far"):
        judge.verify_onnx(folder)


@pytest.mark.slow
def test_verification_needs_data(model, tmp_path):
    path = written(lowered(model, example()), tmp_path)
    assert artifact.read(path).verify is None
    with pytest.raises(UsageError, match="without --no-verify"):
        judge.verify_onnx(path)


def test_damaged_cases(folder):
    (folder / "verify/cases.npz").write_bytes(b"PK nothing")
    reseal(folder)
    with pytest.raises(BackendError, match="cannot be read"):
        judge.verify_onnx(folder)


def test_distance():
    exact = [{"y": torch.tensor([2.0, -4.0]).double()}, {"y": torch.tensor([1.0, torch.inf])}]
    near = [{"y": torch.tensor([2.0, -4.1])}, {"y": torch.tensor([1.0, torch.inf])}]
    assert reference.distance(near, exact, "y") == pytest.approx(0.1 / 4, rel=1e-5)
    near[1]["y"] = torch.tensor([1.0, -torch.inf])
    assert reference.distance(near, exact, "y") == float("inf")
    near[1]["y"] = torch.tensor([torch.nan, torch.inf])
    assert reference.distance(near, exact, "y") == float("inf")
    assert reference.distance([{"y": torch.ones(2)}], [{"y": torch.ones(1)}], "y") == float("inf")
    labels = [{"y": torch.tensor([1, 2, 3, 4])}], [{"y": torch.tensor([1, 2, 3, 5])}]
    assert reference.distance(*labels, "y") == 0.25


class Several(nn.Module):
    """Nested results, one of them an integer, one of them twice."""

    def forward(self, x):
        scores = x.flatten(1).sum(1, keepdim=True).sigmoid()
        return {"scores": scores, "best": x.flatten(1).argmax(1), "again": scores}


@pytest.mark.slow
def test_nested_results(tmp_path):
    path = compiled(Several(), example()).save(tmp_path / "net.trt")
    told = artifact.read(path)
    assert [t.name for t in told.outputs] == ["scores", "best"]
    assert told.verify["tolerance"]["best"] == 0
    assert judge.verify_onnx(path).passed


# --- engines on disk ------------------------------------------------------------------------------


def record(**changed):
    given = {
        "engine": "x.engine", "sha256": "0" * 64, "content": "", "library": "tensorrt",
        "version": "1", "device": "gpu", "seconds": 1.0, "layers": None,
    }  # fmt: skip
    return build.EngineRecord(**{**given, **changed})


def test_corrupt_engine_never_reaches_the_library(tmp_path):
    from refold.backends.tensorrt.runner import Engine

    (tmp_path / "x.engine").write_bytes(b"engine")
    with pytest.raises(BackendError, match="is damaged"):
        Engine(build.Built(tmp_path / "x.engine", record()))
    good = record(sha256=artifact.digest(tmp_path / "x.engine"))
    with pytest.raises(BackendError, match="no GPU is visible"):
        Engine(build.Built(tmp_path / "x.engine", good))


def test_records_of_engines(folder):
    told = artifact.read(folder)
    here = library.Library(None, "tensorrt", "11.4.0.106")
    assert build.find(folder, told, here) is None
    path = build._record_path(folder, told, here)
    path.parent.mkdir()
    for text in ("", "{}", '{"content": 1}', "[]", "3"):
        path.write_text(text)
        assert build.find(folder, told, here) is None
    (folder / "model.engine").write_bytes(b"engine")
    for name in ("x.engine", "../model.engine", "/etc/hostname"):
        artifact.write_json(path, dataclasses.asdict(record(engine=name)))
        assert build.find(folder, told, here) is None, "missing, or outside"
    (path.parent / "x.engine").write_bytes(b"engine")
    artifact.write_json(path, dataclasses.asdict(record()))
    assert build.find(folder, told, here).path == path.parent / "x.engine"
    for other in (
        dataclasses.replace(here, version="11.3.0"),
        dataclasses.replace(here, name="tensorrt_rtx"),
    ):
        assert build.find(folder, told, other) is None
    assert build.find(folder, dataclasses.replace(told, flags={"TF32": True}), here) is None


def test_interrupt_cancels_and_waits():
    stop, ended = threading.Event(), []

    def work():
        _thread.interrupt_main()
        assert stop.wait(10)
        ended.append(True)

    # A suite in the background of a shell inherits an ignored SIGINT, which nothing interrupts.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            build._interruptible(work, stop)
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert ended


def test_failure_beside_the_main_thread_is_raised():
    def work():
        raise BackendError("no")

    with pytest.raises(BackendError, match="no"):
        build._interruptible(work, threading.Event())
    assert build._interruptible(lambda: 3, threading.Event()) == 3


class Timings:
    """Stands for the two calls of a configuration that concern caches; it builds nothing."""

    def __init__(self, accepts=True):
        self.accepts, self.made = accepts, []

    def create_timing_cache(self, data):
        self.made.append(data)
        return data

    def set_timing_cache(self, cache, ignore_mismatch):
        assert ignore_mismatch is False
        return self.accepts or not cache


def test_timing_cache_of_nobody_else(tmp_path):
    path = tmp_path / "x.timing"
    config = Timings()
    assert build._timing_cache(config, path) == b""
    sealed = build._seal(b"timings")
    path.write_bytes(sealed)
    assert build._timing_cache(config, path) == b"timings"
    for damaged in (sealed[:-1], sealed[5:], b"", sealed.replace(b"cache 1", b"cache 2")):
        path.write_bytes(damaged)
        assert build._timing_cache(config, path) == b""
    path.write_bytes(sealed)
    refusing = Timings(accepts=False)
    assert build._timing_cache(refusing, path) == b"", "of another version"
    assert refusing.made == [b"timings", b""]


def test_old_library_is_refused(saved):
    old = library.Library(None, "tensorrt", "10.2.0.1")
    needs = dataclasses.replace(artifact.read(saved), minimum_version="10.15", opset=22)
    with pytest.raises(UsageError, match="too old"):
        build.check_version(needs, dataclasses.replace(old, version="10.3.0"))
    build.check_version(needs, dataclasses.replace(old, version="11.4.0.106"))
    build.check_version(needs, dataclasses.replace(old, name="tensorrt_rtx", version="1.7.1"))


def test_file_is_replaced_whole_or_not(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")

    def fail(beside):
        beside.write_text("half")
        raise OSError(28, "no space left")

    with pytest.raises(BackendError, match="nothing was written"):
        artifact.replace_file(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


# --- the table ------------------------------------------------------------------------------------


def test_versions():
    assert str(ops.Version.parse("")) == "TensorRT 10.15"
    assert str(ops.Version.parse("rtx-1.7")) == "TensorRT-RTX 1.7"
    last = {
        t: ops.Version.parse(t).last_opset for t in ("10", "10.3", "10.15", "11", "11.4", "rtx")
    }
    assert last == {"10": 20, "10.3": 20, "10.15": 24, "11": 25, "11.4": 25, "rtx": 25}
    for wrong in ("9.2", "ten", "10.1", "8"):
        with pytest.raises(UsageError):
            ops.Version.parse(wrong)


def objections(op, *, version="", dtypes=("FLOAT",), **given):
    known = {"attributes": {}, "constants": {}, "ranks": {}, "outputs": 1, "domain": "", **given}
    return [
        o.reason
        for o in ops.objections(
            op, dtypes={str(i): d for i, d in enumerate(dtypes)},
            version=ops.Version.parse(version), **known,
        )
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "given", "reason"),
    [
        ("ConvInteger", {}, "not supported"),
        ("FusedConv", {"domain": "com.microsoft"}, "domain"),
        ("Conv", {"dtypes": ("DOUBLE",)}, "does not take DOUBLE"),
        ("HardSwish", {"dtypes": ("BFLOAT16",)}, "does not take BF16"),
        ("Swish", {"version": "10.15"}, "read since 11.0"),
        ("DeformConv", {"version": "rtx"}, "plugin"),
        ("MaxPool", {"attributes": {"dilations": [2, 2]}}, "dilation"),
        ("MaxPool", {"outputs": 2}, "indices"),
        ("Resize", {"attributes": {"antialias": 1}}, "antialias"),
        ("ReduceMean", {"ranks": {0: 4, 1: 1}}, "axes that are computed"),
        ("TopK", {"constants": {1: np.array([4000])}}, "TopK of 4000"),
        ("QuantizeLinear", {"constants": {2: np.array([3])}}, "zero point"),
        ("ScatterND", {"attributes": {"reduction": "add"}}, "reduction add"),
    ],
)
def test_table_objects(op, given, reason):
    (found,) = objections(op, **given)
    assert reason in found


@pytest.mark.parametrize(
    ("op", "given"),
    [
        ("Conv", {"dtypes": ("FLOAT16", "FLOAT16")}),
        ("Swish", {"version": "11"}),
        ("DeformConv", {"version": "10.15"}),
        ("MaxPool", {"attributes": {"dilations": [1, 1]}, "ranks": {0: 4}}),
        ("ReduceMean", {"ranks": {0: 4, 1: 1}, "constants": {1: np.array([2])}}),
        ("TopK", {"constants": {1: np.array([5])}}),
        ("Resize", {"attributes": {"mode": "cubic"}}),
        ("AveragePool", {"ranks": {0: 3}}),
        ("QuantizeLinear", {"constants": {2: np.array([0])}}),
        ("Gather", {"dtypes": ("INT64",)}),
    ],
)
def test_table_accepts(op, given):
    assert objections(op, **given) == []


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(2, dilation=2)

    def forward(self, x):
        return self.pool(x).bitwise_not() if x.dtype == torch.int32 else self.pool(x)


@pytest.mark.slow
def test_rejection_names_the_users_line(tmp_path):
    path = written(lowered(Pooled(), example()), tmp_path)
    found = check.preflight(path / "model.onnx", ops.Version.parse(""), None)
    (rejection,) = found.rejections
    assert (rejection.operator, rejection.reason) == ("MaxPool", "MaxPool with dilation")
    assert rejection.modules == "pool"
    assert re.fullmatch(r"test_tensorrt\.py:\d+", rejection.source)
    assert rejection.nodes
    assert "use dilation 1" in str(rejection)
    assert "table of TensorRT 10.15" in str(rejection)


def test_opset_is_checked(saved):
    model = saved / "model.onnx"
    assert not check.preflight(model, ops.Version.parse("10.3"), None).rejections
    newer = onnx.load(model)
    newer.opset_import[0].version = 23
    path = saved.parent / "newer.onnx"
    onnx.save(newer, path)
    (rejection,) = check.preflight(path, ops.Version.parse("10.3"), None).rejections
    assert "opset 23" in rejection.reason
    assert rejection.fix == "export with opset=20"


# --- precision ------------------------------------------------------------------------------------


def cast(model, x, dtype=torch.float16):
    program = trace(model, (x,), {})
    gm = program.graph_module
    layers = precision.survey(gm, (program.args, program.kwargs), dtype)
    kept = {x.node: x.kept for x in layers if x.kept}
    return gm, precision.cast(gm, dtype, kept), kept, layers


def dtypes_of(gm, name):
    return [n.meta["val"].dtype for n in gm.graph.nodes if str(n.target).startswith(f"aten.{name}")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_everything_is_cast(dtype):
    x = torch.randn(2, 3, 8, 8)
    gm, half, kept, layers = cast(seeded(ConvNet()), x, dtype)
    assert not kept
    assert {x.operator for x in layers} >= {"conv2d", "linear"}
    assert dtypes_of(half, "conv2d") == dtypes_of(half, "linear") == [dtype]
    assert sum(str(n.target).startswith("aten._to_copy") for n in half.graph.nodes) == 2
    assert {t.dtype for t in half.buffers() if t.is_floating_point()} == {dtype}
    assert half.conv.weight.dtype == dtype
    assert gm.conv.weight.dtype == torch.float32, "the caller's own weights"
    y = half(x)
    assert y.dtype == torch.float32
    exact = Oracle(gm)(x)
    error = float((y - exact).abs().max() / exact.abs().max())
    assert 0 < error < 4 * torch.finfo(dtype).eps


class Range(nn.Module):
    """A layer whose values, or weights, half precision does not have."""

    def __init__(self, weight, shrink):
        super().__init__()
        self.wide = nn.Linear(4, 4, bias=False)
        self.tame = nn.Linear(4, 4, bias=False)
        nn.init.constant_(self.wide.weight, weight)
        self.shrink = shrink

    def forward(self, x):
        return self.tame(self.wide(x) * self.shrink)


@pytest.mark.parametrize(
    ("weight", "shrink", "reason"),
    [(3e4, 1e-5, "its values reach"), (1e-7, 1e7, "casting its"), (7e4, 1e-5, "values")],
)
def test_layers_past_the_range_stay_float32(weight, shrink, reason):
    x = torch.ones(2, 4)
    gm, half, kept, _ = cast(Range(weight, shrink), x)
    assert any(reason in r for r in kept.values())
    assert dtypes_of(half, "linear") == [torch.float32, torch.float16]
    exact = Oracle(gm)(x)
    assert (half(x) - exact).abs().max() / exact.abs().max() < 4 * torch.finfo(torch.float16).eps
    assert cast(Range(weight, shrink), x, torch.bfloat16)[2] == {}


def test_operand_past_the_range_keeps_its_reader():
    class Masked(nn.Module):
        def forward(self, x):
            return (x + torch.where(x > 0, 0.0, -1e9)).softmax(1)

    x = torch.tensor([[-1.0, -2.0, 3.0], [1.0, 2.0, -3.0]])
    gm, half, kept, _ = cast(Masked(), x)
    assert "softmax" in {n.removesuffix("_default") for n in kept}
    assert torch.allclose(half(x), Oracle(gm)(x).float(), atol=1e-3)


def test_positions_are_counted_in_float32():
    class Positions(nn.Module):
        def forward(self, x):
            steps = torch.arange(x.shape[1], dtype=torch.float32)
            return x * 0 + (steps - steps.floor() + steps % 2)

    x = torch.zeros(2, 4099)
    gm, half, _, _ = cast(Positions(), x)
    assert torch.equal(half(x), gm(x))


@pytest.mark.slow
def test_half_precision_artifact(model, tmp_path):
    done = compiled(model, example(), precision="fp16", exclude=["head"])
    (name,) = {n.split(" stays")[0] for n in done.report.notes if "stays float32" in n}
    assert name.startswith("linear")
    path = done.save(tmp_path / "net.trt")
    told = artifact.read(path)
    assert [t.dtype for t in (*told.inputs, *told.outputs)] == ["FLOAT", "FLOAT"]
    model = onnx.load(path / "model.onnx")
    weights = {i.name: i.data_type for i in model.graph.initializer if len(i.dims) > 1}
    assert weights.pop("head.weight") == onnx.TensorProto.FLOAT
    assert set(weights.values()) == {onnx.TensorProto.FLOAT16}
    assert [n.op_type for n in model.graph.node].count("Cast") == 2
    assert told.precision == {"asked": "fp16", "kept_float32": {name: "it is excluded"}}
    layers = json.loads((path / "precision.json").read_text())
    assert {x["operator"] for x in layers} >= {"conv2d", "linear"}
    assert all(x["largest"] > 0 for x in layers)
    assert 1e-5 < told.verify["own_error"]["output"] < told.verify["tolerance"]["output"] < 0.01
    assert judge.verify_onnx(path).passed


class HardSwish(nn.Module):
    def forward(self, x):
        return nn.functional.hardswish(x)


@pytest.mark.slow
def test_hardswish_is_written_out_for_bfloat16_alone(tmp_path):
    done = compiled(HardSwish(), torch.randn(2, 8) * 4, precision="bf16")
    path = done.save(tmp_path / "a")
    model = onnx.load(path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [n.op_type for n in model.graph.node] == ["Cast", "HardSigmoid", "Mul", "Cast"]
    assert model.opset_import[0].version == 22
    assert any("HardSwish written" in n for n in done.report.notes)
    assert not check.preflight(path / "model.onnx", ops.Version.parse(""), None).rejections
    # ONNX Runtime has no bfloat16 kernels: the numbers are those that the nodes state.
    slopes = {a.name: a.f for a in model.graph.node[1].attribute}
    told = artifact.read(path)
    stored = reference.read(path, told.verify, {"x": torch.float32})
    for given, expected in zip(stored.inputs, stored.outputs, strict=True):
        x = given["x"].double()
        gate = (x * slopes["alpha"] + slopes["beta"]).clamp(0, 1)
        assert torch.allclose(x * gate, expected["output"], atol=1e-6)
    half = lowered(HardSwish(), torch.randn(2, 8), precision="fp16").content.onnx.model
    assert "HardSwish" in [n.op_type for n in half.graph]


def test_a_model_that_writes_its_input_is_not_cast():
    class Writes(nn.Module):
        def forward(self, x):
            x.add_(1)
            return x * 2

    with pytest.raises(BackendError, match="as float32 only"):
        lowered(Writes(), example(), precision="fp16")


# --- names ----------------------------------------------------------------------------------------

# What the sources use of the library, by class; all of it is in 10.3, 10.13, 10.16, 11.4 and in
# TensorRT-RTX 1.7, whose lists of names were compared.
EVERYWHERE = {
    "": "Builder DataType ILogger IOutputAllocator IProgressMonitor OnnxParser OnnxParserRefitter "
        "Refitter Runtime TensorIOMode",
    "Builder": "build_serialized_network create_builder_config create_network "
               "create_optimization_profile",
    "BuilderFlag": "REFIT TF32",
    "DataType": "BF16 BOOL FLOAT FP8 HALF INT32 INT64 INT8 UINT8",
    "IBuilderConfig": "add_optimization_profile clear_flag create_timing_cache "
                      "profiling_verbosity progress_monitor set_flag set_timing_cache",
    "ICudaEngine": "create_execution_context get_tensor_dtype get_tensor_mode get_tensor_name "
                   "get_tensor_profile_shape num_io_tensors serialize",
    "IExecutionContext": "execute_async_v3 get_tensor_shape infer_shapes set_input_shape "
                         "set_output_allocator set_tensor_address",
    "ILogger": "__init__", "IOutputAllocator": "__init__", "IProgressMonitor": "__init__",
    "IOptimizationProfile": "set_shape",
    "ITimingCache": "serialize",
    "NetworkDefinitionCreationFlag": "STRONGLY_TYPED",
    "OnnxParser": "get_error num_errors parse_from_file",
    "OnnxParserRefitter": "get_error num_errors refit_from_file",
    "ParserError": "code desc node_name node_operator",
    "ProfilingVerbosity": "DETAILED",
    "Refitter": "get_missing_weights refit_cuda_engine",
    "Runtime": "deserialize_cuda_engine",
    "TensorIOMode": "INPUT OUTPUT",
}  # fmt: skip
# The classes of the objects that the sources hold, by the names that they give them.
HELD = {
    "parsed.builder": "Builder", "builder": "Builder", "parser": "OnnxParser", "e": "ParserError",
    "config": "IBuilderConfig", "profile": "IOptimizationProfile", "cache": "ITimingCache",
    "engine": "ICudaEngine", "self._engine": "ICudaEngine", "self._context": "IExecutionContext",
    "context": "IExecutionContext", "runtime": "Runtime", "kinds": "DataType",
    "mode": "TensorIOMode", "opened.engine": "ICudaEngine", "refitter": "Refitter",
    "reader": "OnnxParserRefitter",
}  # fmt: skip
MODULE = ("trt", "library.module", "opened.library.module", "self._trt")


def names_used(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Attribute):
            continue
        owner = ast.unparse(node.value)
        if owner in MODULE:
            yield "", node.attr
        elif owner.rpartition(".")[0] in MODULE:
            yield owner.rpartition(".")[2], node.attr
        elif owner in HELD:
            yield HELD[owner], node.attr


def test_only_names_of_every_version_are_used():
    known = {(owner, n) for owner, names in EVERYWHERE.items() for n in names.split()}
    used = {u for path in SOURCES if path.stem in HOLDERS for u in names_used(path)}
    # A class is read on the way to its members.
    used -= {("", owner) for owner in EVERYWHERE if ("", owner) not in known}
    assert used == known


def test_no_other_source_touches_the_library():
    for path in SOURCES:
        if path.stem not in HOLDERS:
            assert "library.module" not in path.read_text(), path


HOLDERS = ("library", "build", "refit", "runner")


# --- command line ---------------------------------------------------------------------------------


NET = "tests.small_nets:ConvNet"


@pytest.mark.slow
def test_commands(run, tmp_path, no_library):
    path = tmp_path / "net.trt"
    code, out, _ = run(
        "export", NET, "--shape", "1x3x8x8", "--target", "trt", "-o", path, "--precision", "fp16",
        "--profile", "batch=1:4:16",
    )  # fmt: skip
    assert code == 0
    assert f"refold build {path} && refold verify {path}" in out
    assert artifact.read(path).inputs[0].profile[2] == (16, 3, 8, 8)
    code, out, _ = run("verify", path, "--onnx", "--json")
    assert code == 0
    assert json.loads(out)["passed"]
    code, out, _ = run("check", path, "--target", "trt:10.3")
    assert code == 0
    assert "none of " in out
    assert "no parser" in out
    code, _, err = run("build", path)
    assert code == exit_codes.ERROR
    assert "pip install tensorrt" in err
    code, _, err = run("verify", path)
    assert code == exit_codes.ERROR


@pytest.mark.slow
def test_check_rejects_with_an_exit_code(run, tmp_path, no_library):
    name = "tests.backends.tensorrt.test_tensorrt:Pooled"
    code, out, _ = run("check", name, "--shape", "1x3x8x8", "--json")
    found = json.loads(out)
    assert code == exit_codes.ERROR
    assert found["accepted"] is False
    assert found["rejections"][0]["modules"] == "pool"
    code, out, _ = run("check", name, "--shape", "1x3x8x8")
    assert "MaxPool with dilation" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", NET, "--target", "onnx"),
        ("check", NET, "--target", "trt:7"),
        ("check", "nothing.onnx"),
        ("verify", "nothing"),
        ("build", "tests"),
        ("export", NET, "--shape", "1x3x8x8", "--target", "trt", "--profile", "batch=1:2"),
    ],
)
def test_usage_errors(run, arguments):
    code, _, err = run(*arguments)
    assert code == exit_codes.USAGE
    assert err
