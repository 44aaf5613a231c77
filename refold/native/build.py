"""Builds the kernel's shared library with the system's C compiler.

``python -m refold.native`` puts it beside its sources, and so does ``pip install``. This file
imports nothing of refold: packages are built where torch is not.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LIBRARY = HERE / "_bcq.so"
_SOURCES = ("bcq.c", "watch.c", "pool.h", "x86.h", "product.h", "neon.h")
# The library chooses its instructions when it is loaded: nothing here may depend on the machine.
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-pthread")


class BuildError(Exception):
    """There is no compiler, or it fails; the message says which."""


def fingerprint() -> str:
    """What a library must carry to be of these sources."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update((HERE / name).read_bytes())
    return digest.hexdigest()[:16]


def compiler() -> list[str] | None:
    """The command of the C compiler: ``$CC``, else the first of cc, gcc and clang."""
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    found = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    return [found] if found else None


def build(output: Path = LIBRARY, extra: tuple[str, ...] = ()) -> Path:
    """Compiles the library; an existing one is replaced only by a complete one.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    if sys.platform == "win32":
        raise BuildError("the kernel is written for POSIX threads, which Windows does not have")
    command = compiler()
    if command is None:
        raise BuildError("no C compiler (cc, gcc or clang) is installed")
    with _scratch().Scratch(output.parent) as folder:
        made = folder / output.name
        source = f'-DBCQ_SOURCE="{fingerprint()}"'
        files = [str(HERE / name) for name in _SOURCES if name.endswith(".c")]
        arguments = [*command, *_FLAGS, source, *extra, *files, "-o", str(made)]
        try:
            done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        except OSError as error:
            raise BuildError(f"{command[0]} cannot be run: {error.strerror}") from error
        if done.returncode != 0:
            raise BuildError(f"{command[0]} failed:\n{done.stderr.strip()}")
        os.replace(made, output)
    return output


def _scratch() -> Any:
    """The module of temporary folders, read from its file: it imports nothing of refold either."""
    spec = importlib.util.spec_from_file_location("scratch", HERE.parent / "scratch.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
