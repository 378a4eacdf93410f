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
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from .archive import open as open_archive
from .digests import digest
from .dtypes import DTYPES
from .durable import Staging
from .errors import AccessError, DeltafmtError, MalformedError, MissingExtraError, UsageError
from .manifest import Sidecar
from .names import MANIFEST
from .reader import Archive, is_archive, read_manifest
from .sources import Bases, PathLike
from .sources import open_archive as open_for_reading
from .torch import LazyTensor, load_model
from .torch.model import check_configuration
from .torch.skeleton import CONFIG, foreign_errors, generation_config, named_classes, no_config, settings
from .torch.tensors import Cast, SharedPieces, nbytes, new_cast, room_for, torch_dtype

try:
    import torch
    import transformers
    from packaging.version import Version
    from transformers.models.auto import modeling_auto
    from transformers.utils.hub import cached_file, cached_files
except ImportError as error:
    raise MissingExtraError("loading archives with transformers needs torch and transformers", extra="hf") from error

OLDEST = "5.0"
"""The first version of transformers whose loader takes lazy slices."""
STUB = "modeling_deltafmt.py"
_GENERATION = "generation_config.json"
_NO_CLASS = "Upgrade transformers, or do without --auto-map (write_auto_map in Python)"
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
        with _explained(folder, kwargs):
            if asked in ({}, {"mode": "full"}):
                return _load(functools.partial(original, cls), folder, os.fspath(name), args, kwargs)
            return _load_as(cls, folder, asked, args, kwargs)

    from_pretrained.loads_archives = True  # type: ignore[attr-defined]
    transformers.PreTrainedModel.from_pretrained = classmethod(from_pretrained)
    for auto_class in vars(modeling_auto).values():
        if isinstance(auto_class, type) and "from_pretrained" in vars(auto_class):
            _explain(auto_class)


def _explain(auto_class: Any) -> None:
    """Let an Auto class, each of which has a `from_pretrained` of its own, say what is wrong with an archive."""
    original = auto_class.from_pretrained.__func__

    @functools.wraps(original)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: PathLike, *args: Any, **kwargs: Any) -> Any:
        folder = Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or "")
        if not is_archive(folder):
            return original(cls, pretrained_model_name_or_path, *args, **kwargs)
        _refuse_single_file(folder)
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


@contextmanager
def _explained(folder: Path, options: Mapping[str, Any]) -> Iterator[None]:
    """Check what may be said before transformers is asked to load an archive. If it fails, look whether the archive's
    config.json is to blame, and say so; its own error stands if not."""
    for option in ("dtype", "torch_dtype"):
        _check_dtype(options.get(option))
    _check_devices(options.get("device_map"))
    own, trusted = options.get("config") is None, bool(options.get("trust_remote_code"))
    if own:
        _refuse_single_file(folder)
        if not (folder / CONFIG).is_file():
            raise no_config(folder)
    try:
        yield
    except DeltafmtError:
        raise
    except Exception:
        if own:
            with open_for_reading(folder) as archive:
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
    if found in (None, "auto") or isinstance(found, Mapping):
        return
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise UsageError(
            f"{dtype!r} is no floating-point dtype of torch", hint="Pass one, such as torch.bfloat16 or 'bfloat16'"
        )


def _check_devices(device_map: Any) -> None:
    """Raise `UsageError` for a device that there is not."""
    for device in device_map.values() if isinstance(device_map, Mapping) else [device_map]:
        if device not in (None, "disk", "meta", *_SPREAD):
            new_cast(device, None)


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
    with open_archive(folder, base, framework="pt") as archive, archive.computing():
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
    place = None if device in (_SEVERAL, "disk", "meta") else new_cast(device, None).device
    return room_for(needed, place, "Take another device or dtype, mode='fused' with max_bytes=, or mode='lazy'")


