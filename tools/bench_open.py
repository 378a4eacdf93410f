"""What `deltafmt.open` costs on an archive of 2,000 tensors: milliseconds when warm, and bytes read from its files.

`json.loads` of the manifest, in turns with it, says how fast the machine is at the moment with such work.

The bytes are the kernel's count for this process (`rchar` in `/proc/self/io`, Linux only): every `read` and `pread`,
cached or not.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import deltafmt
import synthetic
from measure import Report, Timed, in_turns


def bytes_read() -> int:
    """Bytes that this process has read so far."""
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["rchar"])


def open_and_close(archive: Path) -> None:
    """What is measured: open, list the names, close."""
    with deltafmt.open(archive) as opened:
        list(opened.keys())


def main() -> None:
    """Pack, open, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="JSON instead of markdown")
    parser.add_argument("--tensors", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=21)
    options = parser.parse_args()
    report = Report(options.json)
    with tempfile.TemporaryDirectory() as directory:
        archive = Path(directory) / "archive"
        deltafmt.pack(synthetic.many_tensors(Path(directory) / "model", options.tensors), archive)
        manifest = (archive / "deltafmt.json").read_bytes()
        timed = {"open": Timed(lambda: open_and_close(archive)), "json": Timed(lambda: json.loads(manifest))}
        seconds = in_turns(timed, options.repeats)
        overhead = bytes_read()
        overhead = bytes_read() - overhead
        before = bytes_read()
        open_and_close(archive)
        read = bytes_read() - before - overhead
        sizes = {path.name: path.stat().st_size for path in archive.iterdir()}
        report.table(
            f"deltafmt.open, {options.tensors} tensors",
            [
                {
                    "warm ms": 1000 * seconds["open"],
                    "json.loads of the manifest, ms": 1000 * seconds["json"],
                    "times that": seconds["open"] / seconds["json"],
                    "bytes read": read,
                    "manifest bytes": sizes["deltafmt.json"],
                    "shard bytes": sum(size for name, size in sizes.items() if name.endswith(".safetensors")),
                }
            ],
        )
    report.finish()


if __name__ == "__main__":
    main()
