"""A Hugging Face model as its configuration says, without weights: parameters on the meta device, buffers computed."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..errors import MissingExtraError, UsageError
from ..names import escaped
from ..reader import Archive


@dataclass(frozen=True)
class Architecture:
    """Which model an archive is of: its configuration, and the class that `config.architectures` names."""

    path: Path
    config: Any
    model_class: Any
    generation_config: Any


def architecture(archive: Archive, trust_remote_code: bool = False) -> Architecture:
    """Read `config.json`, and `generation_config.json` if there is one.

    Raises `UsageError` where they do not say which model this is, or transformers does not know it; `MissingExtraError`
    without transformers.
    """
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtraError("models need transformers", extra="hf")
    with _sidecar_folder(archive) as folder:
        return _architecture(archive.path, folder, trust_remote_code)


def _architecture(path: Path, folder: Path, trust_remote_code: bool) -> Architecture:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).partition("\n")[0]
        raise UsageError(
            f"transformers cannot read its configuration: {first}",
            where=str(path),
            hint="load_state_dict reads any archive",
        ) from error
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None and _quant_method(quantized) == "deltafmt":
        del config.quantization_config  # ours: what we build is not quantised
    names = getattr(config, "architectures", None) or []
    found = getattr(transformers, names[0], None) if names else None
    remote = (getattr(config, "auto_map", None) or {}) if trust_remote_code else {}
    for reference in remote.values():
        if names and isinstance(reference, str) and reference.rpartition(".")[2] == names[0]:
            found = transformers.dynamic_module_utils.get_class_from_dynamic_module(reference, str(folder))
    if found is None and not names:
        found = transformers.AutoModel._model_mapping.get(type(config), None)
    if found is None or isinstance(found, tuple):
        known = escaped(names[0]) if names else "no architecture"
        raise UsageError(
            f"transformers has no class for it: config.json names {known}",
            where=str(path),
            hint="Pass trust_remote_code=True if the model brings its own code and you trust it",
        )
    generation = None
    if (folder / "generation_config.json").is_file():
        generation = transformers.GenerationConfig.from_pretrained(folder)
    return Architecture(path, config, found, generation)


@contextmanager
def _sidecar_folder(archive: Archive) -> Iterator[Path]:
    """Where transformers finds configuration and code: the archive, or a folder for the while if that is one file."""
    if not archive.single_file:
        yield archive.path
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, part in archive.sidecars.items():
            if name.endswith((".json", ".py")):
                target = Path(folder) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(b"".join(part.blocks()))
        yield Path(folder)


def settings(config: Any) -> dict[str, Any]:
    """What of a configuration makes a model another one: not where it is from, nor what its weights are cast to."""
    passing = ("_name_or_path", "architectures", "auto_map", "dtype", "transformers_version")
    return {name: value for name, value in config.to_dict().items() if name not in passing}


def skeleton(of: Architecture, dtype: torch.dtype) -> nn.Module:
    """The model with its parameters on the meta device; buffers are there, as the model's code computes them. In
    evaluation mode, ties made."""
    with _parameters_on_meta():
        model: Any = of.model_class._from_config(of.config, dtype=dtype)
        model.tie_weights()
    _finish(model, of)
    built: nn.Module = model
    return built


def full_model(of: Architecture, tensors: dict[str, torch.Tensor], dtype: torch.dtype | None) -> nn.Module:
    """The model as `from_pretrained` builds it from a state dict: names converted where they have changed since.

    Raises `UsageError` if weights are missing: they would be random.
    """
    model, loaded = of.model_class.from_pretrained(
        None, config=of.config, state_dict=tensors, dtype="auto" if dtype is None else dtype, output_loading_info=True
    )
    if loaded["missing_keys"]:
        raise missing(of.path, sorted(loaded["missing_keys"]))
    _finish(model, of)
    built: nn.Module = model
    return built


def missing(path: Path, names: list[str]) -> UsageError:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return UsageError(
        f"the archive lacks weights of {escaped(names[0])}{more} that the model needs",
        where=str(path),
        hint="They would be random; load_state_dict gives what there is",
    )


def _finish(model: Any, of: Architecture) -> None:
    model.eval()
    model.config._name_or_path = model.name_or_path = str(of.path)
    if model.can_generate() and of.generation_config is not None:
        model.generation_config = copy.deepcopy(of.generation_config)


def _quant_method(quantized: Any) -> Any:
    return quantized.get("quant_method") if isinstance(quantized, dict) else getattr(quantized, "quant_method", None)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules that this thread builds have their parameters on the meta device, and their buffers where they are."""
    builder = threading.get_ident()

    def to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> Any:
        if threading.get_ident() != builder or parameter is None or parameter.device.type == "meta":
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        hook.remove()