def _load_as(cls: Any, folder: Path, asked: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The ways of `load_model`, which reads the configuration itself."""
    _refuse_single_file(folder)
    if not (folder / CONFIG).is_file():
        raise no_config(folder)
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


# For those who do not import this module


def check_auto_map(checkpoint: PathLike) -> None:
    """Raises what `write_auto_map` would of the archive of a local checkpoint, before there is one."""
    folder = Path(checkpoint)
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            raise UsageError(f"the checkpoint has no {CONFIG}", where=str(folder), hint="Leave out --auto-map")
        _auto_map(folder / CONFIG)


def _auto_map(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A configuration, and the `auto_map` that names our stub for its classes."""
    where = str(file)
    try:
        config = json.loads(file.read_bytes())
    except OSError as error:
        raise AccessError(f"cannot read: {error.strerror}", where=where) from error
    except ValueError as error:
        raise MalformedError("not JSON", where=where) from error
    auto_map = {name: f"{Path(STUB).stem}.{name}" for name in _auto_classes(config, where)}
    if config.get("auto_map", auto_map) != auto_map:
        raise UsageError("the model has code of its own", where=where, found="auto_map", hint="Import deltafmt.hf")
    return config, auto_map


def write_auto_map(archive: PathLike) -> None:
    """Let an archive be loaded by `AutoModel....from_pretrained(archive, trust_remote_code=True)` alone.

    `config.json` gets an `auto_map`, and a small module (`STUB`) that imports deltafmt comes beside it; both are
    sidecars of the archive afterwards, so that `verify` holds, and `unpack` gives the config with its `auto_map`, too.
    The packer copies config.json byte for byte, so this is for archives whose owner wants it. Done twice, it changes
    nothing; interrupted, it is finished by doing it again.

    Without deltafmt, such an archive is refused with a message that says what to install.

    Raises:
        UsageError: there is no config.json, it has an `auto_map` of its own, or no Auto class knows the model.
        AccessError: the file system refused.
        DeltafmtError: what `archive` names is not one.
    """
    folder = Path(os.path.abspath(archive))
    manifest = read_manifest(folder)
    if folder.is_file():
        raise UsageError("transformers needs a directory", where=str(folder), hint="Pack without --single-file")
    if CONFIG not in manifest.sidecars:
        raise UsageError(f"the archive has no {CONFIG}", where=str(folder), hint="Pack a checkpoint that has one")
    config, auto_map = _auto_map(folder / CONFIG)
    text = json.dumps({**config, "auto_map": auto_map}, indent=2, ensure_ascii=False) + "\n"
    written = {STUB: _stub(auto_map).encode(), CONFIG: text.encode()}
    sidecars = {name: Sidecar(len(data), digest(data)) for name, data in written.items()}
    changed = replace(manifest, sidecars=dict(sorted({**manifest.sidecars, **sidecars}.items())))
    written[MANIFEST] = changed.to_bytes()
    with Staging(folder.with_name(f"{folder.name}.auto-map")) as staging:
        for name, data in written.items():
            staging.write(name, [data])
        try:
            for name in written:  # the manifest last
                os.replace(staging.path / name, folder / name)
        except OSError as error:
            raise AccessError(f"cannot write: {error.strerror}", where=str(folder)) from error


def _auto_classes(config: Any, where: str) -> list[str]:
    """Names of the Auto classes that know a model."""
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in transformers.CONFIG_MAPPING:
        raise UsageError("a model that transformers does not know", where=where, found=kind, hint=_NO_CLASS)
    kind_of_config = transformers.CONFIG_MAPPING[kind]
    found = [
        name
        for name in dir(modeling_auto)
        if name.startswith("AutoModel")
        and hasattr(transformers, name)
        and kind_of_config in getattr(modeling_auto, name)._model_mapping
    ]
    if not found:
        raise UsageError("no Auto class knows the model", where=where, found=kind, hint=_NO_CLASS)
    return found


def _stub(auto_map: Mapping[str, str]) -> str:
    lines = "\n".join(f'{name} = stand_in("{name}")' for name in auto_map)
    return f'''"""With `pip install "deltafmt[hf]"` and `trust_remote_code=True` this archive loads."""

import deltafmt
from deltafmt.hf import stand_in

{lines}
'''


def stand_in(auto_class: str) -> type:
    """What `auto_map` names for an Auto class of transformers: it loads with transformers' own model classes."""

    class StandIn:
        @staticmethod
        def register_for_auto_class(auto_class: Any) -> None:
            """Asked of all that `auto_map` names; but what is loaded is no custom code, and not saved as such."""

        @staticmethod
        def from_pretrained(name: PathLike, *args: Any, config: Any, **kwargs: Any) -> Any:
            del config.auto_map
            kwargs.pop("trust_remote_code", None)
            return getattr(transformers, auto_class).from_pretrained(name, *args, config=config, **kwargs)

    return StandIn


register()
