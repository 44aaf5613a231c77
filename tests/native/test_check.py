"""``check.c``, under sanitizers and on emulated processors, where the tools are installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from refold.native import build

_CHECK = Path(__file__).with_name("check.c")


def _run(compiler: list[str], folder: Path, before: tuple[str, ...] = ()) -> None:
    binary = folder / "check"
    flags = ["-O2", "-g", "-std=gnu11", "-pthread", f"-I{build.HERE}"]
    made = subprocess.run(
        [*compiler, *flags, str(_CHECK), "-lm", "-o", str(binary)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if made.returncode != 0 and "-fsanitize" in " ".join(compiler):
        pytest.skip(f"no sanitizers: {made.stderr.strip().splitlines()[-1]}")
    assert made.returncode == 0, made.stderr
    done = subprocess.run([*before, str(binary)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_under_sanitizers(tmp_path: Path, sanitizers: str) -> None:
    command = build.compiler()
    if command is None:
        pytest.skip("no C compiler")
    _run([*command, f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"], tmp_path)


@pytest.mark.slow
def test_on_an_emulated_arm_processor(tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("no aarch64-linux-gnu-gcc and qemu-aarch64")
    _run([compiler, "-static"], tmp_path, (emulator,))
