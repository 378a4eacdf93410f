"""What the tests of the command line work with: small checkpoints, processes, JSON strictly read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Arrays = dict[str, np.ndarray[Any, Any]]
Run = Callable[..., tuple[int, str, str]]


def write(folder: Path, tensors: Arrays) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "bert"}\n')
    return folder


def weights(seed: int, layers: int = 3, width: int = 128) -> Arrays:
    random = np.random.default_rng(seed)
    return {
        f"encoder.layer.{layer}.output.dense.weight": random.standard_normal((width, width), np.float32)
        for layer in range(layers)
    }


def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "deltafmt", *map(str, arguments)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def object_in(out: str) -> dict[str, Any]:
    """The one JSON object in a text, strictly read."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    parsed: dict[str, Any] = json.loads(out, parse_constant=refuse)
    assert isinstance(parsed, dict)
    return parsed
