"""Promises 1 to 4, 17 and 31: what is not an archive, or is one of tomorrow, is named as such."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import deltafmt
from command_line import Run
from deltafmt import DeltafmtError, IntegrityError, MalformedError, UnsupportedError
from deltafmt.durable import Staging
from deltafmt.names import escaped
from deltafmt.strictjson import canonical as print_json
from deltafmt.strictjson import parse
from hostile import MANIFEST, Json, canonical, derived, edit, f32, manifest, put, ref, seal, tree, write_checkpoint


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pristine")
    source = write_checkpoint(root / "src", {"w": f32(6, 4), "v": f32(5, seed=1)})
    deltafmt.pack(source, root / "packed")
    return root / "packed"


@pytest.fixture
def archive(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "archive"))


def refused(path: Path, kind: type[DeltafmtError], reason: str) -> DeltafmtError:
    """`open`, `verify` and `unpack` all refuse, with the same class and reason; nothing is written."""
    errors = []
    for verb in (deltafmt.open, deltafmt.verify, lambda src: deltafmt.unpack(src, path.parent / "out")):
        with pytest.raises(DeltafmtError) as caught:
            verb(path)
        errors.append(caught.value)
        assert type(caught.value) is kind, caught.value
        assert caught.value.reason == reason, caught.value
        assert str(caught.value).isprintable()
    assert not (path.parent / "out").exists()
    assert str(errors[0]) == str(errors[1]) == str(errors[2])
    return errors[0]


# --- 1: not an archive ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["empty", "file", "missing", "interrupted", "staged", "manifest is a folder"])
def test_1_not_an_archive(what: str, archive: Path, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if what == "empty":
        path.mkdir()
    elif what == "file":
        path.write_bytes(b"not a model")
    elif what == "interrupted":
        shutil.copytree(archive, path)
        (path / MANIFEST).unlink()
    elif what == "staged":  # as a pack that is killed leaves it
        path = Staging(path).__enter__().path
        (path / "config.json").write_bytes(b"{}")
    elif what == "manifest is a folder":
        (path / MANIFEST).mkdir(parents=True)
    error = refused(path, MalformedError, "not-an-archive")
    assert error.exit_code == 3
    assert str(path) in str(error)
    assert ("interrupted pack" in error.what) == (what in ("empty", "interrupted", "staged"))
    steps = {"empty": "Pack again", "interrupted": "Pack or download it again", "staged": "run that again"}
    assert steps.get(what, "Name the") in error.hint


# --- 2, 3: versions and features ------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2.0", "0.9", "10.1"])
def test_2_another_major_version(archive: Path, version: str) -> None:
    # Whatever else such an archive holds, its version is what is reported.
    edit(archive, lambda document: document.update(version=version, requires=["x"], arrays=7, tomorrow=[]))
    error = refused(archive, UnsupportedError, "version")
    assert error.exit_code == 4
    assert version in str(error)
    assert "1.x" in str(error)
    if version != "0.9":
        assert "pgrade" in str(error)


def test_2_a_higher_minor_version_is_accepted(archive: Path) -> None:
    edit(archive, lambda document: document.update(version="1.7"))
    with deltafmt.open(archive) as opened:
        assert opened.get_tensor("w").shape == (6, 4)


@pytest.mark.parametrize("version", ["1", "1.0.0", "01.0", "1.00", "v1.0", "", "1.0\n", " 1.0", 1.0, 1, None, ["1.0"]])
def test_2_what_is_no_version(archive: Path, version: object) -> None:
    refused(edit(archive, lambda document: document.update(version=version)), MalformedError, "schema")


def test_3_an_unknown_feature(archive: Path) -> None:
    error = refused(edit(archive, lambda d: d.update(requires=["sparse-7"], shiny=1)), UnsupportedError, "feature")
    assert error.exit_code == 4
    assert "sparse-7" in str(error)


def test_3_annotations_mean_nothing(archive: Path) -> None:
    edit(archive, lambda d: d.update(annotations={"op": "os.system", "": [None, {"x": 1.5, "y": True}]}))
    with deltafmt.open(archive) as opened:
        assert opened.get_tensor("v").shape == (5,)


# --- 4: closed tables -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x", "a.py:B", "pickle", "os.system", "__class__", "Stored", "stored ", "\u001b[2J"])
@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("tensors/w/recipe/op", "operator"),
        ("arrays/w/encoding/coder", "encoding"),
        ("arrays/w/encoding/filter", "encoding"),
        ("arrays/w/dtype", "dtype"),
        ("tensors/w/dtype", "dtype"),
    ],
)
def test_4_unknown_names_in_closed_tables(archive: Path, path: str, reason: str, name: str) -> None:
    error = refused(edit(archive, lambda document: put(document, path, name)), UnsupportedError, reason)
    assert error.exit_code == 4
    assert "/w" in str(error)  # which tensor or array
    assert "This version knows" in str(error)


# --- 17: strict JSON ------------------------------------------------------------------------------------------------


def _with_annotation(archive: Path, raw: bytes) -> Path:
    """The manifest with these bytes as an annotation's value; the checksum is right."""
    document = manifest(archive) | {"annotations": {"x": "HERE"}}
    text = canonical(document | {"$checksum": "sha256:" + 64 * "0"})
    (archive / MANIFEST).write_bytes(seal(text.replace(b'"HERE"', raw)))
    return archive


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":1,"a":1}',
        b'{"a":{"b":1,"c":2,"b":3}}',
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b"1e400",
        b"-1e400",
        b"9" * 400 + b".5",
        b"1" * 5000,
        b"1" * 20,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b"[" * 100_000,
        b"[" * 65 + b"]" * 65,
        b'"\\ud800"',
        b'{"\\udfff":1}',
        b'"\xff"',
        b'"\xed\xa0\x80"',
        b'"\n"',
        b"01",
        b"+1",
        b".5",
        b"0x10",
        b"[1,]",
        b"'x'",
        b"1} {",
        b"",
    ],
)
def test_17_strict_json(archive: Path, raw: bytes) -> None:
    error = refused(_with_annotation(archive, raw), MalformedError, "json")
    assert error.exit_code == 3
    assert len(str(error)) < 2000


