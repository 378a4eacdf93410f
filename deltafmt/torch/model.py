"""A packed Hugging Face model as a model of transformers: dense, fused, or lazy."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn

from ..errors import UsageError
from ..limits import DEFAULT_LIMITS, Limits, check_count
from ..reader import Archive
from ..sources import Bases, PathLike, open_archive
from .bases import BaseCache
from .fill import bases_of, cast_of, fill, listed, move_buffers, take_over
from .fused import deltas, no_plain_checkpoint
from .lazy import LazyWeights
from .skeleton import Architecture, architecture, full_model, settings, skeleton
from .slots import Slot, check_shapes, slots
from .tensors import Cast, check_bases, nbytes, new_cast, read_tensors, room_for, torch_dtype

Mode: TypeAlias = Literal["full", "fused", "lazy"]


def load_model(
    path: PathLike,
    mode: Mode = "full",
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    base: Bases | None = None,
    rank: int | None = None,
    max_bytes: int | None = None,
    bases: BaseCache | None = None,
    keep: bool = False,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    jobs: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Any:
    """Load a packed model as the class of transformers that its `config.json` names, in evaluation mode.

    Args:
        path: the archive's directory, or a Hub id.
        mode: `"full"`: dense weights, each tensor of the archive as it was, as `from_pretrained` loads the unpacked
            model. `"fused"`: linear layers and embeddings that are stored as base and factors stay so, see `fused`;
            whatever is stored as a *patch* of that sum lacks the patch, so that each weight is within a rounding step
            or two of the exact one; all other tensors are exact. Only factors can be trained; integers, as archives
            without loss have them, after `deltafmt.torch.trainable(model)`. `"lazy"`: nothing is read yet; each layer
            reads its weights when it runs, each time into new memory, and lets them go after that.
        device: where it goes; the CPU by default. In mode `"full"` all of it is on the CPU first, where transformers
            puts a state dict unless accelerate is there; `from_pretrained(device_map=)` of `deltafmt.hf` uses that, and
            no more of the CPU's memory than for a few tensors.
        dtype: of its floating-point weights; by default what `config.json` says, or else what the first weight has.
        base: the base it was packed against, or several, as in `deltafmt.open`. It must be there, with the right names,
            dtypes and shapes, when the model is loaded; in mode `"lazy"` the digest of the smallest tensor that is
            needed of it is checked then, and of each other one when it is first read.
        rank: use at most this many components of each pair of factors. Dense weights that are stored with more are
            built from these, without the patch that made them exact; all others are as they were. Not for `"lazy"`.
        max_bytes: use as many components as fit: parameters and buffers take at most this many bytes.
        bases: base weights to share with other models, mode `"fused"` only.
        keep: mode `"lazy"`: keep weights once read; `deltafmt.torch.release(model)` lets them go.
        attn_implementation: how attention is computed, as of `from_pretrained`.
        trust_remote_code: run code that comes with the model.
        jobs: threads; one per processor if None.
        limits: caps on what is accepted; see `deltafmt.Limits`.

    Returns:
        A `transformers.PreTrainedModel`.

    Raises:
        MalformedError, UnsupportedError, IntegrityError: as spec/reasons.md says.
        WrongBaseError: a base is missing, or is another model.
        MissingExtraError: without transformers.
        UsageError: transformers cannot build it, weights are missing, or it does not fit in `max_bytes` or on the
            device; or an argument is not what it may be.
    """
    if mode not in get_args(Mode):
        raise UsageError(f"unknown mode {mode!r}", hint=f"Choose one of {', '.join(get_args(Mode))}")
    _check_options(mode, rank, max_bytes, base, bases, keep)
    check_count("jobs", jobs, 1)
    cast = new_cast(device, dtype)
    with contextlib.ExitStack() as stack:
        archive = stack.enter_context(open_archive(path, base, limits=limits))
        of = architecture(archive, trust_remote_code)
        if attn_implementation is not None:
            of.config._attn_implementation = attn_implementation
        model: nn.Module | None = None
        if mode == "lazy":
            model = _lazy(archive, of, cast, keep, jobs)
            if model is not None:
                stack.pop_all()  # it is closed when the model is gone
        elif mode == "fused":
            model = _fused(archive, of, cast, bases or BaseCache(), rank, max_bytes, jobs)
        return _full(archive, of, cast, rank, max_bytes, jobs) if model is None else model


def swap(
    model: Any, path: PathLike, *, base: Bases | None = None, rank: int | None = None, trust_remote_code: bool = False
) -> None:
    """Turn a fused model into another fine-tune of its base, in place.

    Factors, and whatever else differs, are read from the archive at `path`; base weights that both have in common stay
    where they are, and if these are all that is needed of the base, `base` may be left out. If anything fails, the
    model stays as it was.

    Raises:
        UsageError: `model` is not from `load_model(mode="fused")`, or the archive is of another architecture or
            configuration.
        WrongBaseError and others: as `load_model`.
    """
    check_count("rank", rank, 0)
    bases, cast = bases_of(model), cast_of(model)
    with open_archive(path, base) as archive:
        of = architecture(archive, trust_remote_code)
        if of.model_class is not type(model):
            raise UsageError(
                "the archive is of another architecture",
                where=str(archive.path),
                expected=type(model).__name__,
                found=of.model_class.__name__,
            )
        if settings(of.config) != settings(model.config):
            raise UsageError(
                "the archive is of a model with another configuration",
                where=str(archive.path),
                hint="Load it by itself: load_model(..., bases=) shares what they have in common",
            )
        other = _fused(archive, of, cast, bases, rank, None, None)
        if other is None:
            raise UsageError("it cannot be fused", where=str(archive.path), hint="Load it with mode='full'")
        take_over(model, other)


def check_configuration(archive: Archive, trust_remote_code: bool = False) -> None:
    """Look for what keeps transformers from building the model, in `config.json` and the shapes of the weights.

    Raises `UsageError` for the first thing found, as `load_model` does.
    """
    of = architecture(archive, trust_remote_code)
    model = skeleton(of, _dtype(archive, of))
    check_shapes(model, slots(model, archive.manifest)[0], archive.manifest, archive.path)


def _check_options(
    mode: Mode, rank: int | None, max_bytes: int | None, base: object, bases: BaseCache | None, keep: bool
) -> None:
    check_count("rank", rank, 0)
    check_count("max_bytes", max_bytes, 0)
    if mode == "lazy" and not (rank is None and max_bytes is None):
        raise UsageError("mode 'lazy' reads whole weights: rank and max_bytes do not apply")
    if isinstance(base, BaseCache):
        hint = "Pass it as bases=, and as base= what it was packed against"
        raise UsageError("base is a BaseCache, which holds weights to share", hint=hint)
    if bases is not None and not isinstance(bases, BaseCache):
        raise UsageError(
            "bases is no BaseCache", found=type(bases).__name__, hint="Use base= for what it was packed against"
        )
    if mode != "fused" and bases is not None:
        raise UsageError(f"mode {mode!r} shares no base weights: bases does not apply", hint="Use mode='fused'")
    if mode != "lazy" and keep:
        raise UsageError(f"mode {mode!r} keeps all weights: keep does not apply", hint="Use mode='lazy'")


def _full(
    archive: Archive, of: Architecture, cast: Cast, rank: int | None, max_bytes: int | None, jobs: int | None
) -> nn.Module:
    needed = nbytes(archive, Cast(None, cast.dtype or _dtype(archive, of)))
    if max_bytes is not None and needed > max_bytes:
        raise UsageError(
            "the dense model does not fit in max_bytes",
            where=archive.location,
            expected=f"at most {max_bytes}",
            found=needed,
            hint="mode='fused' takes less where layers share a base",
        )
    hint = "Take another device, mode='fused' with max_bytes=, or mode='lazy'"
    with room_for(needed, None, hint):
        tensors = read_tensors(archive, archive.tensors, Cast(None, _common(archive, of, cast.dtype)), jobs, rank=rank)
        model = full_model(of, _each_its_own(tensors), cast.dtype)
    if cast.device is None:
        return model
    with room_for(needed, cast.device, hint):
        return model.to(cast.device)


def _common(archive: Archive, of: Architecture, dtype: torch.dtype | None) -> torch.dtype | None:
    """What tensors may be cast to as they are read. None if the model keeps some wider: transformers casts these from
    what is stored, with all the others."""
    stored = [torch_dtype(info.dtype) for info in archive.tensors.values() if info.dtype.is_float]
    if dtype is None or all(dtype == torch.promote_types(dtype, each) for each in stored):
        return dtype
    floats = (each.dtype for each in skeleton(of, dtype).state_dict().values() if each.is_floating_point())
    return dtype if set(floats) == {dtype} else None


def _each_its_own(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """No two tensors in the same memory: a dense model may be trained in place."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        own[name] = tensor.clone() if id(tensor) in seen else tensor
        seen.add(id(tensor))
    return own


