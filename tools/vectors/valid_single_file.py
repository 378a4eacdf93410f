"""Valid cases of the single-file form (spec/layout.md)."""

from __future__ import annotations

import json

from vectors.draft import Draft, ref
from vectors.spoil import based, low_rank, plain_archive
from vectors.valid import valid
from vectors.values import Json, tensor, weights


@valid(
    "an archive in a single file, with sidecars as arrays: in sub-directories, one empty, one of a reserved name there"
)
def single_file() -> Draft:
    draft = plain_archive()
    draft.single_file = True
    draft.sidecars |= {"1_Pooling/config.json": b"{}", "sub/deltafmt.json": b"{}", "empty.txt": b""}
    return draft


@valid("a single file that needs a base")
def single_file_based() -> Draft:
    draft = based()
    draft.single_file = True
    return draft


@valid("a single file with a bounded tensor")
def single_file_bounded() -> Draft:
    draft = low_rank()
    draft.single_file = True
    return draft


@valid("a single file without tensors or sidecars")
def single_file_no_tensors() -> Draft:
    return Draft(single_file=True)


@valid("a single file whose manifest holds quotes, backslashes, control characters and more than ASCII: escaped twice")
def single_file_escapes() -> Draft:
    draft = Draft(single_file=True, sidecars={"\u6a21\u578b/\xe9.txt": b"x"})
    for name in ('quo"te', "back\\slash", '\\"', "\u91cd\u307f", "\U0001f9ea", "\x80\u2028", "deltafmt.sidecar", "a/b"):
        draft.stored(name, tensor(name, "U8", 2))
    draft.more = {"annotations": {"text": 'a tab\t, a line\n, \x01, \\u0041, "}"'}}
    return draft


@valid("a single file with other metadata, a header with white space, entries in another order than their data")
def single_file_header() -> Draft:
    draft = Draft(single_file=True, sidecars={"config.json": b"{}\n", "a.txt": b"a"})
    draft.stored("w", weights("single", "BF16", 6, 4), "float-planes", "zstd", 9)
    draft.exact("tied", draft.tensors["w"], ref("w"))

    def edit(header: Json, data: bytes) -> tuple[bytes, bytes]:
        entries = json.dumps(dict(reversed(header.items())), indent=1)
        return b'{"__metadata__":{ "format" : "pt" } ,' + entries[1:].encode() + b" " * 100, data

    draft.edit_shard = edit
    return draft
