"""What a newcomer, or somebody worse, types: an error that names the fix, and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from refold.cli import exit_codes, model_spec
from refold.errors import FrontendError, UsageError
from tests.small_nets import ConvNet

SHAPE = ("--shape", "1x3x8x8")
NET = "tests.small_nets:ConvNet"
FAILING = "tests.cli.failing"


# --- makers of models -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "says", "line"),
    [
        ("raises", "raises ValueError: no weights for you", "_inner: raise ValueError"),
        ("exits", "ends the process with 7", "exits: sys.exit(7)"),
        ("exits_with_nothing", "ends the process\n", "exits_with_nothing: raise SystemExit"),
        ("raises_its_own", "raises _OfTheirOwn: odd", "raises_its_own: raise"),
        ("recurses", "raises RecursionError", "recurses: return recurses()"),
        ("no_memory", "raises MemoryError\n", "no_memory: raise MemoryError"),
        ("asserts", "raises AssertionError", "asserts: assert not ConvNet"),
        ("a_type_error_inside", "raises TypeError", "a_type_error_inside: return len(5)"),
        ("reads_a_file", "raises FileNotFoundError", "reads_a_file: with open"),
        ("FailsInInit", "raises RuntimeError: in init", "__init__: raise RuntimeError"),
        ("fails_in_eval", "raises RuntimeError: in eval", "eval: raise RuntimeError"),
        ("no_attributes.net", "raises RuntimeError: asked for net", "__getattr__: raise"),
    ],
)
def test_the_users_own_line_is_named(run, name, says, line) -> None:
    code, out, err = run("explain", f"{FAILING}:{name}", *SHAPE)
    assert code == exit_codes.ERROR
    assert f"model '{FAILING}:{name}' {says}" in err
    assert "failing.py:" in err
    assert f"in {line}" in err
    assert out == ""


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("takes_one", "must be callable without arguments"),
        ("makes_nothing", "made a NoneType"),
        ("makes_a_class", "made a type"),
        ("makes_two", "made a tuple"),
        ("makes_later", "made a coroutine"),
        ("number", "is a int, not a model"),
        ("no_attributes", "not a model or callable"),
        ("nothing_there", "no 'nothing_there' there"),
    ],
)
def test_what_is_no_maker_is_said(run, name, says, recwarn) -> None:
    code, _, err = run("explain", f"{FAILING}:{name}", *SHAPE)
    assert code == exit_codes.USAGE
    assert says in err
    assert not [w for w in recwarn if "never awaited" in str(w.message)]


def test_a_maker_that_is_interrupted(run) -> None:
    assert run("explain", f"{FAILING}:interrupted", *SHAPE)[0] == exit_codes.INTERRUPTED


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def f(:", "SyntaxError"),
        ("raise RuntimeError('at import')", "raises RuntimeError: at import"),
        ("import sys; sys.exit(3)", "ends the process with 3"),
        ("import no_such_package", "No module named 'no_such_package'"),
    ],
)
def test_modules_that_cannot_be_imported(tmp_path, monkeypatch, text, says) -> None:
    name = f"broken_{abs(hash(text))}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises((FrontendError, UsageError)) as caught:
        model_spec.load_model(f"{name}:f")
    assert says in str(caught.value)
    assert f"{name}.py:1" in str(caught.value)


@pytest.mark.parametrize("spec", [":f", "module:", ":", "..module:f", "no_such_module:f"])
def test_specs_that_name_nothing(run, spec) -> None:
    assert run("explain", spec, *SHAPE)[0] == exit_codes.USAGE


def test_errors_of_makers_are_json_where_that_is_asked_for(run) -> None:
    code, out, _ = run("explain", f"{FAILING}:raises", *SHAPE, "--json")
    error = json.loads(out)["error"]
    assert (code, error["exit_code"]) == (exit_codes.ERROR, exit_codes.ERROR)
    assert "no weights for you" in error["message"]


def test_what_a_model_prints_is_no_part_of_the_answer(run, tmp_path) -> None:
    code, out, err = run(
        "export", f"{FAILING}:Prints", *SHAPE, "--target", "torch", "-o", tmp_path / "net.pt2",
        "--json", "--randomize-bn",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["output"].endswith("net.pt2")
    assert "hello from the maker" in err
    assert "hello from forward" in err
    code, out, err = run(
        "verify", f"{FAILING}:Prints", tmp_path / "net.pt2", *SHAPE, "--json", "--randomize-bn"
    )
    assert code == 0, err
    assert json.loads(out)["passed"]


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--shape", "1x3x999999x999999"), "larger than the memory"),
        (("--shape", "99999999999999999999999x3"), "larger than the memory"),
        (("--shape", "Nx3xH=99999999xW=99999999"), "larger than the memory"),
        (("--shape", "0x3x8x8"), "sizes must be positive"),
        (("--shape", "1.5x3"), "neither a size nor a name"),
        (("--shape", ""), "neither a size nor a name"),
        (("--input", "int64:1x77:0..99999999999999999999"), "cannot be made"),
        (("--input", "uint8:1x3:-5..300"), "from -5 to 300 cannot be made"),
        (("--input", "int8:1x3:0..1000"), "from 0 to 1000 cannot be made"),
        ((*SHAPE, "--seed", "99999999999999999999999"), "64 bits"),
        ((*SHAPE, "--dtype", "int8"), "floating-point dtype"),
        ((*SHAPE, "--pipeline", ""), "cannot be read"),
        ((*SHAPE, "--checkpoint", "/tmp"), "directory"),
        ((*SHAPE, "--checkpoint", os.devnull), "device"),
        ((*SHAPE, "--bind", f"x={os.devnull}.npy"), "no such file"),
    ],
)
def test_nonsense_is_a_usage_error(run, arguments, says) -> None:
    code, _, err = run("explain", NET, *arguments)
    assert code == exit_codes.USAGE
    assert says in err


# --- checkpoints ----------------------------------------------------------------------------------


def _bomb(path: Path) -> None:
    torch.save(ConvNet().state_dict(), path)
    with zipfile.ZipFile(path) as whole:
        entries = {e.filename: whole.read(e) for e in whole.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in entries.items():
            new.writestr(name, data)
        new.writestr(f"{path.stem}/data/99", bytes(40 << 20))


def _header(path: Path, edit: Any) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(ConvNet().state_dict(), path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = edit(header)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def _lies(header: dict[str, Any]) -> bytes:
    first = next(name for name in header if name != "__metadata__")
    header[first]["shape"] = [10**6, 10**6]
    return json.dumps(header).encode()


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("empty.pt", lambda p: p.write_bytes(b"")),
        ("cut.pt", lambda p: (torch.save(ConvNet().state_dict(), p), os.truncate(p, 500))),
        ("list.pt", lambda p: torch.save([1], p)),
        ("tensor.pt", lambda p: torch.save(torch.ones(3), p)),
        ("numbers.pt", lambda p: torch.save({1: torch.ones(3)}, p)),
        ("scalar.pt", lambda p: torch.save({"conv.weight": 5}, p)),
        ("module.pt", lambda p: torch.save(ConvNet(), p)),
        ("bomb.pt", _bomb),
        ("empty.safetensors", lambda p: p.write_bytes(b"")),
        ("lies.safetensors", lambda p: _header(p, _lies)),
        ("deep.safetensors", lambda p: _header(p, lambda h: b"[" * 100_000)),
        ("long.safetensors", lambda p: p.write_bytes(b"\xff" * 8 + b"{}")),
    ],
)
def test_checkpoints_that_are_none(run, tmp_path, name, write) -> None:
    write(tmp_path / name)
    code, _, err = run("explain", NET, *SHAPE, "--checkpoint", tmp_path / name)
    assert code == exit_codes.ERROR
    assert f"checkpoint {tmp_path / name}" in err
    assert "weights_only=False" not in err.replace(" to ", "=")
    assert "Traceback" not in err


# --- what is read is not overwritten --------------------------------------------------------------


@pytest.mark.parametrize("target", ["onnx", "torch"])
def test_export_overwrites_no_input(run, tmp_path, target) -> None:
    weights, value = tmp_path / "w.pt", tmp_path / "scale.npy"
    torch.save(ConvNet().state_dict(), weights)
    np.save(value, np.ones(3))
    (tmp_path / "link.onnx").symlink_to(weights)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    for output in (weights, tmp_path / "link.onnx", tmp_path / "." / ".." / tmp_path.name / "w.pt"):
        code, _, err = run(
            "export", NET, *SHAPE, "--target", target, "--checkpoint", weights, "-o", output,
            "--force",
        )  # fmt: skip
        assert code == exit_codes.USAGE
        assert "is read to make it" in err
    code, _, err = run("export", NET, "--bind", f"x={value}", "-o", value, "--force")
    assert code == exit_codes.USAGE
    assert "is read to make it" in err
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_export_does_not_overwrite_its_model(run, tmp_path, monkeypatch) -> None:
    x = torch.randn(2, 3, 8, 8)
    model = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(ConvNet().eval(), (x,)), model)
    source = tmp_path / "my_own_net.py"
    source.write_text("from tests.small_nets import ConvNet\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = {p: p.read_bytes() for p in (model, source)}
    for spec, output in ((model, model), ("my_own_net:ConvNet", source)):
        code, _, err = run(
            "export", spec, *SHAPE, "--target", "torch", "-o", output, "--force", "--no-verify"
        )
        assert code == exit_codes.USAGE, err
        assert "is read to make it" in err
    assert {p: p.read_bytes() for p in (model, source)} == before


def test_a_recipe_overwrites_no_other_file(run, tmp_path) -> None:
    pytest.importorskip("onnxscript")
    mine = tmp_path / "net.onnx.recipe"
    mine.write_text("mine")
    command = ("export", NET, *SHAPE, "--recipe", "--no-verify", "-o", tmp_path / "net.onnx")
    code, _, err = run(*command)
    assert code == exit_codes.USAGE
    assert "net.onnx.recipe exists" in err
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx.recipe"]
    assert mine.read_text() == "mine"
    assert run(*command, "--force")[0] == 0
    assert mine.read_bytes()[:2] == b"PK"


# --- damaged directories --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxscript")
    import refold

    compiled = refold.compile_for_inference(
        ConvNet().eval(), torch.randn(1, 3, 8, 8), target="trt", build=False
    )
    return compiled.save(tmp_path_factory.mktemp("trt") / "net.trt")


def _replace(name: str, data: bytes) -> Any:
    return lambda folder: (folder / name).write_bytes(data)


def _other_kind(name: str, make: Any) -> Any:
    return lambda folder: ((folder / name).unlink(), make(folder / name))


def _flip(folder: Path) -> None:
    data = bytearray((folder / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.onnx").write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.onnx").unlink(),
        lambda folder: (folder / "build.json").unlink(),
        lambda folder: shutil.rmtree(folder / "verify"),
        lambda folder: [p.unlink() for p in folder.iterdir() if p.is_file()],
        _replace("build.json", b""),
        _replace("build.json", b"{"),
        _replace("build.json", b"[]"),
        _replace("build.json", b"null"),
        _replace("build.json", b"[" * 100_000),
        _replace("build.json", b"\xff\xfe\x00"),
        _replace("model.onnx", b""),
        _replace("model.onnx", b"hello" * 20),
        _replace("provenance.json", b"{"),
        _flip,
        _other_kind("model.onnx", os.mkdir),
        _other_kind("model.onnx", os.mkfifo),
        _other_kind("build.json", os.mkfifo),
    ],
)
@pytest.mark.parametrize("command", [("check",), ("verify", "--onnx"), ("build",)])
def test_damaged_directories(run, exported, tmp_path, damage, command) -> None:
    folder = tmp_path / "net.trt"
    shutil.copytree(exported, folder)
    damage(folder)
    code, out, err = run(command[0], folder, *command[1:])
    assert code in (exit_codes.ERROR, exit_codes.USAGE)
    assert str(folder) in err
    assert out == ""


def test_whole_directories_are_checked(run, exported) -> None:
    assert run("check", exported)[0] == exit_codes.OK


@pytest.mark.parametrize("command", ["check", "verify", "build"])
def test_what_is_no_directory_of_ours(run, tmp_path, command) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "file", tmp_path / "empty", tmp_path / "missing", os.devnull):
        code, _, err = run(command, path)
        assert code == exit_codes.USAGE
        assert str(path) in err


def test_files_that_may_not_be_read(run, exported, tmp_path, monkeypatch) -> None:
    from refold.backends.tensorrt import artifact

    def refused(path: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(artifact, "digest", refused)
    code, _, err = run("check", exported)
    assert code == exit_codes.ERROR
    assert "cannot be read: Permission denied" in err


@pytest.mark.parametrize("data", [b"", b"hi" * 50, b"\x08\x07"])
def test_files_that_are_no_onnx(run, tmp_path, data) -> None:
    pytest.importorskip("onnx")
    (tmp_path / "net.onnx").write_bytes(data)
    code, _, err = run("check", tmp_path / "net.onnx")
    assert code == exit_codes.ERROR
    assert "net.onnx is not an ONNX file" in err
