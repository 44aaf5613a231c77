import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def _block(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)[1]


def _normal(text: str) -> list[str]:
    """Without what differs between runs: times, and the last digits of errors."""
    text = re.sub(r"\d+(\.\d+)? (ms|s)\b", "TIME", text)
    text = re.sub(r"\d\.\d+e-\d+", "ERROR", text)
    text = re.sub(r"\.py:\d+", ".py:LINE", text)
    text = re.sub(r"\n time .*?(?=\n note|\Z)", "", text, flags=re.DOTALL)  # its length wraps it
    return [" ".join(line.split()) for line in text.strip().splitlines()]


@pytest.mark.slow
def test_example_prints_what_the_readme_shows(tmp_path):
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _block("python")],
        capture_output=True, text=True, check=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert _normal(out.stdout) == _normal(_block("text"))
    assert (tmp_path / "net.onnx").is_file()


def test_files_that_the_readme_names_exist():
    names = re.findall(r"\]\(([\w./-]+)\)", README)
    names += re.findall(r"`((?:refold|bench|tools|docs)/[\w./]*)`", README)
    for name in names:
        assert (ROOT / name).exists(), name
