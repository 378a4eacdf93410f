"""Models on the Hugging Face Hub: a repo id becomes a local snapshot directory, through `huggingface_hub`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from .errors import AccessError, MissingExtraError

# Hub rules: letters, digits, `-`, `_`, `.`; at most 96 characters; no `--` or `..`; no `-` or `.` at either end.
_NAME = r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"(?:{_NAME}/)?{_NAME}", re.ASCII)
_FILE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".json", ".git", ".gguf")
# The same weights for other runtimes.
_OTHER_RUNTIMES = (
    "*.h5",
    "*.msgpack",
    "*.ot",
    "*.tflite",
    "onnx/*",
    "openvino/*",
    "coreml/*",
    "*.mlmodel",
    "flax_model*",
)
# The same weights again, where there are safetensors.
_PICKLED_TWINS = ("pytorch_model*.bin", "pytorch_model.bin.index.json", "consolidated*.pth", "original/*.pth")
_SAFETENSORS = {"model.safetensors", "model.safetensors.index.json"}


def split_repo_id(text: str) -> tuple[str, str | None]:
    """`org/name@revision` -> `("org/name", "revision")`; without `@` the revision is None."""
    repo_id, at, revision = text.partition("@")
    return repo_id, revision if at else None


def looks_like_repo_id(text: str) -> bool:
    """Whether a text has the form `name` or `org/name`, with `@revision` or without. Looks at no disk and no network.

    A text that ends like a weight file is taken for a path that does not exist.
    """
    repo_id, revision = split_repo_id(text)
    if revision is not None and not revision.strip():
        return False
    return _REPO_ID.fullmatch(repo_id) is not None and not repo_id.endswith(_FILE_SUFFIXES)


def download(
    repo_id: str, *, revision: str | None = None, progress: Callable[[str], None] | None = None
) -> tuple[Path, str]:
    """Download a model from the Hub, or find it in the local cache; weights in formats of other runtimes are left out.

    The environment variables of `huggingface_hub` hold (HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, ...). Without
    network a snapshot in the cache is used.

    Args:
        repo_id: `name` or `org/name`; `@revision` may follow where `revision` is None.
        revision: a branch, tag or commit; the default branch if None.
        progress: called with a line of text for each step.

    Returns:
        The snapshot directory, and the full commit hash that `revision` stands for.

    Raises:
        MissingExtraError: `huggingface_hub` is not installed.
        AccessError: no such repo or revision, no permission, no network, or the disk is full.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        what = "a model on the Hub is read through huggingface_hub, which is not installed"
        raise MissingExtraError(what, extra="hub", where=repo_id) from error

    if revision is None:
        repo_id, revision = split_repo_id(repo_id)
    tell = progress or (lambda line: None)
    ignored = [*_OTHER_RUNTIMES, *_PICKLED_TWINS]
    from_cache = False
    try:
        info = huggingface_hub.HfApi().model_info(repo_id, revision=revision)
    except Exception as error:  # without network: whatever the HTTP client of this version raises
        if _is_final(error):
            raise _explained(error, repo_id, revision) from error
        tell(f"{repo_id}: the Hub cannot be reached, looking in the cache")
        from_cache = True
    else:
        names = {file.rfilename for file in info.siblings or []}
        if not names & _SAFETENSORS:
            ignored = list(_OTHER_RUNTIMES)
        tell(f"{repo_id}: downloading commit {info.sha}")
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                repo_id, revision=revision, ignore_patterns=ignored, local_files_only=from_cache
            )
        )
    except Exception as error:
        raise _explained(error, repo_id, revision) from error
    return folder, folder.name  # the cache names a snapshot after its commit


def _is_final(error: Exception) -> bool:
    """Whether the Hub itself refused: then the cache must not answer in its place."""
    from huggingface_hub import errors

    return isinstance(
        error,
        (errors.GatedRepoError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError),
    )


def _explained(error: Exception, repo_id: str, revision: str | None) -> AccessError:
    from huggingface_hub import errors

    where = f"{repo_id}@{revision}" if revision else repo_id
    if isinstance(error, errors.GatedRepoError):  # a kind of RepositoryNotFoundError, so it comes first
        what, hint = "the model is gated", "Accept its terms on its Hub page, then log in: hf auth login"
    elif isinstance(error, errors.RepositoryNotFoundError):
        what = "no such local path, and no such model on the Hub"
        hint = "Check the spelling; for a private model log in: hf auth login"
    elif isinstance(error, errors.RevisionNotFoundError):
        what, hint = "the model has no such revision", "Give a branch, a tag or a full commit hash after the @"
    elif isinstance(error, errors.HFValidationError):
        what, hint = "no such local path, and not a Hub id", "Check the path; a Hub id is name or org/name"
    elif isinstance(error, errors.LocalEntryNotFoundError):
        what = "no such local path, and the Hub cannot be reached; the cache does not hold the model"
        hint = "Check the path, the network, HF_ENDPOINT and HF_HUB_OFFLINE"
    else:
        first_line = (str(error) or type(error).__name__).splitlines()[0][:200]
        what, hint = f"the download failed: {first_line}", "Try again: finished files are kept"
    return AccessError(what, where=where, hint=hint)
