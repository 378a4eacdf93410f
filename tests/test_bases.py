"""Several bases in one archive: packed in an order, found again by their content in any."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deltafmt
from command_line import Run, object_in
from deltafmt import DeltafmtError, UsageError, WrongBaseError
from hostile import Tensor, manifest, tree, write_checkpoint

Weights = dict[str, Tensor]
Opener = Callable[[Path, Any], None]

ROWS, COLUMNS = 96, 64


def tensor(values: np.ndarray[Any, Any]) -> Tensor:
    return Tensor("F32", values.shape, values.astype("<f4").tobytes())


def values(of: Tensor) -> np.ndarray[Any, Any]:
    return np.frombuffer(of.data, "<f4").reshape(of.shape)


def model(seed: int) -> Weights:
    """Two weights and a bias of one architecture, and a norm that was never trained: the same for every seed."""
    random = np.random.default_rng(seed)
    return {
        "first.weight": tensor(random.standard_normal((ROWS, COLUMNS))),
        "second.weight": tensor(random.standard_normal((ROWS, COLUMNS))),
        "bias": tensor(random.standard_normal(COLUMNS)),
        "norm": tensor(np.ones(7)),
    }


def near(of: Tensor, seed: int = 9) -> Tensor:
    """The same, each value moved a little."""
    moves = np.random.default_rng(seed).standard_normal(of.shape)
    return tensor(values(of) * (1 + 2.0**-16 * moves))


def changed(model: Weights, name: str) -> Weights:
    """The same model but for one value of one tensor."""
    other = values(model[name]).copy()
    other.flat[-1] += 1
    return model | {name: tensor(other)}


A, B = model(1), model(2)
C = model(3) | {"norm": tensor(np.zeros(7))}
MERGE = {
    "first.weight": near(A["first.weight"]),
    "second.weight": near(B["second.weight"]),
    "bias": B["bias"],
    "norm": A["norm"],
    "average": tensor((values(A["bias"]) + values(B["bias"])) / 2),
}


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`a`, `b`, `c`: three models of one architecture. `merge`: made of a and b. `packed`: it, against both."""
    monkeypatch.chdir(tmp_path)
    for name, weights in {"a": A, "b": B, "c": C, "merge": MERGE}.items():
        write_checkpoint(tmp_path / name, weights)
    deltafmt.pack("merge", "packed", base=["a", "b"])
    return tmp_path


def bases_of(recipe: object) -> set[str]:
    """Every base that a recipe refers to."""
    if isinstance(recipe, list):
        return set().union(*map(bases_of, recipe))
    if not isinstance(recipe, dict):
        return set()
    own = {recipe["base"]} if "base" in recipe else set()
    return own.union(*map(bases_of, recipe.values()))


def opened(archive: Path, base: Any) -> None:
    with deltafmt.open(archive, base=base) as each:
        names = each.keys()
        for name in names:
            each.get_tensor(name)


def unpacked(archive: Path, base: Any) -> None:
    deltafmt.unpack(archive, "refused", base=base)


def verified(archive: Path, base: Any) -> None:
    deltafmt.verify(archive, base=base)


OPENERS: list[Opener] = [opened, unpacked, verified]


def refused(kind: type[DeltafmtError], base: Any, archive: str = "packed") -> list[DeltafmtError]:
    """What `open`, `unpack` and `verify` raise."""
    errors = []
    for opener in OPENERS:
        with pytest.raises(DeltafmtError) as caught:
            opener(Path(archive), base)
        assert type(caught.value) is kind, caught.value
        assert not Path("refused").exists()
        errors.append(caught.value)
    return errors


# --- pack -----------------------------------------------------------------------------------------------------------


def test_each_tensor_takes_the_base_that_suits_it(room: Path) -> None:
    document = manifest(room / "packed")
    taken = {name: bases_of(entry["recipe"]) for name, entry in document["tensors"].items()}
    assert taken["first.weight"] == {"base"} and taken["second.weight"] == taken["bias"] == {"base2"}
    assert taken["norm"] == {"base"}  # both have it: the first
    assert taken["average"] == set()
    assert {name: entry["repo"] for name, entry in document["bases"].items()} == {"base": "a", "base2": "b"}
    methods = {name: entry["recipe"]["op"] for name, entry in document["tensors"].items()}
    assert methods["first.weight"] == methods["second.weight"] == "patch"
    assert methods["bias"] == methods["norm"] == "ref"


