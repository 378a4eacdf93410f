"""The bare package needs no extra: importing it, or its command line, must load neither torch nor the Hub client."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import deltafmt

EXTRAS = ("torch", "huggingface_hub", "transformers", "gguf", "vllm", "sglang")
ABOUT_EXTRAS = ("torch", "auto_map", "hf", "dcp", "deltallm")  # modules of which the whole point is an extra
ABOUT_ENGINES = ("vllm", "sglang")  # which only these engines import


@pytest.mark.parametrize("module", ["deltafmt", "deltafmt.cli"])
def test_importing_loads_no_extra(module: str) -> None:
    program = f"import sys, {module}; print([name for name in {EXTRAS} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_module_imports_without_the_extras() -> None:
    program = f"""
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys({EXTRAS}))  # None: importing it fails
import deltafmt
from deltafmt.errors import MissingExtraError
for module in pkgutil.walk_packages(deltafmt.__path__, "deltafmt.", onerror=lambda name: None):
    if module.name.endswith("__main__") or module.name.startswith(("deltafmt.torch.", "deltafmt.deltallm.")):
        continue
    if module.name.split(".")[1] in {ABOUT_ENGINES}:
        continue
    try:
        importlib.import_module(module.name)
        missing = False
    except MissingExtraError:
        missing = True
    assert missing == (module.name.split(".")[1] in {ABOUT_EXTRAS}), module.name
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_type_checkers_of_users_see_the_types() -> None:
    assert (Path(deltafmt.__file__).parent / "py.typed").is_file()
