"""Invalid cases of the manifest: its text, types, versions and closed tables; steps 1 to 4 of spec/reasons.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vectors.draft import Draft
from vectors.spoil import TERMS, Path, add, annotation, based, both, drop, flip, low_rank, manifest, plain_archive, put
from vectors.values import canonical, digest

# Step 1 and 2 --------------------------------------------------------------------------------------

add("no-manifest", "not-an-archive", "a directory without deltafmt.json", edit_files=lambda f: f.pop("deltafmt.json"))


def manifest_file(name: str, reason: str, description: str, change: Callable[[bytes], bytes]) -> None:
    def edit(files: dict[str, bytes]) -> None:
        files["deltafmt.json"] = change(files["deltafmt.json"])

    add(name, reason, description, edit_files=edit)


manifest_file("manifest-empty", "json", "an empty deltafmt.json", lambda text: b"")
manifest_file(
    "manifest-no-json", "json", "a text that is not JSON", lambda text: b"version https://git-lfs.github.com/spec/v1\n"
)
manifest_file("manifest-list", "json", "a JSON list", lambda text: b"[]")
manifest_file("manifest-cut-in-checksum", "json", "cut within the checksum", lambda text: text[:50])
manifest_file("manifest-bom", "json", "a byte order mark", lambda text: b"\xef\xbb\xbf" + text)
manifest_file("manifest-cut-half", "manifest-checksum", "cut in the middle", lambda text: text[: len(text) // 2])
manifest_file("manifest-cut-last-byte", "manifest-checksum", "cut by one byte", lambda text: text[:-1])
manifest_file("manifest-longer", "manifest-checksum", "a line feed after the object", lambda text: text + b"\n")
manifest_file(
    "manifest-flip", "manifest-checksum", "one bit flipped in the middle", lambda text: flip(text, len(text) // 2)
)
manifest_file(
    "manifest-flip-digit",
    "manifest-checksum",
    "one digit of the checksum is another",
    lambda text: text[:21] + (b"1" if text[21:22] == b"0" else b"0") + text[22:],
)
manifest_file("manifest-no-checksum", "schema", "no $checksum", lambda text: b"{" + text[text.index(b",") + 1 :])
manifest_file("manifest-spaced", "schema", "white space before the checksum", lambda text: b"{ " + text[1:])
manifest_file(
    "manifest-upper-case-checksum",
    "schema",
    "the checksum in upper case",
    lambda text: text[:21] + b"ABCDEF" + text[27:],
)

annotation("json-nan", "json", "NaN", b"NaN")
annotation("json-infinity", "json", "-Infinity", b"-Infinity")
annotation("json-1e400", "json", "a number beyond a double", b"1e400")
annotation("json-long-integer", "json", "an integer of 5,000 digits", b"7" * 5000)
annotation("json-20-digits", "json", "an integer of 20 digits", b"1" + b"0" * 19)
annotation("json-duplicate-key", "json", "a duplicate key", b'{"a":1,"b":2,"a":1}')
annotation("json-duplicate-escaped-key", "json", "a duplicate key, written in another way", rb'{"a":1,"\u0061":1}')
annotation("json-lone-surrogate", "json", "a lone surrogate, escaped", rb'"\ud800"')
annotation("json-surrogates-swapped", "json", "surrogates in the wrong order, escaped", rb'"\udc00\ud800"')
annotation("json-raw-surrogate", "json", "a surrogate encoded in UTF-8", b'"\xed\xa0\x80"')
annotation("json-not-utf8", "json", "a byte that is not UTF-8", b'"\xff"')
annotation("json-control-character", "json", "a raw line feed in a string", b'"\n"')
annotation("json-trailing-comma", "json", "a comma before a bracket", b"[1,]")
annotation("json-leading-zero", "json", "a number with a leading zero", b"01")
annotation("json-comment", "json", "a comment", b"1/**/")
annotation(
    "json-63-lists-in-annotations", "json", "65 deep: the manifest, annotations, and 63 lists", b"[" * 63 + b"]" * 63
)
annotation("json-100000-lists", "json", "100,000 lists deep", b"[" * 100_000)
add("json-second-object", "json", "a second object", edit_text=lambda text: text + b"{}")
add(
    "json-duplicate-tensor",
    "json",
    "a tensor twice",
    edit_text=lambda t: t.replace(b'"tensors":{"bias":', b'"tensors":{"bias":{},"bias":'),
)

for key in ("format", "version", "requires", "shards", "arrays", "bases", "tensors", "checkpoint", "sidecars"):
    manifest(f"without-{key}", "schema", f"the key {key} is missing", drop(key))
PLACES: dict[str, tuple[Path, Callable[[], Draft]]] = {
    "manifest": ((), plain_archive),
    "shard": (("shards", 0), plain_archive),
    "array": (("arrays", "w"), plain_archive),
    "encoding": (("arrays", "w", "encoding"), plain_archive),
    "tensor": (("tensors", "w"), plain_archive),
    "recipe": (("tensors", "w", "recipe"), plain_archive),
    "inner-node": (("tensors", "w", "recipe", "terms", 1, "a"), low_rank),
    "base": (("bases", "base"), based),
    "base-tensor": (("bases", "base", "tensors", "w"), based),
    "checkpoint": (("checkpoint",), plain_archive),
    "checkpoint-file": (("checkpoint", "files", 0), plain_archive),
    "sidecar": (("sidecars", "config.json"), plain_archive),
}
LACKING: dict[str, Path] = {
    "encoding": ("filter",),
    "recipe": ("op",),
    "inner-node": ("array",),
    "checkpoint": ("files",),
    "shard": ("header",),
    "checkpoint-file": ("header",),
}
for name, (path, make) in PLACES.items():
    manifest(f"unknown-key-in-{name}", "schema", f"a key nobody knows in: {name}", put(1, *path, "surprise"), make)
    if path:
        lacking = drop(*path, *LACKING.get(name, ("digest",)))
        manifest(f"missing-key-in-{name}", "schema", f"a key is missing in: {name}", lacking, make)

WRONG: dict[str, tuple[str, Any, Path]] = {
    "format-other": ("another format", "deltafmt2", ("format",)),
    "version-number": ("a version that is a number", 1.0, ("version",)),
    "version-without-minor": ("a version without a minor number", "1", ("version",)),
    "version-leading-zero": ("a version with a leading zero", "1.00", ("version",)),
    "requires-object": ("requires is an object", {}, ("requires",)),
    "requires-number": ("a feature that is a number", [1], ("requires",)),
    "arrays-list": ("arrays is a list", [], ("arrays",)),
    "annotations-list": ("annotations is a list", [], ("annotations",)),
    "tensor-null": ("a tensor that is null", None, ("tensors", "w")),
    "shard-size-text": ("a size that is a string", "100", ("shards", 0, "size")),
    "shard-size-true": ("a size that is true", True, ("shards", 0, "size")),
    "shard-size-fraction": ("a size written as 100.0", 100.0, ("shards", 0, "size")),
    "sidecar-size-negative": ("a size below 0", -1, ("sidecars", "config.json", "size")),
    "table-null": ("a table that is null", None, ("arrays", "w", "table")),
    "table-2-63": ("a table of 2^63", 2**63, ("arrays", "w", "table")),
    "shard-index-out-of-range": ("an array in a shard that does not exist", 1, ("arrays", "w", "shard")),
    "chunk-zero": ("a chunk of no elements", 0, ("arrays", "w", "encoding", "chunk")),
    "filter-without-coder": ("a filter with coder none", "planes", ("arrays", "bias", "encoding", "filter")),
    "float-planes-of-integers": ("float-planes of I64", "float-planes", ("arrays", "ids", "encoding", "filter")),
    "dtype-number": ("a dtype that is a number", 4, ("tensors", "w", "dtype")),
    "shape-number": ("a shape that is a number", 24, ("tensors", "w", "shape")),
    "digest-short": ("a digest of 63 digits", "sha256:" + "0" * 63, ("tensors", "w", "digest")),
    "digest-upper-case": ("a digest in upper case", "sha256:" + "A" * 64, ("arrays", "w", "digest")),
    "digest-other-algorithm": ("a digest by another algorithm", "md5:" + "0" * 64, ("arrays", "w", "digest")),
    "digest-and-rel-error": ("digest and rel_error", 0.5, ("tensors", "w", "rel_error")),
    "recipe-text": ("a recipe that is a string", "w", ("tensors", "w", "recipe")),
    "op-list": ("an op that is a list", ["stored"], ("tensors", "w", "recipe", "op")),
    "array-name-null": ("a stored node whose array is null", None, ("tensors", "w", "recipe", "array")),
}
for name, (description, value, path) in WRONG.items():
    manifest(name, "schema", description, put(value, *path))
manifest("terms-object", "schema", "terms that are an object", put({}, *TERMS), low_rank)
manifest("term-text", "schema", "a term that is a string", put("u", *TERMS, 0), low_rank)
manifest("scale-text", "schema", "a scale that is a string", put("1", *TERMS, 1, "scale"), low_rank)
manifest("scale-true", "schema", "a scale that is true", put(True, *TERMS, 1, "scale"), low_rank)
manifest("rel-error-negative", "schema", "a rel_error below 0", put(-0.5, "tensors", "w", "rel_error"), low_rank)
manifest("rel-error-text", "schema", "a rel_error that is a string", put("0", "tensors", "w", "rel_error"), low_rank)
manifest(
    "base-digest-of-others",
    "schema",
    "a base's digest that is not that of its list",
    put(digest(b""), "bases", "base", "digest"),
    based,
)

# Step 3 and the closed tables of step 4 ------------------------------------------------------------

for version in ("2.0", "0.9", "10.0"):
    manifest(f"version-{version.replace('.', '-')}", "version", f"version {version}", put(version, "version"))
FUTURE = {
    "$checksum": "sha256:" + "0" * 64,
    "format": "deltafmt",
    "version": "2.0",
    "requires": {"x": 1},
    "graph": [None],
}
add(
    "version-2-of-another-layout",
    "version",
    "version 2.0 with other keys and types",
    edit_text=lambda _: canonical(FUTURE).encode(),
)
manifest("feature", "feature", "an unknown feature", put(["streaming"], "requires"))
manifest(
    "feature-and-key",
    "feature",
    "an unknown feature and the key that comes with it",
    both(put(["extra"], "requires"), put(1, "extra")),
)
for number, dtype in enumerate(("F4", "f32", "float32", "")):
    manifest(f"dtype-{number}", "dtype", f"a tensor of dtype {dtype!r}", put(dtype, "tensors", "bias", "dtype"))
manifest("dtype-of-array", "dtype", "an array of an unknown dtype", put("I128", "arrays", "bias", "dtype"))
manifest(
    "dtype-of-base-tensor",
    "dtype",
    "a base tensor of an unknown dtype",
    put("F6", "bases", "base", "tensors", "unused", "dtype"),
    lambda: based_with("F6"),
)


def based_with(dtype: str) -> Draft:
    """A base whose digest says the dtype that the manifest gives `unused`."""
    draft = based()
    kinds = {name: [t.dtype, t.shape, digest(t.data)] for name, t in draft.base_tensors.items()}
    kinds["unused"][0] = dtype
    draft.base_hints = {"digest": digest(canonical(kinds).encode())}
    return draft


for number, op in enumerate(("x", "a.py:B", "pickle", "Stored", "deltafmt.operators.stored", "", "__import__")):
    manifest(
        f"operator-{number}",
        "operator",
        f"the operator {op!r}",
        put({"op": op, "array": "w"}, "tensors", "w", "recipe"),
    )
manifest(
    "operator-inside",
    "operator",
    "an unknown operator within a sum",
    put({"op": "quant", "bits": 4}, *TERMS, 0),
    low_rank,
)
manifest("encoding-filter", "encoding", "an unknown filter", put("xor", "arrays", "w", "encoding", "filter"))
manifest("encoding-coder", "encoding", "an unknown coder", put("lzma", "arrays", "w", "encoding", "coder"))