def test_two_bases_store_less_than_either(room: Path) -> None:
    def shards(archive: Path) -> int:
        return sum(path.stat().st_size for path in archive.glob("*.safetensors"))

    for name in "ab":
        deltafmt.pack("merge", f"against {name}", base=name)
        assert shards(room / "packed") < 0.75 * shards(room / f"against {name}")


def test_a_base_of_no_use_is_not_needed(room: Path) -> None:
    for bases, needed in ((["c", "a", "b"], ("a", "b")), (["a", "c", "b"], ("a", "b")), (["b", "c"], ("b",))):
        report = deltafmt.pack("merge", "other", base=bases, overwrite=True)
        assert (report.base, report.bases, report.bases_needed) == (bases[0], tuple(bases), needed)
        places = {"base" if not bases.index(name) else f"base{bases.index(name) + 1}": name for name in needed}
        assert {name: entry["repo"] for name, entry in manifest(room / "other")["bases"].items()} == places
        assert deltafmt.verify("other", base=list(needed), against="merge").equal
        assert deltafmt.verify("other", base={name: room / where for name, where in places.items()}).base_checked


def test_one_base_in_a_list_is_that_base(room: Path) -> None:
    deltafmt.pack("merge", "one", base="a")
    deltafmt.pack("merge", "list", base=["a"])
    assert tree(room / "one") == tree(room / "list")
    deltafmt.pack("merge", "none", base=[])
    assert manifest(room / "none")["bases"] == {}


def test_the_archive_is_the_same_with_any_number_of_threads(room: Path) -> None:
    deltafmt.pack("merge", "again", base=["a", "b"], jobs=1)
    assert tree(room / "again") == tree(room / "packed")


def test_a_base_twice(room: Path) -> None:
    write_checkpoint(room / "copy", A, shards=2)
    for bases in (["a", "a"], ["a", "b", "copy"], ["a", "./a/"]):
        with pytest.raises(UsageError, match="the same model"):
            deltafmt.pack("merge", "new", base=bases)
    for bases in (["a", "b", "copy"], ["copy", "a"], ["a", "b", "a"]):
        assert all("the same model" in str(error) for error in refused(UsageError, bases))
    assert not (room / "new").exists()


def test_what_may_be_lost_goes_with_one_base(room: Path) -> None:
    lossy: list[dict[str, Any]] = [{"rank": 2}, {"method": "lowrank"}, {"target_size": 100_000}]
    for options in lossy:
        with pytest.raises(UsageError, match="one base, and 2 are given"):
            deltafmt.pack("merge", "new", base=["a", "b"], **options)
    assert not (room / "new").exists()


def test_an_archive_with_bases_is_packed_again(room: Path) -> None:
    """Its own bases are found among those given, which serve it as well."""
    for bases in (["b", "a"], ["c", "b", "a"]):
        deltafmt.pack("packed", "again", base=bases, overwrite=True)
        assert deltafmt.verify("again", base=["a", "b"], against="merge").equal
    with pytest.raises(WrongBaseError, match=r"needs the base 'base2'.*packed against 'b'"):
        deltafmt.pack("packed", "new", base=["c", "a"])


def test_a_destination_inside_one_of_the_bases(room: Path) -> None:
    for verb in (
        lambda: deltafmt.pack("merge", "b/new", base=["a", "b"]),
        lambda: deltafmt.unpack("packed", "b/new", base=["b", "a"]),
        lambda: deltafmt.unpack("packed", "b/new", base={"base": "a", "base2": "b"}),
    ):
        with pytest.raises(deltafmt.DestinationError):
            verb()


# --- found by content -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [["a", "b"], ["b", "a"], ("b", "a"), {"base2": "b", "base": "a"}], ids=str)
def test_in_any_order(room: Path, base: Any) -> None:
    deltafmt.unpack("packed", "out", base=base)
    assert tree(room / "out") == tree(room / "merge")
    report = deltafmt.verify("packed", base=base, against="merge")
    assert report.equal and report.base_checked and report.bases_missing == {}
    with deltafmt.open("packed", base=base) as archive:
        for name, wanted in MERGE.items():
            assert archive.get_tensor(name).tobytes() == wanted.data


def test_three_in_any_order(room: Path) -> None:
    write_checkpoint(room / "three", MERGE | {"third.weight": C["first.weight"]})
    deltafmt.pack("three", "packed three", base=["c", "b", "a"])
    assert set(manifest(room / "packed three")["bases"]) == {"base", "base2", "base3"}
    for bases in itertools.permutations("abc"):
        assert deltafmt.verify("packed three", base=bases, against="three").equal


