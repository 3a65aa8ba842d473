"""Drafts of files and model folders: whole or not there, gone on with after a kill, never written by two at once."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from loratools.errors import MalformedFileError, OptionError, OutputExistsError, ReadError, WriteError
from loratools.io.base import Base
from loratools.io.draft import ModelFile
from loratools.io.model_folder import ModelFolder, true_index
from loratools.io.work_folder import Identity, clean, place_of

ROOT = Path(__file__).resolve().parents[2]
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX resource limits, signals and links")
SHARDS = ("unet/a.safetensors", "unet/b.safetensors", "c.safetensors")
BESIDE = ("config.json", "tokenizer/vocab.txt", "unet/notes.md")


def a_base(folder, beside=BESIDE):
    for name in beside:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"the base's {name}")
    return Base(str(folder), {}, folder=str(folder), beside=tuple(beside))


OWN = Identity("bake", {"base": "1"}, {"seed": 0})


def draft(output, base, **options):
    return ModelFolder(
        output, base, options.pop("identity", OWN), files=options.pop("files", SHARDS), **options
    )


def write(folder, name, text="new"):
    """Write a file, and have it recorded."""
    Path(folder.place(name)).write_text(f"{text} {name}")
    folder.log(name).record([("all", text)])


def done(folder):
    """The files of which an interrupted run has recorded something."""
    return {name for name in SHARDS if folder.log(name).known}


def content(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def names(folder):
    return sorted(os.listdir(folder))


WHOLE = {**{name: f"new {name}" for name in SHARDS}, **{name: f"the base's {name}" for name in BESIDE}}


def test_a_folder_has_what_was_written_and_what_lies_beside(tmp_path):
    base = a_base(tmp_path / "base")
    with draft(tmp_path / "out", base) as folder:
        assert (done(folder), folder.fresh_reason, folder.beside) == (set(), "", BESIDE)
        for name in SHARDS:
            write(folder, name)
            assert not (tmp_path / "out").exists()
        folder.write_json("config.json", {"tied": False, "name": "é"})
        assert folder.beside == BESIDE[1:]
    found = content(tmp_path / "out")
    assert json.loads(found.pop("config.json")) == {"tied": False, "name": "é"}
    assert found == {name: text for name, text in WHOLE.items() if name != "config.json"}
    assert names(tmp_path) == ["base", "out"]
    assert content(tmp_path / "base") == {name: f"the base's {name}" for name in BESIDE}


@posix
def test_links_beside_are_copied_as_files(tmp_path):
    base = a_base(tmp_path / "base", ("real.txt",))
    (tmp_path / "base" / "link.txt").symlink_to("real.txt")
    with draft(tmp_path / "out", base._replace(beside=("link.txt", "real.txt")), files=()):
        pass
    assert not (tmp_path / "out" / "link.txt").is_symlink()
    assert (tmp_path / "out" / "link.txt").read_text() == "the base's real.txt"


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_a_failure_keeps_no_more_than_what_can_be_resumed(resume, stop, tmp_path):
    base = a_base(tmp_path / "base")
    with pytest.raises(stop), draft(tmp_path / "out", base, resume=resume) as folder:  # noqa: PT012
        write(folder, SHARDS[0])
        folder.write_json("config.json", {})
        Path(folder.place(SHARDS[1])).write_text("half")
        raise stop
    assert names(tmp_path) == ([".out.work", "base"] if resume else ["base"])
    if resume:
        assert {"journal", f"new/{SHARDS[0]}"} <= set(content(tmp_path / ".out.work"))
        with draft(tmp_path / "out", base, resume=True) as folder:
            assert (done(folder), folder.fresh_reason) == ({SHARDS[0]}, "")
            assert not (tmp_path / ".out.work" / "new" / SHARDS[1]).exists()
            assert not (tmp_path / ".out.work" / "new" / "config.json").exists()
            for name in SHARDS[1:]:
                write(folder, name)
        assert content(tmp_path / "out") == WHOLE
        assert names(tmp_path) == ["base", "out"]


def test_a_failure_before_any_file_is_finished_leaves_nothing_to_resume(tmp_path):
    with pytest.raises(RuntimeError), draft(tmp_path / "out", Base("", {}), resume=True) as folder:  # noqa: PT012
        Path(folder.place(SHARDS[1])).write_text("half")
        raise RuntimeError
    assert names(tmp_path) == []


def run(program, folder, **options):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    head = """
        import os, signal, sys
        from pathlib import Path
        from loratools.errors import LoraError
        from loratools.io.base import Base
        from loratools.io import work_folder
        from loratools.io.model_folder import ModelFolder
        work_folder._EVERY = 0.0
        own = work_folder.Identity("bake", {"base": "1"}, {"seed": 0})
        files = ("unet/a.safetensors", "unet/b.safetensors", "c.safetensors")
        def draft(output, base, **options):
            return ModelFolder(output, base, own, files=files, **options)
        base = Base("base", {}, folder="base", beside=("config.json", "tokenizer/vocab.txt", "unet/notes.md"))
        def write(folder, name):
            Path(folder.place(name)).write_text("new " + name)
            folder.log(name).record([("all", "new")])
    """
    command = [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(program)]
    return subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, **options
    )


@posix
@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_killed_process_is_gone_on_with_at_the_file(count, tmp_path):
    """Killed while the file after the ``count`` finished ones is half-written; it need not have asked to resume."""
    base = a_base(tmp_path / "base")
    killed = run(
        f"""
        with draft("out", base) as folder:
            for name in {SHARDS[:count]!r}:
                write(folder, name)
            Path(folder.place({SHARDS[count]!r})).write_text("half")
            folder.write_json("stale.json", 1)
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        tmp_path,
    )
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert names(tmp_path) == [".out.work", "base"]
    with draft(tmp_path / "out", base, resume=True) as folder:
        assert done(folder) == {*SHARDS[:count]}
        assert ("no interrupted run" in folder.fresh_reason) is (not count)
        for name in SHARDS[count:]:
            write(folder, name)
    assert content(tmp_path / "out") == WHOLE
    assert names(tmp_path) == ["base", "out"]


