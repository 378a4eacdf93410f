"""Patches of what is a patch itself, in an archive or through its base: each has its own residuals."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

import deltafmt
from hostile import Tensor, manifest, write_checkpoint

SIDE = 384
LAYERS = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(8)]
RANDOM = np.random.default_rng(0)

Bits = npt.NDArray[np.uint16]
Model = dict[str, Bits]


def noise(scale: float) -> npt.NDArray[np.float32]:
    return RANDOM.standard_normal((SIDE, SIDE), np.float32) * np.float32(scale)


def rounded(values: npt.NDArray[np.float32]) -> Bits:
    return values.astype(ml_dtypes.bfloat16).view(np.uint16)


def near(weight: Bits, change: npt.NDArray[np.float32]) -> Bits:
    return rounded(weight.view(ml_dtypes.bfloat16).astype(np.float32) + change)


def save(folder: Path, model: Model) -> Path:
    return write_checkpoint(folder, {name: Tensor("BF16", bits.shape, bits.tobytes()) for name, bits in model.items()})


def operators(archive: Path, name: str) -> tuple[str, str]:
    """What a tensor's patch is grouped by, and what it is a patch of."""
    recipe = manifest(archive)["tensors"][name]["recipe"]
    return recipe["groups"]["by"], recipe["prediction"]["op"]


def check(archive: Path, base: Path, model: Model) -> None:
    with deltafmt.open(archive, base=base) as opened:
        for name, bits in model.items():
            assert np.array_equal(opened.get_tensor(name).view(np.uint16), bits), name
            for part in (np.s_[100:300], np.s_[3:77, 50:60], 383):
                assert np.array_equal(opened.get_slice(name)[part].view(np.uint16), bits[part]), name
    deltafmt.verify(archive, base=base)


@pytest.fixture(scope="module")
def base() -> Model:
    return {name: rounded(noise(0.02)) for name in LAYERS}


@pytest.mark.usefixtures("way")
def test_an_anchor_that_is_a_patch_of_the_base(base: Model, tmp_path: Path) -> None:
    tuned = dict(base)
    tuned[LAYERS[2]] = near(base[LAYERS[2]], noise(2e-4))
    tuned |= {name: near(tuned[LAYERS[2]], noise(2e-4)) for name in LAYERS[3:6]}
    plain = save(tmp_path / "base", base)
    deltafmt.pack(save(tmp_path / "tuned", tuned), tmp_path / "packed", base=plain, share="sequential:4")
    for name in LAYERS[2:6]:
        assert operators(tmp_path / "packed", name) == ("exponent", "ref")
    check(tmp_path / "packed", plain, tuned)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("by", ["exponent", "margin"])
def test_a_base_whose_layers_are_patches(base: Model, by: str, tmp_path: Path) -> None:
    shared = dict(base) | {name: near(base[LAYERS[2]], noise(2e-4)) for name in LAYERS[3:6]}
    archive = tmp_path / "shared"
    deltafmt.pack(save(tmp_path / "base", shared), archive, share="sequential:4")
    factors = [RANDOM.standard_normal((2, SIDE), np.float32) * np.float32(0.02) for _ in "ab"]
    change = noise(2e-4) if by == "exponent" else factors[0].T @ factors[1]
    tuned = {name: near(bits, change) for name, bits in shared.items()}
    deltafmt.pack(save(tmp_path / "tuned", tuned), tmp_path / "packed", base=archive)
    for name in LAYERS[3:6]:
        assert operators(archive, name) == ("exponent", "ref")
        assert operators(tmp_path / "packed", name) == (by, "ref" if by == "exponent" else "sum")
    check(tmp_path / "packed", archive, tuned)
