"""Files that may have come from anywhere: what stands against reading one."""

from __future__ import annotations

import os
import stat
import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

_BLOCK = 1 << 20
# Deflate reaches 1,000; weights reach 2, JSON 20. What is small may be all zeros.
_MOST_INFLATED, _SMALL = 100, 1 << 20


def unreadable(path: Path) -> str:
    """Why a path is no file that can be read, or ``""``."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "no such file"
    except OSError as error:
        return error.strerror or str(error)
    except ValueError:
        return "no file has such a name"
    if stat.S_ISDIR(mode):
        return "no such file: it is a directory"
    if not stat.S_ISREG(mode):
        return "no such file: it is a device or a pipe"
    if not os.access(path, os.R_OK):
        return "it may not be read (permission denied)"
    return ""


def damaged_zip(file: Path | BinaryIO, *, checksums: bool = True) -> str:
    """Why a zip file is not to be unpacked, or ``""``.

    It is read to its end, a block at a time, for its checksums: readers of torch do not look at
    them (and writers can be told to leave them out, which exports never are). Nothing is unpacked
    that inflates to many times the size of the file.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if len({e.filename for e in entries}) != len(entries):
                return "two of its entries have the same name"
            size = os.path.getsize(file) if isinstance(file, Path) else file.seek(0, os.SEEK_END)
            if sum(e.compress_size for e in entries) > size:
                return "its entries lie in each other"
            for entry in entries:
                if entry.file_size > max(_SMALL, _MOST_INFLATED * entry.compress_size):
                    return (
                        f"its entry {entry.filename} inflates to {entry.file_size:,} bytes, "
                        f"{entry.file_size // max(entry.compress_size, 1):,} times its size"
                    )
            for entry in entries if checksums else ():
                with archive.open(entry) as content:
                    while content.read(_BLOCK):
                        pass
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError) as error:
        return f"it is damaged, or cut off ({error})"
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: encrypted, or unknown
        return f"it cannot be read ({error})"
    return ""


def memory() -> int:
    """Bytes of this machine's memory, or a number that nothing reaches where that is not known."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 62
