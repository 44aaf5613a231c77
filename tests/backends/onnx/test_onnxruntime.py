import pytest
import torch

import refold
from refold.backends.onnx import session as backend
from refold.errors import BackendError, MissingDependencyError, UsageError
from tests.small_nets import ConvNet, PaddedMaxPool, seeded


@pytest.mark.slow
@pytest.mark.parametrize(("twice", "own"), [(False, 0), (True, 1)])
def test_zero_pad_before_max_pool_stays_zero(twice, own, tmp_path):
    # Everything is about -100: a border taken as -inf would show.
    model, x = seeded(PaddedMaxPool(twice, own)), torch.randn(2, 2, 9, 9)
    compiled = refold.compile_for_inference(model, x, target="ort")
    torch.testing.assert_close(compiled(x), model(x))
    assert any("Pad before MaxPool" in note for note in compiled.report.notes)

    session = backend.open_session(compiled.save(tmp_path / "net.onnx"))
    (got,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(x))


@pytest.mark.slow
def test_runtime_miscompiles_the_plain_spelling(tmp_path, monkeypatch):
    """Why the other spelling exists; once this fails, the runtime was mended."""
    monkeypatch.setattr("refold.backends.onnx.export.keep_pads_before_max_pool", lambda model: 0)
    model, x = seeded(PaddedMaxPool()), torch.randn(2, 2, 9, 9)
    with pytest.raises(refold.RefoldError, match="from the float64 reference"):
        refold.compile_for_inference(model, x, target="ort")


@pytest.mark.slow
def test_pad_with_minus_infinity_is_left_to_the_runtime():
    class Net(torch.nn.Module):
        def forward(self, x):
            y = torch.nn.functional.pad(x - 100, (1, 1, 1, 1), value=-torch.inf)
            return torch.nn.functional.max_pool2d(y, 3)

    x = torch.randn(2, 2, 7, 7)
    compiled = refold.compile_for_inference(Net(), x, target="ort")
    torch.testing.assert_close(compiled(x), Net()(x))
    assert not any("Pad" in note for note in compiled.report.notes)


@pytest.mark.slow
def test_threads_are_an_option(monkeypatch):
    seen = {}
    real = backend.open_session
    monkeypatch.setattr(
        backend,
        "open_session",
        lambda p, threads=0, **_: seen.update(n=threads) or real(p, threads=threads),
    )
    model, x = seeded(ConvNet()), torch.randn(1, 3, 8, 8)
    compiled = refold.compile_for_inference(model, x, target="ort", threads=1)
    assert seen == {"n": 1}
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(compiled(x), model(x))


def test_negative_threads():
    with pytest.raises(UsageError, match="threads must be 0"):
        refold.compile_for_inference(ConvNet(), torch.randn(1, 3, 8, 8), target="ort", threads=-1)


def test_bfloat16_is_refused_with_the_reason():
    model = seeded(ConvNet()).to(torch.bfloat16)
    with pytest.raises(BackendError, match="bfloat16, which NumPy"):
        refold.compile_for_inference(
            model, torch.randn(2, 3, 8, 8, dtype=torch.bfloat16), target="ort", verify=False
        )


@pytest.fixture
def no_runtime(monkeypatch):
    real = refold.backends.base.importlib.util.find_spec
    monkeypatch.setattr(
        refold.backends.base.importlib.util,
        "find_spec",
        lambda name, *a: None if name == "onnxruntime" else real(name, *a),
    )


def test_missing_runtime_names_the_extra(no_runtime):
    message = r"onnxruntime is not installed: pip install 'refold\[ort\]'"
    with pytest.raises(MissingDependencyError, match=message):
        refold.compile_for_inference(ConvNet(), torch.randn(1, 3, 8, 8), target="ort")


@pytest.mark.slow
def test_onnx_is_written_without_a_runtime(no_runtime, tmp_path):
    compiled = refold.compile_for_inference(ConvNet(), torch.randn(1, 3, 8, 8), target="onnx")
    assert compiled.save(tmp_path / "net.onnx").is_file()
    assert compiled.report.numerics["passed"]
    assert compiled.report.artifact_numerics is None
    assert any("was not run here: onnxruntime is not" in n for n in compiled.report.notes)
    with pytest.raises(MissingDependencyError, match="onnxruntime is not installed"):
        compiled(torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize("target", ["onnx", "ort"])
def test_who_only_writes_the_file_opens_no_session(target, tmp_path, monkeypatch) -> None:
    """It has weights of its own, as many as the model."""
    from refold.backends.onnx import session

    opened, own = [], session.open_session
    monkeypatch.setattr(session, "open_session", lambda *a, **k: opened.append(a) or own(*a, **k))
    model, x = torch.nn.Linear(3, 4).eval(), torch.randn(2, 3)
    compiled = refold.compile_for_inference(model, (x,), target=target, verify=False)
    compiled.save(tmp_path / "net.onnx")
    assert len(opened) == (target == "ort")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), model(x))
    assert len(opened) == 1
