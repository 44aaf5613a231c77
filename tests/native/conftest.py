from __future__ import annotations

from pathlib import Path

import pytest

from refold import native
from refold.native import build
from refold.native.interface import KernelLibrary, NativeError


@pytest.fixture(scope="session")
def library_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of the present sources: the installed one, or one built for the tests."""
    try:
        KernelLibrary(build.LIBRARY)
        return build.LIBRARY
    except NativeError:
        pass  # not there, or stale
    if build.compiler() is None:
        pytest.skip("no C compiler")
    return build.build(tmp_path_factory.mktemp("native") / build.LIBRARY.name)


@pytest.fixture
def kernel(library_path: Path, monkeypatch: pytest.MonkeyPatch) -> KernelLibrary:
    """The library, which everything that asks for it finds."""
    monkeypatch.setattr(build, "LIBRARY", library_path)
    monkeypatch.delenv(native.OFF, raising=False)
    found = native.library()
    assert found is not None, native.status()
    return found
