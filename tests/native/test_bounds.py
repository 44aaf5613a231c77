"""The C code reads and writes no byte beyond its buffers: each ends where memory ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# A process of its own, without torch: what touches the guard page dies.
_SCRIPT = """
import ctypes, mmap, struct, sys

library = ctypes.CDLL(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
PAGE = mmap.PAGESIZE
LONG = ctypes.c_long
AVX2, ABSENT = 1, 4
keep = []

def guarded(data):
    pages = -(-len(data) // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    keep.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + pages * PAGE), LONG(PAGE), 0) == 0
    ctypes.memmove(start + pages * PAGE - len(data), data, len(data))
    return ctypes.c_void_p(start + pages * PAGE - len(data))

def floats(count):
    return struct.pack(f"{count}f", *(0.5 + i % 7 for i in range(count)))

for isa in range(4):
    if not library.bcq_supports(isa):
        continue
    for q in (1, 2, 3, 4):
        for n, k, group in ((1, 1, 8), (65, 77, 32), (64, 264, 24), (130, 200, 128)):
            for a in {1, q}:
                tiles, columns, groups = -(-n // 64), -(-k // 8), -(-k // group)
                planes = guarded(bytes(tiles * columns * q * 64))
                layer = (LONG(n), LONG(k), q, a, LONG(group))
                for half in (0, 1):
                    count = tiles * groups * a * 64
                    scales = guarded(bytes(2 * count) if half else floats(count))
                    for m in (1, 3, 9):
                        x, bias = guarded(floats(m * k)), guarded(floats(n))
                        y = guarded(bytes(4 * m * n))
                        for exact in (0, 1):
                            assert 0 == library.bcq_multiply(
                                x, LONG(m), planes, scales, half, bias, y, *layer, exact, isa, 2)
                        status = library.bcq_product(
                            x, LONG(m), planes, scales, half, bias, y, *layer, isa, 2)
                        assert status == (0 if isa == AVX2 else ABSENT)
                    out = guarded(bytes(4 * k * 64 * tiles))
                    assert 0 == library.bcq_unpack(
                        planes, scales, half, out, LONG(64 * tiles), LONG(0), LONG(tiles), *layer,
                        isa, 2)
x = guarded(floats(8))
five = (x, LONG(1), x, x, 0, x, x, LONG(1), LONG(8), 5, 1, LONG(8))  # planes
assert 3 == library.bcq_multiply(*five, 1, 0, 1)
assert 3 == library.bcq_product(*five, 0, 1)
if len(sys.argv) > 2:  # the guard works
    ctypes.string_at(guarded(b"end").value, 4)
print("done")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="mprotect as Linux has it")
def test_no_byte_beyond_the_buffers(library_path: Path) -> None:
    command = [sys.executable, "-c", _SCRIPT, str(library_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    beyond = subprocess.run([*command, "beyond"], capture_output=True, check=False)
    assert beyond.returncode < 0, "the guard pages guard nothing"
