"""Tensor parallelism in transformers: two ranks load an archive, each of them its own part of every weight."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import deltafmt
from two_ranks import of_two_ranks

LLAMA = {  # every matrix has 512K elements, which are two chunks
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 2048,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "tie_word_embeddings": False,
}
UP, DOWN = (f"model.layers.0.mlp.{which}_proj.weight" for which in ("up", "down"))

# What each rank runs: of every archive, its parts of the weights and the axes they are split along; what was read of
# files and how much of products was computed to get them; and what the model says.
_RANK = """
import os, sys
import torch, torch.distributed as dist, transformers
rank, rendezvous, out, base, *archives = int(sys.argv[1]), *sys.argv[2:]
import deltafmt.hf
from deltafmt.gemm import Product
from deltafmt.safetensors_file import SafetensorsFile
from transformers.distributed import DistributedConfig
reads, products = [], []

def watch(owner, method, note):  # what goes through a method, as it goes on
    work = getattr(owner, method)
    def through(self, *given):
        note(self, *given)
        return work(self, *given)
    setattr(owner, method, through)

watch(SafetensorsFile, "read_into", lambda file, offset, out: reads.append((str(file.path), offset, out.nbytes)))
watch(Product, "add", lambda product, into, *given: products.append(into.size))
watch(Product, "onto_bf16", lambda product, top, rows: products.append(rows * product._columns))
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)
os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE="2")
dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
found = {}
for archive in archives:
    reads.clear(), products.clear()
    options = {"base": base} if archive.endswith("lossy") else {}
    parallel = DistributedConfig(tp_size=2, tp_plan="auto")
    model = transformers.AutoModelForCausalLM.from_pretrained(archive, distributed_config=parallel, **options)
    state = model.state_dict().items()
    found[archive] = {
        "reads": list(reads),
        "products": sum(products),
        "axes": {name: tensor.placements[0].dim for name, tensor in state if hasattr(tensor, "placements")},
        "parts": {name: getattr(tensor, "to_local", lambda: tensor)().contiguous() for name, tensor in state},
    }
    with torch.no_grad():
        found[archive]["logits"] = model(torch.arange(8)[None]).logits
torch.save(found, out)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, Path]:
    """(base, lossless archive of it, the same for two ranks, lossy low-rank archive of a fine-tune against it)."""
    root = tmp_path_factory.mktemp("parallel")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).bfloat16()
    model.save_pretrained(root / "base")
    for name in (UP, DOWN):
        weight = model.get_parameter(name).data
        weight += (torch.randn(len(weight), 3) @ torch.randn(3, weight.shape[1]) / 64).bfloat16()
    model.save_pretrained(root / "tuned")
    deltafmt.pack(root / "base", root / "exact")
    deltafmt.pack(root / "base", root / "for two", tensor_parallel=2)
    deltafmt.pack(root / "tuned", root / "lossy", base=root / "base", method="lowrank", rank=3)
    return root / "base", root / "exact", root / "for two", root / "lossy"


@pytest.fixture(scope="module")
def ranks(models: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    return of_two_ranks(_RANK, tmp_path_factory.mktemp("ranks"), models)


@pytest.mark.parametrize("which", [1, 2, 3], ids=["exact", "for two", "lossy"])
def test_each_rank_has_its_part_of_the_model(
    models: tuple[Path, ...], ranks: list[dict[str, Any]], which: int, tmp_path: Path
) -> None:
    archive = models[which]
    deltafmt.unpack(archive, tmp_path / "plain", base=models[0] if which == 3 else None)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    one, other = (found[str(archive)] for found in ranks)
    assert one["axes"] == other["axes"]
    assert (one["axes"][UP], one["axes"][DOWN]) == (0, 1)
    for name, weight in expected.state_dict().items():
        axis = one["axes"].get(name)
        halves = weight.chunk(2, axis) if axis is not None else [weight] * 2
        for half, found in zip(halves, (one["parts"][name], other["parts"][name]), strict=True):
            if which < 3:
                assert torch.equal(found, half), name
            else:  # float products in blocks of another size may round otherwise
                torch.testing.assert_close(found, half, rtol=2**-7, atol=1e-6)
    with torch.no_grad():
        logits = expected(torch.arange(8)[None]).logits
    for found in (one, other):
        torch.testing.assert_close(found["logits"], logits, rtol=0, atol=0.02 * float(logits.abs().max()))


def test_each_rank_reads_its_part_and_no_more(models: tuple[Path, ...], ranks: list[dict[str, Any]]) -> None:
    """Of an archive that was packed for two ranks."""
    archive = models[2]
    for found in (rank[str(archive)] for rank in ranks):
        stored, read = _read(archive, found["reads"])
        assert set(found["axes"].values()) == {0, 1}
        for name in found["axes"]:
            assert read[name] == pytest.approx(stored[name] / 2, rel=0.01), name
    both = sum((_read(archive, rank[str(archive)]["reads"])[1] for rank in ranks), Counter[str]())
    assert all(both[name] == _read(archive, [])[0][name] for name in ranks[0][str(archive)]["axes"])  # nothing twice


def test_each_rank_reads_the_chunks_of_its_part(models: tuple[Path, ...], ranks: list[dict[str, Any]]) -> None:
    """Of another archive. Split by rows: those of its rows, so each half. Split by columns: all, since a chunk holds
    whole rows."""
    exact = models[1]
    for found in (rank[str(exact)] for rank in ranks):
        stored, read = _read(exact, found["reads"])
        for name, axis in found["axes"].items():
            assert read[name] == pytest.approx(stored[name] / (2 if axis == 0 else 1), rel=0.01), name
        assert sum(read.values()) < 0.7 * sum(stored.values())
    by_rows = [name for name, axis in ranks[0][str(exact)]["axes"].items() if axis == 0]
    both = sum((_read(exact, rank[str(exact)]["reads"])[1] for rank in ranks), Counter[str]())
    assert all(both[name] == _read(exact, [])[0][name] for name in by_rows)  # no chunk twice


def test_each_rank_computes_its_part_of_products(models: tuple[Path, ...], ranks: list[dict[str, Any]]) -> None:
    base, *_, lossy = models
    plain = load_file(base / "model.safetensors")
    digests = sum(tensor.nbytes for tensor in plain.values())  # before they are used, base tensors are read whole
    for rank in ranks:
        found = rank[str(lossy)]
        assert found["products"] == (plain[UP].numel() + plain[DOWN].numel()) / 2
        read = sum(size for path, _, size in found["reads"] if Path(path).parent == base)
        used = sum(plain[name].nbytes / (2 if axis == 0 else 1) for name, axis in found["axes"].items())
        assert read == pytest.approx(digests + used, rel=0.01)


def _read(archive: Path, reads: list[tuple[str, int, int]]) -> tuple[Counter[str], Counter[str]]:
    """By name: the bytes that each stored array has in the archive, and how many of these were read."""
    (shard,) = archive.glob("*.safetensors")
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    places = {name: entry["data_offsets"] for name, entry in json.loads(content[8 : 8 + length]).items()}
    found = Counter[str]()
    for path, offset, size in reads:
        if Path(path) == shard:
            at = offset - 8 - length
            found.update({name: size for name, (begin, end) in places.items() if begin <= at < end})
    return Counter({name: end - begin for name, (begin, end) in places.items()}), found
