"""Writes the golden texts of the tests anew; review the difference before you commit it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "REFOLD_UPDATE_GOLDENS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-k", "golden", *sys.argv[1:]]
    sys.exit(subprocess.run(command, cwd=root, env=environment, check=False).returncode)
