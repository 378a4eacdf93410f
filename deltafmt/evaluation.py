"""How good a model still is: an archive or a checkpoint predicts a text, by itself or beside another model.

What is measured is in `torch.evaluate`; here are the models, and the tokens of the text. Needs `deltafmt[hf]`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from .archive import usable_device
from .errors import MissingExtraError, UsageError
from .limits import DEFAULT_LIMITS, Limits
from .names import escaped
from .reader import is_archive
from .report import EvalReport, Progress, Score, silent
from .sources import Bases, PathLike, each_base, local_path, open_archive

if TYPE_CHECKING:
    from .torch.evaluate import Evaluation

Mode: TypeAlias = Literal["full", "fused", "lazy"]
MODES = ("full", "fused", "lazy")
DTYPES = ("bfloat16", "float16", "float32", "float64")

_LENGTH = 512
_CONFIG = "config.json"
_TOKENIZER = re.compile(r"(tokenizer|vocab)[^/]*|merges\.txt|[^/]+\.(model|tiktoken)")
_READ = re.compile(rf"{_TOKENIZER.pattern}|config\.json|(special_tokens_map|added_tokens)\.json")
"""The files that are read of a model before its weights."""


def measure(
    src: PathLike,
    text: PathLike,
    *,
    base: Bases | None = None,
    against: PathLike | None = None,
    against_base: Bases | None = None,
    mode: Mode = "full",
    length: int | None = None,
    batch: int = 8,
    tokens: int | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    progress: Progress = silent,
    limits: Limits = DEFAULT_LIMITS,
) -> EvalReport:
    """Let a causal language model predict a text.

    Args:
        src: an archive or a Hugging Face checkpoint, a directory or Hub id; an archive may be a single file.
        text: a UTF-8 file, which the tokenizer of `src` cuts into tokens as it does by itself, special tokens included;
            `-` for stdin; or a `.npy` file of token ids, integers `[n]`.
        base: what `src` was packed against.
        against: a model to compare with, in mode `"full"`; it must have the same vocabulary.
        against_base: what that was packed against.
        mode: of `deltafmt.torch.load_model`; an archive only.
        length: tokens in a window; by default 512, or as many positions as the model has, if these are fewer.
        batch: windows at once.
        tokens: use at most the first so many; all if None.
        device: where the models run.
        dtype: of the weights of both, one of `DTYPES`; by default what each config.json says.
        progress: called with tokens done, and in total, and the model at work.
        limits: caps on what an archive may hold.

    Raises:
        MissingExtraError: torch or transformers is not installed.
        UsageError: it is no causal language model; text and model do not fit; or what was asked cannot be done.
        AccessError, MalformedError, UnsupportedError, IntegrityError, WrongBaseError: as `deltafmt.torch.load_model`.
    """
    begin = time.perf_counter()
    if any(importlib.util.find_spec(library) is None for library in ("torch", "transformers")):
        raise MissingExtraError("measuring a model needs torch and transformers", extra="hf")
    if against is None and each_base(against_base):
        raise UsageError("there is a base to compare with, and no model", hint="Name the model: --against MODEL")
    import torch

    from .torch.evaluate import evaluate
    from .torch.skeleton import foreign_errors

    usable_device(device)
    with _quiet_transformers():
        subjects = [_described(src, base, mode, limits)]
        if against is not None:
            subjects.append(_described(against, against_base, "full", limits))
        ids = torch.from_numpy(_token_ids(subjects, str(text), tokens))
        window = _window(length, len(ids), subjects)
        models = [_loaded(each, device, dtype) for each in subjects]
        scores = []
        for place, (of, model, other) in enumerate(zip(subjects, models, [*models[1:], None], strict=True)):
            tell = _share_of(progress, of.name, place, len(models))
            with foreign_errors(of.name, f"it cannot be computed on {device}", _SMALLER, when_full=_SMALLER):
                found = evaluate(model, ids, reference=other, length=window, batch=batch, device=device, progress=tell)
            scores.append(_score(of, model, found))
    own, reference = scores[0], scores[1] if len(scores) > 1 else None
    seconds = time.perf_counter() - begin
    return EvalReport(str(text), found.tokens, window, batch, device, own, reference, seconds)


_SMALLER = "A smaller --batch or --length takes less memory; or take another --dtype or --device"
_AGAIN = "Get the checkpoint again, or a transformers that knows it"


def _share_of(progress: Progress, name: str, place: int, places: int) -> Progress:
    """Progress of one of several passes over the text."""

    def tell(done: int, total: int, what: str) -> None:
        progress(place * total + done, places * total, what or name)

    return tell


@dataclass(frozen=True)
class _Subject:
    """A model, before its weights are read.

    Attributes:
        name: as the user has it.
        model_class: the class of transformers that its config.json names.
        vocabulary, positions: how many tokens it knows, and how many at once; None if its configuration does not say.
    """

    name: str
    path: Path
    base: Bases | None
    mode: Mode
    limits: Limits
    packed: bool
    model_class: Any
    vocabulary: int
    positions: int | None


def _described(source: PathLike, base: Bases | None, mode: Mode, limits: Limits) -> _Subject:
    from transformers import AutoConfig

    from .torch.skeleton import foreign_errors

    path = local_path(source)
    packed = is_archive(path)
    if not packed and (mode != "full" or each_base(base)):
        asked = "a base" if each_base(base) else f"mode '{mode}'"
        raise UsageError(
            f"{asked} is for archives, and this is a plain checkpoint",
            where=str(source),
            hint="Leave it out, or pack the checkpoint first: deltafmt pack",
        )
    with _files(path, limits) as folder:
        if not (folder / _CONFIG).is_file():
            raise UsageError(
                f"there is no {_CONFIG}, which says what model it is", where=str(source), hint="Name its directory"
            )
        with foreign_errors(str(source), "transformers cannot read its config.json", _AGAIN):
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    found = _causal_class(config, str(source))
    inner = config.get_text_config()
    positions = getattr(inner, "max_position_embeddings", None)
    return _Subject(str(source), path, base, mode, limits, packed, found, inner.vocab_size, positions)


def _causal_class(config: Any, where: str) -> Any:
    """The class that a configuration names. Raises `UsageError` unless it predicts the next token, from those before
    it only."""
    import transformers

    from .torch.skeleton import named_classes

    names = named_classes(config, where)
    found = getattr(transformers, names[0], None) if names else None
    both_ways = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    known = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    if found is None or not known or not found.can_generate() or config.is_encoder_decoder or both_ways:
        raise UsageError(
            "it is no causal language model of transformers",
            where=where,
            expected="a model that predicts the next token, such as LlamaForCausalLM",
            found=escaped(names[0]) if names else "no architecture in config.json",
        )
    return found


@contextlib.contextmanager
def _files(path: Path, limits: Limits) -> Iterator[Path]:
    """The folder where configuration and tokenizer are; those of an archive are checked."""
    if not is_archive(path):
        yield path
        return
    from .torch.skeleton import sidecar_folder

    with open_archive(path, limits=limits) as archive, sidecar_folder(archive, _READ) as folder:
        yield folder


# Tokens


def _token_ids(subjects: list[_Subject], text: str, most: int | None) -> np.ndarray[Any, Any]:
    """Integers `[n]` that all models know."""
    subject = subjects[0]
    ids = _stored_ids(text) if text.endswith(".npy") else _tokens_of(subjects, _read_text(text))
    ids = ids[:most]
    if len(ids) < 2:
        raise UsageError(
            "there is nothing to predict", where=text, expected="two tokens or more", found=len(ids), hint="Take more"
        )
    for other in subjects[1:]:
        if other.vocabulary != subject.vocabulary:
            raise UsageError(
                "the models have vocabularies of different sizes, so they cannot be compared",
                where=other.name,
                expected=subject.vocabulary,
                found=other.vocabulary,
            )
    for extreme in (int(ids.min()), int(ids.max())):
        if not 0 <= extreme < subject.vocabulary:
            raise UsageError(
                "a token is not in the vocabulary",
                where=text,
                expected=f"0 to {subject.vocabulary - 1}",
                found=extreme,
                hint="The text or the ids are for another tokenizer than that of the model",
            )
    return ids.astype(np.int64)


def _stored_ids(file: str) -> np.ndarray[Any, Any]:
    try:
        ids = np.load(file, allow_pickle=False, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise UsageError("not a .npy file of numbers", where=file, hint=_SAVE) from error
    if not isinstance(ids, np.ndarray):
        ids.close()
        raise UsageError("not a .npy file but several in one", where=file, hint=_SAVE)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        found = f"{ids.dtype} {list(ids.shape)}"
        raise UsageError("these are no token ids", where=file, expected="integers [n]", found=found, hint=_SAVE)
    return np.asarray(ids)


_SAVE = "Write them with numpy.save(file, ids), ids a flat array of integers"


def _read_text(file: str) -> str:
    data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"not UTF-8 text: byte {error.start} cannot be read",
            where="stdin" if file == "-" else file,
            hint="Convert it, e.g. with iconv; token ids go into a file whose name ends in .npy",
        ) from error


def _tokens_of(subjects: list[_Subject], text: str) -> np.ndarray[Any, Any]:
    """As the first model's tokenizer has them; one that another model brings must agree."""
    subject, *others = subjects
    ids = _tokenized(subject, text)
    if ids is None:
        raise UsageError(
            "the model brings no tokenizer",
            where=subject.name,
            hint="Put its tokenizer.json beside it and pack it again, or give token ids: --text ids.npy",
        )
    for other in others:
        found = _tokenized(other, text)
        if found is not None and not np.array_equal(ids, found):
            raise UsageError(
                f"it cuts the text into other tokens than {subject.name}",
                where=other.name,
                hint="Compare models that have one tokenizer",
            )
    return ids


