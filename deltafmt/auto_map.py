"""Archives that transformers loads with `trust_remote_code=True` where nobody imports deltafmt: a `config.json` with an
`auto_map`, and the module that it names. Public as `deltafmt.hf`, which published archives import."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .digests import digest
from .durable import Staging
from .errors import AccessError, MalformedError, UsageError
from .manifest import Sidecar
from .names import MANIFEST
from .reader import read_manifest
from .sources import PathLike
from .torch.skeleton import CONFIG

STUB = "modeling_deltafmt.py"
_NO_CLASS = "Upgrade transformers, or do without --auto-map (write_auto_map in Python)"


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
    import transformers
    from transformers.models.auto import modeling_auto

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
            import transformers

            del config.auto_map
            kwargs.pop("trust_remote_code", None)
            return getattr(transformers, auto_class).from_pretrained(name, *args, config=config, **kwargs)

    return StandIn