@pytest.mark.parametrize(
    ("raw", "pointer", "what"),
    [
        (b'{"a":1,"a":1}', "/a", "duplicate key 'a'"),
        (b'[{"b":1},{"b":1,"c":{"c":2},"b":3}]', "/1/b", "duplicate key 'b'"),
        (b'{"b":[",]}",{"c":NaN}],"a":1}', "/b/1/c", "NaN is not a JSON number"),
        (b"[1,-Infinity]", "/1", "-Infinity is not a JSON number"),
        (b'{"a/b~":[[],{},-1e400]}', "/a~1b~0/2", "the number -1e400 is outside the range of a double"),
        (b'{"a":{"b":{}},"c":[1,-12345678901234567890]}', "/c/1", "an integer of 20 digits"),
        (b'{"a":["\\"","\\ud800"]}', "/a/1", "a lone surrogate in '\\ud800'"),
        (b'{"a":1,"\\udfff":1}', r"/\udfff", "a lone surrogate in '\\udfff'"),
        (b"[0," + b"[" * 100_000 + b"]" * 100_001, "/1" + 61 * "/0", "nested deeper than 64"),
    ],
)
def test_17_the_json_pointer(archive: Path, raw: bytes, pointer: str, what: str) -> None:
    error = refused(_with_annotation(archive, raw), MalformedError, "json")
    assert error.what == what
    assert str(error).startswith(f"{archive / MANIFEST}: /annotations/x{pointer}: {what}. ")


def test_17_every_pointer_is_spelled_alike(archive: Path) -> None:
    """Of what is no strict JSON, and of what is, but no manifest."""
    name, spelled = "a/b~c\x9b", r"/arrays/a~1b~0c\x9b"

    def where(reason: str, **changes: object) -> str:
        def change(found: Json) -> None:
            found["arrays"][name] = {**next(iter(found["arrays"].values())), **changes}

        return str(refused(edit(archive, change), MalformedError, reason).where).removeprefix(f"{archive / MANIFEST}: ")

    assert where("schema", shard="0") == where("schema", shard=99) == f"{spelled}/shard"
    assert where("coverage", shard=0) == spelled
    assert _refusal(f'{{"arrays":{{"{name}":NaN}}}}'.encode()).where == f"here: {spelled}"


