"""Archives and pickles that become more than they are: zips that inflate or lie, tuples of tuples, endless views."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from loratools.errors import MalformedFileError, UnsafePickleError
from loratools.io import archive, opcodes
from loratools.io.reader import open_tensors
from tests.fuzz.mutators import zipped

torch = pytest.importorskip("torch")


def saved(value: object, *, zip_: bool = True) -> bytes:
    made = io.BytesIO()
    torch.save(value, made, _use_new_zipfile_serialization=zip_)
    return made.getvalue()


def members(data: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as opened:
        return [(info.filename, opened.read(info)) for info in opened.infolist()]


def refused(path: Path, data: bytes, words: str) -> MalformedFileError:
    path.write_bytes(data)
    with pytest.raises(MalformedFileError, match=words) as caught:
        open_tensors(path)
    return caught.value


def test_an_archive_that_inflates_beyond_measure_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "_INFLATED", 1 << 20)
    stream = io.BytesIO()
    np.savez_compressed(stream, a=np.zeros(1 << 20, "<f4"))
    refused(tmp_path / "x.npz", stream.getvalue(), "would inflate from")
    parts = [*members(saved({"a": torch.ones(2)})), ("archive/data/9", bytes(4 << 20))]
    refused(tmp_path / "x.pt", zipped(parts, zipfile.ZIP_DEFLATED), "would inflate from")


def test_zeros_that_pack_well_are_read(tmp_path: Path) -> None:
    """What deflate makes of an adapter's untouched factors is no bomb."""
    path = tmp_path / "x.npz"
    np.savez_compressed(path, a=np.zeros(1 << 20, "<f4"))
    with open_tensors(path) as opened:
        assert bytes(opened.tensors["a"].raw()) == bytes(4 << 20)


def edited(data: bytes, at: int, code: str, value: int) -> bytes:
    """The archive with a field of its last member's entry in the directory changed."""
    place = data.rindex(b"PK\x01\x02") + at
    size = struct.calcsize(code)
    return data[:place] + struct.pack(code, value) + data[place + size :]


# Places in an entry of the directory: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3.12.
LIES = {
    "a method that nobody uses": (10, "<H", 14, "compressed in a way that is not read"),
    "inflates beyond deflate": (24, "<I", 0xF0000000, "would inflate from|two sizes"),
    "more bytes than the file": (20, "<I", 0xF0000000, "outside the file"),
    "over another": (42, "<I", 0, "lies over another"),
}


