import errno
from pathlib import Path

import onnx
import pytest
import torch

import refold
from refold.backends.onnx.targets import OnnxTarget
from refold.errors import BackendError, UsageError
from tests.small_nets import ConvNet, Structured, assert_same, seeded, structured_call


@pytest.fixture(scope="module")
def compiled():
    model, x = seeded(ConvNet()), torch.randn(1, 3, 8, 8)
    return refold.compile_for_inference(model, x, target="onnx", expect={"batch-norm": 1})


@pytest.fixture(scope="module")
def structured():
    model = seeded(Structured())
    args, kwargs = structured_call(2)
    return model, refold.compile_for_inference(
        _Call(model), {"x": args[0], **kwargs}, target="onnx"
    )


class _Call(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x, extra):
        return self.inner(x, extra=extra)


def test_file_is_valid_and_folded(compiled, tmp_path):
    model = onnx.load(compiled.save(tmp_path / "net.onnx"))
    onnx.checker.check_model(model, full_check=True)
    ops = [n.op_type for n in model.graph.node]
    assert ops.count("Conv") == 1
    assert "BatchNormalization" not in ops
    assert model.opset_import[0].version == 20


def test_names_are_telling(compiled, tmp_path):
    graph = onnx.load(compiled.save(tmp_path / "net.onnx")).graph
    assert [i.name for i in graph.input] == ["x"]
    assert [o.name for o in graph.output] == ["output"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.slow
def test_names_of_nested_outputs(structured, tmp_path):
    _, folded = structured
    graph = onnx.load(folded.save(tmp_path / "net.onnx")).graph
    assert [i.name for i in graph.input] == ["x", "extra_a", "extra_b"]
    names = [o.name for o in graph.output]
    assert names[1:] == ["again_3", "size", "found_scores", "found_boxes", "best", "positive"]
    # A folded weight may have the name already.
    assert names[0].startswith("logits")
    assert len({*names, *(i.name for i in graph.initializer)}) == len(names) + len(
        graph.initializer
    )


def test_structure_survives_the_runtime(structured):
    model, folded = structured
    for batch, reverse in ((1, False), (3, True)):
        args, kwargs = structured_call(batch, reverse)
        got = folded(*args, **kwargs)
        assert_same(got, model(*args, **kwargs))
        assert got["size"] == batch


def test_provenance_reaches_the_file(compiled, tmp_path):
    path = compiled.save(tmp_path / "net.onnx")
    model = onnx.load(path)
    conv = next(n for n in model.graph.node if n.op_type == "Conv")
    told = {p.key: p.value for p in conv.metadata_props}
    assert set(told["refold.modules"].split(", ")) == {"conv", "bn"}
    assert "fold-batch-norm" in told["refold.rules"]
    assert told["refold.source"].startswith("small_nets.py:")
    assert "/small_nets.py" not in told["refold.source"]


def test_no_folder_of_the_builder_is_in_the_file(compiled, tmp_path):
    data = compiled.save(tmp_path / "net.onnx").read_bytes()
    here = str(Path(__file__).resolve().parents[3])
    assert here.encode() not in data
    assert str(Path(torch.__file__).parent).encode() not in data
    assert b"stack_trace" not in data


def test_existing_file_is_kept_without_force(compiled, tmp_path):
    path = tmp_path / "net.onnx"
    path.write_text("mine")
    with pytest.raises(UsageError, match=r"exists: pass force=True"):
        compiled.save(path)
    assert path.read_text() == "mine"
    compiled.save(path, force=True)
    assert path.stat().st_size > 100
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOSPC])
def test_nothing_is_left_when_writing_fails(compiled, tmp_path, monkeypatch, code):
    path = tmp_path / "net.onnx"
    path.write_text("mine")

    def full(self, artifact, folder, name):
        (folder / name).write_text("half")
        raise OSError(code, "no way")

    monkeypatch.setattr(OnnxTarget, "save", full)
    with pytest.raises(BackendError, match="no way; nothing was written"):
        compiled.save(path, force=True)
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_directory_and_directory_as_file(compiled, tmp_path):
    with pytest.raises(BackendError, match="does not exist"):
        compiled.save(tmp_path / "no" / "net.onnx")
    with pytest.raises(UsageError, match="is a directory"):
        compiled.save(tmp_path)


def test_large_weights_go_beside(compiled, tmp_path, monkeypatch):
    monkeypatch.setattr("refold.backends.onnx.export._EXTERNAL_DATA_BYTES", 100)
    path = compiled.save(tmp_path / "net.onnx")
    # Small tensors stay inside.
    assert (tmp_path / "net.onnx.data").stat().st_size == 4 * 4 * 3 * 3 * 3
    onnx.checker.check_model(str(path))
    from refold.backends.onnx.session import open_session

    x = torch.randn(2, 3, 8, 8)
    (got,) = open_session(path).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), compiled(x))


@pytest.mark.parametrize("opset", [13, 17, 99])
def test_opset_out_of_range_is_said(opset):
    with pytest.raises(UsageError, match="choose 18 to"):
        refold.compile_for_inference(ConvNet(), torch.randn(2, 3, 8, 8), target="onnx", opset=opset)


def test_model_with_state_is_refused():
    class Counter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count.add_(1)
            return x + self.count

    model = Counter()
    with pytest.raises(BackendError, match=r"writes its own state \(count\)"):
        refold.compile_for_inference(model, torch.randn(2, 3), target="onnx")
    compiled = refold.compile_for_inference(model, torch.randn(2, 3))
    x = torch.zeros(2, 3)
    assert [float(compiled(x)[0, 0]) for _ in range(2)] == [1.0, 2.0]
    assert model.count == 0


@pytest.mark.slow
def test_model_that_writes_its_input_is_noted():
    class InPlace(torch.nn.Module):
        def forward(self, x):
            return x.add_(1) * 2

    compiled = refold.compile_for_inference(InPlace(), torch.randn(2, 3), target="onnx")
    assert any("writes its input x" in note for note in compiled.report.notes)


def test_untranslatable_operator_is_named():
    class Odd(torch.nn.Module):
        def forward(self, x):
            return torch.linalg.eigvalsh(x @ x.mT)

    with pytest.raises(BackendError, match=r"eigh|eigvalsh|linalg"):
        refold.compile_for_inference(Odd(), torch.randn(2, 3, 3), target="onnx", verify=False)
