"""Packs and their journals that somebody changed, runs that get into each other's way, and runs that were killed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any
from zlib import crc32

import factories as make
import pytest

import loratools as lt
from loratools.errors import LoraError, MalformedFileError, OptionError, OutputExistsError, WriteError
from loratools.io.work_folder import Identity, WorkFolder, place_of
from loratools.ops import _pack_run, _pack_work

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for number in range(2):
        make.peft(tmp_path / f"lib/a{number}", seed=number)
    make.peft(tmp_path / "lib/same", seed=0)
    return tmp_path / "lib"


@pytest.fixture(params=[None, 4], ids=["adapters", "shared basis"])
def packed(request: pytest.FixtureRequest, library: Path, tmp_path: Path) -> Path:
    lt.pack([library], tmp_path / "out", shared_basis=request.param)
    return tmp_path / "out"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


def said(pack: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((pack / "index.json").read_text("utf-8"))
    return found


def say(pack: Path, index: object) -> None:
    (pack / "index.json").write_text(json.dumps(index), "utf-8")


OUTSIDE = [
    "../mine",
    "adapters/../../mine",
    "adapters\\..\\..\\mine",
    "C:mine",
    ".",
    "adapters//a",
    "a\0",
    "aux",
]


@pytest.mark.parametrize("place", [*OUTSIDE, "MINE"])
def test_a_place_outside_the_pack_is_refused_whatever_lies_there(library, tmp_path, place):
    lt.pack([library], tmp_path / "out")
    mine = make.peft(tmp_path / "mine", seed=7).file
    index = said(tmp_path / "out")
    index["adapters"][0]["path"] = str(tmp_path / "mine") if place == "MINE" else place
    index["adapters"][0]["sha256"] = hashlib.sha256(mine.read_bytes()).hexdigest()
    say(tmp_path / "out", index)
    with pytest.raises(MalformedFileError, match="path of an adapter is "):
        lt.unpack(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_the_file_of_a_shared_basis_lies_in_the_pack(library, tmp_path):
    lt.pack([library], tmp_path / "out", shared_basis=4)
    os.replace(tmp_path / "out/shared_basis.safetensors", tmp_path / "mine.safetensors")
    index = said(tmp_path / "out")
    index["shared_basis"]["file"] = "../mine.safetensors"
    say(tmp_path / "out", index)
    with pytest.raises(MalformedFileError, match=r"file of the shared basis is '\.\./mine"):
        lt.unpack(tmp_path / "out", tmp_path / "back")


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
@pytest.mark.parametrize("linked", ["index.json", "adapters/a0", f"adapters/a0/{WEIGHTS}"])
def test_a_link_that_leaves_the_pack_is_refused(library, tmp_path, linked):
    lt.pack([library], tmp_path / "out")
    os.replace(tmp_path / "out" / linked, tmp_path / "mine")
    (tmp_path / "out" / linked).symlink_to(tmp_path / "mine")
    with pytest.raises(MalformedFileError, match=r"a link leads to .*mine"):
        lt.unpack(tmp_path / "out", tmp_path / "back")


# Of fields that may be nothing, or any number.
OTHERS = {"rows": ([[]], -1.5), "adapters": ([[]], -1.5), "error": ([[]], "0")}


def _with(whole: Any, row: dict[str, Any], name: str, other: object) -> Any:
    row[name] = other
    return whole


def test_every_field_of_an_index_is_of_its_type(packed, tmp_path):
    whole = said(packed)
    rows = [whole["adapters"][0], whole["aliases"][0] if whole["aliases"] else whole["adapters"][1]]
    if whole.get("shared_basis"):
        rows += [whole["shared_basis"], whole["shared_basis"]["modules"][0]]
    for row in rows:
        for name, value in list(row.items()):
            for other in OTHERS.get(name, ([[]], -1.5, None)):
                say(packed, _with(whole, row, name, other))
                with pytest.raises(MalformedFileError):
                    lt.unpack(packed, tmp_path / "back", dry_run=True)
            row[name] = value
        row["more"] = 1
        say(packed, whole)
        with pytest.raises(MalformedFileError, match="a field 'more', which means nothing"):
            lt.info(packed)
        del row["more"]
    say(packed, whole)
    lt.unpack(packed, tmp_path / "back")


def test_an_alias_of_no_adapter(library, tmp_path):
    lt.pack([library], tmp_path / "out")
    index = said(tmp_path / "out")
    index["aliases"][0]["of"] = "nobody"
    say(tmp_path / "out", index)
    with pytest.raises(MalformedFileError, match="1 aliases are of no adapter, such as 'same'"):
        lt.unpack(tmp_path / "out", tmp_path / "back")


@pytest.mark.parametrize(
    ("name", "value"),
    [("rank", 3), ("shape", [1, 1]), ("name", "other"), ("adapters", ["a0"]), ("rows", [[1, 0]])],
)
def test_a_shared_basis_is_what_its_index_says(library, tmp_path, name, value):
    lt.pack([library], tmp_path / "out", shared_basis=4)
    index = said(tmp_path / "out")
    assert index["shared_basis"]["modules"][0][name] != value
    index["shared_basis"]["modules"][0][name] = value
    say(tmp_path / "out", index)
    with pytest.raises(MalformedFileError):
        lt.unpack(tmp_path / "out", tmp_path / "back", names=["a0"])


def interrupted(library: Path, output: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Path:
    """The journal that a run leaves."""
    with monkeypatch.context() as patched:
        patched.setattr(_pack_run.Run, "settle", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            lt.pack([library], output, resume=True, **options)
    return place_of(output) / "journal"


def rewritten(journal: Path, change: Any) -> None:
    """A journal with other records, and true checksums."""
    lines = [json.loads(line.partition(b" ")[2]) for line in journal.read_bytes().splitlines()]
    made = [json.dumps(line if isinstance(line, dict) else change(*line)).encode() for line in lines]
    journal.write_bytes(b"".join(b"%08x %s\n" % (crc32(text), text) for text in made))


CHANGES = {
    "a path outside": lambda said: said["adapter"].update(path="../../mine"),
    "another adapter's path": lambda said: said["adapter"].update(path="adapters/a1"),
    "another name": lambda said: said["adapter"].update(name="../../mine"),
    "no path": lambda said: said["adapter"].pop("path"),
    "no adapter": lambda said: said.update(adapter=[]),
    "no key": lambda said: said.update(key="none"),
    "no architecture": lambda said: said.pop("arch"),
    "other marks": lambda said: said.update(marks="AAAA"),
    "marks that are none": lambda said: said.update(marks=3),
    "an alias of itself": lambda said: said.update(alias={"name": "../x"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_record_that_is_none_of_ours_is_done_again(library, tmp_path, monkeypatch, change):
    journal = interrupted(library, tmp_path / "out", monkeypatch)
    mine = make.peft(tmp_path / "mine", seed=7).file
    kept = mine.read_bytes()

    def changed(task: str, value: dict[str, Any]) -> list[Any]:
        if task.endswith(f"a0{os.sep}{WEIGHTS}"):
            CHANGES[change](value)
            if isinstance(value.get("adapter"), dict):
                value["adapter"]["sha256"] = (
                    hashlib.sha256(kept).hexdigest() if "outside" in change else value["adapter"]["sha256"]
                )
        return [task, value]

    rewritten(journal, changed)
    report = lt.pack([library], tmp_path / "out", resume=True)
    assert report.reused < 3
    lt.pack([library], tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert mine.read_bytes() == kept


def test_a_journal_of_other_options_is_refused_and_stays(library, tmp_path, monkeypatch):
    journal = interrupted(library, tmp_path / "out", monkeypatch)
    kept = journal.read_bytes()
    with pytest.raises(OptionError, match="the interrupted run is another than this one"):
        lt.pack([library], tmp_path / "out", resume=True, ranks=[64])
    assert journal.read_bytes() == kept
    assert lt.pack([library], tmp_path / "out", resume=True).reused == 3


def test_two_runs_do_not_write_one_pack(library, tmp_path):
    with (
        WorkFolder(tmp_path / "out", Identity("pack", {}, {})),
        pytest.raises(OutputExistsError, match="another process is writing this output"),
    ):
        lt.pack([library], tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["lib"]


def test_an_older_pack_is_there_again_where_the_new_one_cannot_take_its_place(library, tmp_path, monkeypatch):
    lt.pack([library / "a0"], tmp_path / "out")
    old = tree(tmp_path / "out")

    def refused(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_pack_work.unchanged, "rename", refused)
    with pytest.raises(WriteError, match="No space left"):
        lt.pack([library], tmp_path / "out", overwrite=True)
    assert tree(tmp_path / "out") == old
    assert sorted(os.listdir(tmp_path)) == ["lib", "out"]


def test_a_pack_that_a_killed_run_had_put_aside_is_not_overwritten_unasked(library, tmp_path):
    lt.pack([library / "a0"], tmp_path / "out")
    old = tree(tmp_path / "out")
    place_of(tmp_path / "out").mkdir()
    os.replace(tmp_path / "out", place_of(tmp_path / "out") / "replaced")
    with pytest.raises(OutputExistsError, match="the output exists already"):
        lt.pack([library], tmp_path / "out")
    assert tree(tmp_path / "out") == old
    assert sorted(os.listdir(tmp_path)) == ["lib", "out"]


def test_what_is_no_index_is_an_error_of_ours(packed, tmp_path):
    for index in (
        [],
        {**said(packed), "adapters": {}},
        {**said(packed), "layout": []},
        {**said(packed), "arch": 3},
    ):
        say(packed, index)
        with pytest.raises(LoraError):
            lt.unpack(packed, tmp_path / "back")
