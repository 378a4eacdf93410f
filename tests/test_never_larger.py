"""What an archive adds to a checkpoint that nothing makes smaller: README.md says how much that is at most."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

import deltafmt
from hostile import WIDTHS, Tensor, manifest, read_shard, tree, write_checkpoint

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "small": [(37, 11), (), (0, 4), (5,)],
    "several chunks": [(700, 300), (3, 150_000), (2, 140_001), (1000,)],
}


def incompressible(shapes: list[tuple[int, ...]]) -> dict[str, Tensor]:
    random = np.random.default_rng(0)
    found = {}
    for dtype, width in WIDTHS.items():
        for shape in shapes:
            content = random.bytes(math.prod(shape) * width)
            if dtype == "BOOL":  # the one that cannot be: seven bits of each byte are 0
                content = bytes(each & 1 for each in content)
            found[f"{dtype}.{'x'.join(map(str, shape))}"] = Tensor(dtype, shape, content)
    return found


def header_bytes(file: bytes) -> int:
    return 8 + int.from_bytes(file[:8], "little")


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("files", [1, 3])
def test_random_bytes_of_every_dtype(tmp_path: Path, shapes: str, files: int) -> None:
    tensors = incompressible(SHAPES[shapes])
    source = write_checkpoint(tmp_path / "source", tensors, shards=files)
    report = deltafmt.pack(source, tmp_path / "packed")
    before, after = tree(source), tree(tmp_path / "packed")
    headers = sum(header_bytes(content) for name, content in before.items() if name.endswith(".safetensors"))
    chunks = sum(math.ceil(math.prod(tensor.shape) / (1 << 17)) for tensor in tensors.values())
    data = sum(len(tensor.data) for tensor in tensors.values())
    added = sum(map(len, after.values())) - sum(map(len, before.values())) - len(after["deltafmt.json"])
    assert added <= headers + data // 1000 + 16 * chunks + 250 * (files + 1)
    assert report.stored_bytes == sum(map(len, after.values()))

    entries, _ = read_shard(tmp_path / "packed")
    for name, tensor in tensors.items():
        begin, end = entries[name]["data_offsets"]
        assert end - begin <= len(tensor.data)
    for file in manifest(tmp_path / "packed")["checkpoint"]["files"]:
        begin, end = entries[file["header"]]["data_offsets"]
        assert end - begin < header_bytes(before[file["name"]])


def test_a_single_file_adds_no_more(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", incompressible(SHAPES["small"]))
    folder = deltafmt.pack(source, tmp_path / "packed")
    single = deltafmt.pack(source, tmp_path / "packed.safetensors", single_file=True)
    text = len((tmp_path / "packed/deltafmt.json").read_bytes())
    assert single.stored_bytes <= folder.stored_bytes + text // 4 + 250  # the manifest's quotation marks are escaped
