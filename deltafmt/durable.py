"""The only module that opens files for writing.

Output is staged in a hidden directory beside its destination and renamed into place once everything in it is on disk,
so that a destination is either complete or untouched. No symlink is ever followed: files are created anew (`O_EXCL`,
`O_NOFOLLOW`) in a directory that only we know.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from .errors import AccessError, DestinationError

_COPY_BLOCK = 4 << 20
_NOFOLLOW: int = getattr(os, "O_NOFOLLOW", 0)
_BINARY: int = getattr(os, "O_BINARY", 0)

_STANDARD = re.compile(
    r"deltafmt\.json|adapter_config\.json|((diffusion_)?pytorch_|adapter_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
)
"""Names of files that are the main part of what pack, unpack and export-lora write."""


class NewFile:
    """A file being written. `append` is for one thread; `write_at` may be called from many at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NOFOLLOW | _BINARY, 0o644)
        except OSError as error:
            raise _failed(path, error) from error

    def append(self, data: Any) -> int:
        """Write a bytes-like object at the end of what was appended; return where it begins."""
        begin = self.position
        self.position += self.write_at(begin, data)
        return begin

    def write_at(self, offset: int, data: Any) -> int:
        """Write a bytes-like object at a byte offset; return its length. Raises `AccessError` (disk full, I/O)."""
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._fd, view[done:], offset + done)
        except OSError as error:
            raise _failed(self.path, error) from error
        return done

    def shift(self, source: int, target: int, length: int) -> None:
        """Move `length` bytes from `source` to `target`, further down or up, and cut the file behind them."""
        try:
            begins = range(0, length, _COPY_BLOCK)
            for begin in begins if target < source else reversed(begins):
                left = min(_COPY_BLOCK, length - begin)
                block = os.pread(self._fd, left, source + begin)
                if len(block) < left:
                    raise OSError(f"the file ended {left - len(block)} bytes early")
                self.write_at(target + begin, block)
            os.ftruncate(self._fd, target + length)
        except OSError as error:
            raise _failed(self.path, error) from error

    def finish(self) -> int:
        """Flush to the device and close; return the size of the file in bytes."""
        try:
            size = os.fstat(self._fd).st_size
            os.fsync(self._fd)
        except OSError as error:
            raise _failed(self.path, error) from error
        self.close()
        return size

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class CountedFile(NewFile):
    """A file that is counted and not written: for dry runs."""

    def __init__(self, path: Path) -> None:
        self.path, self.position, self._size, self._fd = path, 0, 0, -1

    def write_at(self, offset: int, data: Any) -> int:
        length = memoryview(data).nbytes
        self._size = max(self._size, offset + length)
        return length

    def shift(self, source: int, target: int, length: int) -> None:
        self._size = target + length

    def finish(self) -> int:
        return self._size


