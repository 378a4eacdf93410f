"""Builds the kernels (deltafmt/native/*.c) with the package, where a C compiler is at hand.

Without one the package is built all the same, and does the same with numpy. `DELTAFMT_KERNELS=require` makes that an
error, as whoever builds wheels for others wants it.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

LIBRARY = "deltafmt/native/libkernels.so.1"  # with that end, Python does not take it for a module
FLAGS = ["-std=gnu11", "-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]


class KernelsBuildHook(BuildHookInterface[Any]):
    """Adds the library to a wheel, which then is one of this platform, for every Python 3."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; called by hatchling before it collects the files of a wheel, or links an editable one."""
        root = Path(self.root)
        library = root / LIBRARY
        command = [*compiler(), *FLAGS, "-shared", "-fPIC", "-o", str(library)]
        command += sorted(str(source) for source in library.parent.glob("*.c"))
        library.unlink(missing_ok=True)
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip()
            if os.environ.get("DELTAFMT_KERNELS") == "require":
                raise SystemExit(f"cannot build the kernels: {reason}") from error
            self.app.display_warning(f"deltafmt will be slower, the kernels cannot be built: {reason}")
            return
        build_data["artifacts"].append(LIBRARY)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{next(platform_tags())}"


def compiler() -> list[str]:
    """`$CC`, or `cc`, or what Python was built with."""
    named = os.environ.get("CC")
    if named:
        return shlex.split(named)
    return ["cc"] if sys.platform != "win32" else shlex.split(sysconfig.get_config_var("CC") or "cc")
