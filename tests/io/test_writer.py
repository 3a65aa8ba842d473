"""Writing: whole files or none, whatever happens on the way."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from loratools.errors import LayoutError, OutputExistsError, ShapeError, WriteError
from loratools.io import atomic_folder, atomic_output, open_tensors, write_safetensors
from loratools.io.writer import Digest
from loratools.tensors import BytesSource, LazySource, TensorRef, from_torch

ROOT = Path(__file__).resolve().parents[2]
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX resource limits, signals and modes")


def ref(name, values=(1.0, 2.0)):
    return from_torch(name, torch.tensor(values))


def failing(name, error):
    def load():
        raise error

    return TensorRef(name, (2,), "F32", LazySource(load))


def names(folder):
    return sorted(os.listdir(folder))


def read(path):
    with open_tensors(path) as file:
        return {name: tensor.load().tolist() for name, tensor in file.tensors.items()}


def run(program, folder, **options):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True, **options)


def test_returns_the_size_and_reports_progress(tmp_path):
    steps = []
    size = write_safetensors(tmp_path / "x", [ref("b"), ref("a", (1.0,))], {"k": "v"}, progress=steps.append)
    assert size == (tmp_path / "x").stat().st_size
    assert steps == [4, 8]  # a, then b: the canonical order
    assert names(tmp_path) == ["x"]


def test_a_transposed_reference_is_written_as_it_reads(tmp_path):
    tensor = torch.arange(6.0).reshape(2, 3)
    write_safetensors(tmp_path / "x", [from_torch("a", tensor).flipped()], {})
    assert read(tmp_path / "x") == {"a": tensor.t().tolist()}


def test_existing_output_needs_overwrite(tmp_path):
    write_safetensors(tmp_path / "x", [ref("old")], {})
    with pytest.raises(OutputExistsError, match="--overwrite") as caught:
        write_safetensors(tmp_path / "x", [ref("new")], {})
    assert isinstance(caught.value, FileExistsError)
    assert read(tmp_path / "x") == {"old": [1, 2]}
    write_safetensors(tmp_path / "x", [ref("new")], {}, overwrite=True)
    assert read(tmp_path / "x") == {"new": [1, 2]}
    assert names(tmp_path) == ["x"]


def test_an_output_that_appears_meanwhile_is_kept(tmp_path):
    def load():
        (tmp_path / "x").write_text("another program's")
        return torch.ones(2)

    with pytest.raises(OutputExistsError):
        write_safetensors(tmp_path / "x", [TensorRef("a", (2,), "F32", LazySource(load))], {})
    assert (tmp_path / "x").read_text() == "another program's"
    assert names(tmp_path) == ["x"]


def test_the_output_may_be_the_mapped_input(tmp_path):
    write_safetensors(tmp_path / "x", [ref("a"), ref("b", (3.0, 4.0))], {})
    with open_tensors(tmp_path / "x") as file:
        kept = file.tensors["b"].load()
        swapped = [file.tensors["a"].renamed("b"), file.tensors["b"].renamed("a")]
        if os.name == "nt":
            pytest.skip("Windows cannot replace a file that is mapped")
        write_safetensors(tmp_path / "x", swapped, {}, overwrite=True)
        assert kept.tolist() == [3, 4]
    assert read(tmp_path / "x") == {"a": [3, 4], "b": [1, 2]}


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "folder").mkdir()
    cases = [
        (tmp_path / "folder", "the output is a folder"),
        (tmp_path / "no" / "x", r"the folder .*no does not exist"),
        (tmp_path / "file" / "x", "does not exist"),
    ]
    (tmp_path / "file").write_text("")
    if os.path.exists("/dev/null"):
        cases.append((Path("/dev/null"), "a device"))
    for path, words in cases:
        with pytest.raises(WriteError, match=words):
            write_safetensors(path, [ref("a")], {}, overwrite=True)
    assert names(tmp_path) == ["file", "folder"]
    assert names(tmp_path / "folder") == []


def test_names_that_occur_twice_are_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(LayoutError, match=r"same name \(a\)"):
        write_safetensors(tmp_path / "x", [failing("a", AssertionError), failing("a", AssertionError)], {})
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, MemoryError])
def test_a_failure_in_the_middle_leaves_the_old_file(tmp_path, error):
    write_safetensors(tmp_path / "x", [ref("old")], {})
    with pytest.raises(error):
        write_safetensors(tmp_path / "x", [ref("a"), failing("b", error)], {}, overwrite=True)
    assert read(tmp_path / "x") == {"old": [1, 2]}
    assert names(tmp_path) == ["x"]


def test_data_of_another_length_than_its_shape(tmp_path):
    wrong = TensorRef("a", (3,), "F32", BytesSource(memoryview(b"\0" * 8)))
    with pytest.raises(ShapeError, match=r"tensor a: its data has 8 bytes.*\[3\] takes 12"):
        write_safetensors(tmp_path / "x", [wrong], {})
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_what_the_system_refuses(tmp_path, monkeypatch, number):
    write_safetensors(tmp_path / "x", [ref("old")], {})

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(
        WriteError, match=rf"{os.strerror(number)} \(\d+ bytes needed, [\d,]+ bytes are free"
    ) as caught:
        write_safetensors(tmp_path / "x", [ref("new")], {}, overwrite=True)
    assert caught.value.path == str(tmp_path / "x")
    monkeypatch.undo()
    assert read(tmp_path / "x") == {"old": [1, 2]}
    assert names(tmp_path) == ["x"]


def test_a_file_system_that_is_read_only(tmp_path, monkeypatch):
    def refuse(path, *_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    # Such a file system refuses to remove even what is not there.
    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(WriteError, match="cannot be written: Read-only file system") as caught:
        write_safetensors(tmp_path / "x", [ref("new")], {})
    assert caught.value.path == str(tmp_path / "x")
    assert ".part" not in str(caught.value)
    assert "choose another folder" in caught.value.todo


@posix
def test_a_full_disk(tmp_path):
    write_safetensors(tmp_path / "x", [ref("old")], {})
    program = """
        import resource
        from loratools.errors import WriteError
        from loratools.io import write_safetensors
        from loratools.tensors import BytesSource, TensorRef
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        big = TensorRef("a", (10**6,), "U8", BytesSource(memoryview(bytes(10**6))))
        try:
            write_safetensors("x", [big], {}, overwrite=True)
        except WriteError as error:
            print(error)
    """
    process = run(program, tmp_path)
    output, _ = process.communicate(timeout=60)
    assert "cannot be written: File too large (1,000,0" in output
    assert read(tmp_path / "x") == {"old": [1, 2]}
    assert names(tmp_path) == ["x"]


@posix
def test_a_killed_process_leaves_the_old_file_whole(tmp_path):
    write_safetensors(tmp_path / "x", [ref("old")], {})
    program = """
        import sys, time
        from loratools.io import write_safetensors
        from loratools.tensors import BytesSource, TensorRef
        class Stuck:
            def raw(self):
                print("half written", flush=True)
                time.sleep(60)
        first = TensorRef("a", (10**6,), "U8", BytesSource(memoryview(bytes(10**6))))
        write_safetensors("x", [first, TensorRef("b", (1,), "U8", Stuck())], {}, overwrite=True)
    """
    process = run(program, tmp_path)
    assert process.stdout.readline() == "half written\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert read(tmp_path / "x") == {"old": [1, 2]}
    assert names(tmp_path) == [".x.work", "x"]
    write_safetensors(tmp_path / "x", [ref("new")], {}, overwrite=True)
    assert names(tmp_path) == ["x"]


@posix
def test_the_mode_follows_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_safetensors(tmp_path / "x", [ref("a")], {})
        with atomic_folder(tmp_path / "folder", overwrite=False) as folder:
            (folder / "a").write_text("")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


@posix
def test_a_link_is_written_through(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "x")
    write_safetensors(tmp_path / "link", [ref("a")], {})
    assert (tmp_path / "link").is_symlink()
    assert read(tmp_path / "real" / "x") == {"a": [1, 2]}


def test_long_names(tmp_path):
    write_safetensors(tmp_path / ("é" * 120), [ref("a")], {})
    assert names(tmp_path) == ["é" * 120]


def test_atomic_output_for_other_files(tmp_path):
    with atomic_output(tmp_path / "x.json", overwrite=False) as temporary:
        temporary.write_text("{}")
        assert temporary.parent == tmp_path / ".x.json.work"
        assert names(tmp_path) == [temporary.parent.name]
    assert (tmp_path / "x.json").read_text() == "{}"

    def interrupted():
        with atomic_output(tmp_path / "x.json", overwrite=True) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "x.json").read_text() == "{}"
    assert names(tmp_path) == ["x.json"]


def fill(folder, **files):
    for name, text in files.items():
        place = folder / name.replace("__", "/").replace("_", ".")
        place.parent.mkdir(exist_ok=True)
        place.write_text(text)


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()
    }


def test_a_new_folder_appears_whole(tmp_path):
    for present in (False, True):  # an empty folder is as good as none
        target = tmp_path / str(present)
        if present:
            target.mkdir()
        with atomic_folder(target, overwrite=False) as folder:
            fill(folder, a_json="1", sub__b_txt="2")
            assert tree(target) == {}
        assert tree(target) == {"a.json": "1", "sub/b.txt": "2"}
    assert names(tmp_path) == ["False", "True"]


def test_a_folder_is_replaced_file_by_file_with_configurations_last(tmp_path, monkeypatch):
    target = tmp_path / "adapter"
    with atomic_folder(target, overwrite=False) as folder:
        fill(folder, a_json="old", w_safetensors="old", kept_txt="old")
    with pytest.raises(OutputExistsError), atomic_folder(target, overwrite=False):
        pytest.fail("the folder must be refused before it is filled")
    moved = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(Path(b).name), replace(a, b)))
    with atomic_folder(target, overwrite=True) as folder:
        fill(folder, a_json="new", w_safetensors="new", sub__z_json="new", sub__x_bin="new")
    assert tree(target) == {
        "a.json": "new",
        "w.safetensors": "new",
        "kept.txt": "old",
        "sub/z.json": "new",
        "sub/x.bin": "new",
    }
    assert sorted(moved[:2]) == ["w.safetensors", "x.bin"]
    assert sorted(moved[2:]) == ["a.json", "z.json"]
    assert names(tmp_path) == ["adapter"]


def test_what_the_new_files_replace_goes_once_they_are_there(tmp_path, monkeypatch):
    target = tmp_path / "adapter"
    with atomic_folder(target, overwrite=False) as folder:
        fill(folder, w_bin="old", kept_bin="old")
    seen = []
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, **how: (seen.append(tree(target)), unlink(path, **how)))
    with atomic_folder(target, overwrite=True, replaced=("w.bin", "w.safetensors")) as folder:
        fill(folder, w_safetensors="new")
    assert seen == [{"w.bin": "old", "w.safetensors": "new", "kept.bin": "old"}]
    assert tree(target) == {"w.safetensors": "new", "kept.bin": "old"}


def test_a_file_that_fails_in_a_new_folder_is_named_where_it_would_be(tmp_path):
    with (
        pytest.raises(WriteError, match="cannot be written: No space") as caught,
        atomic_folder(tmp_path / "adapter", overwrite=False) as folder,
    ):
        write_safetensors(folder / "w", [failing("a", OSError(errno.ENOSPC, "No space"))], {})
    assert caught.value.path == str(tmp_path / "adapter" / "w")
    assert ".part" not in str(caught.value)
    assert names(tmp_path) == []


def test_a_folder_that_fails_leaves_the_old_one(tmp_path):
    target = tmp_path / "adapter"
    with atomic_folder(target, overwrite=False) as folder:
        fill(folder, a_json="old")

    def interrupted():
        with atomic_folder(target, overwrite=True) as folder:
            fill(folder, a_json="new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert tree(tmp_path) == {"adapter/a.json": "old"}
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(WriteError, match="the output is a file"),
        atomic_folder(tmp_path / "file", overwrite=True),
    ):
        pytest.fail("a file must be refused")
    with (
        pytest.raises(WriteError, match="does not exist"),
        atomic_folder(tmp_path / "no" / "x", overwrite=True),
    ):
        pytest.fail("a missing parent must be refused")


def payload(path):
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def test_digests_of_the_data_are_in_the_header_and_the_data_is_read_once(tmp_path):
    read = []

    class Counted:
        def __init__(self, name, data):
            self.name, self.data = name, data

        def raw(self):
            read.append(self.name)
            return memoryview(self.data)

    tensors = [TensorRef(n, (40,), "U8", Counted(n, bytes(range(k, k + 40)))) for k, n in enumerate("abc")]
    parts = {
        "all": Digest(),
        "few": Digest(8),
        "middle": Digest(64, b"", 30, 90),
        "one": Digest(64, b"", 41, 42),
        "past": Digest(64, b"", 110, 500),
        "beyond": Digest(8, b"", 500, 600),
        "after": Digest(64, b"head", 0, 0),
        "tail": Digest(64, b"head", 119),
    }
    write_safetensors(tmp_path / "x", tensors, {"first": "1", "few": "?", "last": "2"}, computed=parts)
    assert read == ["a", "b", "c"]
    data = payload(tmp_path / "x")
    with open_tensors(tmp_path / "x") as file:
        found = dict(file.metadata)
        assert {name: tensor.load().tolist() for name, tensor in file.tensors.items()} == {
            n: list(range(k, k + 40)) for k, n in enumerate("abc")
        }
    assert list(found)[:3] == ["first", "few", "last"]
    for key, part in parts.items():
        expected = hashlib.sha256(part.before + data[part.start : part.stop]).hexdigest()[: part.digits]
        assert found[key] == expected, key


def test_digests_do_not_change_the_size(tmp_path):
    size = write_safetensors(tmp_path / "x", [ref("a")], {"d": Digest().blank}, computed={"d": Digest()})
    assert size == (tmp_path / "x").stat().st_size
    assert size == write_safetensors(tmp_path / "y", [ref("a")], {"d": Digest().blank})


def test_a_digest_of_wide_and_computed_tensors(tmp_path):
    tensors = [from_torch("a", torch.arange(6.0).reshape(2, 3)).flipped(), ref("b"), ref("c", ())]
    write_safetensors(tmp_path / "x", tensors, {}, computed={"d": Digest()})
    with open_tensors(tmp_path / "x") as file:
        assert file.metadata["d"] == hashlib.sha256(payload(tmp_path / "x")).hexdigest()
