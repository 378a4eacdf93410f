"""A Hugging Face model as its configuration says, without weights: parameters on the meta device, buffers computed."""

from __future__ import annotations

import copy
import importlib.util
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..digests import digest
from ..durable import Staging
from ..errors import DeltafmtError, MissingExtraError, UsageError
from ..names import escaped
from ..reader import Archive
from .tensors import is_out_of_memory

CONFIG = "config.json"
_GENERATION = "generation_config.json"
_DESCRIBES = re.compile(r"config(\.[^/]+)?\.json|generation_config\.json|(.+/)?[^/]+\.py")
"""Sidecars that say what model it is: configuration, also for single versions of transformers, and code."""
_SHOWN = 300  # characters of what transformers says


@dataclass(frozen=True)
class Architecture:
    """Which model an archive is of: its configuration, and the class that `config.architectures` names.

    Attributes:
        path: the archive.
        where: its config.json, for messages.
        dtype: what the configuration says of the weights, if anything.
    """

    path: Path
    where: str
    config: Any
    dtype: torch.dtype | None
    model_class: Any
    generation_config: Any


def architecture(archive: Archive, trust_remote_code: bool = False) -> Architecture:
    """Read `config.json`, and `generation_config.json` if there is one.

    Raises `UsageError` where they do not say which model this is, or transformers does not know it or cannot read them;
    `MissingExtraError` without transformers; `IntegrityError` if they, or code beside them, are damaged.
    """
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtraError("models need transformers", extra="hf")
    with sidecar_folder(archive, _DESCRIBES) as folder:
        return _architecture(archive, folder, trust_remote_code)


def _architecture(archive: Archive, folder: Path, trust_remote_code: bool) -> Architecture:
    import transformers

    if not (folder / CONFIG).is_file():
        raise no_config(archive.path)
    where = _place(archive, CONFIG)
    with foreign_errors(where, "transformers cannot read it"):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        quantized = getattr(config, "quantization_config", None)
        if quantized is not None and _quant_method(quantized) == "deltafmt":
            del config.quantization_config  # ours: what we build is not quantised
        found = _model_class(config, folder, where, trust_remote_code)
    generation = generation_config(folder, _place(archive, _GENERATION))
    return Architecture(archive.path, where, config, _dtype(config, where), found, generation)


