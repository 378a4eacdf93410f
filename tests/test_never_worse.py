"""Of what is no merge, an archive is no larger than without the search for merges, but for the bytes that say so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import deltafmt
from deltafmt.methods import lossless
from deltafmt.methods.merged import computed
from deltafmt.methods.prediction import Elements, Prediction
from merges import factors, ulp
from plain_checkpoint import NUMPY, held, write_checkpoint

Array = npt.NDArray[Any]
Change = Callable[[Array, float], Array]
"""From weights, and the size of the change."""

SIDE = 1024  # several chunks, of which some are sampled, and parts that stand for the whole
SPREAD = 0.02
FEW = 16
"""Bytes."""


def gaussian(seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal((SIDE, SIDE), np.float32)


def noise(base: Array, step: float) -> Array:
    return base + np.float32(step) * gaussian(1)


def scaled_noise(base: Array, step: float) -> Array:
    """Larger in some rows and columns than in others: the size of the change is of rank 1, the change is not."""
    rng = np.random.default_rng(2)
    rows, columns = rng.lognormal(0, 1, (SIDE, 1)), rng.lognormal(0, 1, SIDE)
    return base + (step * rows * columns * gaussian(1)).astype(np.float32)


def decay_and_noise(base: Array, step: float) -> Array:
    """AdamW's: every weight is multiplied, and then moved."""
    return noise(base * np.float32(1 - 1e-3), step)


def some_rows_decayed(base: Array, step: float) -> Array:
    """As `noise`, but for rows that were only multiplied, less than a quarter of all."""
    changed = noise(base, step)
    changed[:200] = base[:200] * np.float32(0.99)
    return changed


def merged_and_noise(base: Array, step: float) -> Array:
    """Low rank, twice as large as the noise."""
    b, a = factors(np.random.default_rng(3), base.shape, 8, 2 * step)
    return noise(base + b @ a, step)


class Packed:
    """One tensor, packed with the search and without.

    Attributes:
        searched, plain: bytes of all files.
        offered: how many predictions the search came up with.
    """

    def __init__(self, root: Path, dtype: str, changed: Change, ulps: float, searched_as: Change | None = None) -> None:
        """With `searched_as`, the search sees another tensor, and what it offers is of no use."""

        def tuned(by: Change) -> Array:
            moved: Array = by(base.astype(np.float32), ulps * ulp(SPREAD, dtype)).astype(NUMPY[dtype])
            return moved

        base = (SPREAD * gaussian(0)).astype(NUMPY[dtype])
        write_checkpoint(root / "base", [held("w", base)])
        write_checkpoint(root / "tuned", [held("w", tuned(changed))])
        seen = tuned(searched_as or changed).reshape(-1)
        self.offered = 0

        def counted(name: str, tensor: Elements, *rest: Any) -> Iterator[Prediction]:
            for found in computed(name, tensor._replace(bits=seen.view(tensor.bits.dtype)), *rest):
                self.offered += 1
                yield found

        self.searched = packed_bytes(root, "searched", counted)
        self.plain = packed_bytes(root, "plain", lambda *_: iter(()))


def packed_bytes(root: Path, name: str, search: Callable[..., Iterator[Prediction]]) -> int:
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(lossless, "computed", search)
        deltafmt.pack(root / "tuned", root / name, base=root / "base")
    return sum(file.stat().st_size for file in (root / name).iterdir())


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("ulps", [0.5, 4])
@pytest.mark.parametrize("changed", [noise, scaled_noise, decay_and_noise, some_rows_decayed])
def test_what_is_no_merge_takes_no_more(dtype: str, ulps: float, changed: Change, tmp_path: Path) -> None:
    packed = Packed(tmp_path, dtype, changed, ulps)
    assert packed.searched <= packed.plain + FEW


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_the_search_is_what_makes_the_difference(dtype: str, tmp_path: Path) -> None:
    packed = Packed(tmp_path, dtype, merged_and_noise, 0.5)
    assert packed.offered > 0
    assert packed.searched < 0.9 * packed.plain


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_what_is_offered_and_does_not_pay_is_not_stored(dtype: str, tmp_path: Path) -> None:
    packed = Packed(tmp_path, dtype, noise, 0.5, searched_as=merged_and_noise)
    assert packed.offered > 0
    assert packed.searched <= packed.plain + FEW
