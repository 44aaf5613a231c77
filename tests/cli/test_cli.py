import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from refold import __version__
from refold.backends.onnx.targets import OnnxTarget
from refold.cli import exit_codes, model_spec
from refold.cli import progress as telling
from refold.errors import FrontendError, UsageError
from tests.small_nets import ConvNet, LateNorm

SHAPE = ("--shape", "1x3x8x8")
NET = "tests.small_nets:ConvNet"
PLAIN = "tests.small_nets:NothingToFold"


# --- commands -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_export_then_verify(run, tmp_path):
    path = tmp_path / "net.onnx"
    code, out, _ = run(
        "export", NET, *SHAPE, "-o", path, "--randomize-bn", "--expect", "batch-norm=1"
    )
    assert code == 0
    assert path.is_file()
    assert "batch-norm 1 -> 0" in out
    command = out.strip().splitlines()[-1].split("check it again: refold ")[1]
    code, out, _ = run(*command.split())
    assert code == 0
    assert "relative error" in out
    # Other weights: the file is not of this model.
    code, _, err = run(*command.split(), "--seed", 1)
    assert code == exit_codes.NUMBERS
    assert "from the float64 reference" in err


def test_export_json_to_torch(run, tmp_path):
    path = tmp_path / "net.pt2"
    code, out, _ = run("export", NET, *SHAPE, "-o", path, "--target", "torch", "--json")
    data = json.loads(out)
    assert code == 0
    assert data["schema"] == 1
    assert data["output"] == str(path)
    assert data["model"] == NET
    code, out, _ = run("verify", NET, path, *SHAPE, "--json")
    assert code == 0
    assert json.loads(out)["passed"]
    # A saved program is a model, with its own example inputs.
    code, out, _ = run("explain", path, "--json")
    assert code == 0
    assert json.loads(out)["before"]["census"]["conv"] == 1


def test_explain(run):
    code, out, _ = run("explain", "tests.small_nets:LateNorm", "--shape", "Nx3xH=4xW=6", "--json")
    data = json.loads(out)
    assert code == 0
    assert data["target"] is None
    assert data["declined"][0]["module"] == "bn"
    assert [type(s) for s in data["inputs"][0]["sizes"]] == [str, int, str, str]


def test_max_growth(run):
    arguments = ("explain", "tests.models.systems.hypercomplex:compacter_kept", "--json")
    kept = json.loads(run(*arguments, "--shape", "2x256")[1])
    code, out, _ = run(*arguments, "--shape", "2x256", "--max-growth", "inf")
    assert code == 0
    folded = json.loads(out)
    assert kept["after"]["census"]["sum"] == kept["before"]["census"]["sum"] == 4
    assert "sum" not in folded["after"]["census"]
    assert folded["after"]["bytes"] > kept["after"]["bytes"] + 4 * 90 * 1024
    code, _, err = run(*arguments, "--shape", "2x256", "--max-growth", "0.5")
    assert code == 2
    assert "max_growth is 0.5" in err


