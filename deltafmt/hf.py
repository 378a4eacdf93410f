"""transformers loads archives: `import deltafmt.hf`, and `from_pretrained` takes the directory of one, or a Hub id.

    import deltafmt.hf
    model = AutoModelForCausalLM.from_pretrained("model.dfmt")
    model = AutoModel.from_pretrained("tuned.dfmt", base="path/or/hub-id/of/the/base", dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained("tuned.dfmt", base="...", mode="fused")

transformers has no plug-in point for weights, so importing this module wraps one public method of it,
`PreTrainedModel.from_pretrained`: what is no archive goes to the original as it came; for an archive, the original is
given a `state_dict` of lazy slices. So every Auto class, `dtype`, `device_map`, `distributed_config`, key renaming and
tied weights work as they do with safetensors, and each weight is rebuilt where transformers puts it and not before.
The Auto classes read the configuration before they call it: theirs are wrapped to say what is wrong with that of an
archive, and for nothing else.

An archive's config.json is that of the checkpoint: transformers, vLLM and SGLang without deltafmt find no weights and
say so. `write_auto_map` makes an archive load with `trust_remote_code=True` where nobody imports this module.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from .archive import open as open_lazily
from .archive import usable_device
from .auto_map import STUB, check_auto_map, stand_in, write_auto_map
from .dtypes import DTYPES
from .errors import DeltafmtError, MissingExtraError, UsageError
from .names import MANIFEST
from .reader import Archive, is_archive, read_manifest
from .sources import Bases, PathLike, open_archive
from .torch import LazyTensor, load_model
from .torch.model import check_configuration
from .torch.skeleton import CONFIG, foreign_errors, generation_config, named_classes, no_config, settings
from .torch.tensors import Cast, SharedPieces, check_float, nbytes, room_for, torch_dtype

try:
    import torch
    import transformers
    from packaging.version import Version
    from transformers.models.auto import modeling_auto
    from transformers.utils.hub import cached_file, cached_files
except ImportError as error:
    raise MissingExtraError("loading archives with transformers needs torch and transformers", extra="hf") from error

__all__ = ["OLDEST", "STUB", "check_auto_map", "register", "stand_in", "write_auto_map"]

OLDEST = "5.0"
"""The first version of transformers whose loader takes lazy slices."""
_GENERATION = "generation_config.json"
_MODES = ("mode", "rank", "max_bytes")
_BOOKKEEPING = frozenset({"_from_auto", "_from_pipeline", "adapter_kwargs", "weights_only", "use_safetensors"})
_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
_SEVERAL = "several devices"
_DOWNLOAD = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


def register() -> None:
    """Make `from_pretrained` take archives. Importing this module has done it; doing it again changes nothing.

    For archives `from_pretrained` takes more arguments: `base`, as of `deltafmt.open`; and `mode`, `rank` and
    `max_bytes`, as of `deltafmt.torch.load_model`. Of its own it takes `dtype`, `device_map` (one device),
    `attn_implementation` and `trust_remote_code` with these, and the class must be the one that `config.json` names.

    Raises `MissingExtraError` if transformers is older than `OLDEST`.
    """
    if Version(transformers.__version__) < Version(OLDEST):
        what = f"loading archives needs transformers {OLDEST} or newer, and this is {transformers.__version__}"
        raise MissingExtraError(what, extra="hf")
    original = transformers.PreTrainedModel.from_pretrained.__func__
    if hasattr(original, "loads_archives"):
        return

    @functools.wraps(original)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: PathLike | None, *args: Any, **kwargs: Any) -> Any:
        name, subfolder = pretrained_model_name_or_path, kwargs.get("subfolder") or ""
        as_usual = functools.partial(_load_plain, functools.partial(original, cls, name, *args), name)
        if name is None or kwargs.get("state_dict") is not None or kwargs.get("gguf_file") is not None:
            return as_usual(**kwargs)
        folder: Path | None = Path(name) / subfolder
        if not os.path.exists(name):
            try:
                return as_usual(**kwargs)
            except OSError:  # no weights that transformers knows of
                folder = _downloaded(os.fspath(name), subfolder, kwargs)
                if folder is None:
                    raise
        if folder is None or not is_archive(folder):
            return as_usual(**kwargs)
        for option in (*_DOWNLOAD, "subfolder"):
            kwargs.pop(option, None)
        asked = {option: value for option in _MODES if (value := kwargs.pop(option, None)) is not None}
        dense = asked in ({}, {"mode": "full"})
        _check_options(folder, kwargs, configured=dense and kwargs.get("config") is not None)
        with _explained(folder, kwargs):
            if dense:
                return _load(functools.partial(original, cls), folder, os.fspath(name), args, kwargs)
            return _load_as(cls, folder, asked, args, kwargs)

    from_pretrained.loads_archives = True  # type: ignore[attr-defined]
    transformers.PreTrainedModel.from_pretrained = classmethod(from_pretrained)
    for auto_class in vars(modeling_auto).values():
        if isinstance(auto_class, type) and "from_pretrained" in vars(auto_class):
            _wrap_auto_class(auto_class)


def _wrap_auto_class(auto_class: Any) -> None:
    """Let an Auto class, each of which has a `from_pretrained` of its own, say what is wrong with an archive."""
    original = auto_class.from_pretrained.__func__

    @functools.wraps(original)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: PathLike, *args: Any, **kwargs: Any) -> Any:
        folder = Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or "")
        if not is_archive(folder):
            return original(cls, pretrained_model_name_or_path, *args, **kwargs)
        _refuse_single_file(folder)
        _check_options(folder, kwargs, configured=kwargs.get("config") is not None)
        with _explained(folder, kwargs):
            return original(cls, pretrained_model_name_or_path, *args, **kwargs)

    auto_class.from_pretrained = classmethod(from_pretrained)


def _load_plain(original: Any, name: PathLike | None, **kwargs: Any) -> Any:
    """What is no archive, as it always was; but for arguments that only an archive takes."""
    try:
        return original(**kwargs)
    except TypeError as error:
        for option in ("base", *_MODES):
            if option in kwargs and f"unexpected keyword argument '{option}'" in str(error):
                raise UsageError(
                    f"'{option}' is for archives, and this is a plain checkpoint",
                    where=str(name),
                    hint=f"Leave {option} out, or pack it first: deltafmt pack",
                ) from error
        raise


def _check_options(folder: Path, options: Mapping[str, Any], configured: bool) -> None:
    """What can be said before transformers is asked to load an archive; `configured`: without its config.json."""
    for option in ("dtype", "torch_dtype"):
        _check_dtype(options.get(option))
    _check_devices(options.get("device_map"))
    if not configured:
        _refuse_single_file(folder)
        if not (folder / CONFIG).is_file():
            raise no_config(folder)


@contextmanager
def _explained(folder: Path, options: Mapping[str, Any]) -> Iterator[None]:
    """If loading an archive fails, look whether its config.json is to blame, and say so; if not, the error stands."""
    own, trusted = options.get("config") is None, bool(options.get("trust_remote_code"))  # loading changes them
    try:
        yield
    except DeltafmtError:
        raise
    except Exception:
        if own:
            with open_archive(folder) as archive:
                check_configuration(archive, trusted)
        raise


def _refuse_single_file(archive: Path) -> None:
    if archive.is_file():
        raise UsageError(
            "from_pretrained takes directories, and this archive is a single file",
            where=str(archive),
            hint="Use deltafmt.torch.load_model(path), or pack without --single-file",
        )


def _check_dtype(dtype: Any) -> None:
    """Raise `UsageError` for one that torch does not have, or that weights cannot have; transformers takes mappings."""
    found = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if found not in (None, "auto") and not isinstance(found, Mapping):
        check_float(found)


def _check_devices(device_map: Any) -> None:
    """Raise `UsageError` for a device that there is not."""
    places = list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]
    if isinstance(device_map, Mapping) and (not places or None in places):
        raise UsageError("the device_map leaves modules without a device", hint='Try {"": "cpu"}, or "auto"')
    for device in places:
        if device not in (None, "disk", "meta", *_SPREAD):
            usable_device(device)


def _one_device(device_map: Any) -> Any:
    """The only one that a model goes to; `_SEVERAL` if there are more."""
    if isinstance(device_map, Mapping):
        places = {str(place): place for place in device_map.values()}
        return next(iter(places.values())) if len(places) == 1 else _SEVERAL
    if isinstance(device_map, str) and device_map in _SPREAD:
        return _SEVERAL if torch.accelerator.is_available() else "cpu"
    return device_map


def _downloaded(repo: str, subfolder: str, options: Mapping[str, Any]) -> Path | None:
    """The files of an archive on the Hub, in the cache of transformers; None if there is no archive."""
    download = {name: options[name] for name in _DOWNLOAD if name in options} | {"subfolder": subfolder}
    manifest = cached_file(
        repo,
        MANIFEST,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
        **download,
    )
    if manifest is None:
        return None
    folder = Path(manifest).parent
    parts = read_manifest(folder)
    cached_files(repo, [*(shard.name for shard in parts.shards), *parts.sidecars], **download)
    return folder


def _load(original: Any, folder: Path, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """All weights, dense, where and as transformers wants them."""
    base: Bases | None = kwargs.pop("base", None)
    if kwargs.get("config") is None:
        kwargs["config"] = str(folder)
    with open_lazily(folder, base, framework="pt") as archive, archive.computing():
        shared = SharedPieces(archive)
        weights = {tensor: _Weight(shared.get_slice(tensor), Cast()) for tensor in archive.keys()}  # noqa: SIM118
        with _room_for_all(archive._archive, kwargs):
            loaded = original(None, *args, state_dict=weights, **kwargs)
    model = loaded[0] if kwargs.get("output_loading_info") else loaded
    model.name_or_path = model.config.name_or_path = name
    if model.can_generate() and kwargs.get("generation_config") is None:
        model.generation_config = generation_config(folder, str(folder / _GENERATION)) or model.generation_config
    return loaded


def _room_for_all(archive: Archive, options: Mapping[str, Any]) -> AbstractContextManager[None]:
    """`room_for` all weights as transformers is asked to hold them; where it may use the disk, no device is blamed."""
    dtype = options.get("dtype") or options.get("torch_dtype")
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    needed = nbytes(archive, Cast(None, dtype if isinstance(dtype, torch.dtype) else None))
    device = _one_device(options.get("device_map"))
    place = None if device in (None, _SEVERAL, "disk", "meta") else usable_device(device)
    return room_for(needed, place, "Take another device or dtype, mode='fused' with max_bytes=, or mode='lazy'")


def _load_as(cls: Any, folder: Path, asked: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The ways of `load_model`, which reads the configuration itself."""
    passed = asked | {name: kwargs.pop(name) for name in ("base", "trust_remote_code") if name in kwargs}
    dtype = kwargs.pop("torch_dtype", None)
    dtype = kwargs.pop("dtype", None) or dtype
    device_map = kwargs.pop("device_map", None)
    device = _one_device(device_map)
    config = kwargs.pop("config", None)
    where = str(folder / CONFIG)
    with foreign_errors(where, "transformers cannot read it"):
        own = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=passed.get("trust_remote_code"))
    given = isinstance(config, transformers.PreTrainedConfig)
    changed = given and settings(config) != settings(own)
    attention = kwargs.pop("attn_implementation", None) or (config._attn_implementation if given else None)
    left = sorted(name for name, value in kwargs.items() if name not in _BOOKKEEPING and value)
    if args or left or changed or device == _SEVERAL:
        changes = "changes to the configuration" if args or changed else f"device_map={str(device_map)[:80]!r}"
        raise UsageError(
            "mode, rank and max_bytes go with dtype, attn_implementation, trust_remote_code and a device_map of one "
            "device only",
            where=str(folder),
            found=", ".join(left) or changes,
            hint="Leave the others out, or load it without mode, rank and max_bytes",
        )
    named = named_classes(own, where)
    if named != [cls.__name__]:
        raise UsageError(
            "mode, rank and max_bytes are for the class that config.json names",
            where=str(folder),
            expected=", ".join(named) or "a class, and it names none",
            found=cls.__name__,
        )
    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    dtype = None if dtype == "auto" else dtype
    return load_model(folder, dtype=dtype, device=device, attn_implementation=attention, **passed)


class _Weight(LazyTensor):
    """A slice as transformers' loader asks of it: one of safetensors that also knows its torch dtype."""

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtype(DTYPES[self.get_dtype()])

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point


register()