def interrupted(tmp_path, base):
    with pytest.raises(RuntimeError), draft(tmp_path / "out", base, resume=True) as folder:  # noqa: PT012
        for name in SHARDS[:2]:
            write(folder, name, "old")
        raise RuntimeError


def test_without_resume_an_interrupted_run_is_removed_first(tmp_path):
    base = a_base(tmp_path / "base")
    interrupted(tmp_path, base)
    with draft(tmp_path / "out", base) as folder:
        assert not done(folder)
        for name in SHARDS:
            write(folder, name)
    assert content(tmp_path / "out") == WHOLE


@pytest.mark.parametrize(
    ("journal", "reason"),
    [
        ('{"version": 2}', "damaged"),
        ("", "damaged"),
        ("[]", "damaged"),
        (None, "no interrupted run"),
    ],
)
def test_a_journal_that_cannot_be_read_is_not_gone_on_with(journal, reason, tmp_path):
    base = a_base(tmp_path / "base")
    interrupted(tmp_path, base)
    file = tmp_path / ".out.work" / "journal"
    file.unlink() if journal is None else file.write_text(journal)
    with draft(tmp_path / "out", base, resume=True) as folder:
        assert not done(folder)
        assert reason in folder.fresh_reason
        for name in SHARDS:
            write(folder, name)
    assert content(tmp_path / "out") == WHOLE


def test_a_journal_of_another_run_is_refused_and_kept(tmp_path):
    base = a_base(tmp_path / "base")
    interrupted(tmp_path, base)
    before = content(tmp_path / ".out.work")
    for identity, what in (
        (OWN._replace(inputs={"base": "2"}), "input base"),
        (OWN._replace(options={"seed": 1}), "option seed"),
        (OWN._replace(operation="extract"), "bake instead of extract"),
    ):
        with pytest.raises(OptionError, match=what):
            draft(tmp_path / "out", base, resume=True, identity=identity).__enter__()
    assert content(tmp_path / ".out.work") == before


