"""Two processes that meet, as two ranks of `torch.distributed`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def of_two_ranks(program: str, folder: Path, arguments: tuple[Path, ...]) -> list[Any]:
    """What each of two ranks saved that ran `program` (Python): its arguments are its rank, the file where the ranks
    meet, the file that it saves to, and these `arguments`; `folder` is for the files."""
    outputs = [folder / f"rank{rank}.pt" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), str(folder / "rendezvous"), str(output), *map(str, arguments)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, output in enumerate(outputs)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    return [torch.load(output) for output in outputs]
