"""Peak resident memory of `deltafmt pack` and `unpack`, each a process of its own, on a 2 GB sharded checkpoint.

The promise: at most 600 MB plus twice the largest tensor. The model is random and shaped like Llama; the fine-tune is
the same with a low-rank update on every linear layer. File pages mapped into the process count as its memory.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import Cell, Report
from plain_checkpoint import read_checkpoint

ALLOWANCE = 600_000_000


def peak_memory(arguments: list[str]) -> tuple[int, float]:
    """Run `deltafmt ARGUMENTS`; its peak resident bytes and seconds. Exits if it fails."""
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "deltafmt", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"`deltafmt {' '.join(arguments)}` exited with {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    return usage.ru_maxrss * unit, time.perf_counter() - begin


def make(script: str, *arguments: str) -> None:
    """Run a script that lies beside this one in a process of its own.

    Not in this one: Linux counts the memory of a parent, as it is at the start of a child, in the peak of the child.
    """
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


def measure(report: Report, work: Path, total_bytes: int, shard_bytes: int) -> bool:
    """Pack and unpack the model, alone and against a base. Returns whether the promise held."""
    base, tuned = work / "base", work / "tuned"
    make("synthetic.py", "random", str(base), f"--total-bytes={total_bytes}", f"--shard-bytes={shard_bytes}")
    make("merges.py", "lora", str(base), str(tuned), "--rank=8")
    largest = max(tensor.nbytes for tensor in read_checkpoint(base))
    bound = ALLOWANCE + 2 * largest
    rows: list[dict[str, Cell]] = []
    kept = True
    for title, model, options in (("alone", base, []), ("against a base", tuned, ["--base", str(base)])):
        archive, restored = work / "archive", work / "restored"
        for verb, arguments in (
            ("pack", ["pack", str(model), str(archive)]),
            ("unpack", ["unpack", str(archive), str(restored)]),
        ):
            peak, seconds = peak_memory([*arguments, *options, "--overwrite"])
            kept &= peak <= bound
            rows.append(
                {
                    "model": title,
                    "verb": verb,
                    "peak MB": peak / 1e6,
                    "promised MB": bound / 1e6,
                    "peak / promised": peak / bound,
                    "seconds": seconds,
                }
            )
    report.table(f"Peak memory, {total_bytes / 1e9:g} GB in shards of {shard_bytes / 1e6:g} MB", rows)
    return kept


def main() -> int:
    """Returns the exit code: 1 if the promise did not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="JSON instead of markdown")
    parser.add_argument("--total-bytes", type=int, default=2_000_000_000)
    parser.add_argument("--shard-bytes", type=int, default=500_000_000)
    options = parser.parse_args()
    report = Report(options.json)
    with tempfile.TemporaryDirectory() as directory:
        held = measure(report, Path(directory), options.total_bytes, options.shard_bytes)
    report.finish()
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
