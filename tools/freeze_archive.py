"""Freeze one archive per release: every later version must open it and rebuild what is beside it.

    cd tests/data; python ../../tools/freeze_archive.py archive-1.0

Writes `base` and `expected` (plain checkpoints, made of arithmetic and nothing of deltafmt), `archive` and `lossy`
(both packed from `expected` against `base`). Run once, when the format gets a new minor version; what is frozen is
never written again.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import deltafmt

Values = Callable[[int], float]


def f32(values: Values, count: int) -> bytes:
    return struct.pack(f"<{count}f", *map(values, range(count)))


def bf16(values: Values, count: int) -> bytes:
    """Cut, not rounded: any bits will do."""
    return b"".join(struct.pack("<f", values(place))[2:] for place in range(count))


def noise(place: int) -> float:
    """Numbers in [-1, 1) that follow no pattern zstd would see; all exact in float32."""
    return ((place * 2654435761 % 2**32) >> 8) / 2**23 - 1


def tuned(place: int) -> float:
    return noise(place) * (1 + 2**-10) if place % 5 else noise(place)


def product(place: int) -> float:
    """`noise` plus a product of rank 2, of a 24 x 16 matrix."""
    row, column = divmod(place, 16)
    return noise(place) + (row % 5 - 2) * (column % 3 - 1) / 64 + (row % 3 - 1) * (column % 7 - 3) / 128


Tensors = dict[str, tuple[str, list[int], bytes]]

BASE: Tensors = {
    "model.embed_tokens.weight": ("BF16", [40, 16], bf16(noise, 640)),
    "model.layers.0.mlp.up_proj.weight": ("F32", [24, 16], f32(noise, 384)),
    "model.layers.0.mlp.down_proj.weight": ("F32", [16, 24], f32(noise, 384)),
    "model.norm.weight": ("F32", [16], f32(lambda place: 1 + place / 16, 16)),
}
EXPECTED: Tensors = {
    "model.embed_tokens.weight": ("BF16", [40, 16], bf16(tuned, 640)),
    "lm_head.weight": ("BF16", [40, 16], bf16(tuned, 640)),
    "model.layers.0.mlp.up_proj.weight": ("F32", [24, 16], f32(product, 384)),
    "model.layers.0.mlp.down_proj.weight": ("BF16", [16, 24], bf16(tuned, 384)),
    "model.norm.weight": ("F32", [16], f32(lambda place: 1 + place / 16, 16)),
    "ключ": ("F64", [50, 8], struct.pack("<400d", *(noise(place) / 3 for place in range(400)))),
    "special": ("F32", [6], struct.pack("<6I", 0x7FC12345, 0xFF800001, 0x7F800000, 0x80000000, 1, 0)),
    "ids": ("I64", [1, 40], struct.pack("<40q", *range(40))),
    "mask": ("BOOL", [3, 3], bytes([1, 0, 0, 1, 1, 0, 1, 1, 1])),
    "float8": ("F8_E4M3", [256], bytes(range(256))),
    "complex": ("C64", [2], struct.pack("<4f", 1, -0.0, float("inf"), 2**-149)),
    "scalar": ("F16", [], b"\x01\x7c"),
    "empty": ("I8", [2, 0, 3], b""),
}


def write_file(path: Path, tensors: Tensors) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(data)]}
        position += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))


def write_checkpoints(directory: Path) -> tuple[Path, Path]:
    """Write `base`, in one file, and `expected`, in two files with an index; return both."""
    base, expected = directory / "base", directory / "expected"
    base.mkdir(parents=True)
    (expected / "tokenizer").mkdir(parents=True)
    (base / "config.json").write_text("{}\n")
    write_file(base / "model.safetensors", BASE)
    (expected / "config.json").write_text('{"model_type": "frozen"}\n')
    (expected / "tokenizer/vocab.txt").write_text("naïve\n")
    names = list(EXPECTED)
    weight_map = {}
    for number, part in enumerate((names[:5], names[5:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        write_file(expected / file, {name: EXPECTED[name] for name in part})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": sum(len(data) for _, _, data in EXPECTED.values())}, "weight_map": weight_map}
    (expected / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return base, expected


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    directory = Path(sys.argv[1])
    base, expected = write_checkpoints(directory)
    deltafmt.pack(expected, directory / "archive", base=base, shard_bytes=2000)
    deltafmt.pack(expected, directory / "lossy", base=base, rank=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
