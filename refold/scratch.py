"""Temporary folders that nobody has to clean up after a run that was killed.

A folder is locked as long as its run lives: the system drops the lock with the process, however
that ends. Whoever makes the next folder in the same place removes those that nobody holds. What a
run had put aside to write something else in its place is put back first.

This file imports the standard library alone: packages are built where torch is not.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: folders are removed by their own run, or not at all
    fcntl = None  # type: ignore[assignment]

_PREFIX = ".refold-tmp-"
_NAME = re.compile(re.escape(_PREFIX) + r"\w{8}")
ASIDE = "aside"


class Scratch:
    """A temporary folder: gone when its block ends, or with its last reference.

    What its run puts into ``aside`` belongs beside the folder. If something is missing there when
    the folder goes, all of it is moved back.

    Attributes:
        path: the folder.
        aside: the folder in it for what is moved out of the way.
    """

    def __init__(self, parent: str | os.PathLike[str] | None = None) -> None:
        """Makes a folder in ``parent`` (by default where the system has its temporary files)."""
        home = Path(tempfile.gettempdir() if parent is None else parent)
        sweep(home)
        while True:
            whole = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=home))
            alive, lock = _hold(whole)
            if alive:
                break  # else another run has swept it, between its making and its lock
        self._finalizer = weakref.finalize(self, _finish, whole, lock, os.getpid())
        # Not the one that is locked: whoever writes into it locks it for a moment.
        self.path, self.aside = whole / "new", whole / ASIDE
        self.path.mkdir()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *error: Any) -> None:
        self._finalizer()


def sweep(parent: Path) -> None:
    """Removes the folders in ``parent`` whose runs are dead."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(parent):
            if _NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                folder = Path(entry.path)
                alone, lock = _hold(folder)
                if alone and lock is not None:
                    _remove(folder)
                if lock is not None:
                    os.close(lock)


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Makes other runs wait that want to change the same folder."""
    lock = None
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks
            lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _hold(folder: Path) -> tuple[bool, int | None]:
    """Locks a folder: whether it is there and nobody else has it, and the lock.

    There is no lock where the system, or the file system, has none.
    """
    if fcntl is None:
        return True, None
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False, None
    except OSError:
        return True, None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), os.stat(folder)):
            return True, lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(lock)
        return True, None
    os.close(lock)
    return False, None


def _finish(folder: Path, lock: int | None, owner: int) -> None:
    if os.getpid() != owner:  # a fork of the run that made it
        return
    _remove(folder)
    if lock is not None:
        os.close(lock)


def _remove(folder: Path) -> None:
    """Removes a folder once what lies aside in it is back, or has a successor."""
    aside = folder / ASIDE
    old = sorted(aside.iterdir()) if aside.is_dir() else []
    if not all(os.path.lexists(folder.parent / file.name) for file in old):
        for file in old:
            place = folder.parent / file.name
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place, ignore_errors=True)
            try:
                os.replace(file, place)
            except OSError:
                return  # it is all that is left of that file: it stays where it is
    shutil.rmtree(folder, ignore_errors=True)
