"""Writes an artifact: all of it is there, or nothing; and nothing that it was made of is lost."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from refold.errors import BackendError, UsageError
from refold.scratch import Scratch, one_at_a_time

Paths = Iterable[str | os.PathLike[str]]


def check_output(
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    marker: str | None = None,
    inputs: Paths = (),
) -> Path:
    """Raises if ``path`` cannot be written, as far as that shows before it is tried.

    Args:
        path: file to write, or directory if there is a ``marker``.
        force: whether an existing one may be replaced.
        marker: a file that a directory must hold to be taken for an artifact and replaced.
        inputs: files that are read to make it, which ``force`` does not give up either.
    """
    output = _path(path)
    text = str(path)
    try:
        if marker is None and (output.is_dir() or text.endswith(os.sep)):
            raise UsageError(f"{text or output} is a directory: name a file in it")
        with one_at_a_time(output.parent):  # another run may be replacing it
            _check_replaceable(output, force=force, inputs=inputs)
            known = marker is None or (output / marker).is_file() or not os.path.lexists(output)
        if not known:
            raise UsageError(f"{output} has no {marker}, so it is no artifact: choose another name")
    except OSError as error:
        raise BackendError(f"cannot write {output}: {error.strerror or error}") from error
    if not output.parent.is_dir():
        raise BackendError(f"cannot write {output}: the directory {output.parent} does not exist")
    if not os.access(output.parent, os.W_OK):
        raise BackendError(f"cannot write {output}: the directory {output.parent} is not writable")
    return output


def write_atomically(
    path: str | os.PathLike[str],
    writer: Callable[[Path, str], None],
    *,
    force: bool = False,
    marker: str | None = None,
    inputs: Paths = (),
) -> Path:
    """Lets ``writer(folder, name)`` write into a hidden folder, then moves the files to ``path``.

    Nothing is left behind when the writer fails, or is killed and another one follows; an existing
    file is never half overwritten. With a ``marker`` (see :func:`check_output`) ``name`` is a
    directory. The writer may make other files: they go beside ``path``, and are treated like it.

    Raises:
        UsageError: a file exists and ``force`` is false, or is one of the ``inputs``.
        BackendError: the directory is missing or not writable, or the disk is full.
    """
    inputs = tuple(inputs)
    path = check_output(path, force=force, marker=marker, inputs=inputs)
    try:
        scratch = Scratch(path.parent)
        with scratch as made:
            writer(made, path.name)
            if not (made / path.name).exists():
                raise BackendError(f"cannot write {path}: the target made no file of that name")
            # The file of that name goes last: whoever sees it finds the files that it refers to.
            files = sorted(made.iterdir(), key=lambda f: f.name == path.name)
            with one_at_a_time(path.parent):
                for file in files:
                    place = path.parent / file.name
                    _check_replaceable(place, force=force, inputs=inputs)
                    if place.is_dir() and not file.is_dir():
                        raise UsageError(f"{place} is a directory, and a file has to go there")
                if len(files) > 1 or (made / path.name).is_dir():
                    # No directory can be renamed over another, and an old file must not be seen
                    # with a new one beside it: they step aside together, and back if need be.
                    _step_aside(path.parent, [f.name for f in reversed(files)], scratch.aside)
                for file in files:
                    os.replace(file, path.parent / file.name)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BackendError(f"cannot write {path}: {reason}; nothing was written") from error
    return path


def _path(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, (str, os.PathLike)) or isinstance(os.fspath(path), bytes):
        raise UsageError(f"the file to write is {path!r}: expected a path, as a string or a Path")
    if "\0" in os.fspath(path):
        raise UsageError(f"the file to write is {path!r}: no file name has a null character")
    return Path(path)


def _check_replaceable(path: Path, *, force: bool, inputs: Paths) -> None:
    """Raises if something lies at ``path`` that must stay."""
    if not os.path.lexists(path):
        return
    for given in inputs:
        if _holds(path, Path(given)):
            raise UsageError(
                f"{path} would replace {given}, which is read to make it: choose another name "
                "(force does not overwrite an input)"
            )
    if not force:
        raise UsageError(
            f"{path} exists: pass force=True (--force on the command line) to overwrite it"
        )
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UsageError(f"{path} is a device or a pipe, not a file: name a file to write")


def _holds(path: Path, given: Path) -> bool:
    """Whether two names are one file, or the first is a directory that the other lies in."""
    with contextlib.suppress(OSError):
        if os.path.samefile(path, given):
            return True
    return path.is_dir() and given.resolve().is_relative_to(path.resolve())


def _step_aside(folder: Path, names: Iterable[str], aside: Path) -> None:
    """Moves what exists under these names, the first of them first."""
    aside.mkdir()
    for name in names:
        if os.path.lexists(folder / name):
            os.replace(folder / name, aside / name)