def test_the_identity_is_asked_for_when_something_is_recorded_and_once(tmp_path):
    asked = []

    def identity():
        asked.append(1)
        return OWN

    base = a_base(tmp_path / "base")
    with draft(tmp_path / "out", base, identity=identity) as folder:
        for name in SHARDS:
            Path(folder.place(name)).write_text("x")
    assert asked == []
    with pytest.raises(RuntimeError), draft(tmp_path / "two", base, identity=identity, resume=True) as folder:  # noqa: PT012
        write(folder, SHARDS[0])
        raise RuntimeError
    assert asked == [1]
    with draft(tmp_path / "two", base, resume=True) as folder:
        assert done(folder) == {SHARDS[0]}
        for name in SHARDS[1:]:
            write(folder, name)


def test_what_is_left_is_cleaned_and_nothing_else(tmp_path):
    base = a_base(tmp_path / "base")
    interrupted(tmp_path, base)
    size = sum(file.stat().st_size for file in place_of(tmp_path / "out").rglob("*") if file.is_file())
    found = clean(tmp_path / "out")
    assert (found.paths, found.bytes) == ((str(tmp_path / ".out.work"),), size)
    assert names(tmp_path) == ["base"]
    assert clean(tmp_path / "out") == ((), 0)
    with (
        draft(tmp_path / "out", base, files=()),
        pytest.raises(OutputExistsError, match="another process"),
    ):
        clean(tmp_path / "out")


def test_a_single_file_is_whole_or_not_there(tmp_path):
    out = tmp_path / "out.bin"
    with ModelFile(out, OWN, files=["out.bin"]) as made:
        Path(made.place("out.bin")).write_text("x")
        assert names(tmp_path) == [".out.bin.work"]
    assert (names(tmp_path), out.read_text()) == (["out.bin"], "x")
    with pytest.raises(OutputExistsError), ModelFile(out, OWN):
        pass
    with pytest.raises(RuntimeError), ModelFile(out, OWN, overwrite=True, files=["out.bin"]) as made:  # noqa: PT012
        Path(made.place("out.bin")).write_text("y")
        raise RuntimeError
    assert (names(tmp_path), out.read_text()) == (["out.bin"], "x")


def test_an_output_that_appears_meanwhile_is_kept(tmp_path):
    out = tmp_path / "out.bin"
    with pytest.raises(OutputExistsError), ModelFile(out, OWN, files=["out.bin"]) as made:  # noqa: PT012
        Path(made.place("out.bin")).write_text("x")
        out.write_text("theirs")
    assert (names(tmp_path), out.read_text()) == (["out.bin"], "theirs")


def test_two_processes_never_write_one_output(tmp_path):
    with draft(tmp_path / "out", Base("", {}), files=("a", "b")) as folder:
        write(folder, "a")
        for resume in (False, True):
            with (
                pytest.raises(OutputExistsError, match="another process is writing this output"),
                draft(tmp_path / "out", Base("", {}), resume=resume),
            ):
                pass
        other = run(
            """
            try:
                draft("out", base).__enter__()
            except LoraError as error:
                print(type(error).__name__)
            """,
            tmp_path,
        )
        assert other.communicate(timeout=60)[0] == "OutputExistsError\n"
        write(folder, "b")
    assert content(tmp_path / "out") == {"a": "new a", "b": "new b"}


@posix
def test_a_full_disk_leaves_nothing_and_says_so(tmp_path):
    a_base(tmp_path / "base")
    program = """
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            with draft("out", base, resume=RESUME) as folder:
                write(folder, "c.safetensors")
                with open(folder.place("b"), "wb", buffering=0) as file:
                    while True:
                        file.write(bytes(999))
        except LoraError as error:
            print(type(error).__name__, error)
    """
    for resume in (False, True):
        done = run(program.replace("RESUME", str(resume)), tmp_path)
        said = done.communicate(timeout=60)[0]
        assert "WriteError" in said
        assert f"{tmp_path / 'out'}: cannot be written: File too large" in said
        assert "bytes are free" in said
        assert ("What is done is kept for --resume" in said) is resume
        assert ("Nothing was left behind" in said) is not resume
        assert names(tmp_path) == ([".out.work", "base"] if resume else ["base"])


