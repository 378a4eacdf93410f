"""Reading an archive.

What can be checked without tensor bytes is checked when it is opened; chunks are checked as they are read.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from .checkpoint import Checkpoint, FilePart, TensorInfo, WeightFileLayout
from .digests import digest
from .dtypes import Bits
from .errors import AccessError, DeltafmtError, IntegrityError, MalformedError, UsageError, WrongBaseError
from .limits import DEFAULT_LIMITS, Limits
from .manifest import Array, Base, Manifest
from .manifest_parser import parse_manifest
from .names import MANIFEST, escaped, is_shard_name
from .operators.base import RangeReader, TensorReader
from .process import without_collecting
from .rebuild import Rebuilder
from .safetensors_file import carried_manifest, is_carrier
from .scope import ManifestScope
from .shards import ArrayReader, ShardReader
from .strictjson import parse

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth")
_STAGED = re.compile(r"\..*\.deltafmt-[0-9a-f]{12}", re.DOTALL)
"""What `durable.Staging` calls a directory until it is complete."""


def is_archive(path: Path) -> bool:
    """Whether a directory holds a deltafmt manifest, or a file carries one. Raises `AccessError`."""
    return (path / MANIFEST).is_file() or is_carrier(path)


def read_manifest(path: Path, limits: Limits = DEFAULT_LIMITS) -> Manifest:
    """Read and check the manifest of an archive (steps 1 to 5 of spec/reasons.md).

    Raises:
        MalformedError: not an archive, or a manifest that breaks the specification.
        UnsupportedError, IntegrityError: as spec/reasons.md says.
    """
    return _parsed(path, _manifest_text(path, limits), limits)


def _manifest_text(path: Path, limits: Limits) -> bytes:
    if not is_archive(path):
        what, hint = _what_it_is(path)
        raise MalformedError(what, hint=hint, reason="not-an-archive")
    if path.is_file():
        return carried_manifest(path, limits)
    file = path / MANIFEST
    limits.check("manifest_bytes", file.stat().st_size, str(file))
    try:
        return file.read_bytes()
    except OSError as error:
        raise AccessError(f"cannot read: {error.strerror}", where=str(file)) from error


def _what_it_is(path: Path) -> tuple[str, str]:
    """Of what is no archive: what it looks like by its names, and what to do."""
    directory = f"Name the directory that holds {MANIFEST}, or a single-file archive"
    if path.name == MANIFEST:
        return f"'{path}' is the manifest of an archive, and not all of it", directory
    if is_shard_name(path.name):
        return f"'{path}' is one shard of an archive, and not all of it", directory
    names = [path.name]
    if path.is_dir():
        if _STAGED.fullmatch(path.name):
            return f"'{path}' is what an interrupted pack or unpack left behind", "Remove it, and run that again"
        with suppress(OSError):
            names = [file.name for file in path.iterdir()]
    if not names:
        return f"'{path}' is empty (an interrupted pack?): there is no {MANIFEST}", f"Pack again. {directory}"
    if any(map(is_shard_name, names)):
        what = f"no {MANIFEST} in '{path}', but shards of an archive (an interrupted pack?)"
        return what, "Pack or download it again: it is incomplete"
    if any(name.endswith(_WEIGHTS) for name in names):
        kind = "weight file" if path.is_file() else "checkpoint"
        return f"'{path}' is a plain {kind} and no archive", "To make one of it: deltafmt pack SRC DST"
    return f"'{path}' is no archive: there is no {MANIFEST}", directory


def _parsed(path: Path, text: bytes, limits: Limits) -> Manifest:
    single_file = path.is_file()
    file = path if single_file else path / MANIFEST
    try:
        manifest = parse_manifest(text, str(file), limits)
        if single_file:
            manifest.check_single_file()
        ManifestScope(manifest).check(limits)
    except DeltafmtError as error:
        if not error.where.startswith(str(file)):  # a JSON pointer: say in which file
            error.where = f"{file}: {error.where}"
        raise
    return manifest


class Archive(Checkpoint):
    """An open archive: a `Checkpoint` whose tensors are rebuilt as they are read. Thread-safe.

    Args:
        path: the archive's directory, or its file.
        bases: base id -> an open checkpoint. Needed for tensors that refer to a base, and only then. They are closed
            with the archive.

    Raises:
        MalformedError, UnsupportedError, IntegrityError: as spec/reasons.md says, steps 1 to 6.
        WrongBaseError: a base given has other tensors than the one the archive was packed against.
    """

    @without_collecting()
    def __init__(
        self, path: Path, bases: Mapping[str, Checkpoint] | None = None, *, limits: Limits = DEFAULT_LIMITS
    ) -> None:
        self.path = path
        self.location = str(path)
        self.limits = limits
        self.single_file = path.is_file()
        text = _manifest_text(path, limits)
        self.manifest_bytes = len(text)
        self.manifest = _parsed(path, text, limits)
        self.scope = ManifestScope(self.manifest)
        self.tensors = {name: TensorInfo(tensor.dtype, tensor.shape) for name, tensor in self.manifest.tensors.items()}
        self._shards: list[ShardReader] = []
        self.bases: dict[str, VerifiedBase] = {}
        self._closed = False
        try:
            self._open_shards()
            self._check_sidecars()
            for name, checkpoint in (bases or {}).items():
                if name not in self.manifest.bases:
                    raise UsageError(
                        f"the archive refers to no base '{name}'", where=self.location, hint="Leave the base out"
                    )
                self.bases[name] = VerifiedBase(name, self.manifest.bases[name], checkpoint, self.location)
        except BaseException:
            for shard in self._shards:
                shard.close()
            raise

    def _open_shards(self) -> None:
        held: list[dict[str, Array]] = [{} for _ in self.manifest.shards]
        for name, array in self.manifest.arrays.items():
            held[array.shard][name] = array
        for shard, arrays in zip(self.manifest.shards, held, strict=True):
            path, sidecars = self.path / shard.name, None
            if self.single_file:
                path, sidecars = self.path, self.manifest.sidecars
            try:
                self._shards.append(ShardReader(path, shard, arrays, self.limits, sidecars))
            except IntegrityError as error:
                if error.reason in ("shard-missing", "shard-size"):
                    count = len(self.scope.tensors_of(arrays))
                    error.hint = f"Tensors that need it: {count} of {len(self.tensors)}. {error.hint}"
                raise

    def _check_sidecars(self) -> None:
        if self.single_file:  # its shard has checked them
            return
        for name, sidecar in self.manifest.sidecars.items():
            path = self.path / name
            found = path.stat().st_size if path.is_file() else None
            if found != sidecar.size:
                what = "the sidecar is missing" if found is None else "the sidecar has another size"
                raise IntegrityError(
                    what,
                    where=str(path),
                    expected=f"{sidecar.size} bytes",
                    found=found,
                    hint="Download it again",
                    reason="sidecar",
                )

    # As a checkpoint

    @property
    def files(self) -> tuple[WeightFileLayout, ...]:  # type: ignore[override]
        return tuple(
            WeightFileLayout(file.name, self.stored_content(file.header)) for file in self.manifest.checkpoint.files
        )

    @property
    def index(self) -> tuple[str, bytes] | None:  # type: ignore[override]
        index = self.manifest.checkpoint.index
        return index and (index[0], self.stored_content(index[1]))

    @property
    def sidecars(self) -> dict[str, FilePart]:  # type: ignore[override]
        names = self.manifest.sidecars
        if self.single_file:
            return {name: self._shards[0].sidecar(name) for name in names}
        return {name: FilePart(self.path / name) for name in names}

    @property
    def input_bytes(self) -> int:  # type: ignore[override]
        """Bytes of the archive: manifest, shards and sidecars."""
        return self.manifest.archive_bytes(self.manifest_bytes, single_file=self.single_file)

    def read(self, name: str, lo: int, hi: int, out: Bits) -> None:
        self.rebuilder(name).read(lo, hi, out)

    def known_digest(self, name: str) -> str | None:
        return self.manifest.tensors[name].digest

    # What recipes read

    def rebuilder(self, name: str) -> Rebuilder:
        """The recipe of a tensor bound to this archive and its bases.

        Raises `UsageError` for an unknown name, `WrongBaseError` if a base is needed and missing or another.
        """
        self._check_open()
        if not isinstance(name, str) or name not in self.manifest.tensors:
            raise UsageError(f"there is no tensor {escaped(repr(name))}", where=self.location, hint="keys() lists them")
        tensor = self.manifest.tensors[name]
        return Rebuilder(tensor.recipe, self, self.scope, self.scope.target(name))

    def array_reader(self, name: str) -> ArrayReader:
        self._check_open()
        return self._shards[self.manifest.arrays[name].shard].array(name)

    def tensor_reader(self, name: str) -> TensorReader:
        return self.rebuilder(name)

    def base_reader(self, base: str, name: str) -> TensorReader:
        return self.base(base).reader(name)

    @property
    def computes(self) -> bool:
        """Whether any tensor, of this archive or of a base of it, is computed: see `gemm.one_thread_each`."""
        return self.scope.computes or any(base.computes for base in self.bases.values())

    def base(self, name: str) -> VerifiedBase:
        """A base that was given. Raises `WrongBaseError` (reason `base-missing`) if it was not."""
        if name not in self.bases:
            known = self.manifest.bases
            missing = [repr(base.repo) for other, base in known.items() if base.repo and other not in self.bases]
            raise WrongBaseError(
                f"it needs the base '{name}'",
                where=self.location,
                expected=known[name].digest,
                hint=f"Pass --base (base= in Python){': it was packed against ' if missing else ''}"
                f"{' and '.join(missing)}. "
                "If this archive is itself what --base names, unpack it first and pass the result",
                reason="base-missing",
            )
        return self.bases[name]

    def stored_array(self, name: str) -> Bits:
        """All elements of a stored array, flat, checked against its digest."""
        array = self.manifest.arrays[name]
        out = np.empty(array.numel, array.dtype.bits)
        self.array_reader(name)(0, out.size, out)
        self.check_array(name, digest(out))
        return out

    def stored_content(self, name: str) -> bytes:
        """The content of a stored array of bytes."""
        return self.stored_array(name).tobytes()

    def check_array(self, name: str, found: str) -> None:
        """Raise `IntegrityError` (reason `digest`) if this is not a stored array's digest."""
        self._check_digest(f"stored array '{escaped(name)}'", self.manifest.arrays[name].digest, found)

    def check_tensor(self, name: str, found: str) -> None:
        """Raise `IntegrityError` (reason `digest`) if this is not the digest of an exact tensor's bytes."""
        self._check_digest(f"tensor '{escaped(name)}'", self.manifest.tensors[name].digest, found)

    def check_sidecar(self, name: str, found: str) -> None:
        """Raise `IntegrityError` (reason `digest`) if this is not a sidecar's digest."""
        self._check_digest(f"sidecar '{escaped(name)}'", self.manifest.sidecars[name].digest, found)

    def _check_digest(self, what: str, expected: str | None, found: str) -> None:
        if found != expected:
            raise IntegrityError(
                f"the {what} does not match its digest",
                where=self.location,
                expected=expected,
                found=found,
                hint="Download the archive again",
                reason="digest",
            )

    def original_metadata(self) -> dict[str, str] | None:
        """`__metadata__` of the first original weight file, as safetensors gives it."""
        files = self.manifest.checkpoint.files
        header = parse(self.stored_content(files[0].header), self.location) if files else None
        metadata: dict[str, str] | None = header.get("__metadata__") if isinstance(header, dict) else None
        return metadata

    def stored_size(self, name: str) -> int:
        """Bytes that a stored array takes in its shard."""
        return self._shards[self.manifest.arrays[name].shard].size(name)

    def prefix_bytes(self, name: str, count: int) -> int:
        """Bytes of a stored array in its shard that its first `count` elements are read from."""
        return self._shards[self.manifest.arrays[name].shard].array(name).stored_bytes(count)

    def close(self) -> None:
        self._closed = True
        for shard in self._shards:
            shard.close()
        for base in self.bases.values():
            base.close()

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("the archive is closed", where=self.location, hint="Read inside the 'with' block")


