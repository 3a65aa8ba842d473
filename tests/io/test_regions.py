"""Ranges of bytes between files: every way of copying gives the same bytes, and says the same of what is wrong."""

from __future__ import annotations

import errno
import os
import random
import threading

import pytest

from loratools.errors import MalformedFileError
from loratools.io import regions

linux = pytest.mark.skipif(
    not hasattr(os, "copy_file_range"), reason="copy_file_range and sendfile are Linux's"
)


def refuse(number):
    def call(*_):
        raise OSError(number, os.strerror(number))

    return call


def nothing(*_):
    return 0


WAYS = {
    "copy_file_range": {},
    "short calls": {"_CHUNK": 1000, "_PIECE": 300},
    "sendfile": {"copy_file_range": errno.EXDEV},
    "sendfile, as nothing was copied": {"copy_file_range": None},
    "memory": {"copy_file_range": errno.ENOSYS, "sendfile": errno.EINVAL},
    "memory, a sandbox": {"copy_file_range": errno.EPERM, "sendfile": errno.EPERM},
    "seeking": {"copy_file_range": errno.EOPNOTSUPP, "sendfile": errno.EINVAL, "seek": True},
}


@pytest.fixture(params=WAYS, ids=str)
def way(request, monkeypatch):
    """Each way of copying; whether a call that must not be used would be noticed is the last test's matter."""
    for name, value in WAYS[request.param].items():
        if name.startswith("_"):
            monkeypatch.setattr(regions, name, value)
        elif name == "seek":
            monkeypatch.setattr(regions, "_READ", regions._read_by_seeking)
            monkeypatch.setattr(regions, "_WRITE", regions._write_by_seeking)
        elif hasattr(os, name):
            monkeypatch.setattr(os, name, nothing if value is None else refuse(value))


@pytest.fixture
def files(tmp_path):
    """Descriptors of a file of 100 003 random bytes and of an empty one, and the bytes."""
    data = random.Random(1).randbytes(100_003)
    (tmp_path / "source").write_bytes(data)
    flags = getattr(os, "O_BINARY", 0)
    source = os.open(tmp_path / "source", os.O_RDONLY | flags)
    target = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT | flags)
    yield source, target, data
    os.close(source)
    os.close(target)


def content(target):
    buffer = bytearray(os.fstat(target).st_size)
    regions.read_at(target, 0, buffer)
    return bytes(buffer)


@pytest.mark.parametrize(
    ("start", "stop", "at"), [(0, 100_003, 0), (7, 70_001, 13), (99_999, 100_003, 1), (5, 5, 3)]
)
def test_every_way_copies_the_same_bytes(way, files, start, stop, at):
    source, target, data = files
    regions.preallocate(target, 120_000)
    steps = []
    regions.copy_range(source, target, start, stop, at, step=steps.append)
    expected = bytearray(120_000)
    expected[at : at + stop - start] = data[start:stop]
    assert content(target) == bytes(expected)
    assert sum(steps) == stop - start


def test_every_way_names_a_source_that_ends_too_early(way, files):
    source, target, _ = files
    with pytest.raises(
        MalformedFileError, match=r"^base: the file ends at byte 100,003\..*held 100,010 bytes"
    ):
        regions.copy_range(source, target, 50_000, 100_010, 0, path="base")


def test_every_way_stops_where_it_is_told(way, files, monkeypatch):
    source, target, _ = files
    monkeypatch.setattr(regions, "_CHUNK", 1000)
    steps = []

    def step(count):
        steps.append(count)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regions.copy_range(source, target, 0, 100_003, 0, step=step)
    assert len(steps) == 1
    assert os.fstat(target).st_size == steps[0] <= 1000