def test_targets_fit_a_narrow_terminal(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run("targets")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "\033" not in out


def test_passes_and_targets(run):
    code, out, _ = run("passes", "--json")
    data = json.loads(out)
    assert code == 0
    assert {"fold-batch-norm", "clean-up"} <= {p["name"] for p in data["passes"]}
    assert "fold-batch-norm" in data["pipelines"]["default"]
    assert all(p["summary"] for p in data["passes"])
    exactness = {p["name"]: p["exactness"] for p in data["passes"]}
    assert set(exactness.values()) <= {"exact", "reassociates", "approximate"}
    assert exactness["substitute-shift-add"] == "approximate"
    code, out, _ = run("targets", "--json")
    rows = {t["name"]: t for t in json.loads(out)["targets"]}
    edge = ["ort-format", "openvino", "executorch", "litert", "ncnn", "coreml"]
    assert [name for name in rows if name in edge] == edge
    assert [name for name in rows if rows[name]["shapes"] == "fixed"] == edge[2:]
    assert rows["coreml"]["verified"] == "converted, never run"
    assert rows["ncnn"]["dtypes"] == ["float32"]
    assert list(rows)[:5] == [
        "torch",
        "inductor",
        "aoti",
        "onnx",
        "ort",
    ]
    for command in ("passes", "targets"):
        code, out, _ = run(command)
        assert code == 0
        assert out


def test_version_and_help():
    module = [sys.executable, "-m", "refold"]
    here = Path(__file__).parents[2]
    out = subprocess.run(
        [*module, "--version"], capture_output=True, text=True, check=True, cwd=here
    )
    assert out.stdout.strip() == f"refold {__version__}"
    out = subprocess.run([*module, "--help"], capture_output=True, text=True, check=True, cwd=here)
    assert "examples:" in out.stdout
    assert "exit codes:" in out.stdout


# --- exit codes -----------------------------------------------------------------------------------


def test_no_command_is_usage(run):
    code, out, _ = run()
    assert code == exit_codes.USAGE
    assert "examples:" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", NET), "give its input shapes"),
        (("export", NET, "--shape", "1x3xfoo-8"), "neither a size nor a name"),
        (("export", NET, "--shape", "1x3xHx8"), "needs an example size: H=224"),
        (("export", NET, "--input", "int46:1x3"), "did you mean 'int64'"),
        (("export", NET, *SHAPE, "--target", "onx"), "did you mean 'onnx'"),
        (("export", NET, *SHAPE, "--pipeline", "min-node"), "did you mean 'min-nodes'"),
        (("export", NET, *SHAPE, "--expect", "batch-norm"), "write KIND=NUMBER"),
        (("export", NET, *SHAPE, "--opset", "3"), "choose 18 to"),
        (("export", "tests.small_nets:ConvNot", *SHAPE), "did you mean 'ConvNet'"),
        (("export", "tests.small_nots:ConvNet", *SHAPE), "No module named"),
        (("export", "resnet", *SHAPE), "write timm:NAME, package.module:callable"),
        (("export", "net.pth", *SHAPE), "name the model and pass --checkpoint net.pth"),
        (("verify", NET, "no.onnx", *SHAPE), "no.onnx: no such file"),
        (("explain", PLAIN, "--shape", "2x3", "--randomize-bn"), "has no batch norm"),
        (("explain", NET, *SHAPE, "--colour"), "unrecognized arguments: --colour"),
        (("explain", NET, *SHAPE, "--exclud=x"), "did you mean '--exclude'"),
        (("explain", NET, "--shap", "2x3x8x8"), "did you mean '--shape'"),
    ],
)  # fmt: skip
def test_usage_errors_exit_with_2(run, arguments, message, tmp_path):
    code, out, err = run(
        *arguments, *(("-o", tmp_path / "x.onnx") if arguments[0] == "export" else ())
    )
    assert code == exit_codes.USAGE
    assert message in err
    assert not out
    assert list(tmp_path.iterdir()) == []


def test_untraceable_model_exits_with_1(run):
    code, _, err = run("explain", NET, "--shape", "1x4x8x8")
    assert code == exit_codes.ERROR
    assert "ConvNet raises on the example inputs" in err
    code, _, err = run("explain", "net.onnx")
    assert code == exit_codes.ERROR
    assert "not yet" in err


def test_missing_fold_exits_with_4_and_writes_nothing(run, tmp_path):
    path = tmp_path / "net.onnx"
    code, out, err = run(
        "export", "tests.small_nets:LateNorm", "--shape", "1x3x4x4", "-o", path,
        "--expect", "batch-norm=1", "--json",
    )  # fmt: skip
    assert code == exit_codes.EXPECTATION
    assert "0 of 1 went" in err
    assert json.loads(out)["error"]["exit_code"] == 4
    assert not path.exists()


def test_existing_output_is_refused_before_any_work(run, tmp_path):
    path = tmp_path / "net.onnx"
    path.write_text("mine")
    start = time.monotonic()
    code, _, err = run("export", "no.such:model", *SHAPE, "-o", path)
    assert code == exit_codes.USAGE
    assert "--force on the command line" in err
    assert path.read_text() == "mine"
    assert time.monotonic() - start < 5


def test_unwritable_directory_is_said_before_any_work(run, tmp_path, monkeypatch):
    code, _, err = run("export", "no.such:model", *SHAPE, "-o", tmp_path / "no" / "net.onnx")
    assert code == exit_codes.ERROR
    assert "does not exist" in err
    monkeypatch.setattr("refold.backends.write.os.access", lambda path, mode: False)
    code, _, err = run("export", "no.such:model", *SHAPE, "-o", tmp_path / "net.onnx")
    assert code == exit_codes.ERROR
    assert "is not writable" in err


@pytest.mark.slow
def test_interrupt_exits_with_130(run, tmp_path, monkeypatch):
    def interrupted(self, artifact, folder, name):
        (folder / name).write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(OnnxTarget, "save", interrupted)
    code, _, err = run("export", NET, *SHAPE, "-o", tmp_path / "net.onnx", "--no-verify")
    assert code == 130
    assert "nothing was written" in err
    assert list(tmp_path.iterdir()) == []


