"""An archive made of a checkpoint: tensors looked at side by side, written in order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .checkpoint import Checkpoint, TensorInfo
from .digests import digest
from .dtypes import Bits
from .durable import Staging
from .errors import UsageError
from .manifest import Base, BaseTensor, Manifest, Tensor
from .methods.lossless import Coding, choose
from .methods.lowrank import Factored, LowrankMethod, Request
from .methods.panels import good_order
from .methods.prediction import Elements, Referred
from .operators import Ref
from .operators.patch import predicts
from .pipeline import IN_FLIGHT_BYTES, Pipeline
from .report import Progress
from .scratch import BufferPool
from .version import __version__
from .writer import ArchiveWriter


@dataclass(frozen=True)
class _Prepared:
    """A tensor read and looked at: its digest, and how it is to be stored unless it turns out to be a copy."""

    digest: str
    bits: Bits
    coding: Coding | None = None
    factored: Factored | None = None
    bases: Sequence[Referred] = ()


class Packer:
    """One checkpoint being packed: `identify_base` for each base, `plan` or `share`, then `run`.

    Args:
        references: the bases, by the ids that the manifest gives them.
        area: where the archive is written; the caller commits it.
        shard_bytes: begin another shard once this many bytes are in one.
        tensor_parallel: ranks, each of which is to read its columns of a weight only; 1 if that does not matter.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        references: Mapping[str, Checkpoint],
        pipeline: Pipeline,
        area: Staging,
        progress: Progress,
        shard_bytes: int,
        tensor_parallel: int,
    ) -> None:
        self._checkpoint, self._references, self._pipeline, self._area = checkpoint, references, pipeline, area
        arrays = [(name, len(info.shape)) for name, info in checkpoint.tensors.items()]
        arrays += [(file.name, 1) for file in checkpoint.files]
        arrays += [(checkpoint.index[0], 1)] if checkpoint.index else []
        self._writer = ArchiveWriter(area, arrays, shard_bytes, len(references) + 1)
        self._bases: dict[str, Base] = {}
        self._copies: dict[tuple[str, tuple[int, ...], str], Ref] = {}
        self._lowrank: LowrankMethod | None = None
        self._anchors: Mapping[str, str] = {}
        self._is_anchor: frozenset[str] = frozenset()
        self._buffers = BufferPool(IN_FLIGHT_BYTES)
        self._progress, self._tensor_parallel = progress, tensor_parallel
        self._done = 0
        self._total = sum(info.nbytes for info in checkpoint.tensors.values())

    # The bases

    def identify_base(self, name: str, repo: str, revision: str | None) -> None:
        """Digest every tensor of a base: what it is known by from now on. Raises `UsageError` if it is known."""
        reference = self._references[name]
        tensors: dict[str, BaseTensor] = {}
        for (tensor, info), found in self._pipeline.ordered(
            reference.tensors.items(), lambda item: reference.digest(item[0]), lambda _: 1 << 20
        ):
            tensors[tensor] = BaseTensor(info.dtype, info.shape, found)
            self._copies.setdefault((info.dtype.name, info.shape, found), Ref(tensor, name))
            self._progress(0, self._total, "reading the base")
        found_base = Base(tensors, repo, revision)
        for other, known in self._bases.items():
            if known.digest == found_base.digest:
                raise UsageError(
                    "two bases are the same model",
                    where=reference.location,
                    found=self._references[other].location,
                    hint="Give each base once",
                )
        self._bases[name] = found_base

    # Methods

    def plan(self, request: Request) -> None:
        """Decide which tensors may lose something and how much. Raises `RefusedError` if the request makes no sense."""
        reference = next(iter(self._references.values()), None)
        self._lowrank = LowrankMethod(
            request,
            self._checkpoint,
            reference,
            self._pipeline,
            self._progress,
            single_file=self._area.single_file,
        )
        self._lowrank.plan()

    def share(self, anchors: Mapping[str, str]) -> None:
        """Let tensors be predicted by others of the checkpoint, those of their anchor layers."""
        self._anchors, self._is_anchor = anchors, frozenset(anchors.values())

    def _prepare(self, item: tuple[str, TensorInfo]) -> _Prepared:
        name, info = item
        bits = self._read(self._checkpoint, name)
        found = digest(bits)
        if self._lowrank is not None and (factored := self._lowrank.factor(name, bits)) is not None:
            return _Prepared(found, bits, factored=factored)
        if self._copy(name, (info.dtype.name, info.shape, found)) is not None:
            return _Prepared(found, bits)
        bases = list(self._predictions(name, info))
        order = good_order(name, info.shape, info.dtype, self._tensor_parallel)
        coding = choose(name, Elements(info.dtype, info.shape, bits), bases, order)
        coding.prepare()
        return _Prepared(found, bits, coding, bases=bases)

    def _read(self, checkpoint: Checkpoint, name: str) -> Bits:
        """A whole tensor in a buffer of the pool; `_release` gives it back."""
        info = checkpoint.tensors[name]
        bits = self._buffers.take(info.dtype.bits, info.count)
        checkpoint.read(name, 0, info.count, bits)
        return bits

    def _release(self, prepared: _Prepared) -> None:
        self._buffers.give(prepared.bits)
        for base in prepared.bases:
            self._buffers.give(base.bits)

    def _predictions(self, name: str, info: TensorInfo) -> Iterator[Referred]:
        """The tensor of that name in each base, and that of its anchor layer, where alike but for the rows."""
        for ref, checkpoint in self._likes(name):
            like = checkpoint.tensors[ref.tensor]
            alike = len(like.shape) == len(info.shape) and like.shape[1:] == info.shape[1:]
            if alike and info.count and predicts(like.dtype, info.dtype):
                bits = self._buffers.take(like.dtype.bits, info.count)
                shared = min(like.count, info.count)
                checkpoint.read(ref.tensor, 0, shared, bits[:shared])
                bits[shared:] = 0
                rows = None if like.shape == info.shape else min(like.shape[0], info.shape[0])
                yield Referred(ref, like.dtype, bits, rows)

    def _likes(self, name: str) -> Iterator[tuple[Ref, Checkpoint]]:
        for base, reference in self._references.items():
            if name in reference.tensors:
                yield Ref(name, base), reference
        if name in self._anchors:
            yield Ref(self._anchors[name]), self._checkpoint

    def _weight(self, item: tuple[str, TensorInfo]) -> int:
        name, info = item
        return info.nbytes + sum(checkpoint.tensors[ref.tensor].nbytes for ref, checkpoint in self._likes(name))

    # The work

    def run(self) -> Manifest:
        """Prepare tensors in parallel, encode their chunks in parallel, write everything in order.

        Returns:
            The manifest, as written.
        """
        for (name, info), prepared in self._pipeline.ordered(
            self._checkpoint.tensors.items(), self._prepare, self._weight
        ):
            self._progress(self._done, self._total, name)
            self._writer.tensors[name] = self._store(name, info, prepared)
            self._done += info.nbytes
            self._release(prepared)
        for sidecar, part in self._checkpoint.sidecars.items():
            self._writer.add_sidecar(sidecar, part)
        layout = self._writer.add_layout(self._checkpoint)
        self._progress(self._total, self._total, "done")
        nodes = (node for tensor in self._writer.tensors.values() for node in tensor.recipe.walk())
        used = {node.base for node in nodes if isinstance(node, Ref)}
        bases = {name: base for name, base in self._bases.items() if name in used}
        return self._writer.finish(layout, bases, {"producer": f"deltafmt {__version__}"})

    def _store(self, name: str, info: TensorInfo, prepared: _Prepared) -> Tensor:
        if prepared.factored is not None:
            recipe = prepared.factored.write(name, self._writer)
            return Tensor(info.dtype, info.shape, recipe, rel_error=prepared.factored.rel_error)
        identity = (info.dtype.name, info.shape, prepared.digest)
        if (copy := self._copy(name, identity)) is not None:
            return Tensor(info.dtype, info.shape, copy, digest=prepared.digest)
        self._copies.setdefault(identity, Ref(name))
        coding = prepared.coding
        assert coding is not None
        suffix = "#residual" if coding.prediction is not None else "#panels" if coding.order is not None else ""
        stored = self._add(f"{name}{suffix}", coding, info, None if suffix else prepared.digest)
        return Tensor(info.dtype, info.shape, coding.recipe(name, stored, self._writer), digest=prepared.digest)

    def _copy(self, name: str, identity: tuple[str, tuple[int, ...], str]) -> Ref | None:
        """Where an equal tensor is. Anchors stand by themselves: a layer that refers to one might be the equal."""
        copy = self._copies.get(identity)
        return None if copy is not None and copy.base is None and name in self._is_anchor else copy

    def _add(self, wanted: str, coding: Coding, info: TensorInfo, known: str | None) -> str:
        running = None if known else hashlib.sha256()
        array_digest = (lambda: "sha256:" + running.hexdigest()) if running else (lambda: known or "")
        return self._writer.add_array(
            wanted, coding.array_dtype, info.shape, coding.encoding, self._chunks(coding, running), array_digest
        )

    def _chunks(self, coding: Coding, running: Any) -> Iterator[list[Any]]:
        done = self._done
        for elements, planes in coding.encoded(self._pipeline):
            if running is not None:
                running.update(elements)
            self._done += elements.nbytes
            self._progress(self._done, self._total, "")
            yield planes
        self._done = done

    @property
    def non_finite(self) -> dict[str, int]:
        """NaN and infinities that kept a tensor lossless, per tensor."""
        return self._lowrank.non_finite if self._lowrank is not None else {}

    def array_bytes(self, name: str) -> int:
        """The stored size of a stored array."""
        return self._writer.array_bytes[name]
