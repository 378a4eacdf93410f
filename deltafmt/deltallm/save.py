"""A model with delta modules, in memory, as an archive: its structure is known, so nothing is searched for.

An anchor's weight is stored once; a delta module's is `sum(ref(anchor), lowrank(factors))`; whatever a base has is a
reference into it. So the checkpoints of a training, whose base is everything that does not train, are small.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint import Checkpoint, FilePart, TensorInfo
from ..digests import digest
from ..dtypes import DTYPES, Bits
from ..dtypes import Dtype as FormatDtype
from ..durable import Staging
from ..errors import UnsupportedError, UsageError
from ..layout import make_header
from ..manifest import Base, BaseTensor, Manifest, Tensor, WeightFile
from ..manifest import Checkpoint as CheckpointEntry
from ..operators import Lowrank, Operator, Ref, Stored, Sum
from ..report import PackReport
from ..roles import pack_report
from ..shard_writer import raw_bytes
from ..sources import BASE_ID, PathLike, check_apart, check_usable_base, local_path, open_source, provenance
from ..torch.fused import BasePool, Delta, Factors, deltas
from ..torch.skeleton import settings
from ..torch.tensors import SAFETENSORS_NAMES, torch_dtype
from ..version import __version__
from ..writer import ArchiveWriter
from .structure import Plan

_WEIGHTS = "model.safetensors"
_CONFIG = "config.json"


def save(
    student: nn.Module,
    plan: Plan | None,
    directory: PathLike,
    *,
    source: PathLike | None = None,
    base: PathLike | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    single_file: bool = False,
) -> PackReport:
    """Write a model as an archive, which all of deltafmt reads: `unpack` gives a plain checkpoint of it.

    Args:
        student: a model of transformers, some layers of it `Delta`s with float or integer factors, or none.
        plan: if given, its delta modules have to be there.
        directory: the archive to create; a file (`*.safetensors`) with `single_file`.
        source: the checkpoint that the model was made from: its tokenizer and other files come along, and its dtypes
            are kept where the model has wider ones. None: the model's configuration comes along.
        base: a checkpoint or lossless archive: what it holds bit for bit is referred to and not stored.
        dtype: of float factors, for example `torch.bfloat16`; None: as they are.
        overwrite: replace an archive or checkpoint at `directory`.

    Returns:
        Sizes per tensor and in total, and the error that rounding of factors and weights makes: relative to the float32
        sum of base and factors.

    Raises:
        UsageError: the plan does not fit the model; `directory` exists; `base` is not exact.
        UnsupportedError: a dtype that the format does not have.
        AccessError: the file system refused.
    """
    if plan is not None and (lost := [name for name in plan.anchors if name not in deltas(student)]):
        raise UsageError(f"the model has no delta module '{lost[0]}' that the plan names", hint="Was it merged?")
    with ExitStack() as stack:
        opened = None if source is None else stack.enter_context(open_source(local_path(source)))
        reference = None if base is None else stack.enter_context(open_source(local_path(base)))
        if reference is not None:
            check_usable_base(reference)
        check_apart(Path(directory), *(local_path(each) for each in (source, base) if each is not None))
        area = stack.enter_context(Staging(Path(directory), overwrite=overwrite, single_file=single_file))
        writing = _Writing(student, area, opened, reference, dtype)
        if base is not None:
            writing.base_from = provenance(base)
        started = time.perf_counter()
        writing.write_all()
        manifest = writing.finish()
        area.commit()
    return pack_report(
        manifest,
        writing.array_bytes,
        started,
        single_file=single_file,
        source=type(student).__name__,
        destination=str(directory),
        base=None if base is None else str(base),
        bases=() if base is None else (str(base),),
        bases_needed=(str(base),) if manifest.bases else (),
        method="lowrank",
    )


def save_frozen(student: nn.Module, directory: PathLike) -> None:
    """Write what of a model is frozen and no delta, without loss: the base of a training's checkpoints, in place of one
    that is there. It is no model by itself. Raises as `save`."""
    with Staging(Path(directory), overwrite=True) as area:
        writing = _Writing(student, area, None, None, None)
        writing.write_all(frozen=True)
        writing.finish()
        area.commit()


class _Writing:
    """One archive being written from a model."""

    def __init__(
        self,
        model: nn.Module,
        area: Staging,
        source: Checkpoint | None,
        base: Checkpoint | None,
        factor_dtype: torch.dtype | None,
    ) -> None:
        self._model, self._source, self._factor_dtype = model, source, factor_dtype
        self._named = dict(_named(model))
        self._writer = ArchiveWriter(area, [(name, 2) for name in (*self._named, _WEIGHTS)])
        self._places: dict[int, str] = {}  # of a parameter: the first tensor that it is
        for name, weight in self._named.items():
            if isinstance(weight, torch.Tensor):
                self._places.setdefault(id(weight), name)
        self._stored: dict[int, Stored] = {}  # bases that are no tensor of the model
        self._base = {} if base is None else _digests(base)
        self._by_content = {(info.dtype.name, info.shape, info.digest): name for name, info in self._base.items()}
        self.base_from: tuple[str, str | None] = ("", None)

    def array_bytes(self, name: str) -> int:
        return self._writer.array_bytes[name]

    def write_all(self, *, frozen: bool = False) -> None:
        """Write every tensor; with `frozen` only those that are no deltas and do not train."""
        for name, weight in self._named.items():
            if name in self._writer.tensors:  # an anchor that a delta before it needed
                continue
            if isinstance(weight, Delta):
                if not frozen:
                    self._writer.tensors[name] = self._delta(name, weight)
            elif not (frozen and weight.requires_grad) and not self._is_left_out(name, weight):
                first = self._places[id(weight)]
                if first != name:
                    known = self._writer.tensors[first]
                    self._writer.tensors[name] = known._replace(recipe=Ref(first))
                else:
                    self._writer.tensors[name] = self._dense(name, weight)

    def finish(self) -> Manifest:
        """Write the layout of the unpacked file, sidecars and the manifest."""
        writer = self._writer
        infos = {name: TensorInfo(tensor.dtype, tensor.shape) for name, tensor in writer.tensors.items()}
        if self._source is not None and dict(self._source.tensors) == infos:
            layout = writer.add_layout(self._source)  # its own files, as they were
        else:
            header = make_header(infos, {"format": "pt"})
            array = writer.add_bits(
                f"{_WEIGHTS}#header", DTYPES["U8"], (len(header),), raw_bytes(header), thorough=True
            )
            layout = CheckpointEntry((WeightFile(_WEIGHTS, array),))
        nodes = (node for tensor in writer.tensors.values() for node in tensor.recipe.walk())
        needed = any(isinstance(node, Ref) and node.base is not None for node in nodes)
        bases = {BASE_ID: Base(self._base, *self.base_from)} if needed else {}
        with self._configuration() as own:
            files = {name: FilePart(path) for name, path in own.items()}
            if self._source is not None:
                files = {**self._source.sidecars, **files}
            for name, part in files.items():
                writer.add_sidecar(name, part)
            return writer.finish(layout, bases, {"producer": f"deltafmt {__version__}"})

    # Tensors

    def _is_left_out(self, name: str, weight: torch.Tensor) -> bool:
        """Whether a name of a tied weight is one that checkpoints leave out."""
        if self._places[id(weight)] == name:
            return False
        if self._source is not None:
            return name not in self._source.tensors
        return name in (getattr(self._model, "all_tied_weights_keys", None) or {})

    def _dense(self, name: str, weight: torch.Tensor) -> Tensor:
        kind, bits = self._elements(weight.detach(), name)
        found = digest(bits)
        shape = tuple(weight.shape)
        known = self._by_content.get((kind.name, shape, found))
        recipe: Operator = (
            Stored(self._writer.add_bits(name, kind, shape, bits)) if known is None else Ref(known, BASE_ID)
        )
        return Tensor(kind, shape, recipe, digest=found)

    def _delta(self, name: str, layer: Delta) -> Tensor:
        base = layer.base
        places = order(layer.factors)
        lora_a, lora_b = (each.detach().cpu()[places] for each in (layer.factors.lora_a, layer.factors.lora_b))
        if self._factor_dtype is not None and lora_a.is_floating_point():
            lora_a, lora_b = lora_a.to(self._factor_dtype), lora_b.to(self._factor_dtype)
        factors = Factors(lora_a, lora_b, layer.factors.scale)
        if base is None and factors.rank == 0:
            raise UnsupportedError(f"{name} has neither a base nor factors", hint="Give it one of them")
        anchor = None if base is None else self._anchor(name, base)
        wanted = base.dtype if base is not None else self._weight_dtype()
        kind = _format_dtype(self._narrowed(wanted, name), name)
        shape = (factors.lora_b.shape[1], factors.lora_a.shape[1])
        if factors.rank == 0:
            assert anchor is not None and base is not None
            if isinstance(anchor, Ref) and anchor.base is None:
                return self._writer.tensors[anchor.tensor]._replace(recipe=anchor)
            return Tensor(kind, shape, anchor, digest=digest(self._elements(base.detach(), name)[1]))
        a, b = (
            Stored(self._add(f"{name}#{role}", factor.detach()))
            for role, factor in (("lora_a", factors.lora_a), ("lora_b", factors.lora_b))
        )
        low = Lowrank(a, b, factors.scale)
        error = _error(layer, factors, torch_dtype(kind))
        return Tensor(kind, shape, low if anchor is None else Sum((anchor, low)), rel_error=error)

    def _anchor(self, name: str, base: torch.Tensor) -> Operator:
        """Where the base of a delta is: another tensor, one of the base model, or an array of its own."""
        if (place := self._places.get(id(base))) is not None:
            if place not in self._writer.tensors:  # it comes later in the model
                self._writer.tensors[place] = self._dense(place, self._named[place])  # type: ignore[arg-type]
            recipe = self._writer.tensors[place].recipe
            return recipe if isinstance(recipe, Ref) else Ref(place)
        if id(base) not in self._stored:
            kind, bits = self._elements(base.detach(), name)
            known = self._by_content.get((kind.name, tuple(base.shape), digest(bits)))
            if known is not None:
                return Ref(known, BASE_ID)
            self._stored[id(base)] = Stored(self._writer.add_bits(f"{name}#base", kind, tuple(base.shape), bits))
        return self._stored[id(base)]

    def _add(self, wanted: str, tensor: torch.Tensor) -> str:
        kind = _format_dtype(tensor.dtype, wanted)
        return self._writer.add_bits(wanted, kind, tuple(tensor.shape), _bits(tensor, kind))

    def _elements(self, tensor: torch.Tensor, name: str) -> tuple[FormatDtype, Bits]:
        tensor = tensor.to(self._narrowed(tensor.dtype, name))
        kind = _format_dtype(tensor.dtype, name)
        return kind, _bits(tensor, kind)

    def _narrowed(self, dtype: torch.dtype, name: str) -> torch.dtype:
        """The dtype of a tensor in the source if that is narrower: the model was loaded in a wider one."""
        info = None if self._source is None else self._source.tensors.get(name)
        if info is None or not dtype.is_floating_point or not info.dtype.is_float:
            return dtype
        given = torch_dtype(info.dtype)
        return given if given.itemsize < dtype.itemsize else dtype

    def _weight_dtype(self) -> torch.dtype:
        """Of a delta without a base: what the model's other weights have."""
        return next(
            (each.dtype for each in self._named.values() if isinstance(each, torch.Tensor) and each.ndim > 1),
            torch.float32,
        )

    # Other files

    @contextmanager
    def _configuration(self) -> Iterator[dict[str, Path]]:
        """`config.json` of the model, for as long as it is needed; nothing if that of the source says the same."""
        config = copy.deepcopy(getattr(self._model, "config", None))
        if config is None or self._source_fits(config):
            yield {}
            return
        config.architectures = [type(self._model).__name__]
        config.dtype = str(self._weight_dtype()).removeprefix("torch.")
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            yield {file.name: file for file in Path(folder).iterdir()}

    def _source_fits(self, config: Any) -> bool:
        part = None if self._source is None else self._source.sidecars.get(_CONFIG)
        if part is None:
            return False
        values = json.loads(b"".join(part.blocks()))
        if values.get("architectures") != [type(self._model).__name__]:
            return False
        return bool(settings(type(config).from_dict(values)) == settings(config))


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter | torch.Tensor | Delta]]:
    """Every tensor of the checkpoint that the model would be without its deltas, in order; the weight of a delta
    module as that module. Tied ones come several times."""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Factors | BasePool):
            continue
        prefix = f"{path}." if path else ""
        if isinstance(module, Delta):
            yield f"{prefix}weight", module
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                yield prefix + leaf, parameter
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf not in module._non_persistent_buffers_set:
                yield prefix + leaf, buffer