# --- models by name -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sizes", "dynamic"),
    [
        ("1x3x224x224", (1, 3, 224, 224), ()),
        ("Nx3x224x224", (2, 3, 224, 224), (0,)),
        ("N=4x3xH=32xW=48", (4, 3, 32, 48), (0, 2, 3)),
    ],
)
def test_shapes(text, sizes, dynamic):
    parsed = model_spec.parse_shape(text)
    assert (parsed.sizes, parsed.dynamic) == (sizes, dynamic)


def test_integer_inputs_stay_in_their_range():
    parsed = model_spec.parse_input("int64:50x20:3..7")
    example = parsed.example(torch.float32)
    assert example.dtype == torch.int64
    assert set(example.flatten().tolist()) == {3, 4, 5, 6, 7}
    for bad in ("int64:1x2:7..3", "int64:1x2:3", "int64", "int64:0x2"):
        with pytest.raises(UsageError):
            model_spec.parse_input(bad)


def test_inputs_keep_their_order(run):
    code, out, _ = run(
        "explain",
        "tests.cli.test_cli:Gather",
        "--input",
        "float32:2x9",
        "--input",
        "int64:2x4:0..8",
        "--json",
    )
    assert code == 0
    assert [i["dtype"] for i in json.loads(out)["inputs"]] == ["float32", "int64"]


class Gather(nn.Module):
    def forward(self, values, index):
        return values.gather(1, index)


def test_model_made_by_a_function_or_given_as_an_instance():
    assert isinstance(model_spec.load_model("tests.small_nets:LateNorm").model, LateNorm)
    assert model_spec.load_model("tests.cli.test_cli:INSTANCE").model is INSTANCE
    with pytest.raises(UsageError, match=r"made a int, not an nn\.Module"):
        model_spec.load_model("tests.cli.test_cli:seven")
    with pytest.raises(UsageError, match="callable without arguments"):
        model_spec.load_model("tests.cli.test_cli:_needs_argument")


INSTANCE = ConvNet()


def seven():
    return 7


def _needs_argument(width):
    return nn.Linear(width, width)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_checkpoints(tmp_path, suffix, nested):
    source, target = ConvNet(), ConvNet()
    path = tmp_path / f"net{suffix}"
    if suffix == ".safetensors":
        safetensors = pytest.importorskip("safetensors.torch")
        safetensors.save_file(source.state_dict(), path)
    else:
        torch.save({"state_dict": source.state_dict()} if nested else source.state_dict(), path)
    model_spec.load_checkpoint(target, path)
    assert torch.equal(source.conv.weight, target.conv.weight)


class _Hostile:
    def __reduce__(self):
        return (Path.touch, (Path("hostile"),))


def test_checkpoint_that_would_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": _Hostile()}, "net.pt")
    with pytest.raises(FrontendError, match="cannot be read"):
        model_spec.load_checkpoint(ConvNet(), "net.pt")
    assert not Path("hostile").exists()


def test_checkpoint_of_another_model(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "net.pt")
    with pytest.raises(FrontendError, match="does not fit the model"):
        model_spec.load_checkpoint(ConvNet(), tmp_path / "net.pt")


def test_randomized_batch_norms_keep_activations_in_range():
    torch.manual_seed(0)
    model = ConvNet().eval()
    assert model_spec.randomize_batch_norms(model, [torch.randn(8, 3, 8, 8)]) == 1
    assert not model.bn.training
    assert model.bn.momentum == 0.1
    assert model.bn.weight.std() > 0.1
    assert model(torch.randn(4, 3, 8, 8)).abs().max() < 100


# --- progress -------------------------------------------------------------------------------------


def test_progress_is_quiet_for_short_work_and_a_line_for_long(monkeypatch, capsys):
    progress = telling.Progress(sys.stderr)
    progress("short")
    progress.close()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(telling, "_QUIET_SECONDS", 0.01)
    progress("long")
    time.sleep(0.05)
    progress("next")
    progress.close()
    assert capsys.readouterr().err.splitlines()[0] == "refold: long ..."


@pytest.mark.slow
def test_timm_network_end_to_end(run, tmp_path):
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    path = tmp_path / "net.onnx"
    code, out, err = run(
        "export", "timm:repvgg_a0", "--shape", "1x3x64x64", "-o", path, "--randomize-bn",
        "--expect", "batch-norm=61", "--json",
    )  # fmt: skip
    assert code == 0, err
    data = json.loads(out)
    assert data["after"]["census"]["conv"] == 22
    code, out, _ = run("verify", "timm:repvgg_a0", path, "--shape", "1x3x64x64", "--randomize-bn")
    assert code == 0
    code, _, err = run("explain", "timm:repvgg_b0x")
    assert code == exit_codes.USAGE
    assert "did you mean 'repvgg_" in err