def test_17_what_has_no_pointer_is_told_by_its_place(archive: Path) -> None:
    assert "not JSON: " in str(refused(_with_annotation(archive, b"[1,]"), MalformedError, "json"))
    assert "not UTF-8 at byte 9" in str(_refusal(b'["abc", "\xff"]'))
    assert re.search(r"not JSON: .* at character 6", str(_refusal(b'["abc"')))
    for value, what in [
        (b"NaN", "NaN is not a JSON number"),
        (b"1e999", "a number outside the range of a double"),
        (b"1" * 20, "an integer of more than 19 digits"),
        (b'{"a":1,"a":2}', "a duplicate key"),
        (rb'"\ud800"', "a lone surrogate"),
        (b"[" * 10_000, "nested deeper than 64"),
    ]:
        far = _refusal(b'["' + b"a" * (1 << 21) + b'",' + value + b"]")  # nobody waits for a pointer into such a text
        assert (far.where, far.what) == ("here", what)


def _refusal(data: bytes) -> MalformedError:
    with pytest.raises(MalformedError) as caught:
        parse(data, "here")
    assert caught.value.where.startswith("here")
    return caught.value


_FORBIDDEN = ["1e400", "NaN", "Infinity", "9" * 20, '"\\ud800"', '{"a":1,"a":2}']
_ALLOWED = ["1", "-0", "1.5e3", "9" * 19, '"\\\\"', '"x,"', "true", "[]", "{}"]


@settings(deadline=None)
@given(
    st.recursive(
        st.sampled_from(_FORBIDDEN + _ALLOWED),
        lambda inner: (
            st.lists(inner, max_size=3).map(lambda items: f"[{' ,'.join(items)}]")
            | st.lists(st.tuples(st.sampled_from(["a", "b", "/", "\\u007e"]), inner), max_size=3).map(
                lambda pairs: "{" + ",\n".join(f'"{key}": {value}' for key, value in pairs) + "}"
            )
        ),
        max_leaves=12,
    )
)
def test_17_the_json_pointer_leads_to_what_is_wrong(text: str) -> None:
    try:
        parse(text.encode(), "here")
    except MalformedError as error:
        pointer = error.where.removeprefix("here: ")
        assert pointer.startswith("/")
        if error.what.startswith("duplicate"):
            return
        found = json.loads(text, object_pairs_hook=lambda pairs: dict(reversed(pairs)))
        for step in pointer[1:].split("/") if pointer != "/" else []:
            found = found[int(step) if isinstance(found, list) else step.replace("~1", "/").replace("~0", "~")]
        assert found in ("\ud800", 10**20 - 1) or not math.isfinite(found)
    else:
        assert not any(odd in text for odd in _FORBIDDEN)


@pytest.mark.parametrize("raw", [b'"\\ud83d\\ude00"', b"[" * 60 + b"]" * 60, b"1e300", b"9223372036854775807", b"-0.0"])
def test_17_what_is_strict_json(archive: Path, raw: bytes) -> None:
    deltafmt.verify(_with_annotation(archive, raw))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "json"),
        (b"\xef\xbb\xbf{}", "json"),
        (b"\x80\x04K\x01.", "json"),
        (b"PK\x03\x04", "json"),
        (b"[]", "json"),
        (b'"deltafmt"', "json"),
        (b"1", "json"),
        (b"1" * 5000, "json"),
        (b"null", "json"),
        (b"{}", "schema"),
        (b'{"version":"1.0"}', "schema"),
        (b'{"version":"2.0"}', "schema"),  # without the checksum in front it is never half understood
    ],
)
def test_17_files_that_do_not_begin_with_the_checksum(archive: Path, content: bytes, reason: str) -> None:
    (archive / MANIFEST).write_bytes(content)
    refused(archive, MalformedError, reason)


def test_17_the_checksum_comes_first(archive: Path) -> None:
    data = (archive / MANIFEST).read_bytes()
    (archive / MANIFEST).write_bytes(b" " + data)
    refused(archive, MalformedError, "schema")
    (archive / MANIFEST).write_bytes(data.replace(b'"1.0"', b'"2.0"'))
    refused(archive, IntegrityError, "manifest-checksum")
    (archive / MANIFEST).write_bytes(data + b" ")
    refused(archive, IntegrityError, "manifest-checksum")


