"""vLLM serves archives. Installed beside it, deltafmt is found as a plugin, and there is one load format more:

    vllm serve packed/ --load-format deltafmt
    vllm serve packed/ --load-format deltafmt --model-loader-extra-config '{"base": "org/base-model"}'

`base` is as of `deltafmt.open`. Each weight is rebuilt as vLLM asks for it and given up once it is copied, so a worker
holds one at a time. Nothing but vLLM's plugin loader should import this module: it needs vLLM.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Set
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from .errors import UsageError
from .names import escaped
from .sources import each_base, local_path
from .torch.stream import stream

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.config.load import LoadConfig

NAME = "deltafmt"


@functools.cache
def register() -> None:
    """The entry point of the group `vllm.general_plugins`. vLLM calls it in every process, perhaps more than once."""
    register_model_loader(NAME)(ArchiveLoader)
    register_quantization_config(NAME)(PassThrough)


class ArchiveLoader(BaseModelLoader):  # type: ignore[misc] # vLLM has no types where it is not installed
    """`--load-format deltafmt`. Raises `UsageError` for an unknown key of `--model-loader-extra-config`."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        options = dict(load_config.model_loader_extra_config)
        self._base = options.pop("base", None)
        if options:
            raise UsageError(f"unknown keys {sorted(options)} in --model-loader-extra-config", hint="There is 'base'")

    def download_model(self, model_config: ModelConfig) -> None:
        """Fetch the archive and its base, if they are on the Hub."""
        for source in (_source(model_config), *each_base(self._base)):
            if isinstance(source, (str, os.PathLike)):
                local_path(source)

    def load_weights(self, model: Any, model_config: ModelConfig) -> None:
        """Fill a model that exists.

        Raises:
            DeltafmtError: what `deltafmt.open` raises, and `IntegrityError` for damaged tensors.
            UsageError: the archive lacks weights of the model.
        """
        source = _source(model_config)
        loaded = model.load_weights(stream(source, self._base))
        if loaded is not None and model_config.quantization in (None, NAME):  # some models do not tell
            _check_complete(model, loaded, source)


class PassThrough(QuantizationConfig):  # type: ignore[misc]
    """For checkpoints whose config names deltafmt as their `quant_method`: layers are as if it named none."""

    def get_name(self) -> str:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PassThrough:
        return cls()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Linear layers have to be told; all others know what to do by themselves."""
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


def _check_complete(model: torch.nn.Module, loaded: Set[str], source: str) -> None:
    """Raise `UsageError` if parameters were not filled: vLLM makes them of memory as it comes.

    vLLM's default loader has the same check, but lets all layers off that have a `quant_method`, as every linear layer
    has; here those are let off that add parameters of their own to what a checkpoint holds (scales of a KV cache).
    """
    known = set(loaded)
    for path, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is not None and not type(method).__name__.startswith("Unquantized"):
            known.update(f"{path}.{name}" for name, _ in module.named_parameters())
    missing = [name for name, _ in model.named_parameters() if name not in known]
    if missing:
        raise UsageError(
            f"{len(missing)} weights of the model are not in the archive, the first is '{escaped(missing[0])}'",
            where=source,
            hint="Pack a checkpoint that has all weights of the model that its config.json names",
        )


def _source(model_config: ModelConfig) -> str:
    """The model as deltafmt names it: a directory, or a Hub id and its revision."""
    revision = f"@{model_config.revision}" if model_config.revision else ""
    return str(model_config.model) + ("" if os.path.isdir(model_config.model) else revision)