def test_no_room_for_what_lies_beside_leaves_nothing(tmp_path, monkeypatch):
    base = a_base(tmp_path / "base")

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", os.fspath(target))

    monkeypatch.setattr("loratools.io.model_folder.clone_file", full)
    with pytest.raises(WriteError, match="No space left"), draft(tmp_path / "out", base) as folder:
        write(folder, "a")
    assert names(tmp_path) == ["base"]


def test_a_file_beside_that_is_gone_is_named(tmp_path):
    base = a_base(tmp_path / "base")
    (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(ReadError, match=r"config\.json: cannot be read"), draft(tmp_path / "out", base):
        pass
    assert names(tmp_path) == ["base"]


def test_errors_name_the_output_instead_of_the_work_folder(tmp_path):
    with pytest.raises(WriteError) as caught, draft(tmp_path / "out", Base("", {})) as folder:
        raise WriteError("the output is a device", path=folder.place("a/b"))
    assert caught.value.path == str(tmp_path / "out" / "a" / "b")
    assert ".work" not in str(caught.value)


def test_an_existing_folder_is_refused_or_its_files_replaced(tmp_path):
    base = a_base(tmp_path / "base")
    a_base(tmp_path / "out", ("c.safetensors", "config.json", "mine.txt", "old.index.json"))
    before = content(tmp_path / "out")
    with pytest.raises(OutputExistsError, match="holds files"), draft(tmp_path / "out", base):
        pass
    with pytest.raises(RuntimeError), draft(tmp_path / "out", base, overwrite=True) as folder:  # noqa: PT012
        write(folder, "c.safetensors")
        raise RuntimeError
    assert content(tmp_path / "out") == before
    gone = ("old.index.json", "c.safetensors")
    with draft(tmp_path / "out", base, overwrite=True, replaced=gone) as folder:
        for name in SHARDS:
            write(folder, name)
    assert content(tmp_path / "out") == {**WHOLE, "mine.txt": "the base's mine.txt"}
    assert names(tmp_path) == ["base", "out"]


def test_a_model_is_baked_into_its_own_folder(tmp_path):
    base = a_base(tmp_path / "base", (*BESIDE, "mine.txt"))
    with draft(tmp_path / "base", base, overwrite=True) as folder:
        assert folder.beside == ()
        for name in SHARDS:
            write(folder, name)
    assert content(tmp_path / "base") == {**WHOLE, "mine.txt": "the base's mine.txt"}


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    with draft(tmp_path / "out", Base("", {}), files=("a",)) as folder:
        write(folder, "a")
    assert content(tmp_path / "out") == {"a": "new a"}


def test_a_place_that_cannot_be_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("x")
    for output, words in (("file", "is a file"), ("absent/out", "does not exist")):
        with pytest.raises(WriteError, match=words):
            draft(tmp_path / output, Base("", {})).__enter__()
    assert names(tmp_path) == ["file"]


def test_a_true_index_says_what_was_written_and_keeps_the_rest(tmp_path):
    original = tmp_path / "model.safetensors.index.json"
    said = {
        "metadata": {"total_parameters": 7, "total_size": 1, "by": "me"},
        "weight_map": {"a": "1.safetensors"},
    }
    original.write_text(json.dumps(said))
    made = true_index(original, {"b": "2.safetensors", "a": "1.safetensors"}, {"a": 4, "b": 10, "c": 99})
    assert made == {
        "metadata": {"total_parameters": 7, "total_size": 14, "by": "me"},
        "weight_map": {"a": "1.safetensors", "b": "2.safetensors"},
    }
    assert list(made["weight_map"]) == ["a", "b"]
    original.write_text(json.dumps({"weight_map": {"a": "1"}}))
    assert true_index(original, {"a": "1"}, {"a": 3})["metadata"] == {"total_size": 3}
    original.write_text("{}")
    with pytest.raises(MalformedFileError):
        true_index(original, {}, {})
