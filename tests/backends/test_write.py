"""A file is written whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from refold.backends import write
from refold.errors import RefoldError, UsageError


def test_interrupt_leaves_nothing(tmp_path):
    def interrupted(folder, name):
        (folder / name).write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write.write_atomically(tmp_path / "net.onnx", interrupted)
    assert list(tmp_path.iterdir()) == []


def test_files_beside_come_first(tmp_path, monkeypatch):
    seen = []

    def two(folder, name):
        (folder / name).write_text("a")
        (folder / f"{name}.data").write_text("b")

    replace = os.replace
    monkeypatch.setattr(
        write.os, "replace", lambda a, b: (seen.append(Path(b).name), replace(a, b))
    )
    write.write_atomically(tmp_path / "net.onnx", two)
    assert seen == ["net.onnx.data", "net.onnx"]


def test_a_writer_that_writes_nothing_is_an_error(tmp_path) -> None:
    with pytest.raises(write.BackendError, match="the target made no file of that name"):
        write.write_atomically(tmp_path / "model.txt", lambda folder, name: None)
    assert list(tmp_path.iterdir()) == []


# --- what must not be lost ------------------------------------------------------------------------


def _writes(*names: str, text: str = "new"):
    def writer(folder, name):
        for made in names or (name,):
            (folder / made).write_text(text)

    return writer


def _spellings(tmp_path: Path, name: str) -> dict[str, Path]:
    """Names of one file."""
    file = tmp_path / name
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(file)
    (tmp_path / "hard").hardlink_to(file)
    (tmp_path / "home").symlink_to(tmp_path)
    return {
        "itself": file,
        "relative": Path(os.path.relpath(file)),
        "up and down": tmp_path / "folder" / ".." / "." / name,
        "a symbolic link": tmp_path / "link",
        "a hard link": tmp_path / "hard",
        "through a linked directory": tmp_path / "home" / name,
    }


@pytest.mark.parametrize(
    "spelling",
    ["itself", "relative", "up and down", "a symbolic link", "a hard link",
     "through a linked directory"],
)  # fmt: skip
@pytest.mark.parametrize("force", [True, False])
def test_an_input_is_not_overwritten_under_any_name(tmp_path, spelling, force) -> None:
    weights = tmp_path / "weights"
    weights.write_text("weights")
    names = _spellings(tmp_path, "weights")
    before = sorted(os.listdir(tmp_path))
    for path, given in ((names[spelling], weights), (weights, names[spelling])):
        with pytest.raises(UsageError, match="is read to make it"):
            write.write_atomically(path, _writes(), force=force, inputs=[given])
        with pytest.raises(UsageError, match="is read to make it"):
            write.check_output(path, force=force, inputs=[given])
    assert weights.read_text() == "weights"
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("force", [True, False])
def test_a_file_that_goes_beside_overwrites_no_input(tmp_path, force) -> None:
    (tmp_path / "net.bin").write_text("weights")
    with pytest.raises(UsageError, match=r"net\.bin, which is read to make it"):
        write.write_atomically(
            tmp_path / "net.xml", _writes("net.xml", "net.bin"), force=force,
            inputs=[tmp_path / "net.bin"],
        )  # fmt: skip
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("net.bin", "weights")]


def test_a_file_that_goes_beside_overwrites_nothing_without_force(tmp_path) -> None:
    (tmp_path / "net.bin").write_text("mine")
    writer = _writes("net.xml", "net.bin")
    with pytest.raises(UsageError, match=r"net\.bin exists"):
        write.write_atomically(tmp_path / "net.xml", writer)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("net.bin", "mine")]
    write.write_atomically(tmp_path / "net.xml", writer, force=True)
    assert (tmp_path / "net.bin").read_text() == "new"
    (tmp_path / "net.bin").unlink()
    (tmp_path / "net.bin").mkdir()
    (tmp_path / "net.bin" / "thesis").write_text("mine")
    with pytest.raises(UsageError, match=r"net\.bin is a directory"):
        write.write_atomically(tmp_path / "net.xml", writer, force=True)
    assert (tmp_path / "net.bin" / "thesis").read_text() == "mine"


def test_a_directory_that_holds_an_input_is_not_replaced(tmp_path) -> None:
    folder = tmp_path / "net.trt"
    folder.mkdir()
    (folder / "marker").write_text("")
    (folder / "model.pt2").write_text("model")

    def writer(made, name):
        (made / name).mkdir()
        (made / name / "marker").write_text("")

    with pytest.raises(UsageError, match="is read to make it"):
        write.write_atomically(
            folder, writer, force=True, marker="marker", inputs=[folder / "model.pt2"]
        )
    assert (folder / "model.pt2").read_text() == "model"
    write.write_atomically(folder, writer, force=True, marker="marker")
    assert [p.name for p in folder.iterdir()] == ["marker"]


@pytest.mark.parametrize("force", [True, False])
def test_pipes_devices_and_dangling_links_stay(tmp_path, force) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to(os.devnull)
    for name in ("pipe", "device"):
        with pytest.raises(UsageError, match="device or a pipe" if force else "exists"):
            write.write_atomically(tmp_path / name, _writes(), force=force)
    assert (tmp_path / "pipe").is_fifo()
    assert Path(os.devnull).is_char_device()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    if not force:
        with pytest.raises(UsageError, match="exists"):
            write.write_atomically(tmp_path / "dangling", _writes())


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, "expected a path"),
        (3, "expected a path"),
        (b"bytes", "expected a path"),
        ("a\0b", "null character"),
        ("", "is a directory"),
        (".", "is a directory"),
        ("name/", "is a directory"),
        ("a" * 300, "too long"),
    ],
)
def test_what_is_no_file_name_is_said(tmp_path, monkeypatch, path, message) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RefoldError, match=message):
        write.write_atomically(path, _writes())
    assert list(tmp_path.iterdir()) == []


def test_long_and_odd_names_are_names(tmp_path) -> None:
    for name in ("a" * 250, "ü \n x", "-", ".onnx"):
        assert write.write_atomically(tmp_path / name, _writes()).read_text() == "new"


def test_a_killed_run_is_cleaned_up_after_by_the_next(tmp_path) -> None:
    """Killed between putting the old files aside and bringing the new ones: the old ones return."""
    (tmp_path / "net.onnx").write_text("old graph")
    (tmp_path / "net.onnx.data").write_text("old data")
    code = (
        "import os, sys\n"
        "from refold.backends import write\n"
        "replace = os.replace\n"
        "def dies(a, b):\n"
        "    if 'aside' not in str(b): os.kill(os.getpid(), 9)\n"
        "    replace(a, b)\n"
        "write.os.replace = dies\n"
        "def writer(folder, name):\n"
        "    for n in (name, name + '.data'): (folder / n).write_text('new')\n"
        "write.write_atomically(sys.argv[1], writer, force=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(write.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "net.onnx")], env=environment, check=False
    )
    assert done.returncode == -9
    assert not (tmp_path / "net.onnx").exists()
    write.write_atomically(tmp_path / "other.onnx", _writes())
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "net.onnx": "old graph", "net.onnx.data": "old data", "other.onnx": "new",
    }  # fmt: skip


def test_a_move_that_fails_leaves_the_old_files(tmp_path, monkeypatch) -> None:
    for name in ("net.onnx", "net.onnx.data"):
        (tmp_path / name).write_text("old")
    replace = os.replace

    def fails(source, place):
        if Path(source).name == "net.onnx" and Path(place).parent == tmp_path:
            monkeypatch.setattr(write.os, "replace", replace)
            raise OSError(5, "input/output error")
        replace(source, place)

    monkeypatch.setattr(write.os, "replace", fails)
    writer = _writes("net.onnx", "net.onnx.data")
    with pytest.raises(write.BackendError, match="nothing was written"):
        write.write_atomically(tmp_path / "net.onnx", writer, force=True)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "net.onnx": "old", "net.onnx.data": "old",
    }  # fmt: skip


def test_two_writers_of_two_files_leave_a_pair(tmp_path) -> None:
    start = threading.Barrier(2)

    def run(text: str) -> None:
        for _ in range(30):
            start.wait()
            with contextlib.suppress(write.BackendError):
                write.write_atomically(
                    tmp_path / "net", _writes("net", "net.data", text=text), force=True
                )

    threads = [threading.Thread(target=run, args=(text,)) for text in ("one", "other")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({p.read_text() for p in tmp_path.iterdir()}) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net", "net.data"]
