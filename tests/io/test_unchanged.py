"""Files that change while they are read: told by size, time and place, and refused before an output has its name."""

import os
import threading

import pytest
from factories import kohya

from loratools import io
from loratools.errors import ReadError
from loratools.io import mapped, unchanged

LATER = 10**9  # ns: systems' clocks for files may be some ms coarse


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "in"
    path.write_bytes(b"0123456789")
    return path


def rewritten(path):
    path.write_bytes(bytes(reversed(path.read_bytes())))
    later(path)


def later(path):
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + LATER))


def replaced(path):
    """By another file of the same size and the same time."""
    found = path.stat()
    draft = path.with_name("draft")
    draft.write_bytes(path.read_bytes())
    os.utime(draft, ns=(found.st_atime_ns, found.st_mtime_ns))
    os.replace(draft, path)


CHANGES = {
    "grown": (lambda path: path.write_bytes(b"0123456789+"), "it has 11 bytes, and had 10"),
    "shortened": (lambda path: os.truncate(path, 4), "it has 4 bytes, and had 10"),
    "rewritten": (rewritten, "it was written to"),
    "replaced": (replaced, "another file has taken its place"),
    "removed": (lambda path: path.unlink(), "it cannot be found any more"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_refused_and_nothing_written(file, tmp_path, name):
    change, how = CHANGES[name]

    @unchanged.watched
    def work():
        unchanged.note(file)
        with io.atomic_output(tmp_path / "out", False) as part:
            part.write_bytes(file.read_bytes())
            change(file)

    with pytest.raises(ReadError, match=how) as found:
        work()
    assert found.value.path == str(file)
    assert "Let no other program write to it" in str(found.value)
    assert set(os.listdir(tmp_path)) <= {"in"}


@pytest.mark.parametrize("name", CHANGES)
def test_what_writes_nothing_is_refused_when_it_returns(file, name):
    change, how = CHANGES[name]

    @unchanged.watched
    def work():
        unchanged.note(file)
        change(file)
        return "a report"

    with pytest.raises(ReadError, match=how):
        work()


def test_all_that_changed_are_counted(tmp_path):
    files = [tmp_path / str(number) for number in range(3)]

    @unchanged.watched
    def work():
        for each in files:
            each.touch()
            unchanged.note(each)
            each.write_bytes(b"more")

    with pytest.raises(ReadError, match=r"0: .* and had 0, and 2 more of the inputs changed"):
        work()


def test_a_folder_of_outputs_stays_as_it_was(file, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old").write_bytes(b"old")

    @unchanged.watched
    def work():
        unchanged.note(file)
        with io.atomic_folder(folder, True) as part:
            (part / "old").write_bytes(b"new")
            (part / "other").write_bytes(b"new")
            rewritten(file)

    with pytest.raises(ReadError, match="it was written to"):
        work()
    assert [(each.name, each.read_bytes()) for each in folder.iterdir()] == [("old", b"old")]


def test_an_output_may_replace_what_it_was_made_of(file, tmp_path):
    @unchanged.watched
    def inner():
        unchanged.note(file)
        with io.atomic_output(file, True) as part:
            part.write_bytes(b"new")
            unchanged.note(part)  # read back before it takes its name

    @unchanged.watched
    def work():
        inner()
        with io.atomic_output(tmp_path / "second", False):
            pass  # looks at what was read for the first one again

    work()
    assert file.read_bytes() == b"new"


def test_a_folder_may_replace_what_it_was_made_of(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_bytes(b"old")

    @unchanged.watched
    def work(goal):
        unchanged.note(tmp_path / "in" / "a")
        with io.atomic_folder(goal, True) as part:
            (part / "a").write_bytes(b"new")
            unchanged.note(part / "a")
        unchanged.check()

    for goal in (tmp_path / "in", tmp_path / "out"):
        work(goal)
        assert (goal / "a").read_bytes() == b"new"


def test_operations_do_not_see_each_others_files(file):
    """One thread's operation reads a file, and another's is not held up when that changes."""

    @unchanged.watched
    def other():
        threads = threading.Thread(target=unchanged.watched(lambda: unchanged.note(file)))
        threads.start()
        threads.join()
        rewritten(file)

    other()
    unchanged.note(file)  # without an operation: nobody watches
    rewritten(file)
    unchanged.check()


def test_the_first_state_counts(file):
    @unchanged.watched
    def work():
        unchanged.note(file)
        rewritten(file)
        unchanged.note(file)

    with pytest.raises(ReadError):
        work()


@pytest.mark.parametrize("name", ["grown", "shortened", "rewritten"])
def test_mapped_data_of_a_file_that_changed_is_refused(tmp_path, name):
    """A page behind the end of a file that was shortened would end the process."""
    made = kohya(tmp_path / "a.safetensors", "sd15")
    size = made.path.stat().st_size
    ref = max(io.open_tensors(made.path).tensors.values(), key=lambda ref: ref.nbytes)
    assert ref.raw().nbytes == ref.nbytes
    if name == "rewritten":
        later(made.path)
    else:
        os.truncate(made.path, size + 1 if name == "grown" else 64)
    with pytest.raises(ReadError, match="has changed while it was read"):
        ref.raw()
    with pytest.raises(ReadError, match="has changed while it was read"):
        ref.load()


def test_an_alpha_of_a_file_that_was_shortened(tmp_path):
    made = kohya(tmp_path / "a.safetensors", "sd15")
    alpha = min(io.open_tensors(made.path).tensors.values(), key=lambda ref: ref.nbytes)
    alpha.scalar()
    os.truncate(made.path, 64)
    with pytest.raises(ReadError, match="it has 64 bytes"):
        alpha.scalar()


@pytest.mark.skipif(not hasattr(os, "pread"), reason="there is no pread")
def test_an_alpha_that_the_disk_refuses(tmp_path, monkeypatch):
    made = kohya(tmp_path / "a.safetensors", "sd15")
    alpha = min(io.open_tensors(made.path).tensors.values(), key=lambda ref: ref.nbytes)

    def refuse(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(mapped, "_PREAD", refuse)
    with pytest.raises(ReadError, match=r"a\.safetensors: cannot be read: Input/output error"):
        alpha.scalar()


def test_a_mapped_file_may_be_replaced_under_its_name(tmp_path):
    """The map keeps the old content; outside an operation that is all that counts."""
    made = kohya(tmp_path / "a.safetensors", "sd15")
    tensors = io.open_tensors(made.path).tensors
    before = {name: bytes(ref.raw()) for name, ref in tensors.items()}
    kohya(tmp_path / "b.safetensors", "sd15", seed=9)
    if os.name == "posix":  # Windows replaces no file that is mapped
        os.replace(tmp_path / "b.safetensors", made.path)
    assert {name: bytes(ref.raw()) for name, ref in tensors.items()} == before
