"""Invalid bases, digests and original files: step 8 of spec/reasons.md."""

from __future__ import annotations

import json
from collections.abc import Callable

from vectors.draft import Draft, plain, safetensors
from vectors.spoil import add, based, flip, manifest, plain_archive, put, shift
from vectors.values import Json, digest

# Step 8 --------------------------------------------------------------------------------------------


def base_edit(name: str, reason: str, description: str, change: Callable[[Json], object]) -> None:
    """Another base than the one that the archive was packed against."""

    def make() -> Draft:
        draft = based()
        tensors: Json = dict(draft.base_tensors)
        change(tensors)
        draft.base = {"model.safetensors": safetensors(tensors)} if tensors else {}
        return draft

    add(name, reason, description, make)


base_edit("base-missing", "base-missing", "no base is given", lambda t: t.clear())
base_edit(
    "base-value",
    "base-mismatch",
    "one value of the base is another",
    lambda t: t.update(w=t["w"]._replace(data=flip(t["w"].data, 0))),
)
base_edit(
    "base-unused-value",
    "base-mismatch",
    "one value is another in a tensor that is not used: found when all is checked",
    lambda t: t.update(unused=t["unused"]._replace(data=flip(t["unused"].data, 0))),
)
base_edit("base-lacks-tensor", "base-mismatch", "the base lacks a tensor", lambda t: t.pop("w"))
base_edit(
    "base-lacks-unused-tensor", "base-mismatch", "the base lacks a tensor that is not used", lambda t: t.pop("unused")
)
base_edit("base-extra-tensor", "base-mismatch", "the base has one more tensor", lambda t: t.update(more=t["same"]))
base_edit(
    "base-renamed-tensor",
    "base-mismatch",
    "a tensor of the base has another name",
    lambda t: t.update(other=t.pop("same")),
)
base_edit(
    "base-dtype",
    "base-mismatch",
    "the same bytes under another dtype",
    lambda t: t.update(same=t["same"]._replace(dtype="BF16")),
)
base_edit(
    "base-shape",
    "base-mismatch",
    "the same bytes in another shape",
    lambda t: t.update(w=t["w"]._replace(shape=[3, 4])),
)


def base_archive() -> Draft:
    inner = Draft()
    for name, t in based().base_tensors.items():
        inner.stored(name, t._replace(data=flip(t.data, 0)) if name == "w" else t)
    draft = based()
    draft.base = inner.seal()
    return draft


add("base-archive-value", "base-mismatch", "a base that is an archive, with another value", base_archive)
for name, path in (
    ("array", ("arrays", "w")),
    ("tensor", ("tensors", "w")),
    ("header-array", ("arrays", "header of model.safetensors")),
):
    manifest(f"digest-of-{name}", "digest", f"another digest of: {name}", put(digest(b""), *path, "digest"))
manifest(
    "digest-of-sidecar", "digest", "another digest of a sidecar", put(digest(b""), "sidecars", "config.json", "digest")
)
manifest("digest-of-tied", "digest", "another digest of a reference", put(digest(b""), "tensors", "tied", "digest"))
manifest(
    "digest-of-patch",
    "digest",
    "a patch that gives other bytes than promised",
    put(digest(b""), "tensors", "w", "digest"),
    based,
)


def original(name: str, description: str, change: Callable[[Json], object], reason: str = "checkpoint") -> None:
    """Another header of the original weight file than the tensors ask for."""

    def make() -> Draft:
        draft = plain_archive()
        header = json.loads(plain(draft.tensors)[0])
        changed = change(header)
        draft.headers = {"model.safetensors": changed if isinstance(changed, bytes) else json.dumps(header).encode()}
        return draft

    add(f"checkpoint-{name}", reason, description, make)


def without_last(header: Json) -> None:
    header.pop("zeros")


def one_more(header: Json) -> None:
    end = header["zeros"]["data_offsets"][1]
    header["more"] = {"dtype": "U8", "shape": [0], "data_offsets": [end, end]}


original("lacks-tensor", "a tensor that no original file holds", without_last)
original("extra-tensor", "an original file with one more tensor", one_more)
original("renamed-tensor", "an original file with a tensor of another name", lambda h: h.update(bias2=h.pop("bias")))
original("dtype", "an original file with another dtype", put("I32", "bias", "dtype"))
original("shape", "an original file with another shape", put([2, 2], "bias", "shape"))
original("length", "an original file whose shape and offsets disagree", put([5], "bias", "shape"))
original("hole", "an original file with a hole", lambda h: shift(h, "zeros", 1))
original("overlap", "an original file with an overlap", lambda h: shift(h, "zeros", -1))
original("not-json", "an original header that is not JSON", lambda h: b"x" * 64)
original(
    "duplicate-key",
    "an original header with a duplicate key",
    lambda h: json.dumps(h).encode().replace(b"{", b'{"bias":1,', 1),
)
original("empty", "an original header without a byte", lambda h: b"")


def held_twice() -> Draft:
    draft = plain_archive()
    draft.layout = {"a.safetensors": list(draft.tensors), "b.safetensors": ["bias"]}
    return draft


add("checkpoint-tensor-twice", "checkpoint", "a tensor in two original files", held_twice)
