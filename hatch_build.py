"""Builds the kernels (deltafmt/native/*.c) with the package, where a C compiler is at hand.

Without one the package is built all the same, and does the same with numpy. `DELTAFMT_KERNELS=require` makes that an
error, as whoever builds wheels for others wants it.
"""

from __future__ import annotations

import ctypes
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
FLAGS = ["-std=gnu11", "-O3", "-fno-fast-math", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi"]
"""Fast math is a default of some compilers, and a library with it makes the whole process flush subnormals to zero."""


class KernelsBuildHook(BuildHookInterface[Any]):
    """Adds the library to a wheel, which then is one of this platform, for every Python 3."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; called by hatchling before it collects the files of a wheel, or links an editable one."""
        root = Path(self.root)
        library = root / LIBRARY
        fresh = library.with_name(f"{library.name}.{os.getpid()}")  # nobody may load what is half written
        command = [*compiler(), *FLAGS, "-shared", "-fPIC", "-o", str(fresh)]
        command += sorted(str(source) for source in library.parent.glob("*.c"))
        library.unlink(missing_ok=True)
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            ctypes.CDLL(str(fresh)).deltafmt_abi()
            fresh.replace(library)
        except (OSError, AttributeError, subprocess.CalledProcessError) as error:
            fresh.unlink(missing_ok=True)
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
