"""What lies elsewhere: which parts of it are read, by how many requests, and where outputs wait to be uploaded."""

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

pytest.importorskip("fsspec")
import factories as make
import fsspec
import torch

from loratools import io
from loratools.errors import (
    LoraError,
    MalformedFileError,
    MissingFileError,
    OutputExistsError,
    ReadError,
    WriteError,
)
from loratools.io import ranged, remote, staging, storage, unchanged
from loratools.io.base import keys_of, load_rows
from loratools.io.mapped import MappedSource

URL = "memory://store/file.safetensors"


@pytest.fixture(autouse=True)
def memory():
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    ranged._groups.cache_clear()


@pytest.fixture
def reads(monkeypatch):
    """The ranges that were asked for."""
    found = []
    read = remote.Files.read

    def noted(self, url, start, stop):
        found.append((start, stop))
        return read(self, url, start, stop)

    monkeypatch.setattr(remote.Files, "read", noted)
    return found


def put(tmp_path, tensors, metadata=None):
    path = tmp_path / "file.safetensors"
    make.write_safetensors(path, tensors, metadata)
    fsspec.filesystem("memory").pipe_file("/store/file.safetensors", path.read_bytes())
    return path


def several(count, size):
    return {f"t{number:03}": torch.full((size,), number % 200, dtype=torch.uint8) for number in range(count)}


@pytest.mark.parametrize(
    ("path", "url"),
    [
        ("s3://bucket/key", True),
        ("hf://org/repo", True),
        ("simplecache::https://example.org/x", True),
        ("C://folder/file", False),  # a drive
        ("folder/file", False),
        ("./s3://bucket", False),
        ("/s3://bucket", False),
        ("://", False),
    ],
)
def test_urls_are_told_from_paths(path, url):
    assert storage.is_url(path) is url


