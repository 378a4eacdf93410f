"""A lossy archive packed again as it is: recipes and stored bytes stay, what it takes from bases is stored.

Nothing is searched for and nothing more is lost. So a checkpoint of a training, which holds little but factors, becomes
an archive that stands by itself.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from .durable import Staging
from .manifest import Manifest
from .operators import Operator, Ref, Stored
from .reader import Archive
from .report import Progress
from .version import __version__
from .writer import ArchiveWriter


class Repacker:
    """Writes an open archive, of which all bases are given, as one that needs none.

    What only resuming a training takes stays behind.
    """

    def __init__(self, archive: Archive, area: Staging, progress: Progress, shard_bytes: int) -> None:
        self._archive, self._progress = archive, progress
        names = [(name, len(info.shape)) for name, info in archive.tensors.items()]
        names += [(file.name, 1) for file in archive.files]
        names += [(archive.index[0], 1)] if archive.index else []
        self.writer = ArchiveWriter(area, names, shard_bytes)
        self._arrays: dict[str, Stored] = {}
        self._of_bases: dict[Ref, Operator] = {}  # what a reference into a base has become
        # Of tensors that are a base's, the first: others, and deltas of it, refer to that.
        self._owners = {
            tensor.recipe: name
            for name, tensor in reversed([*archive.manifest.tensors.items()])
            if isinstance(tensor.recipe, Ref) and tensor.recipe.base is not None
        }

    def run(self) -> Manifest:
        """Raises `WrongBaseError` without a base that is needed, `IntegrityError` for damaged chunks."""
        manifest, done = self._archive.manifest, 0
        for name, tensor in manifest.tensors.items():
            self._progress(done, manifest.logical_bytes, name)
            self.writer.tensors[name] = tensor._replace(recipe=self._recipe(tensor.recipe, name))
            done += self._archive.tensors[name].nbytes
        for name, part in self._archive.sidecars.items():
            self.writer.add_sidecar(name, part)
        layout = self.writer.add_layout(self._archive)
        return self.writer.finish(layout, {}, {**manifest.annotations, "producer": f"deltafmt {__version__}"})

    def _recipe(self, node: Operator, tensor: str) -> Operator:
        """The same with what it refers to in the new archive."""
        if isinstance(node, Stored):
            return self._stored(node.array)
        if isinstance(node, Ref):
            return node if node.base is None else self._of_base(node, tensor)
        known: Any = node  # a dataclass, as every operator is
        changed: dict[str, Any] = {}
        for field in dataclasses.fields(known):
            value = getattr(known, field.name)
            if isinstance(value, Operator):
                changed[field.name] = self._recipe(value, tensor)
            elif isinstance(value, tuple) and value and isinstance(value[0], Operator):
                changed[field.name] = tuple(self._recipe(each, tensor) for each in value)
        made: Operator = dataclasses.replace(known, **changed)
        return made

    def _stored(self, name: str) -> Stored:
        if name not in self._arrays:
            array, reader = self._archive.manifest.arrays[name], self._archive.array_reader(name)
            chunks = map(reader.planes, range(array.encoding.chunks(array.numel)))
            added = self.writer.add_array(name, array.dtype, array.shape, array.encoding, chunks, lambda: array.digest)
            self._arrays[name] = Stored(added)
        return self._arrays[name]

    def _of_base(self, ref: Ref, tensor: str) -> Operator:
        """A tensor of the archive that is that of the base; or an array, called after the first that needs it."""
        owner = self._owners.get(ref, tensor)
        if owner != tensor:
            return Ref(owner)
        if ref not in self._of_bases:
            assert ref.base is not None
            info = self._archive.manifest.bases[ref.base].tensors[ref.tensor]
            bits = np.empty(info.nbytes // info.dtype.width, info.dtype.bits)
            self._archive.base_reader(ref.base, ref.tensor).read(0, bits.size, bits)
            wanted = tensor if ref in self._owners else f"{tensor}#base"
            self._of_bases[ref] = Stored(self.writer.add_bits(wanted, info.dtype, info.shape, bits))
        return self._of_bases[ref]
