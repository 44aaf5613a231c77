"""``python -m refold.native`` builds the kernel's library beside its sources."""

from __future__ import annotations

import sys

from refold import native
from refold.native import build

try:
    sys.stdout.write(f"built {build.build()}\n")
except (build.BuildError, OSError) as error:
    sys.exit(f"refold: the native kernel was not built: {error}")
if reason := native.status():
    sys.exit(f"refold: the native kernel cannot be used: {reason}")