@pytest.mark.parametrize("name", ["first.weight", "bias", "norm"])
def test_models_that_differ_in_one_value(room: Path, name: str) -> None:
    """Whichever tensor it is in, and whatever order they come in."""
    write_checkpoint(room / "twin", changed(A, name))
    write_checkpoint(room / "both", {"x": A[name], "y": changed(A, name)[name]})
    deltafmt.pack("both", "packed both", base=["a", "twin"])
    assert len(manifest(room / "packed both")["bases"]) == 2
    for bases in (["a", "twin"], ["twin", "a"]):
        assert deltafmt.verify("packed both", base=bases, against="both").equal
        for one in bases:
            report = deltafmt.verify("packed both", base=[one])
            assert list(report.bases_missing.values()) == [other for other in bases if other != one]


def test_bases_of_other_structures(room: Path) -> None:
    write_checkpoint(room / "wide", {"wide": MERGE["first.weight"], "more": tensor(np.zeros(3))})
    deltafmt.pack("merge", "mixed", base=["wide", "b"])
    for bases in (["wide", "b"], ["b", "wide"]):
        assert deltafmt.verify("mixed", base=bases, against="merge").equal


def test_a_base_that_is_another_archive(room: Path) -> None:
    deltafmt.pack("b", "packed b")
    deltafmt.unpack("packed", "out", base=["packed b", "a"])
    assert tree(room / "out") == tree(room / "merge")


# --- wrong and missing ----------------------------------------------------------------------------------------------


def test_a_base_that_fits_none(room: Path) -> None:
    """Of another structure; of the same; equal to the right one where the bases differ from each other."""
    wrong = {"renamed": {f"x.{name}": each for name, each in B.items()}, "other": C} | {
        f"almost {name}": changed(B, name) for name in ("second.weight", "bias")
    }
    for name, weights in wrong.items():
        write_checkpoint(room / name, weights)
        for bases in (["a", name], [name, "a"]):
            for error in refused(WrongBaseError, bases):
                assert error.reason == "base-mismatch" and f"'{name}' is not its base" in str(error)
        for all_and_one in itertools.permutations(["a", "b", name]):  # it is not taken for one of them
            assert deltafmt.verify("packed", base=all_and_one, against="merge").equal


def test_a_base_that_is_wrong_where_nothing_refers_to_it(room: Path) -> None:
    """The whole of it is checked by what reads the whole archive; and where two may be it, one is not."""
    write_checkpoint(room / "almost", changed(B, "first.weight"))
    for verb in OPENERS[1:]:
        with pytest.raises(WrongBaseError, match=r"'almost' is not its base: .* 'first.weight'"):
            verb(Path("packed"), ["almost", "a"])
    for bases in (["almost", "b", "a"], ["a", "b", "almost"]):
        assert deltafmt.verify("packed", base=bases, against="merge").equal
    deltafmt.pack("merge", "one", base="b")
    for verb in OPENERS[1:]:
        for bases in (["almost", "c"], ["c", "almost"]):
            with pytest.raises(WrongBaseError, match=r"'almost' is not its base: .* 'first.weight'"):
                verb(Path("one"), bases)


def test_what_pack_had_no_use_for_may_be_given_again(room: Path, run: Run) -> None:
    report = deltafmt.pack("merge", "other", base=["b", "c"])
    assert report.bases_needed == ("b",)
    for opener in OPENERS[::2]:
        opener(room / "other", ["b", "c"])
    code, _, err = run("unpack", "other", "out", "--base", "c", "--base", "b")
    assert (code, err) == (0, "") and tree(room / "out") == tree(room / "merge")
    for error in refused(WrongBaseError, ["c", "a"], "other"):
        assert error.reason == "base-mismatch"


def test_two_that_fit_none(room: Path) -> None:
    write_checkpoint(room / "renamed", {f"x.{name}": each for name, each in B.items()})
    for error in refused(WrongBaseError, ["c", "renamed"]):
        assert error.reason == "base-mismatch" and "is none of its bases (expected a or b)" in str(error)


def test_ids_say_which_is_which_and_are_held_to_it(room: Path) -> None:
    for error in refused(WrongBaseError, {"base": "b", "base2": "a"}):
        assert error.reason == "base-mismatch"
    refused(UsageError, {"base": "a", "base2": "b", "base3": "c"})


