"""The README's table of sizes: packs real models and writes the table between the README's markers.

    python tools/sizes.py            prints the table
    python tools/sizes.py --write    puts it into README.md

Everything is counted: weights, manifest, sidecars (tokenizers and the like, the same bytes on both sides). Weights are
real; the bf16 rows of MiniLM are casts of fp32 checkpoints; the LoRAs are trained by `train_lora.py` (rank 16). Needs
`deltafmt[torch,bench]`.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deltafmt
import fixtures
import measure
import synthetic
import train_lora

README = Path(__file__).parent.parent / "README.md"
MARKED = re.compile(r"(<!-- sizes:.*?-->\n).*?(<!-- /sizes -->)", re.DOTALL)


@dataclass(frozen=True)
class Case:
    """One row: a model, how it is packed, and against what."""

    model: str
    how: str
    source: Path
    base: Path | None = None
    options: dict[str, Any] | None = None


def cases(folder: Path) -> Iterator[Case]:
    """Every row of the table; casts are made in `folder`."""
    base, tuned = fixtures.minilm(), fixtures.finetune()
    base16 = synthetic.cast_checkpoint(base, folder / "base-bf16", "BF16")
    tuned16 = synthetic.cast_checkpoint(tuned, folder / "finetune-bf16", "BF16")
    yield Case("all-MiniLM-L6-v2, bf16", "lossless", base16)
    yield Case("all-MiniLM-L6-v2, fp32", "lossless", base)
    yield Case("a fine-tune of it, bf16", "lossless, against the base", tuned16, base16)
    yield Case("a fine-tune of it, fp32", "lossless, against the base", tuned, base)
    yield Case("a fine-tune of it, fp32", "rank 32, against the base", tuned, base, {"rank": 32})
    for merge in ("SmolLM2 LoRA, merged in bf16", "MGM LoRA, merged in bf16", "MGM DoRA, merged in bf16"):
        merged_base, merged = train_lora.merged(train_lora.MERGES[merge])
        yield Case(f"{merge} by PEFT", "lossless, against the base", merged, merged_base)
    yield Case("MGM (GPT-2, 8.9M, tied, .bin), fp32", "lossless", fixtures.mgm())
    yield Case("rxnmapper (ALBERT, .bin), fp32", "lossless", fixtures.rxnmapper())


def rows(folder: Path) -> list[dict[str, measure.Cell]]:
    """Pack every case; sizes in MB (10^6 bytes)."""
    table: list[dict[str, measure.Cell]] = []
    for place, case in enumerate(cases(folder)):
        report = deltafmt.pack(case.source, folder / f"packed-{place}", base=case.base, **(case.options or {}))
        sidecars = report.roles["sidecar"]
        table.append(
            {
                "model": case.model,
                "packed": case.how,
                "input MB": f"{report.logical_bytes / 1e6:.1f}",
                "archive MB": f"{report.stored_bytes / 1e6:.1f}",
                "archive / input": f"{report.ratio:.1%}",
                "without sidecars": f"{(report.stored_bytes - sidecars) / (report.logical_bytes - sidecars):.1%}",
                "largest relative error": "0" if report.exact else f"{report.max_rel_error:.2g}",
            }
        )
    return table


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--write", action="store_true", help="put the table into README.md")
    write = arguments.parse_args().write
    with tempfile.TemporaryDirectory() as folder:
        table = measure.markdown(rows(Path(folder)))
    print(table)
    if write:
        text = README.read_text(encoding="utf-8")
        README.write_text(MARKED.sub(lambda found: f"{found[1]}{table}\n{found[2]}", text), encoding="utf-8")


if __name__ == "__main__":
    main()