def _fused(
    archive: Archive,
    of: Architecture,
    cast: Cast,
    bases: BaseCache,
    rank: int | None,
    max_bytes: int | None,
    jobs: int | None,
) -> nn.Module | None:
    """None if names in the archive are not those of the model."""
    empty = _empty(archive, of, cast)
    if empty is None:
        return None
    model, found = empty
    fill(model, archive, found, cast.device, bases, rank, max_bytes, jobs)
    if deltas(model):
        model.save_pretrained = no_plain_checkpoint  # type: ignore[assignment]
    return model


def _lazy(archive: Archive, of: Architecture, cast: Cast, keep: bool, jobs: int | None) -> nn.Module | None:
    """None if names in the archive are not those of the model."""
    empty = _empty(archive, of, cast)
    if empty is None:
        return None
    model, found = empty
    check_bases(archive, [slot.tensor for slot in found])
    weights = LazyWeights(archive, jobs, keep)
    own: dict[nn.Module, dict[str, tuple[str, Cast]]] = {}
    for slot in found:
        as_held = Cast(cast.device, slot.dtype)
        for place in slot.places:
            parent, _, leaf = place.rpartition(".")
            module = model.get_submodule(parent)
            if leaf in module._parameters:
                own.setdefault(module, {})[leaf] = slot.tensor, as_held
            else:
                module._buffers[leaf] = read_tensors(archive, [slot.tensor], as_held)[slot.tensor]
    for module, tensors in own.items():
        weights.attach(module, tensors)
    move_buffers(model, cast.device)
    model.save_pretrained = no_plain_checkpoint  # type: ignore[assignment]
    return model


def _empty(archive: Archive, of: Architecture, cast: Cast) -> tuple[nn.Module, list[Slot]] | None:
    """A model without weights, and where each tensor of the archive goes; None if the names are others."""
    model = skeleton(of, cast.dtype or _dtype(archive, of))
    found = _slots(model, archive)
    return None if found is None else (model, found)


def _slots(model: nn.Module, archive: Archive) -> list[Slot] | None:
    found, homeless = slots(model, archive.manifest)
    if homeless:
        modules = sorted({name.rpartition(".")[0] for name in homeless})
        warnings.warn(
            f"{archive.location}: tensors have other names than these modules of the model, which is loaded dense: "
            f"{listed(modules)}",
            stacklevel=5,
        )
        return None
    check_shapes(model, found, archive.manifest, archive.path)
    return found


def _dtype(archive: Archive, of: Architecture) -> torch.dtype:
    """What the configuration says, or what the first weight has."""
    floats = (torch_dtype(info.dtype) for info in archive.tensors.values() if info.dtype.is_float)
    return of.dtype or next(floats, torch.float32)