class VerifiedBase:
    """A base that is what the manifest says.

    Dtypes and shapes are checked when it is opened, each tensor's digest before its first use.
    """

    def __init__(self, name: str, expected: Base, checkpoint: Checkpoint, archive: str) -> None:
        self._expected, self._checkpoint, self._archive = expected, checkpoint, archive
        self._verified: set[str] = set()
        self._lock = threading.Lock()
        for tensor in sorted(expected.tensors.keys() | checkpoint.tensors.keys()):
            needed, found = expected.tensors.get(tensor), checkpoint.tensors.get(tensor)
            facts = [entry and f"{entry.dtype.name} {list(entry.shape)}" for entry in (needed, found)]
            if facts[0] != facts[1]:
                raise self._mismatch(tensor, facts[0] or "no such tensor", facts[1] or "no such tensor")

    def _mismatch(self, tensor: str, needed: str, found: str) -> WrongBaseError:
        repo = f" '{self._expected.repo}'," if self._expected.repo else ""
        return WrongBaseError(
            f"'{self._checkpoint.location}' is not its base: the first tensor that differs is '{escaped(tensor)}'",
            where=self._archive,
            expected=needed,
            found=found,
            hint=f"Pass the one that it was packed against:{repo} base digest {self._expected.digest}",
            reason="base-mismatch",
        )

    @property
    def computes(self) -> bool:
        return isinstance(self._checkpoint, Archive) and self._checkpoint.computes

    def reader(self, tensor: str) -> TensorReader:
        """A reader of a base tensor, its digest verified."""
        self.verify(tensor)
        if isinstance(self._checkpoint, Archive):
            return self._checkpoint.rebuilder(tensor)
        row = math.prod(self._expected.tensors[tensor].shape[1:])
        return RangeReader(lambda lo, hi, out: self._checkpoint.read(tensor, lo, hi, out), row)

    def verify(self, tensor: str) -> None:
        """Check one tensor's digest, once. Raises `WrongBaseError` (reason `base-mismatch`)."""
        with self._lock:
            if tensor in self._verified:
                return
        found = self._checkpoint.digest(tensor)
        if found != self._expected.tensors[tensor].digest:
            raise self._mismatch(tensor, self._expected.tensors[tensor].digest, found)
        with self._lock:
            self._verified.add(tensor)

    def nbytes(self, tensor: str) -> int:
        return self._expected.tensors[tensor].nbytes

    def unverified(self) -> list[str]:
        """Tensors whose digest has not been checked yet."""
        return [tensor for tensor in self._expected.tensors if tensor not in self._verified]

    def close(self) -> None:
        self._checkpoint.close()
