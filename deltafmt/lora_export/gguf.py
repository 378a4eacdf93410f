"""An adapter as llama.cpp keeps it: a GGUF file of the type `adapter`.

Names, the order of dimensions and the permutation are those of llama.cpp's `convert_lora_to_gguf.py` and of its Llama
conversion (`LlamaModel.permute`). The form is written for the architectures whose conversion is no more than that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..dtypes import Dtype
from ..durable import Staging
from ..errors import AccessError, MissingExtraError, UnsupportedError, UsageError
from .factors import Float32
from .modules import Kind
from .peft import Adapter

FILE = "adapter_model.gguf"
MODEL_TYPES = ("llama", "mistral")
"""Of `config.json`: both are of llama.cpp's architecture `llama`."""


_COUNTS = ("num_hidden_layers", "num_attention_heads")
"""Of `config.json`: what the form cannot be written without."""


def check_gguf(config: Mapping[str, Any], where: str) -> None:
    """Whether there is a GGUF form for the model of this config, in the archive `where`, before any work is done.

    Raises:
        UnsupportedError: another architecture, or a config that does not tell the numbers of layers and heads.
        MissingExtraError: without `gguf`.
    """
    model_type = str(config.get("model_type", ""))
    if model_type not in MODEL_TYPES:
        raise UnsupportedError(
            f"no GGUF adapter of a model of type {model_type!r}",
            expected=" or ".join(MODEL_TYPES),
            hint="Write a PEFT adapter and convert it with llama.cpp's convert_lora_to_gguf.py",
        )
    for key in _COUNTS:
        found = config.get(key)
        if type(found) is not int or found < 1:
            raise UnsupportedError(
                f"config.json does not tell {key}",
                where=where,
                expected="1 or more",
                found=found,
                hint="Complete it and pack the model again, or write a PEFT adapter",
            )
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("a GGUF adapter is written through gguf, which is not installed", "gguf") from error


def write_gguf(
    area: Staging, adapters: Sequence[Adapter], rank: int, dtype: Dtype, config: Mapping[str, Any], base: str | None
) -> None:
    """Write the adapter file.

    Raises:
        UsageError: a module has no place in a GGUF model of this architecture.
        AccessError: writing failed.
    """
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = config["num_attention_heads"]
    # What llama.cpp splits the rows of Q and K by.
    split = {"q_proj": heads, "k_proj": int(config.get("num_key_value_heads") or heads)}
    file = area.create(FILE)  # gguf writes into it by its name
    writer = gguf.GGUFWriter(file.path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    if base is not None:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base)
    kind = gguf.GGMLQuantizationType[dtype.name]
    for adapter in adapters:
        name = names.get_name(f"{adapter.path}.weight", try_suffixes=(".weight",))
        if name is None:
            raise UsageError(f"the module '{adapter.path}' has no place in a GGUF model", hint="Write a PEFT adapter")
        a, b = adapter.lora_a, adapter.lora_b
        if adapter.kind is Kind.EMBEDDING:
            a = a.T  # rows are looked up in it
        if (parts := split.get(adapter.path.rpartition(".")[2])) is not None:
            b = permuted(b, parts)
        for letter, factor in (("a", a), ("b", b)):
            values = np.ascontiguousarray(factor)
            stored = values if dtype.name == "F32" else gguf.quants.quantize(values, kind)
            writer.add_tensor(f"{name}.lora_{letter}", stored, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except OSError as error:
        raise AccessError(f"cannot write: {error.strerror or error}", where=str(file.path)) from error
    finally:
        writer.close()
    file.finish()


def permuted(rows: Float32, heads: int) -> Float32:
    """Rows of Q or K in the order in which llama.cpp rotates them: within a head the halves interleaved."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)
