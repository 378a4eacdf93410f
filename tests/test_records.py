"""Records are read a column at a time, and one by one where something is odd: both ways say the same of any file."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import deltafmt
import hostile
import synthetic
from deltafmt.errors import DeltafmtError
from deltafmt.manifest_parser import parse_manifest
from deltafmt.records import Record
from deltafmt.safetensors_file import parse_header

DIGIT = "sha256:" + "0" * 63
ODD: list[Any] = [
    *[None, True, False, 0, 1, -1, 1.0, 1e300, 2**63 - 1, 2**63],
    *["", "x", "F32", "I8", "none", "planes", DIGIT + "0", DIGIT + "G", DIGIT + "\n"],
    *[[], [1], [1, True], [1, 1.0], [-1, 4], [32, 32], [0, 2048], [1] * 17],
    *[{}, {"op": "stored", "array": "model.layers.0.weight"}, {"op": "stored", "array": 7}],
    {"filter": "none", "coder": "none", "chunk": 1},
]
NAMES = ["", "__metadata__", "a\x00b", "\x7f", "é" * 200, "é" * 600, "n" * 255, "n" * 1025, "deltafmt.chunks"]


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("records")
    deltafmt.pack(synthetic.many_tensors(folder / "model", 4), folder / "archive")
    return dict(json.loads((folder / "archive" / hostile.MANIFEST).read_bytes()))


def sealed(document: dict[str, Any]) -> bytes:
    """The manifest, its checksum right."""
    return hostile.seal(hostile.canonical(document | {"$checksum": hostile.ZEROS}))


def outcome(parse: Any, *arguments: Any) -> tuple[Any, ...]:
    """What comes of it, or everything that the error says."""
    try:
        return ("parsed", parse(*arguments))
    except DeltafmtError as error:
        return type(error), error.what, error.where, error.expected, error.found, error.hint, error.reason


def both_ways_agree(parse: Any, *arguments: Any) -> tuple[Any, ...]:
    """The outcome, which has to be that of reading records one by one."""
    found = outcome(parse, *arguments)
    with pytest.MonkeyPatch.context() as patch:

        def refuse(self: Record, items: Any) -> Any:
            raise deltafmt.MalformedError("not this way")

        patch.setattr(Record, "columns", refuse)
        assert outcome(parse, *arguments) == found
    return found


def odd_edit(data: st.DataObject, items: dict[str, Any]) -> dict[str, Any]:
    """A copy of records, one of which has another value, a key more or less, or another name."""
    items = json.loads(json.dumps(items))
    name = data.draw(st.sampled_from(sorted(items)))
    record, key = items[name], data.draw(st.sampled_from(sorted(items[name])))
    match data.draw(st.sampled_from(["value", "inside", "less", "more", "name", "record"])):
        case "value":
            record[key] = data.draw(st.sampled_from(ODD))
        case "inside" if record[key] and isinstance(record[key], (dict, list)):
            keys = sorted(record[key]) if isinstance(record[key], dict) else range(len(record[key]))
            inner = data.draw(st.sampled_from(keys))
            record[key][inner] = data.draw(st.sampled_from(ODD))
        case "less":
            del record[key]
        case "more":
            record["rel_error"] = data.draw(st.sampled_from(ODD))
        case "name":
            items[data.draw(st.sampled_from(NAMES))] = items.pop(name)
        case _:
            items[name] = data.draw(st.sampled_from(ODD))
    return items


@settings(deadline=None, max_examples=300)
@given(st.data(), st.sampled_from(["arrays", "tensors"]))
def test_manifests(document: dict[str, Any], data: st.DataObject, part: str) -> None:
    edited = {**document, part: odd_edit(data, document[part])}
    both_ways_agree(parse_manifest, sealed(edited), "here")


def test_uniform_records_are_read_by_columns(document: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above is of two ways, then."""
    one_by_one: list[str] = []
    call = Record.__call__

    def note(self: Record, value: object, pointer: str) -> tuple[Any, ...]:
        one_by_one.append(pointer)
        return call(self, value, pointer)

    monkeypatch.setattr(Record, "__call__", note)
    parse_manifest(sealed(document), "here")
    assert not [pointer for pointer in one_by_one if pointer.startswith(("/arrays", "/tensors"))]


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_headers(data: st.DataObject) -> None:
    plain = {
        f"t{i}": {"dtype": "BF16", "shape": [32, 32], "data_offsets": [2048 * i, 2048 * (i + 1)]} for i in range(4)
    }
    found = both_ways_agree(parse_header, json.dumps(odd_edit(data, plain)).encode(), "here")
    assert found[0] != "parsed" or all(entry.end - entry.begin == 2048 for entry in found[1].values())
