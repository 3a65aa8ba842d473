"""Where half-made outputs lie: in the work folder of the run that makes them, where the next run finds them."""

import errno
import os

import pytest

from loratools import io
from loratools.errors import OutputExistsError, WriteError
from loratools.io import _journal_file
from loratools.io.work_folder import REPLACED, Identity, WorkFolder, clean, place_of

IDENTITY = Identity("merge", {}, {})


def test_a_file_is_made_in_the_work_folder(tmp_path):
    target = tmp_path / "out"
    with WorkFolder(target, IDENTITY) as work:
        with io.atomic_output(target, False) as part:
            assert part.parent == work.path
            assert os.listdir(tmp_path) == [work.path.name]
            part.write_bytes(b"whole")
        assert target.read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_is_made_in_the_work_folder(tmp_path):
    target = tmp_path / "out"
    with WorkFolder(target, IDENTITY) as work, io.atomic_folder(target, False) as part:
        assert part.parent == work.path
        with io.atomic_output(part / "file", False) as inner:
            assert inner.is_relative_to(part)
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(target) == ["file"]


def test_other_outputs_have_work_folders_of_their_own(tmp_path):
    with WorkFolder(tmp_path / "out", IDENTITY), io.atomic_output(tmp_path / "other", False) as part:
        assert part.parent == place_of(tmp_path / "other")
    with io.atomic_output(tmp_path / "out", False) as part:
        assert part.parent == place_of(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]


def test_a_dead_run_s_half_is_removed_by_the_next_one_and_what_can_be_resumed_stays(tmp_path):
    target = tmp_path / "out"
    folder = place_of(target)
    (folder / ".out.0123456789ab.part" / "inner").mkdir(parents=True)
    (folder / ".out.ba9876543210.part").write_bytes(b"half")
    (folder / "journal").write_bytes(b"")
    with io.atomic_output(target, False) as part:
        assert sorted(os.listdir(folder)) == [part.name, "journal", "lock"]
    assert os.listdir(folder) == ["journal"]
    assert clean(target).paths == (str(folder),)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("output", [io.atomic_output, io.atomic_folder])
def test_what_another_is_writing_is_refused_and_its_half_stays(tmp_path, output):
    target = tmp_path / "out"
    with output(target, False) as part:
        with pytest.raises(OutputExistsError, match="out: another process is writing this output"):
            output(target, True).__enter__()
        with pytest.raises(OutputExistsError, match="another process"):
            clean(target)
        assert part.exists()
    assert os.listdir(tmp_path) == ["out"]


def test_a_link_in_the_place_of_the_work_folder_is_not_followed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".x.part").write_bytes(b"kept")
    (tmp_path / ".out.work").symlink_to("mine")
    with pytest.raises(WriteError, match="a symbolic link"):
        io.atomic_output(tmp_path / "out", False).__enter__()
    assert os.listdir(tmp_path / "mine") == [".x.part"]


@pytest.mark.parametrize("how", ["clean", "run", "failed run"])
def test_an_output_whose_successor_was_killed_has_its_name_again(tmp_path, how):
    target = tmp_path / "out"
    old = place_of(target) / REPLACED
    old.mkdir(parents=True)
    (old / "file").write_bytes(b"old")
    if how == "clean":
        clean(target)
    else:
        with pytest.raises(KeyError), WorkFolder(target, IDENTITY, resume=how == "run"):
            raise KeyError
    assert os.listdir(tmp_path) == ["out"]
    assert (target / "file").read_bytes() == b"old"


def test_a_run_that_is_refused_takes_no_work_folder_from_another(tmp_path):
    target = tmp_path / "out"
    with WorkFolder(target, IDENTITY) as work:
        with pytest.raises(OutputExistsError, match="another process"):
            WorkFolder(target, IDENTITY).__enter__()
        with io.atomic_output(target, False) as part:
            assert part.parent == work.path


def test_what_a_killed_run_has_half_made_is_cleaned_up(tmp_path):
    target = tmp_path / "out"
    work = WorkFolder(target, IDENTITY)
    with work:
        part = io.atomic_output(target, False)
        part.__enter__().write_bytes(b"half")
        left = os.listdir(work.path)
        work._lock.release()  # as the system does when a process ends
        assert clean(target).bytes == 4
        assert len(left) == 2
    assert os.listdir(tmp_path) == []


def test_a_journal_that_the_disk_refuses(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with WorkFolder(tmp_path / "out", IDENTITY) as work:
        work.record("a task", {})
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", refuse)
            with pytest.raises(
                WriteError, match=r"out: its work folder \.out\.work cannot be written: No space"
            ):
                work.flush()
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no device that is always full")
def test_closing_a_journal_that_the_disk_refused_hides_no_error(tmp_path):
    journal = _journal_file.Journal(tmp_path / "journal", IDENTITY, {})
    with open("/dev/full", "ab") as full:
        os.dup2(full.fileno(), journal._file.fileno())
        with pytest.raises(OSError, match="No space left"):
            journal.append({"a task": 1})
        journal.close()
