"""Exact tensors in torch: torch only carries them. No product of torch, which TF32 might shorten, makes any of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import deltafmt
import merges
from deltafmt.torch import load_model, load_state_dict
from deltafmt.torch.fused import deltas
from deltafmt.torch.stream import stream

PRODUCTS = {
    torch: "matmul mm bmm addmm addbmm baddbmm mv addmv dot vdot inner outer ger addr einsum tensordot chain_matmul",
    torch.Tensor: "__matmul__ __rmatmul__ matmul mm bmm addmm addbmm baddbmm mv addmv dot vdot inner outer",
    torch.linalg: "matmul multi_dot vecdot",
    torch.nn.functional: "linear bilinear",
}
RANK = 4


@contextmanager
def without_products() -> Iterator[None]:
    """In all threads, torch multiplies no matrices."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a product by torch")

    with pytest.MonkeyPatch.context() as patching:
        for owner, names in PRODUCTS.items():
            for name in names.split():
                patching.setattr(owner, name, refuse)
        yield


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(archive, base, the original): a merged LoRA, bit for bit, with integer factors."""
    root = tmp_path_factory.mktemp("exact")
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=80,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        dtype="bfloat16",
    )
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(root / "base")
    tuned = merges.merged_lora(root / "base", root / "tuned", rank=RANK, ulps=3)
    report = deltafmt.pack(tuned, root / "packed", base=root / "base")
    assert sum(tensor.rank == RANK for tensor in report.tensors.values()) == 8
    return root / "packed", root / "base", tuned


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def test_no_product_of_torch_makes_an_exact_tensor(merged: tuple[Path, Path, Path]) -> None:
    archive, base, tuned = merged
    expected = {name: bits(tensor) for name, tensor in load_file(tuned / "model.safetensors").items()}
    with without_products():
        assert {name: bits(tensor) for name, tensor in load_state_dict(archive, base=base).items()} == expected
        assert {name: bits(tensor) for name, tensor in stream(archive, base)} == expected
        with deltafmt.open(archive, base=base, framework="pt") as opened:  # what lazy models read from
            assert {name: bits(opened.get_tensor(name)) for name in opened.keys()} == expected  # noqa: SIM118
            for name in expected:
                assert bits(opened.get_slice(name)[3:9]) == bits(opened.get_tensor(name)[3:9])
        full = load_model(archive, base=base)
        fused = load_model(archive, "fused", base=base)
    assert {name: bits(tensor) for name, tensor in full.state_dict().items()} == expected
    rest = {name: bits(tensor) for name, tensor in fused.state_dict().items() if name in expected}
    assert rest == {name: expected[name] for name in rest}
    assert len(rest) + len(deltas(fused)) == len(expected)


def test_fused_layers_multiply(merged: tuple[Path, Path, Path]) -> None:
    """What the other test refuses is what torch would multiply with."""
    archive, base, _ = merged
    fused = load_model(archive, "fused", base=base)
    layer = next(iter(deltas(fused).values()))
    with without_products():
        with pytest.raises(AssertionError, match="by torch"):
            layer(torch.ones(1, 80, dtype=torch.bfloat16))
        with pytest.raises(AssertionError, match="by torch"):
            layer.merged_weight()
