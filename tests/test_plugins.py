"""Passes and targets of other packages, installed without a network: a wheel, unpacked."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import refold
from refold.backends import registry
from refold.backends.base import Target
from refold.cli import main
from refold.errors import UsageError
from refold.passes import find_pipeline

CODE = '''
from dataclasses import dataclass
import torch
import refold
from refold.rewrite.pattern import Call, Var


@dataclass(frozen=True)
class Options:
    scale: float = 1.0


@dataclass(frozen=True)
class DropTanh:
    """Leaves out every tanh; the table of this pass has a limit."""

    name: str = "drop-tanh"
    exactness: str = "exact"
    limit: int = 9

    def run(self, gm, context):
        found = [n for n in gm.graph.nodes if n.target is torch.ops.aten.tanh.default]
        for node in found[: self.limit]:
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
        return refold.PassResult(modified=bool(found[: self.limit]))


class Mine(refold.Target):
    name, suffix, options = "mine", ".mine", Options

    def lower(self, program, gm, options):
        from refold.backends.base import Artifact
        return Artifact((gm, options.scale))

    def load(self, artifact, options):
        gm, scale = artifact.content
        return lambda *a, **k: gm(*a, **k) * scale

    def save(self, artifact, folder, name):
        (folder / name).write_text(str(artifact.content[1]))

    def stats(self, artifact):
        return {"nodes": 1, "bytes": 0}


number = 3
'''
POINTS = """
[refold.passes]
drop-tanh = acme_rules:DropTanh
number = acme_rules:number
gone = acme_rules:Gone
other-name = acme_rules:DropTanh
clean-up = acme_rules:DropTanh

[refold.targets]
mine = acme_rules:Mine
absent = acme_missing:Target
untarget = acme_rules:DropTanh
torch = acme_rules:Mine
"""


@pytest.fixture
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A wheel with entry points, as an installer leaves it."""
    wheel = tmp_path / "acme_rules-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("acme_rules.py", CODE)
        info = "acme_rules-1.0.dist-info/"
        archive.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: acme-rules\nVersion: 1.0")
        archive.writestr(info + "entry_points.txt", POINTS)
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    monkeypatch.syspath_prepend(site)
    yield site
    sys.modules.pop("acme_rules", None)


class Net(nn.Module):
    def forward(self, x):
        return (x + 1).tanh() * 2


X = torch.randn(2, 3)


def test_nothing_is_imported_until_it_is_asked_for(acme: Path) -> None:
    refold.fold(Net(), X)
    assert {"mine", "absent"} <= set(registry.target_names())
    assert "acme_rules" not in sys.modules


def test_a_pass_by_name_and_options(acme: Path) -> None:
    done = refold.fold(Net(), X, pipeline="default,drop-tanh{limit=1}", verify=False)
    torch.testing.assert_close(done(X), (X + 1) * 2)
    kept = refold.fold(Net(), X, pipeline="default,drop-tanh{limit=0}")
    torch.testing.assert_close(kept(X), (X + 1).tanh() * 2)
    with pytest.raises(UsageError, match="did you mean 'drop-tanh'"):
        find_pipeline("default,drop-than")
    with pytest.raises(UsageError, match="did you mean 'limit'"):
        find_pipeline("default,drop-tanh{limt=1}")


def test_a_target_by_name_and_options(acme: Path, tmp_path: Path) -> None:
    done = refold.compile_for_inference(Net(), X, target="mine", scale=1.0)
    assert done.report.artifact_numerics["passed"]
    done.save(tmp_path / "net.mine")
    assert (tmp_path / "net.mine").read_text() == "1.0"
    with pytest.raises(UsageError, match="did you mean 'mine'"):
        refold.compile_for_inference(Net(), X, target="mne")


def test_both_from_the_command_line(acme: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "net.mine"
    arguments = ("export", "tests.test_plugins:Net", "--shape", "2x3", "-o", str(path))
    code = main([*arguments, "--target", "mine", "-O", "scale=1", "--pipeline", "default,drop-tanh",
                 "--no-verify", "--json"])  # fmt: skip
    out, err = capsys.readouterr()
    assert code == 0, err
    assert json.loads(out)["after"]["census"].get("activation", 0) == 0
    assert path.read_text() == "1.0"
    assert main([*arguments, "--force", "--target", "mine", "-O", "scal=1"]) == 2
    assert "target 'mine' has no option 'scal' (did you mean 'scale'?)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone", "pass 'gone' of acme-rules (acme_rules:Gone) cannot be loaded: AttributeError"),
        ("number", "'number' does not name a pass"),
        ("other-name", "pass 'other-name' of acme-rules calls itself 'drop-tanh'"),
    ],
)
def test_a_broken_pass_names_its_package(acme: Path, name: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        find_pipeline(f"default,{name}")
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent", "target 'absent' of acme-rules (acme_missing:Target) cannot be loaded: Module"),
        ("untarget", "target 'untarget' of acme-rules is no target"),
    ],
)
def test_a_broken_target_names_its_package(acme: Path, name: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        registry.find_target(name)
    assert words in str(error.value)


def test_what_is_broken_breaks_nothing_else(acme: Path, capsys) -> None:
    assert ".onnx" in registry.file_targets()
    assert main(["targets"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "scale: a number, default 1.0" in out
    assert "absent target 'absent' of acme-rules (acme_missing:Target) cannot be loaded" in out
    assert main(["targets", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert set(record["broken"]) == {"absent", "untarget"}
    assert main(["passes"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "drop-tanh (exact, of acme-rules)" in out
    assert "gone pass 'gone' of acme-rules" in out
    assert main(["passes", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["passes"]}
    assert rows["drop-tanh"]["options"] == {"limit": "an integer, default 9"}
    assert "broken" in rows["number"]


def test_refolds_own_names_stay_its_own(acme: Path, capsys) -> None:
    assert type(find_pipeline("clean-up").passes[0]).__name__ == "CleanUp"
    assert type(registry.find_target("torch")).__name__ == "TorchTarget"
    for command, name in (("passes", "clean-up"), ("targets", "torch")):
        assert main([command]) == 0
        said = f"note: acme-rules offers {name!r}, which is refold's own: it is not used"
        assert said in capsys.readouterr().out

    class Torch(Target):
        name, suffix = "torch", ".pt2"
        lower = load = save = stats = None

    with pytest.raises(UsageError, match="'torch' is refold's own"):
        registry.register_target(Torch())
    with pytest.raises(UsageError, match=r"subclass of refold\.Target"):
        registry.register_target(object())


def test_one_name_of_two_packages_is_neither(acme: Path, tmp_path: Path, monkeypatch) -> None:
    other = tmp_path / "other"
    info = other / "zeta-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zeta\nVersion: 1.0")
    (info / "entry_points.txt").write_text("[refold.passes]\ndrop-tanh = zeta:Other\n")
    monkeypatch.syspath_prepend(other)
    with pytest.raises(UsageError, match="'drop-tanh' is offered by acme-rules and zeta"):
        find_pipeline("drop-tanh")