def order(factors: Factors) -> torch.Tensor:
    """Components by decreasing contribution, as the format wants them and `save` writes them: integers `[r]`."""
    a, b = factors.lora_a.detach().cpu(), factors.lora_b.detach().cpu()
    contribution = a.double().norm(dim=1) * b.double().norm(dim=1)
    return torch.argsort(contribution, descending=True, stable=True)


def _error(layer: Delta, stored: Factors, dtype: torch.dtype) -> float:
    """Relative Frobenius norm of what rounding changes: the factors that are stored, and then the sum."""
    base = layer.base
    device = layer.factors.lora_a.device

    def total(factors: Factors) -> torch.Tensor:
        a, b = (factor.to(device) for factor in factors.pair(torch.float32))
        return b.t() @ a if base is None else base.float() + b.t() @ a

    with torch.no_grad():
        exact = total(layer.factors)
        return float((total(stored).to(dtype).float() - exact).norm() / exact.norm().clamp_min(1e-30))


def _digests(base: Checkpoint) -> dict[str, BaseTensor]:
    return {name: BaseTensor(info.dtype, info.shape, base.digest(name)) for name, info in base.tensors.items()}


def _format_dtype(dtype: torch.dtype, name: str) -> FormatDtype:
    found = SAFETENSORS_NAMES.get(dtype)
    if found is None:
        raise UnsupportedError(f"the format has no dtype {dtype}", where=name)
    return DTYPES[found]


def _bits(tensor: torch.Tensor, kind: FormatDtype) -> Bits:
    """All elements as unsigned integers."""
    memory: Bits = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memory.view(kind.bits)