def test_one_of_two_is_missing(room: Path) -> None:
    for given, missing, needing in (("a", "b", ["second.weight", "bias"]), ("b", "a", ["first.weight", "norm"])):
        for base in (given, [given]):
            with pytest.raises(WrongBaseError, match=f"packed against '{missing}'") as caught:
                deltafmt.unpack("packed", "refused", base=base)
            assert caught.value.reason == "base-missing" and f"'{given}'" not in caught.value.hint
            report = deltafmt.verify("packed", base=base)
            assert not report.base_checked and sorted(report.unchecked) == sorted(needing)
            assert list(report.bases_missing.values()) == [missing]
            with deltafmt.open("packed", base=base) as archive:
                for name in MERGE.keys() - set(needing):
                    assert archive.get_tensor(name).tobytes() == MERGE[name].data
    with pytest.raises(WrongBaseError, match="packed against 'a' and 'b'"):
        deltafmt.unpack("packed", "refused")


def test_where_no_base_is_needed_they_do_no_harm(room: Path) -> None:
    deltafmt.pack("c", "alone")
    assert deltafmt.verify("alone", base=["a", "b"], against="c").equal


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the system does not list open files")
def test_every_file_is_closed(room: Path) -> None:
    deltafmt.pack("c", "alone")
    before = set(os.listdir("/proc/self/fd"))
    deltafmt.open("packed", base=["b", "a"]).close()
    deltafmt.open("packed", base=["c", "b", "a"]).close()
    deltafmt.open("alone", base=["b", "a"]).close()
    for base in (["c", "b"], ["a", "a"], ["a", "nowhere"], {"base": "a", "other": "b"}):
        with pytest.raises(DeltafmtError):
            deltafmt.open("packed", base=base)
    deltafmt.pack("packed", "again", base=["c", "b", "a"])
    assert set(os.listdir("/proc/self/fd")) == before


# --- the command line -----------------------------------------------------------------------------------------------


def test_bases_on_the_command_line(room: Path, run: Run) -> None:
    code, out, err = run("pack", "merge", "new", "--base", "c", "--base", "a", "--base", "b")
    assert (code, err) == (0, "")
    shown = [line.split(maxsplit=1)[1] for line in out.splitlines() if line.startswith("base  ")]
    assert shown[0].startswith("c  (nothing of it was of use") and shown[1:3] == ["a", "b"]
    for bases in (("a", "b"), ("b", "a"), ("base3=b", "base2=a")):
        options = [part for base in bases for part in ("--base", base)]
        assert run("verify", "new", *options, "--against", "merge")[0] == 0
        assert run("unpack", "new", "out", *options, "--overwrite")[0] == 0
        assert tree(room / "out") == tree(room / "merge")
    _, out, _ = run("pack", "merge", "packed", "--base", "a", "--base", "b", "--overwrite", "--json")
    report = object_in(out)
    assert (report["base"], report["bases"], report["bases_needed"]) == ("a", ["a", "b"], ["a", "b"])


def test_ids_on_the_command_line(room: Path, run: Run) -> None:
    for bases, told in (
        (("base=a", "b"), "Write ID=BASE for all of them, or for none"),
        (("base=a", "base=b"), "two bases have the id 'base'"),
        (("base=a", "base2="), "it is empty"),
        (("base=a", "base9=b"), "no base 'base9'"),
        (("a", ""), "it is empty"),
    ):
        code, _, err = run("verify", "packed", *(part for base in bases for part in ("--base", base)))
        assert code == 2 and told in err, err
    (room / "a").rename(room / "base=a")  # what exists is a path
    assert run("verify", "packed", "--base", "base=a", "--base", "b")[0] == 0
    assert run("verify", "packed", "--base", "base=base=a", "--base", "base2=b")[0] == 0
    assert run("verify", "packed", "--base", "base=b", "--base", "base2=base=a")[0] == 6


def test_what_is_missing_is_named(room: Path, run: Run) -> None:
    _, out, _ = run("verify", "packed")
    assert "4 tensors could not be rebuilt without the bases: pass --base a --base b" in out
    _, out, _ = run("verify", "packed", "--base", "b")
    assert "2 tensors could not be rebuilt without the base: pass --base a" in out
    _, out, _ = run("inspect", "packed")
    assert "base2: sha256:" in out and "a (pass --base and its place)" in out