@pytest.mark.parametrize(
    "path", ["shards", "arrays", "bases", "tensors", "checkpoint", "sidecars", "format", "version", "requires"]
)
@pytest.mark.parametrize("value", [None, 3, "x", True, [1], {"a": 1}])
def test_17_wrong_types_and_missing_keys(archive: Path, path: str, value: object) -> None:
    def drop(document: Json) -> None:
        del document[path]

    with pytest.raises(DeltafmtError) as caught:
        deltafmt.open(edit(archive, lambda document: put(document, path, value)))
    assert caught.value.reason == "schema"
    refused(edit(archive, drop), MalformedError, "schema")


@pytest.mark.parametrize(
    "path",
    [
        "",
        "shards/0",
        "arrays/w",
        "arrays/w/encoding",
        "tensors/w",
        "tensors/w/recipe",
        "checkpoint",
        "checkpoint/files/0",
    ],
)
def test_17_unknown_keys(archive: Path, path: str) -> None:
    error = refused(
        edit(archive, lambda document: put(document, f"{path}/new\u001bkey".lstrip("/"), 1)), MalformedError, "schema"
    )
    assert "/".join(path.split("/")[:2]) in str(error)


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(deadline=None)
@given(_VALUES)
def test_17_what_is_printed_reads_back(value: Any) -> None:
    printed = print_json(value)
    assert parse(printed, "") == value
    assert parse(json.dumps(value).encode(), "") == value
    assert print_json(parse(printed, "")) == printed


@settings(deadline=None)
@given(st.binary(max_size=40) | st.text('{}[]",:0123456789eE+-.nulltrfasx\\ud83 \n', max_size=40).map(str.encode))
def test_17_parses_as_the_standard_library_or_refuses(data: bytes) -> None:
    try:
        value = parse(data, "")
    except MalformedError as error:
        assert error.reason == "json"
    else:
        assert value == json.loads(data.decode())


# --- 31: errors are API ---------------------------------------------------------------------------------------------


def _errors() -> dict[type[DeltafmtError], Callable[[Path], object]]:
    def pack(path: Path, **options: Any) -> object:
        return deltafmt.pack(path / "src", path / "new", **options)

    return {
        deltafmt.AccessError: lambda path: deltafmt.pack(path / "nowhere", path / "new"),
        deltafmt.UsageError: lambda path: pack(path, method="magic"),
        deltafmt.DestinationError: lambda path: deltafmt.pack(path / "src", path / "archive"),
        MalformedError: lambda path: deltafmt.open(path),
        UnsupportedError: lambda path: deltafmt.open(edit(path / "archive", lambda d: d.update(version="3.0"))),
        IntegrityError: lambda path: deltafmt.open(_without_shard(path / "archive")),
        deltafmt.WrongBaseError: lambda path: deltafmt.unpack(path / "child", path / "new"),
    }


def _without_shard(archive: Path) -> Path:
    next(archive.glob("*.safetensors")).unlink()
    return archive


_EXIT = {"AccessError": 1, "UsageError": 2, "DestinationError": 2, "MalformedError": 3, "UnsupportedError": 4}


@pytest.mark.parametrize("kind", list(_errors()), ids=lambda kind: kind.__name__)
def test_31_every_error_is_reached_and_survives_pickling(
    archive: Path, tmp_path: Path, kind: type[DeltafmtError]
) -> None:
    write_checkpoint(tmp_path / "src", {"w": f32(6, 4)})
    write_checkpoint(tmp_path / "base", {"w": f32(6, 4), "u": f32(3)})
    deltafmt.pack(tmp_path / "src", tmp_path / "child", base=tmp_path / "base")
    with pytest.raises(DeltafmtError) as caught:
        _errors()[kind](tmp_path)
    error = caught.value
    assert type(error) is kind
    assert error.exit_code == _EXIT.get(kind.__name__, {"IntegrityError": 5, "WrongBaseError": 6}.get(kind.__name__))
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):  # noqa: S301
        assert type(again) is kind
        assert str(again) == str(error)
        assert (again.reason, again.exit_code, again.hint) == (error.reason, error.exit_code, error.hint)
    assert str(error).isprintable()
    assert error.what
    assert not (tmp_path / "new").exists()


def test_31_a_missing_extra_survives_pickling() -> None:
    error = deltafmt.MissingExtraError("torch tensors need torch", extra="torch")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert type(again) is deltafmt.MissingExtraError
    assert str(again) == str(error)
    assert "deltafmt[torch]" in str(again)


