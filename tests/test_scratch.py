"""Temporary folders go with their runs, however those end, and never while they live."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from refold import scratch
from refold.scratch import Scratch, one_at_a_time, sweep

pytest.importorskip("fcntl")

_RUN = """
import sys, time
from pathlib import Path
from refold.scratch import Scratch
folder = Scratch(sys.argv[1])
(folder.path / "half").write_text("half")
print(folder.path, flush=True)
time.sleep(60)
"""


@pytest.fixture
def another_run(tmp_path: Path):
    """A living process with a folder in ``tmp_path``."""
    environment = {**os.environ, "PYTHONPATH": str(Path(scratch.__file__).parents[1])}
    run = subprocess.Popen(
        [sys.executable, "-c", _RUN, str(tmp_path)],
        stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert run.stdout is not None
    path = Path(run.stdout.readline().strip())
    assert (path / "half").exists()
    yield run, path
    run.kill()
    run.wait()
    run.stdout.close()


def test_a_folder_goes_with_its_block_and_with_its_last_reference(tmp_path: Path) -> None:
    with Scratch(tmp_path) as folder:
        (folder / "file").write_text("x")
        assert list(tmp_path.iterdir()) == [folder.parent]
    assert list(tmp_path.iterdir()) == []
    kept = Scratch(tmp_path)
    assert kept.path.is_dir()
    del kept
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_goes_with_the_next_and_not_while_it_lives(
    tmp_path: Path, another_run
) -> None:
    run, theirs = another_run
    with Scratch(tmp_path) as folder:
        assert folder.is_dir()
        assert (theirs / "half").exists()
    assert list(tmp_path.iterdir()) == [theirs.parent]
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert (theirs / "half").exists()
    with Scratch(tmp_path) as folder:
        assert list(tmp_path.iterdir()) == [folder.parent]


def test_two_folders_of_one_run_leave_each_other_alone(tmp_path: Path) -> None:
    with Scratch(tmp_path) as one, Scratch(tmp_path) as other:
        sweep(tmp_path)
        assert one.is_dir()
        assert other.is_dir()


def test_a_folder_in_it_may_be_locked_while_it_lives(tmp_path: Path) -> None:
    with Scratch(tmp_path) as folder, one_at_a_time(folder):
        (folder / "file").write_text("x")


def test_files_of_others_stay(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis").write_text("mine")
    (home / ".refold-tmp-mine").mkdir()  # not a name that is made
    (home / ".refold-tmp-abcdefgh.txt").mkdir()
    (home / ".refold-tmp-abcdefgh").write_text("a file")
    os.symlink(elsewhere, home / ".refold-tmp-linklink")
    before = sorted(p.name for p in home.iterdir())
    sweep(home)
    assert sorted(p.name for p in home.iterdir()) == before
    assert (elsewhere / "thesis").read_text() == "mine"


def test_a_folder_that_is_swept_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    mkdtemp = scratch.tempfile.mkdtemp

    def swept(**where: object) -> str:
        made.append(mkdtemp(**where))
        if len(made) == 1:
            shutil.rmtree(made[0])
        return made[-1]

    monkeypatch.setattr(scratch.tempfile, "mkdtemp", swept)
    with Scratch(tmp_path) as folder:
        assert folder.is_dir()
    assert len(made) == 2


def test_a_fork_does_not_remove_the_folder_of_its_parent(tmp_path: Path) -> None:
    folder = Scratch(tmp_path)
    scratch._finish(folder.path, None, os.getpid() + 1)
    assert folder.path.is_dir()


def _left_by_a_killed_run(home: Path, **aside: str) -> Path:
    folder = home / ".refold-tmp-killed_1"
    (folder / "aside").mkdir(parents=True)
    for name, text in aside.items():
        (folder / "aside" / name).write_text(text)
    return folder


def test_what_was_put_aside_and_not_replaced_comes_back(tmp_path: Path) -> None:
    _left_by_a_killed_run(tmp_path, graph="old graph", data="old data")
    (tmp_path / "data").write_text("new data, of a graph that never came")
    sweep(tmp_path)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "graph": "old graph", "data": "old data",
    }  # fmt: skip


def test_what_was_put_aside_and_replaced_is_gone(tmp_path: Path) -> None:
    _left_by_a_killed_run(tmp_path, graph="old graph")
    (tmp_path / "graph").write_text("new graph")
    sweep(tmp_path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("graph", "new graph")]


def test_what_cannot_come_back_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _left_by_a_killed_run(tmp_path, graph="old graph")

    def full(*_: object) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setattr(scratch.os, "replace", full)
    sweep(tmp_path)
    assert (folder / "aside" / "graph").read_text() == "old graph"