def _tokenized(subject: _Subject, text: str) -> np.ndarray[Any, Any] | None:
    """None if the model has no tokenizer; transformers would make an empty one up."""
    from transformers import AutoTokenizer

    from .torch.skeleton import foreign_errors

    with _files(subject.path, subject.limits) as folder:
        if not any(_TOKENIZER.fullmatch(file.name) for file in folder.iterdir()):
            return None
        with foreign_errors(subject.name, "transformers cannot read its tokenizer", _AGAIN):
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            return np.asarray(tokenizer(text)["input_ids"], np.int64)


def _window(length: int | None, tokens: int, subjects: list[_Subject]) -> int:
    """Tokens in a window, no more than the text has."""
    for subject in subjects:
        if length is not None and subject.positions is not None and length > subject.positions:
            raise UsageError(
                "a window is longer than the model's positions",
                where=subject.name,
                expected=f"--length of at most {subject.positions}",
                found=length,
            )
    positions = [subject.positions for subject in subjects if subject.positions is not None]
    return min(tokens, *positions, _LENGTH if length is None else length)


# Models


def _loaded(subject: _Subject, device: str, dtype: str | None) -> Any:
    import torch

    from .torch import load_model
    from .torch.skeleton import foreign_errors

    wanted: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
    if subject.packed:
        return load_model(
            subject.path, subject.mode, device=device, dtype=wanted, base=subject.base, limits=subject.limits
        )
    with foreign_errors(subject.name, "transformers cannot load it", _AGAIN, when_full=_SMALLER):
        model, info = subject.model_class.from_pretrained(
            subject.path,
            dtype=wanted or "auto",
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        if info["missing_keys"]:
            name = escaped(min(info["missing_keys"]))
            what = "the checkpoint lacks weights that the model needs"
            raise UsageError(what, where=subject.name, found=name, hint="Name a complete one, or get this one again")
        return model.to(device).eval()


def _score(of: _Subject, model: Any, found: Evaluation) -> Score:
    from .torch.evaluate import parameters, resident_bytes, stored_bytes

    return Score(
        model=of.name,
        mode=of.mode if of.packed else "plain",
        dtype=str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
        bases=tuple(str(base) for base in each_base(of.base)),
        perplexity=found.perplexity,
        accuracy=found.accuracy,
        agreement=found.agreement,
        kl=found.kl,
        parameters=parameters(model),
        stored_bytes=stored_bytes(of.path),
        resident_bytes=resident_bytes(model),
        tokens_per_second=found.tokens_per_second,
    )


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Its own progress bars and advice would come between ours."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
