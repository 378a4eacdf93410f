"""Which names a file may hold (spec/layout.md, "Names"). Checked lexically, before the file system is asked."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from .errors import MalformedError, printable
from .limits import COMPONENT_BYTES, NAME_BYTES

MANIFEST = "deltafmt.json"
MISLEADING = ("model.safetensors", "model.safetensors.index.json")
CHUNK_TABLE = "deltafmt.chunks"
SIDECAR_PREFIX = "deltafmt.sidecar/"
"""And the name of a sidecar: an array in the single-file form."""
SHARD_PATTERN = re.compile(r"deltafmt-[^/]*\.safetensors")
_TAKEN_FOR_WEIGHTS = re.compile(
    r"(model|pytorch_model|adapter_model|diffusion_pytorch_model)(\..+)?(-[0-9]+-of-[0-9]+)?\.safetensors",
    re.IGNORECASE,  # as some file systems do
)
"""What other tools load by itself, as a variant (`model.fp16.safetensors`), or as one shard of several."""
BASE_ID = re.compile(r"[a-z0-9_-]{1,64}")

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # control characters, lone surrogates
_PATH_CHARACTERS = re.compile(r"[\\:]")
_RESERVED = re.compile(r"(CON|PRN|AUX|NUL|COM[0-9]|LPT[0-9])", re.IGNORECASE)


def shard_name(index: int, count: int) -> str:
    """The name of shard `index` (from 0) of `count`."""
    return f"deltafmt-{index + 1:05d}-of-{count:05d}.safetensors"


def is_shard_name(name: str) -> bool:
    return SHARD_PATTERN.fullmatch(name) is not None


def is_misleading(name: str) -> bool:
    """Whether other tools, or we, take a single file of this name for something else than an archive: plain weights,
    which they lack and make up, or one shard."""
    return _TAKEN_FOR_WEIGHTS.fullmatch(name) is not None or is_shard_name(name)


def check_name(name: str, where: str) -> str:
    """Check the name of a tensor or stored array; return it. Raises `MalformedError` (reason `name`)."""
    if name == "__metadata__":
        raise _refused(name, where)
    return _check_any_name(name, where)


def check_plain(names: Collection[str]) -> None:
    """Check many names as `check_name` does, and that none is long. Raises `MalformedError`, which names none."""
    text = "".join(names)
    if "" in names or "__metadata__" in names or _UNPRINTABLE.search(text) or max(map(len, names), default=0) > 255:
        raise MalformedError("a name that needs a closer look", reason="name")


def _check_any_name(name: str, where: str) -> str:
    if not name or _UNPRINTABLE.search(name) or (len(name) > 255 and _length(name) > NAME_BYTES):
        raise _refused(name, where)
    return name


def check_file_name(name: str, where: str) -> str:
    """Check a relative file name with `/` separators; return it. Raises `MalformedError` (reason `name`)."""
    _check_any_name(name, where)
    if _PATH_CHARACTERS.search(name):
        raise _refused(name, where)
    for component in name.split("/"):
        if component in ("", ".", "..") or component[-1] in " ." or _length(component) > COMPONENT_BYTES:
            raise _refused(name, where)
        if _RESERVED.fullmatch(component.split(".")[0]):
            raise _refused(name, where)
    return name


def check_sidecar_name(name: str, where: str) -> str:
    """Check the name of an original file, weights or not. Raises `MalformedError` (reason `name`)."""
    check_file_name(name, where)
    if name == MANIFEST or is_shard_name(name):
        raise _refused(name, where, "is reserved for deltafmt itself")
    return name


def check_kept_name(name: str, where: str) -> str:
    """Check the name of a sidecar in an archive, where other tools must find no weights. Raises `MalformedError`."""
    if name in MISLEADING:
        raise _refused(name, where, "would make other tools load an archive wrongly")
    return check_sidecar_name(name, where)


def check_shard_name(name: str, where: str) -> str:
    """Check the name of a shard. Raises `MalformedError` (reason `name`)."""
    check_file_name(name, where)
    if "/" in name or not name.endswith(".safetensors") or name in MISLEADING:
        raise _refused(name, where)
    return name


def check_no_clash(file_names: Iterable[str], where: str) -> None:
    """Refuse equal file names, and one that is a directory of another. Raises `MalformedError` (reason `name`)."""
    seen: set[str] = set()
    directories: set[str] = set()
    for name in file_names:
        if name in seen:
            raise _refused(name, where, "is given twice")
        seen.add(name)
        parts = name.split("/")
        directories.update("/".join(parts[:end]) for end in range(1, len(parts)))
    for name in sorted(seen & directories):
        raise _refused(name, where, "is both a file and a directory")


def escaped(name: str) -> str:
    """A name as it can be shown on a terminal: `errors.printable`, and not longer than 200 characters."""
    text = printable(name)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _length(name: str) -> int:
    return len(name.encode("utf-8", "surrogatepass"))


def _refused(name: str, where: str, why: str = "is not allowed") -> MalformedError:
    return MalformedError(
        f"the name '{escaped(name)}' {why}",
        where=where,
        hint="Names are relative, without '..', drive letters or reserved device names (spec/layout.md)",
        reason="name",
    )