def test_a_path_goes_to_the_system(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    assert storage.is_file(str(file))
    assert storage.is_dir(str(tmp_path))
    assert storage.names(str(tmp_path)) == ["file"]
    assert storage.size(str(file)) == 3
    assert storage.read_all(str(file), 3) == b"abc"
    assert storage.pinned(file) == storage.local(str(file)) == str(file)
    before = storage.tag(str(file))
    file.write_bytes(b"abcd")
    assert storage.tag(str(file)) != before


def test_small_neighbours_are_read_together_and_each_byte_once(tmp_path, reads):
    size = 300_000
    path = put(tmp_path, several(40, size))
    with io.open_tensors(URL) as file:
        reads.clear()
        for name, ref in file.tensors.items():
            assert ref.load().unique().tolist() == [int(name[1:]) % 200]
    # The first lies in what was read for the header.
    assert len(reads) <= 2 + path.stat().st_size // (ranged.GROUP - size)
    assert sum(stop - start for start, stop in reads) <= path.stat().st_size
    assert max(stop - start for start, stop in reads) <= ranged.GROUP


def test_a_large_tensor_is_read_alone(tmp_path, reads):
    put(tmp_path, {"a": torch.zeros(10), "large": torch.ones(ranged.GROUP // 2), "z": torch.zeros(10)})
    with io.open_tensors(URL) as file:
        reads.clear()
        assert file.tensors["large"].load().sum() == ranged.GROUP // 2
    assert [stop - start for start, stop in reads] == [2 * ranged.GROUP]


def test_threads_that_want_one_group_read_it_once(tmp_path, reads):
    put(tmp_path, several(8, 400_000))
    with io.open_tensors(URL) as file, ThreadPoolExecutor(8) as pool:
        reads.clear()
        assert len(list(pool.map(lambda ref: ref.load().numel(), [*file.tensors.values()] * 4))) == 32
    assert len(reads) == 1


def test_what_is_kept_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(ranged, "GROUP", 1000)
    put(tmp_path, several(400, 900) | {"pad": torch.zeros(ranged.HEAD, dtype=torch.uint8)})
    with io.open_tensors(URL) as file:
        for ref in file.tensors.values():
            ref.load()
    assert len(ranged._groups()._kept) == ranged._KEPT


def test_a_read_that_fails_is_tried_anew_by_the_next(tmp_path, monkeypatch):
    put(tmp_path, several(4, 400_000))
    file = io.open_tensors(URL)
    read = remote.Files.read
    monkeypatch.setattr(remote.Files, "read", lambda *_: b"")
    with pytest.raises(MalformedFileError, match="the file ends at byte"):
        file.tensors["t003"].load()
    monkeypatch.setattr(remote.Files, "read", read)
    assert file.tensors["t003"].load().unique().tolist() == [3]


def test_a_header_longer_than_the_first_request_is_read_to_its_end(tmp_path, reads):
    put(tmp_path, {"a": torch.arange(10)}, {"notes": "x" * (2 * ranged.HEAD)})
    with io.open_tensors(URL) as file:
        assert file.tensors["a"].load().tolist() == list(range(10))
        assert len(file.metadata["notes"]) == 2 * ranged.HEAD


def test_a_file_can_be_sent_to_a_worker_and_is_read_there(tmp_path):
    put(tmp_path, several(3, 400_000))
    refs = io.open_tensors(URL).tensors
    sent = pickle.dumps(list(refs.values()))
    assert len(sent) < 10_000
    assert [ref.load().unique().item() for ref in pickle.loads(sent)] == [0, 1, 2]


def test_a_worker_refuses_a_file_that_is_another_now(tmp_path, memory):
    put(tmp_path, several(3, 400_000))
    sent = pickle.dumps(io.open_tensors(URL).tensors["t001"])
    ranged._again.cache_clear()
    memory.pipe_file("/store/file.safetensors", b"x" * 100)
    with pytest.raises(ReadError, match="another now"):
        pickle.loads(sent)


def test_a_base_is_read_by_rows(tmp_path, reads):
    put(tmp_path, {"w": torch.arange(1_000_000, dtype=torch.float32).reshape(1000, 1000)})
    weight = keys_of(URL).parts[""]["w"]
    assert weight.file == URL
    reads.clear()
    assert load_rows(weight, 10, 12).flatten().tolist() == list(range(10_000, 12_000))
    assert [stop - start for start, stop in reads] == [8000]


def test_a_server_that_ignores_ranges_is_refused(tmp_path, monkeypatch):
    put(tmp_path, several(3, 400_000))
    monkeypatch.setattr(remote.Files, "read", lambda self, url, start, stop: b"x" * (stop - start + 1))
    with pytest.raises(ReadError, match="answers requests for parts"):
        io.open_tensors(URL)


@pytest.mark.parametrize("container", ["pickle", "npz"])
def test_other_containers_are_fetched_whole(tmp_path, memory, container):
    import numpy

    path = tmp_path / "whole"
    with open(path, "wb") as file:
        if container == "npz":
            numpy.savez(file, a=numpy.arange(5))
        else:
            torch.save({"a": torch.arange(5)}, file)
    memory.pipe_file("/store/whole", path.read_bytes())
    opened = io.open_tensors("memory://store/whole")
    assert (opened.container, opened.path) == (container, "memory://store/whole")
    assert opened.tensors["a"].load().tolist() == [0, 1, 2, 3, 4]
    assert not isinstance(opened.tensors["a"].source, MappedSource) or storage.local(
        "memory://store/whole"
    ) == str(opened.tensors["a"].source.file.path)


def test_a_copy_needs_room(tmp_path, memory, monkeypatch):
    memory.pipe_file("/store/x.bin", b"\x80\x02" + bytes(100))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(WriteError, match="102 bytes are needed"):
        storage.local("memory://store/x.bin")


def test_a_configuration_is_not_read_beyond_its_bound(memory):
    memory.pipe_file("/store/config.json", b"{" + b" " * 100 + b"}")
    with pytest.raises(MalformedFileError, match="more than 50 bytes"):
        storage.read_all("memory://store/config.json", 50)


def test_what_is_not_there_is_an_error_that_says_where():
    for ask in (storage.state, storage.size, storage.tag, storage.local, storage.names, io.open_tensors):
        with pytest.raises(MissingFileError, match="memory://store/none"):
            ask("memory://store/none")
    assert not storage.is_file("memory://store/none")
    assert not storage.is_dir("memory://store/none")


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def test_an_output_is_uploaded_when_it_is_whole(temporary, memory):
    url = "memory://store/out.bin"
    with staging.staged(url, overwrite=False) as local:
        with open(local, "wb") as file:
            file.write(b"whole")
        assert not storage.is_file(url)
    assert memory.cat_file("/store/out.bin") == b"whole"
    assert [path for path in temporary.rglob("*") if path.is_file()] == []


def test_an_output_that_fails_is_not_uploaded_and_its_error_names_the_url(temporary):
    url = "memory://store/out.bin"
    with pytest.raises(WriteError, match=url) as caught, staging.staged(url, overwrite=False) as local:
        raise WriteError("no", path=local)
    assert caught.value.path == url
    assert not storage.is_file(url)


def test_two_at_once_are_refused(temporary):
    url = "memory://store/out.bin"
    with (
        staging.staged(url, overwrite=True),
        pytest.raises(OutputExistsError, match="another process"),
        staging.staged(url, overwrite=True),
    ):
        pass


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="users are told apart by their number")
def test_a_folder_that_another_could_have_made_is_refused(temporary, tmp_path):
    place = staging.place("memory://store/out.bin")
    (tmp_path / "theirs").mkdir()
    os.symlink(tmp_path / "theirs", os.path.dirname(os.path.dirname(place)))
    with pytest.raises(WriteError, match="link"), staging.staged("memory://store/out.bin", overwrite=True):
        pass


def test_indices_and_configurations_are_uploaded_last(temporary, monkeypatch):
    order = []
    monkeypatch.setattr(remote, "upload", lambda path, url: order.append(url.rpartition("/")[2]))
    with staging.staged("memory://store/model", overwrite=False) as local:
        os.mkdir(local)
        for name in ("config.json", "b.safetensors", "a.index.json", "a.safetensors"):
            with open(os.path.join(local, name), "w") as file:
                file.write("x")
    assert order == ["a.safetensors", "b.safetensors", "config.json", "a.index.json"]


def test_errors_are_all_of_one_base(monkeypatch):
    def failing(*_):
        raise RuntimeError("anything")

    monkeypatch.setattr(remote, "_system", failing)
    for ask in (storage.is_file, storage.size, storage.names, io.open_tensors):
        with pytest.raises(LoraError, match="anything"):
            ask("memory://store/x")


def _put(url, data):
    with fsspec.open(url, "wb") as file:
        file.write(data)


CHANGES_ELSEWHERE = {
    "written": (lambda url: _put(url, b'{"a": 2}'), "its size and state are "),
    "longer": (lambda url: _put(url, b'{"a": 12}'), "its size and state are '9 "),
    "gone": (
        lambda url: fsspec.filesystem("memory").rm(url),
        r"it cannot be looked up any more \(nothing is there",
    ),
}


@pytest.mark.parametrize("name", CHANGES_ELSEWHERE)
@pytest.mark.parametrize("writes", [True, False])
def test_a_file_that_changes_in_its_store_is_refused(tmp_path, name, writes):
    change, how = CHANGES_ELSEWHERE[name]
    url = "memory://store/config.json"
    _put(url, b'{"a": 1}')

    @unchanged.watched
    def work():
        storage.read_all(url, 100)
        if writes:
            with io.atomic_output(tmp_path / "out", False):
                change(url)
        else:
            change(url)

    with pytest.raises(ReadError, match=f"the file has changed while it was read: {how}") as caught:
        work()
    assert caught.value.path == url
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("container", ["safetensors", "pt"])
def test_tensors_that_change_in_their_store_are_refused(tmp_path, container):
    if container == "pt":
        torch.save({"a": torch.ones(4)}, tmp_path / "x")
    else:
        make.write_safetensors(tmp_path / "x", {"a": torch.ones(4)}, None)
    url, data = f"memory://store/x.{container}", (tmp_path / "x").read_bytes()
    _put(url, data)

    @unchanged.watched
    def work(later):
        with io.open_tensors(url) as opened:
            later()
            return opened.tensors["a"].load().tolist()

    assert work(lambda: None) == [1.0] * 4
    with pytest.raises(ReadError, match="has changed while it was read"):
        work(lambda: _put(url, data))