def _model_class(config: Any, folder: Path, where: str, trust_remote_code: bool) -> type:
    import transformers

    names = named_classes(config, where)
    found = getattr(transformers, names[0], None) if names else None
    remote = (getattr(config, "auto_map", None) or {}) if trust_remote_code else {}
    for reference in remote.values():
        if names and isinstance(reference, str) and reference.rpartition(".")[2] == names[0]:
            found = transformers.dynamic_module_utils.get_class_from_dynamic_module(reference, str(folder))
    if found is None and not names:
        found = transformers.AutoModel._model_mapping.get(type(config), None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        known = escaped(names[0]) if names else "no architecture"
        raise UsageError(
            f"transformers has no class for the model: {known} is named",
            where=where,
            hint="Pass trust_remote_code=True if the model brings its own code and you trust it",
        )
    return found


def named_classes(config: Any, where: str) -> list[str]:
    """The classes that a configuration names. Raises `UsageError` if its `architectures` are no list of names."""
    names = getattr(config, "architectures", None) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError("its architectures are no list of names", where=where, found=repr(names)[:80], hint=_CORRECT)
    return names


def _dtype(config: Any, where: str) -> torch.dtype | None:
    named = getattr(config, "dtype", None)
    if named is None:
        return None
    found = getattr(torch, named, None) if isinstance(named, str) else named
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise UsageError(
            "its dtype is no floating-point dtype of torch", where=where, found=str(named)[:80], hint=_CORRECT
        )
    return found


def generation_config(folder: Path, where: str) -> Any:
    """What a folder says about generation; None if it says nothing, or what is no JSON, which transformers skips."""
    import transformers

    with foreign_errors(where, "transformers cannot read it"), suppress(OSError):
        return transformers.GenerationConfig.from_pretrained(folder)
    return None


_CORRECT = "Correct it in the checkpoint and pack that again; load_state_dict reads any archive as it is"


@contextmanager
def foreign_errors(where: str, what: str, hint: str = _CORRECT, *, when_full: str | None = None) -> Iterator[None]:
    """What a library raises about what it is given, of whatever class, as `UsageError`; that memory is full only with a
    hint for that."""
    try:
        yield
    except DeltafmtError:
        raise
    except ImportError as error:  # says what to install
        raise UsageError(f"{what}: {_in_short(error)}", where=where, hint="Install what it needs") from error
    except Exception as error:
        if is_out_of_memory(error):
            if when_full is None:
                raise
            hint = when_full
        raise UsageError(f"{what}: {_in_short(error)}", where=where, hint=hint) from error


def _in_short(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def no_config(archive: Path) -> UsageError:
    return UsageError(
        f"the archive has no {CONFIG}, which says what model it is of",
        where=str(archive),
        hint="Pass config= to from_pretrained, or pack the checkpoint with it; load_state_dict reads any archive",
    )


def _place(archive: Archive, sidecar: str) -> str:
    """Where a sidecar is, for messages."""
    return f"{archive.path}: {sidecar}" if archive.single_file else str(archive.path / sidecar)


@contextmanager
def sidecar_folder(archive: Archive, wanted: re.Pattern[str]) -> Iterator[Path]:
    """Where transformers finds sidecars of these names, which are those of the archive: a folder for the while if that
    is one file. Raises `IntegrityError` if they are damaged."""
    contents = {}
    for name, part in archive.sidecars.items():
        if wanted.fullmatch(name):
            contents[name] = b"".join(part.blocks())
            archive.check_sidecar(name, digest(contents[name]))
    if not archive.single_file:
        yield archive.path
        return
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / archive.path.stem  # code is kept by transformers under the name of its folder
        with Staging(target) as staging:
            for name, content in contents.items():
                staging.write(name, [content])
            staging.commit()
        yield target


def settings(config: Any) -> dict[str, Any]:
    """What of a configuration makes a model another one: not where it is from, nor what its weights are cast to."""
    passing = ("_name_or_path", "architectures", "auto_map", "dtype", "transformers_version")
    return {name: value for name, value in config.to_dict().items() if name not in passing}


def skeleton(of: Architecture, dtype: torch.dtype) -> nn.Module:
    """The model with its parameters on the meta device; buffers are there, as the model's code computes them. In
    evaluation mode, ties made, each parameter of the dtype in which `from_pretrained` holds it."""
    with foreign_errors(of.where, "transformers cannot build the model that it describes"), _parameters_on_meta():
        model: Any = of.model_class._from_config(of.config, dtype=dtype)
        model.tie_weights()
        _keep_wide(model, dtype)
        _finish(model, of)
    built: nn.Module = model
    return built


def _keep_wide(model: Any, dtype: torch.dtype) -> None:
    """Make float32 what the model's class wants so beside half precision; the names are patterns, as transformers
    looks for them."""
    patterns = set(model._keep_in_fp32_modules_strict or ()) if dtype in (torch.float16, torch.bfloat16) else set()
    if dtype == torch.float16:
        patterns |= set(model._keep_in_fp32_modules or ())
    if not patterns:
        return
    wide = re.compile("|".join(pattern.replace("*", ".*") for pattern in patterns))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and wide.search(name):
            tensor.data = tensor.data.float()


def full_model(of: Architecture, tensors: dict[str, torch.Tensor], dtype: torch.dtype | None) -> nn.Module:
    """The model as `from_pretrained` builds it from a state dict: names converted where they have changed since.

    Raises `UsageError` if weights are missing, or have another shape than the model's: they would be random.
    """
    with foreign_errors(of.where, "transformers cannot build the model that it describes"):
        model, loaded = of.model_class.from_pretrained(
            None,
            config=of.config,
            state_dict=tensors,
            dtype="auto" if dtype is None else dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        _finish(model, of)
    if loaded["mismatched_keys"]:
        name, stored, needed = min(loaded["mismatched_keys"])
        raise misfit(of.path, name, list(needed), list(stored))
    if loaded["missing_keys"]:
        raise missing(of.path, sorted(loaded["missing_keys"]))
    built: nn.Module = model
    return built


def misfit(path: Path, name: str, needed: list[int], stored: list[int]) -> UsageError:
    return UsageError(
        f"the tensor '{escaped(name)}' does not fit the model that {CONFIG} describes",
        where=str(path),
        expected=needed,
        found=stored,
        hint=_CORRECT,
    )


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