def _classes(kind: type[DeltafmtError]) -> Iterator[type[DeltafmtError]]:
    for child in kind.__subclasses__():
        if child.__module__ == "deltafmt.errors":
            yield child
        yield from _classes(child)


def test_31_every_class_knows_a_next_step() -> None:
    classes = list(_classes(DeltafmtError))
    assert len(classes) >= 9
    for kind in classes:
        assert kind("what was found").hint, kind
        if kind is not deltafmt.MissingExtraError:
            assert kind("what was found", hint="Do this").hint == "Do this"


def _cycle(document: Json) -> None:
    derived(document, "x", ref("y"))
    derived(document, "y", ref("x"))


@pytest.mark.parametrize(
    "change",
    [
        _cycle,
        lambda d: d["arrays"].update(unused=d["arrays"]["w"]),
        lambda d: put(d, "tensors/w/shape/0", True),
        lambda d: put(d, "tensors/w/shape", [4, 6]),
        lambda d: put(d, "tensors/w/recipe/op", "x"),
        lambda d: put(d, "arrays/w/encoding/chunk", 0),
        lambda d: put(d, "version", "0.9"),
        lambda d: put(d, "version", 1),
        lambda d: d.update(requires=["x"]),
        lambda d: d.update(annotations=[]),
        lambda d: put(d, "annotations", {"x": 2**70}),
        lambda d: d.pop("shards"),
    ],
)
def test_31_whatever_is_wrong_with_a_manifest_there_is_a_next_step(
    archive: Path, change: Callable[[Json], object], run: Run
) -> None:
    edit(archive, change)
    assert _told(run("inspect", archive))


@pytest.mark.parametrize(
    "arguments", [("src", "new", "--share", "99:0"), ("cut", "new"), ("src", "new", "--rank", "0"), ("nowhere", "new")]
)
def test_31_whatever_cannot_be_packed_there_is_a_next_step(arguments: list[str], tmp_path: Path, run: Run) -> None:
    layers = {f"model.layers.{place}.mlp.weight": f32(8, 8, seed=place) for place in range(3)}
    source = write_checkpoint(tmp_path / "src", layers) / "model.safetensors"
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/model.safetensors").write_bytes(source.read_bytes()[:-1])
    assert _told(run("pack", *arguments))


def _told(outcome: tuple[int, str, str]) -> bool:
    """Whether the command line told an error and a next step, a line for each."""
    code, _, err = outcome
    return code != 0 and re.fullmatch(r"deltafmt: error: .+\ndeltafmt: hint: .+\n", err) is not None


@settings(deadline=None)
@given(st.text(), st.text(), st.text(), st.text(), st.text())
def test_31_messages_are_one_line_whatever_a_file_says(
    what: str, where: str, expected: str, found: str, hint: str
) -> None:
    error = MalformedError(what, where=where, expected=expected, found=found, hint=hint, reason="json")
    text = str(error)
    assert len(text.splitlines()) <= 1
    assert not any(ord(character) < 32 or 0x7F <= ord(character) < 0xA0 for character in text)
    text.encode()  # no lone surrogates: it can be printed


def test_31_names_are_shown_without_what_commands_a_terminal() -> None:
    assert escaped("a\x1b[1mb\ud800\n") == r"a\x1b[1mb\ud800\n"
    assert escaped("a\x9b31mb\u202ec") == r"a\x9b31mb\u202ec"
    assert escaped("Gewicht 重み é") == "Gewicht 重み é"
    assert len(escaped("\x00" * 1000)) < 250


def test_31_hostile_text_from_a_manifest_stays_on_one_line(archive: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "src", {"w": f32(6, 4)})
    deltafmt.pack(tmp_path / "src", tmp_path / "child", base=tmp_path / "src")
    edit(tmp_path / "child", lambda d: d["bases"]["base"].update(repo="x\r\n\u001b]0;owned\u0007"))
    with pytest.raises(deltafmt.WrongBaseError) as caught:
        deltafmt.unpack(tmp_path / "child", tmp_path / "out")
    assert str(caught.value).isprintable()
    before = tree(archive)
    edit(archive, lambda d: d["sidecars"].update({"x\n\u001b[2J": {"size": True}}))
    with pytest.raises(MalformedError) as malformed:
        deltafmt.open(archive)
    assert str(malformed.value).isprintable()
    assert before.keys() == tree(archive).keys()
