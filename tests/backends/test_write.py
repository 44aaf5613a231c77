"""A file is written whole, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from refold.backends import write


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