@linux
@pytest.mark.parametrize("name", ["copy_file_range", "sendfile"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_not_a_reason_to_try_otherwise(files, monkeypatch, name, number):
    source, target, _ = files
    if name == "sendfile":
        monkeypatch.setattr(os, "copy_file_range", refuse(errno.EXDEV))
    monkeypatch.setattr(os, name, refuse(number))
    with pytest.raises(OSError, match=os.strerror(number)):
        regions.copy_range(source, target, 0, 10, 0)


@linux
def test_the_kernel_copies_where_it_can(files, monkeypatch):
    source, target, data = files
    for name in ("_READ", "_WRITE"):
        monkeypatch.setattr(regions, name, refuse(errno.EIO))
    regions.copy_range(source, target, 0, 1000, 0)
    monkeypatch.setattr(os, "copy_file_range", refuse(errno.EXDEV))
    regions.copy_range(source, target, 1000, 2000, 1000)
    monkeypatch.undo()
    assert content(target) == data[:2000]


def test_reading_from_a_path_and_past_the_end(way, files, tmp_path):
    source, _, data = files
    buffer = bytearray(50)
    regions.read_at(tmp_path / "source", 100, buffer)
    assert buffer == data[100:150]
    regions.read_at(source, 99_953, memoryview(buffer))
    assert buffer == data[-50:]
    with pytest.raises(MalformedFileError, match=r"source: the file ends at byte 100,003"):
        regions.read_at(tmp_path / "source", 99_954, buffer)
    with pytest.raises(FileNotFoundError):
        regions.read_at(tmp_path / "none", 0, buffer)


def test_buffers_of_other_elements_than_bytes_and_short_calls(way, files, monkeypatch):
    _, target, _ = files
    monkeypatch.setattr(regions, "_MOST", 7)
    data = memoryview(bytearray(range(240))).cast("i")
    regions.write_at(target, 11, data)
    assert content(target) == bytes(11) + bytes(range(240))
    found = memoryview(bytearray(240)).cast("i")
    regions.read_at(target, 11, found)
    assert found == data


def test_threads_write_and_read_at_once(way, files):
    _, target, data = files
    wrong = []

    def work(number):
        for place in range(number, 400, 8):
            part = data[place * 250 : place * 250 + 250]
            regions.write_at(target, place * 250, part)
            found = bytearray(250)
            regions.read_at(target, place * 250, found)
            if found != part:
                wrong.append(place)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert content(target) == data[:100_000]


def test_room_is_made_at_once(files, monkeypatch):
    _, target, _ = files
    regions.preallocate(target, 5000)
    assert content(target) == bytes(5000)
    regions.preallocate(target, 0)
    assert content(target) == b""
    monkeypatch.setattr(os, "posix_fallocate", refuse(errno.EOPNOTSUPP), raising=False)
    regions.preallocate(target, 70)
    assert content(target) == bytes(70)
    monkeypatch.setattr(os, "posix_fallocate", refuse(errno.ENOSPC), raising=False)
    with pytest.raises(OSError, match="No space left"):
        regions.preallocate(target, 70)


def test_a_clone_is_the_file_or_nothing(tmp_path):
    (tmp_path / "source").write_bytes(b"data" * 1024)
    (tmp_path / "target").write_bytes(b"")
    cloned = regions.clone_file(str(tmp_path / "source"), str(tmp_path / "target"))
    assert (tmp_path / "target").read_bytes() == (b"data" * 1024 if cloned else b"")


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="ioctl is POSIX's")
def test_a_clone_asks_the_file_system(tmp_path, monkeypatch):
    import fcntl
    import sys

    def ioctl(target, request, source):
        assert request == 0x40049409
        os.write(target, os.read(source, 100))
        return 0

    (tmp_path / "source").write_bytes(b"data")
    (tmp_path / "target").write_bytes(b"")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    assert regions.clone_file(str(tmp_path / "source"), str(tmp_path / "target"))
    assert (tmp_path / "target").read_bytes() == b"data"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not regions.clone_file(str(tmp_path / "source"), str(tmp_path / "target"))
