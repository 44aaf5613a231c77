"""Writes the table of what CI runs, target by target, into ``docs/trust.md``.

Run from the repository's root: ``python tools/ci_table.py [--check]``. It collects all tests and
counts, for each target and suite, those that name the target or lie in its folder. ``--check``
changes nothing and ends with 1 if the page has another table. ``tests/test_ci_table.py`` holds the
words to the code; the counts are those of the day on which this was run.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "trust.md"
SUITES = ("quick", "slow", "sweep", "edge", "rtx")
_TABLE = re.compile(r"(<!-- ci -->\n)(.*?)(<!-- /ci -->)", re.DOTALL)
_HEAD = ("target", "what CI does with it", *(f"`{s}`" for s in SUITES))


@dataclass(frozen=True)
class Row:
    """A target, or a part of refold that compiles.

    Attributes:
        name: of the target, or in words.
        tests: a pattern of the names of its tests.
        how: what CI does with what comes out, and what it does not.
    """

    name: str
    tests: str
    how: str


# A test counts for each row whose pattern it matches; what matches none runs the folded graph.
ROWS = (
    Row("torch", "", "executed, compared with the original in float64 (all tests of no other row)"),
    Row("inductor", "inductor", "compiled to C++ here, executed, compared"),
    Row("aoti", "aoti", "compiled to C++ here, saved, loaded, executed, compared"),
    Row("`torch.compile(backend=\"refold\")`", "tests/torch_compile/",
        "executed behind dynamo, with inner backends of PyTorch's, compared with eager"),
    Row("onnx", r"/test_onnx\.py|\[[^]]*\bonnx\b|_onnx_",
        "checked by `onnx.checker`; executed by ONNX Runtime, compared"),
    Row("ort", r"onnx/(test_quantised|shift_add)|onnxruntime|\[[^]]*\bort\b(?!-)",
        "executed by ONNX Runtime on the CPU, compared"),
    Row("ort-format", r"ort_format|ort-format", "written, loaded, executed, compared"),
    Row("openvino", "openvino", "executed by OpenVINO on the CPU, compared"),
    Row("executorch", "backends/.*executorch", "lowered to XNNPACK, loaded, executed, compared"),
    Row("litert", "backends/.*litert", "converted, loaded, executed with XNNPACK, compared"),
    Row("ncnn", "backends/.*ncnn",
        "converted by pnnx, loaded, executed without Winograd convolution, compared"),
    Row("coreml", "backends/.*coreml",
        "converted; the program in the package read back and computed in float64 by the tests; "
        "never executed by Core ML, which runs on Apple's systems alone"),
    Row("trt", "tests/backends/tensorrt/|\\btrt\\b",
        "written; its ONNX model executed by ONNX Runtime; its operators looked up in the table of "
        "what TensorRT's parser takes; never executed by TensorRT, which needs a GPU"),
    Row("trt, by TensorRT-RTX", "tests/rtx/",
        "parsed by NVIDIA's parser and compiled to engines by its builder, on the CPU; engine "
        "layers counted; never executed"),
    Row("native kernels", "tests/native/",
        "compiled by the C compiler, executed, compared: portable C, AVX2 and AVX-512; NEON where "
        "there is an emulator, and listed as skipped where there is none"),
)  # fmt: skip


class Collected:
    """Remembers the suite of every test."""

    def __init__(self) -> None:
        self.tests: dict[str, str] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            marked = [s for s in SUITES[1:] if item.get_closest_marker(s)]
            self.tests[item.nodeid] = marked[-1] if marked else SUITES[0]


def counted(tests: dict[str, str]) -> dict[str, Counter[str]]:
    """For each row the tests of each suite."""
    found: dict[str, Counter[str]] = {row.name: Counter() for row in ROWS}
    for test, suite in tests.items():
        rows = [row for row in ROWS[1:] if re.search(row.tests, test)] or [ROWS[0]]
        for row in rows:
            found[row.name][suite] += 1
    return found


def table(tests: dict[str, str]) -> str:
    """The table as Markdown."""
    found = counted(tests)
    lines = [_HEAD, ("---",) * 2 + ("---:",) * len(SUITES)]
    lines += [(r.name, r.how, *(str(found[r.name][s] or "") for s in SUITES)) for r in ROWS]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rows_of_page() -> list[list[str]]:
    """The cells of the table on the page, without its head."""
    text = _TABLE.search(PAGE.read_text())
    assert text, f"{PAGE} has no marks of the table"
    return [re.split(r" \| ?", line[2:-2]) for line in text[2].strip().splitlines()[2:]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args()
    collected = Collected()
    code = pytest.main(["-qq", "--collect-only", "--no-summary", "-m", ""], plugins=[collected])
    if code != pytest.ExitCode.OK:
        return int(code)
    before = PAGE.read_text()
    after = _TABLE.sub(lambda m: f"{m[1]}\n{table(collected.tests)}\n{m[3]}", before)
    if options.check:
        return int(after != before)
    PAGE.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