@pytest.mark.parametrize("case", LIES)
@pytest.mark.parametrize("packed", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_directory_that_lies_is_refused(case: str, packed: int, tmp_path: Path) -> None:
    at, code, value, words = LIES[case]
    data = zipped(members(saved({"a": torch.ones(64), "b": torch.zeros(64)})), packed)
    error = refused(tmp_path / "x.pt", edited(data, at, code, value), words)
    assert error.keys


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packings_without_a_bound_are_refused(method: int, tmp_path: Path) -> None:
    data = zipped(members(saved({"a": torch.ones(64)})), method)
    refused(tmp_path / "x.pt", data, "compressed in a way that is not read")


def nested_tuples(levels: int) -> bytes:
    """A tuple that holds the one below twice, as a dict's key: 2 ** levels to whoever hashes it."""
    codes = [b"\x80\x02}", b")q\x00"]
    for _ in range(levels):
        codes += [b"h\x00h\x00\x86q\x00", b"0"]
    return b"".join([*codes, b"h\x00K\x01s."])


def test_tuples_of_tuples_are_refused_before_anybody_visits_them(tmp_path: Path) -> None:
    with pytest.raises(MalformedFileError, match="tuples of the same tuples"):
        opcodes.scan(nested_tuples(60), "x.pt")
    assert opcodes.scan(nested_tuples(10), "x.pt").imports == ()
    parts = [
        (name, nested_tuples(60) if name.endswith("data.pkl") else content)
        for name, content in members(saved({"a": torch.ones(2)}))
    ]
    refused(tmp_path / "x.pt", zipped(parts), "tuples of the same tuples")


def test_a_long_tuple_is_no_bomb() -> None:
    assert opcodes.scan(pickle.dumps(tuple(range(200_000))), "x.pt").imports == ()


@pytest.mark.parametrize(
    "code",
    [b"T\xff\xff\xff\x7f", b"\x8d" + b"\xff" * 7 + b"\x7f", b"\x8b\xff\xff\xff\x7f", b"X\xff\xff\xff\xff"],
)
def test_lengths_that_the_file_does_not_have_take_no_memory(code: bytes, tmp_path: Path) -> None:
    """Of a file, as of bytes: Python makes room for as much as is asked of a file."""
    path = tmp_path / "x.ckpt"
    path.write_bytes(b"\x80\x02" + code)
    with path.open("rb") as file, pytest.raises(MalformedFileError, match="the pickle is damaged"):
        opcodes.scan(file, "x.ckpt")
    with pytest.raises(MalformedFileError, match="the pickle is damaged"):
        open_tensors(path)


def test_an_archive_whose_own_records_are_no_numbers_is_refused_as_ours(tmp_path: Path) -> None:
    """torch's reader, which is C++, raises IndexError for some of them."""
    parts = [
        (name, b"x" * len(content) if name.endswith((".format_version", "version")) else content)
        for name, content in members(saved({"a": torch.ones(2)}))
    ]
    path = tmp_path / "x.pt"
    path.write_bytes(zipped(parts))
    with pytest.raises(MalformedFileError, match=r"archive of torch\.save is damaged"):
        open_tensors(path)


def test_storages_that_a_file_has_no_room_for_are_refused_before_they_are_made(tmp_path: Path) -> None:
    data = saved({"a": torch.zeros(1000)}, zip_=False)
    huge = data.replace(b"M\xe8\x03", b"\x8a\x06" + (2**40).to_bytes(6, "little"))
    assert huge != data
    refused(tmp_path / "x.ckpt", huge, "the file is truncated: its storages take 4,398,046,511,104 bytes")


def test_references_to_anything_but_storages_are_refused(tmp_path: Path) -> None:
    parts = [
        (name, content.replace(b"X\x07\x00\x00\x00storage", b"X\x07\x00\x00\x00storagx"))
        for name, content in members(saved({"a": torch.ones(2)}))
    ]
    refused(tmp_path / "x.pt", zipped(parts), "refers to something other than a storage")


def test_views_that_take_far_more_than_the_file_has_are_refused(tmp_path: Path) -> None:
    one = torch.ones(1)
    refused(tmp_path / "x.pt", saved({"a": one.expand(1 << 40)}), "tensors take 4,398,046,511,104 bytes")
    many = torch.ones(1 << 20)
    refused(tmp_path / "y.pt", saved({str(n): many for n in range(100)}), "of which the file holds")
    path = tmp_path / "z.pt"
    path.write_bytes(saved({"a": one.expand(1000), "t": many, "u": many.t()}))
    with open_tensors(path) as opened:
        assert opened.tensors["a"].nbytes == 4000
        assert bytes(opened.tensors["a"].raw()) == bytes(one.numpy().tobytes() * 1000)


def test_containers_that_hold_each_other_by_long_names_are_refused(tmp_path: Path) -> None:
    inner = {"a" * 4000 + str(n): torch.zeros(0) for n in range(200)}
    value = {"b" * 4000 + str(n): inner for n in range(200)}
    refused(tmp_path / "x.pt", saved(value), "keys of the pickle, joined")


def test_no_import_is_reached_through_a_reference(tmp_path: Path) -> None:
    parts = [
        (
            name,
            content.replace(b"torch\nFloatStorage", b"os\nsystem") if name.endswith("data.pkl") else content,
        )
        for name, content in members(saved({"a": torch.ones(2)}))
    ]
    path = tmp_path / "x.pt"
    path.write_bytes(zipped(parts))
    with pytest.raises(UnsafePickleError) as caught:
        open_tensors(path)
    assert caught.value.keys == ("os.system",)