class Staging:
    """Context manager: a new directory that `commit` renames to `destination`; left without a commit it vanishes.

    Args:
        destination: the directory to create. Its parents are created as needed (and removed again on failure).
        overwrite: replace an existing directory, if it holds a checkpoint or an archive.
        single_file: the destination is not the new directory, but the one file in it, which has that name too.

    Raises:
        DestinationError: the destination exists and `overwrite` is false, is a symlink, or is not something we would
            overwrite.
        AccessError: the file system refused.
    """

    def __init__(self, destination: Path, *, overwrite: bool = False, single_file: bool = False) -> None:
        self.destination = Path(os.path.abspath(destination))
        self.single_file = single_file
        self._overwrite = overwrite
        self._files: list[NewFile] = []
        self._made: list[Path] = []
        check_destination(self.destination, overwrite=overwrite, single_file=single_file)

    def __enter__(self) -> Staging:
        parent = self.destination.parent
        try:
            missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
            for folder in reversed(missing):
                folder.mkdir()
                self._made.append(folder)
            # A name may have 255 bytes; 48 characters leave room for the rest of this one.
            self.path = parent / f".{self.destination.name[:48]}.deltafmt-{secrets.token_hex(6)}"
            self.path.mkdir()
        except OSError as error:
            self._remove_parents()
            raise _failed(parent, error) from error
        return self

    def create(self, name: str) -> NewFile:
        """A new file of this relative name (already checked by `names`), its directories included."""
        path = self.path / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _failed(path, error) from error
        file = NewFile(path)
        self._files.append(file)
        return file

    def write(self, name: str, blocks: Iterable[Any]) -> int:
        """Create a file from blocks of bytes; return its size."""
        file = self.create(name)
        for block in blocks:
            file.append(block)
        return file.finish()

    def rename(self, old: str, new: str) -> None:
        """Rename a finished file inside the staging directory."""
        try:
            os.rename(self.path / old, self.path / new)
        except OSError as error:
            raise _failed(self.path / new, error) from error

    def commit(self) -> None:
        """Make everything durable, then put it at the destination in one rename."""
        try:
            for folder, _, _ in os.walk(self.path):
                _sync_directory(Path(folder))
            check_destination(self.destination, overwrite=self._overwrite, single_file=self.single_file)
            if self.single_file:
                os.replace(self.path / self.destination.name, self.destination)
            else:
                self._replace_directory()
            self._made.clear()
            _sync_directory(self.destination.parent)
            shutil.rmtree(self._replaced, ignore_errors=True)
        except OSError as error:
            raise _failed(self.destination, error) from error

    def _replace_directory(self) -> None:
        try:
            if os.path.lexists(self.destination):
                os.rename(self.destination, self._replaced)
            os.rename(self.path, self.destination)
        except BaseException:  # Ctrl-C between the two as well
            if os.path.lexists(self._replaced) and not os.path.lexists(self.destination):
                os.rename(self._replaced, self.destination)
            raise

    @property
    def _replaced(self) -> Path:
        return self.path.with_name(f"{self.path.name}-replaced")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()
        shutil.rmtree(self.path, ignore_errors=True)
        self._remove_parents()

    def _remove_parents(self) -> None:
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):
                folder.rmdir()


class DryRun(Staging):
    """A staging area that counts what would be written."""

    def __enter__(self) -> DryRun:
        self.path = self.destination
        return self

    def create(self, name: str) -> NewFile:
        return CountedFile(self.path / name)

    def rename(self, old: str, new: str) -> None:
        pass

    def commit(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def check_destination(destination: Path, *, overwrite: bool, single_file: bool = False) -> None:
    """Refuse a destination that may not be written, before any work is done. Raises `DestinationError`."""
    where = str(destination)
    if destination.is_symlink():
        raise DestinationError("the destination is a symlink", where=where, hint="Name the real directory")
    if not os.path.lexists(destination):
        return
    if not overwrite:
        raise DestinationError("the destination exists", where=where, hint="Choose another, or pass --overwrite")
    if not (_replaceable_file(destination) if single_file else destination.is_dir() and _replaceable(destination)):
        raise DestinationError(
            "--overwrite replaces a checkpoint or an archive only, and this is neither",
            where=where,
            hint="Remove it yourself, or choose another destination",
        )


def _replaceable_file(file: Path) -> bool:
    return file.is_file() and file.name.endswith(".safetensors")


def _replaceable(folder: Path) -> bool:
    """Whether it is empty, or a checkpoint, an archive or an adapter: not just any place where a weight file lies."""
    entries = list(folder.iterdir())
    if not entries or any(_STANDARD.fullmatch(entry.name) for entry in entries):
        return True
    weights = [entry for entry in entries if entry.name.endswith((".safetensors", ".gguf"))]
    return len(weights) == 1 and not any(entry.is_dir() for entry in entries)


def _sync_directory(folder: Path) -> None:
    if os.name != "posix":  # pragma: no cover - directories cannot be opened elsewhere
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _failed(path: Path, error: OSError) -> AccessError:
    return AccessError(
        f"cannot write: {error.strerror or error}", where=str(path), hint="Check space, permissions and the path"
    )
