"""What stands against reading a file is said, before anything of it is read."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import pytest

from refold import reading
from refold.reading import damaged_zip, unreadable


def _zip(path: Path, *, deflate: bool = False, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED) as new:
        for name, data in entries.items():
            new.writestr(name, data)
    return path


def test_what_is_no_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    assert unreadable(tmp_path / "file") == ""
    assert unreadable(tmp_path / "missing") == "no such file"
    assert unreadable(tmp_path / "file" / "below") == "no such file"
    assert "directory" in unreadable(tmp_path)
    assert "pipe" in unreadable(tmp_path / "pipe")
    assert "device" in unreadable(Path(os.devnull))
    assert "name" in unreadable(Path("a\0b"))
    assert "too long" in unreadable(Path("a" * 5000))
    monkeypatch.setattr(reading.os, "access", lambda path, how: False)
    assert "permission" in unreadable(tmp_path / "file")


def test_whole_archives_are_whole(tmp_path: Path) -> None:
    whole = _zip(tmp_path / "z", a=b"a" * 1000, zeros=bytes(1 << 20))
    assert damaged_zip(whole) == ""
    assert damaged_zip(_zip(tmp_path / "d", deflate=True, a=os.urandom(5000))) == ""
    # As much as deflate can make of so little is no attack.
    assert damaged_zip(_zip(tmp_path / "e", deflate=True, zeros=bytes(1 << 20))) == ""
    assert damaged_zip(io.BytesIO(whole.read_bytes())) == ""


def test_archives_that_inflate_a_thousand_times_are_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = _zip(tmp_path / "bomb", deflate=True, zeros=bytes(20 << 20))
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *a, **k: pytest.fail("unpacked"))
    assert "inflates to 20,971,520 bytes, 1,0" in damaged_zip(bomb)
    assert "inflates" in damaged_zip(bomb, checksums=False)


def test_a_bit_that_flipped_shows(tmp_path: Path) -> None:
    path = _zip(tmp_path / "z", a=b"weights" * 100)
    data = bytearray(path.read_bytes())
    data[data.index(b"weights") + 3] ^= 4
    path.write_bytes(data)
    assert "CRC" in damaged_zip(path)
    assert damaged_zip(path, checksums=False) == ""


def test_cut_off_doubled_and_overlapping_archives(tmp_path: Path) -> None:
    path = _zip(tmp_path / "z", a=os.urandom(4000))
    whole = path.read_bytes()
    for end in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert "cut off" in damaged_zip(path)
    with zipfile.ZipFile(path, "w") as new:
        new.writestr("a", "1")
        with pytest.warns(UserWarning, match="Duplicate name"):
            new.writestr("a", "2")
    assert "same name" in damaged_zip(path)
    with zipfile.ZipFile(path, "w") as new:
        new.writestr("a", os.urandom(4000))
        second = zipfile.ZipInfo("b")
        first = new.infolist()[0]
        for field in ("header_offset", "CRC", "compress_size", "file_size"):
            setattr(second, field, getattr(first, field))
        new.filelist.append(second)
        new.NameToInfo["b"] = second
    assert "lie in each other" in damaged_zip(path)
