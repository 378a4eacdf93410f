"""vLLM serves archives. Installed beside it, deltafmt is found as a plugin, and there is one load format more:

    vllm serve packed/ --load-format deltafmt
    vllm serve packed/ --load-format deltafmt --model-loader-extra-config '{"base": "org/base-model"}'

`base` is as of `deltafmt.open`. Each weight is rebuilt as vLLM asks for it and given up once it is copied, so a worker
holds one at a time. Nothing but vLLM's plugin loader should import this module: it needs vLLM.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from .archive import open as open_archive
from .errors import UsageError
from .sources import each_base, local_path

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
        """Fill a model that exists. Raises what `deltafmt.open` raises, and `IntegrityError` for damaged tensors."""
        model.load_weights(weights(_source(model_config), self._base))


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


def weights(path: str, base: Any = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every tensor of an archive, in the order of its files."""
    with open_archive(path, base, framework="pt") as archive:
        for name in archive.keys():  # noqa: SIM118
            yield name, archive.get_tensor(name)


def _source(model_config: ModelConfig) -> str:
    """The model as deltafmt names it: a directory, or a Hub id and its revision."""
    revision = f"@{model_config.revision}" if model_config.revision else ""
    return str(model_config.model) + ("" if os.path.isdir(model_config.model) else revision)
