"""Building and finding the library, and what users read where that fails."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from refold import native
from refold.native import build, op
from refold.native.interface import KernelLibrary
from tests.native.layers import EXACT, activations, layer, relative


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for a library where there is none yet."""
    path = tmp_path / "_bcq.so"
    monkeypatch.setattr(build, "LIBRARY", path)
    monkeypatch.delenv(native.OFF, raising=False)
    return path


def test_a_missing_library_is_said_and_the_reference_runs(elsewhere: Path) -> None:
    assert native.library() is None
    assert "python -m refold.native" in str(native.status())
    of, x = layer(3, 70, 100, 32), activations(2, 100)
    packed = of.packed
    got = torch.ops.refold.bcq_linear_packed(
        x, packed.planes, packed.scales, None, 70, 32, True
    )  # fmt: skip
    assert relative(got, of.reference(x)) <= EXACT


def test_a_broken_library_is_said(elsewhere: Path) -> None:
    elsewhere.write_bytes(b"no library")
    assert native.library() is None
    assert "is no usable library" in str(native.status())
    assert "python -m refold.native" in str(native.status())


def test_a_library_of_other_sources_is_not_used(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if build.compiler() is None:
        pytest.skip("no C compiler")
    with monkeypatch.context() as patched:
        patched.setattr(build, "fingerprint", lambda: "0123456789abcdef")
        build.build(elsewhere, ("-O0",))
    assert "built from other sources" in str(native.status())


def test_a_library_of_wrong_numbers_is_not_used(
    kernel: KernelLibrary, elsewhere: Path, library_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere.write_bytes(library_path.read_bytes())
    right = KernelLibrary.multiply

    def wrong(self: KernelLibrary, *args: object, **kwargs: object) -> object:
        return right(self, *args, **kwargs) * 1.01  # type: ignore[arg-type, operator]

    monkeypatch.setattr(KernelLibrary, "multiply", wrong)
    assert "computes wrong numbers on this machine" in str(native.status())


@pytest.mark.parametrize(
    "state",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
        lambda: FakeTensorMode(),
        lambda: torch.inference_mode(),
        lambda: default_dtype(torch.float64),
    ],
    ids=["autocast", "default device", "fake tensors", "inference mode", "default dtype"],
)
def test_it_is_tried_out_whatever_state_the_caller_is_in(
    kernel: KernelLibrary, state: Callable[[], AbstractContextManager[object]]
) -> None:
    native._open.cache_clear()
    with state():
        assert native.status() is None


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def test_it_can_be_switched_off(kernel: KernelLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.status() is None
    monkeypatch.setenv(native.OFF, "0")
    assert native.library() is None
    assert native.OFF in str(native.status())


def test_without_a_compiler_nothing_is_built(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(build.BuildError, match="no C compiler"):
        build.build()
    assert not list(elsewhere.parent.iterdir())


@pytest.mark.parametrize(
    ("command", "said"), [("false", "false failed"), ("/no/such/cc", "cannot be run")]
)
def test_a_compiler_that_fails_is_named(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, command: str, said: str
) -> None:
    monkeypatch.setenv("CC", command)
    with pytest.raises(build.BuildError, match=said):
        build.build()
    assert not list(elsewhere.parent.iterdir())


def test_the_build_imports_nothing_of_refold() -> None:
    """Packages are built where torch is not."""
    script = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('build', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert not {'torch', 'refold'} & set(sys.modules), sys.modules\n"
        "print(module.fingerprint())\n"
    )
    command = [sys.executable, "-c", script, str(build.__file__)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == build.fingerprint()


def test_what_a_killed_build_left_goes_with_the_next(tmp_path: Path) -> None:
    if build.compiler() is None:
        pytest.skip("no C compiler")
    left = tmp_path / ".refold-tmp-killed_1" / "new"
    left.mkdir(parents=True)
    (left / "_bcq.so").write_bytes(b"half")
    build.build(tmp_path / "_bcq.so", ("-O0",))
    assert [p.name for p in tmp_path.iterdir()] == ["_bcq.so"]


@pytest.mark.parametrize("name", ["planes", "scales", "bias", "group_size", "rows", "strides"])
def test_shapes_that_do_not_fit_never_reach_the_kernel(kernel: KernelLibrary, name: str) -> None:
    packed = layer(3, 70, 100, 32).packed
    given = {
        "x": activations(2, 100),
        "planes": packed.planes,
        "scales": packed.scales,
        "bias": torch.zeros(70),
        "rows": 70,
        "group_size": 32,
        "exact": True,
    }
    wrong = {
        "planes": packed.planes[:, :-1],
        "scales": packed.scales[:1],
        "bias": torch.zeros(69),
        "group_size": 12,
        "rows": 1000,
    }
    if name == "strides":
        name, wrong = "planes", {"planes": packed.planes.mT.contiguous().mT}
    torch.ops.refold.bcq_linear_packed(**given)
    with pytest.raises(ValueError, match="do not fit each other"):
        torch.ops.refold.bcq_linear_packed(**{**given, name: wrong[name]})


def test_the_operator_keeps_torchs_contract(kernel: KernelLibrary) -> None:
    packed = layer(3, 70, 100, 32).packed
    torch.library.opcheck(
        torch.ops.refold.bcq_linear_packed.default,
        (activations(2, 3, 100), packed.planes, packed.scales, torch.zeros(70), 70, 32, True),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert op.__doc__
