"""Writes an artifact: all of it is there, or nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from refold.errors import BackendError, UsageError


def check_output(path: Path, *, force: bool = False, marker: str | None = None) -> None:
    """Raises if ``path`` cannot be written, as far as that shows before it is tried.

    Args:
        path: file to write, or directory if there is a ``marker``.
        force: whether an existing one may be replaced.
        marker: a file that a directory must hold to be taken for an artifact and replaced.
    """
    if path.is_dir() and marker is None:
        raise UsageError(f"{path} is a directory: name a file in it")
    if path.exists() and not force:
        raise UsageError(
            f"{path} exists: pass force=True (--force on the command line) to overwrite it"
        )
    if path.exists() and marker is not None and not (path / marker).is_file():
        raise UsageError(f"{path} has no {marker}, so it is no artifact: choose another name")
    if not path.parent.is_dir():
        raise BackendError(f"cannot write {path}: the directory {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise BackendError(f"cannot write {path}: the directory {path.parent} is not writable")


def write_atomically(
    path: str | os.PathLike[str],
    writer: Callable[[Path, str], None],
    *,
    force: bool = False,
    marker: str | None = None,
) -> Path:
    """Lets ``writer(folder, name)`` write into a hidden folder, then moves the files to ``path``.

    Nothing is left behind when the writer fails, and an existing file is never half overwritten.
    With a ``marker`` (see :func:`check_output`) ``name`` is a directory.

    Raises:
        UsageError: the file exists and ``force`` is false.
        BackendError: the directory is missing or not writable, or the disk is full.
    """
    path = Path(path)
    check_output(path, force=force, marker=marker)
    folder: Path | None = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        writer(folder, path.name)
        if not (folder / path.name).exists():
            raise BackendError(f"cannot write {path}: the target made no file of that name")
        # The file of that name goes last: whoever sees it finds the files that it refers to.
        for file in sorted(folder.iterdir(), key=lambda f: f.name == path.name):
            _move(file, path.parent / file.name)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BackendError(f"cannot write {path}: {reason}; nothing was written") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    return path


def _move(source: Path, destination: Path) -> None:
    """Moves a file over an existing one, or a directory into the place of an existing one."""
    if not (source.is_dir() and destination.is_dir()):
        os.replace(source, destination)
        return
    # No directory can be renamed over another: the old one steps aside, and back if need be.
    aside = source.with_name(f"{source.name}.old")
    os.replace(destination, aside)
    try:
        os.replace(source, destination)
    except OSError:
        os.replace(aside, destination)
        raise
