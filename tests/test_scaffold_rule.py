from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from tests import golden

ROOT = Path(__file__).resolve().parent.parent


def load(path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_scaffolded_rule_passes_its_own_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = load(ROOT / "tools/scaffold_rule.py", "scaffold_rule", monkeypatch)
    (tmp_path / "refold/passes/prepare").mkdir(parents=True)
    (tmp_path / "tests/passes/prepare").mkdir(parents=True)
    rule, test = tool.scaffold(tmp_path, "prepare", "drop-things")
    load(rule, "refold.passes.prepare.drop_things", monkeypatch)
    monkeypatch.setattr(golden, "DIRECTORY", tmp_path)
    monkeypatch.setenv("REFOLD_UPDATE_GOLDENS", "1")
    made = load(test, "test_drop_things", monkeypatch)
    made.test_golden()
    made.test_it_declines()
    made.test_it_keeps_the_numbers()
    assert (tmp_path / "drop_things.txt").read_text().startswith("before\n")
    with pytest.raises(SystemExit, match="there already"):
        tool.scaffold(tmp_path, "prepare", "drop-things")
    with pytest.raises(SystemExit, match="kebab-case"):
        tool.scaffold(tmp_path, "prepare", "DropThings")
