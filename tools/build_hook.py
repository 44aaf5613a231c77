"""What packaging runs: builds the native kernel into the wheel, or says why there is none.

An editable install builds it beside its sources. ``REFOLD_NATIVE=0`` builds a wheel without it, for
every platform.
"""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeKernelHook(BuildHookInterface):
    """Adds the shared library; the wheel is then of one platform, but of every Python."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if os.environ.get("REFOLD_NATIVE") == "0":
            return
        path = Path(self.root) / "refold/native/build.py"
        spec = importlib.util.spec_from_file_location("refold_native_build", path)
        assert spec is not None
        assert spec.loader is not None
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
        try:
            library = native.build()
        except (native.BuildError, OSError) as error:
            self.app.display_warning(f"refold: going on without the native kernel: {error}")
            return
        build_data["artifacts"].append(str(library.relative_to(self.root)))
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
