"""Archives of torch.save, rewritten where they lie: what torch would have saved, checksums included."""

from __future__ import annotations

import collections
import io
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from rewriting import checkpoint, naive, pickled, raw, rewritten

from loratools.errors import (
    ConversionError,
    MalformedFileError,
)
from loratools.io import open_tensors
from loratools.io.base import Shard, Weight
from loratools.io.rewrite import Rewrite


def id_masked(path):
    """A file's bytes without torch's digest of all its checksums, which is no checksum of the data, and its own."""
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("serialization_id"))
        content = archive.read(name)
    assert data.count(content) == 1
    crc = zlib.crc32(content).to_bytes(4, "little")
    assert data.count(crc) == 2
    return data.replace(content, bytes(len(content))).replace(crc, bytes(4))


@pytest.mark.parametrize("width", [0, 1, 37])
@pytest.mark.parametrize("crc", [True, False])
def test_a_torch_archive_is_the_one_that_torch_would_have_saved(tmp_path, width, crc):
    old, flat = checkpoint(0, width)
    new, new_flat = checkpoint(1, width)
    keys = [key for key in flat if key not in ("slice", "odd")]
    new["state_dict"] = collections.OrderedDict(
        {key: new_flat[key] if key in keys else flat[key] for key in flat}
    )
    kept = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(crc)
    try:
        torch.save(old, tmp_path / "model.ckpt")
        (tmp_path / "expected").mkdir()
        torch.save(new, tmp_path / "expected" / "model.ckpt")
    finally:
        torch.serialization.set_crc32_options(kept)
    shard, weights = pickled(tmp_path / "model.ckpt", flat)
    before = (tmp_path / "model.ckpt").read_bytes()
    rewritten(shard, weights, {key: new_flat[key] for key in keys}, tmp_path / "out")
    expected = (tmp_path / "expected" / "model.ckpt").read_bytes()
    if crc:
        assert id_masked(tmp_path / "out") == id_masked(tmp_path / "expected" / "model.ckpt")
        assert zipfile.ZipFile(tmp_path / "out").testzip() is None
    else:
        assert len(expected) == len(before)
        assert (tmp_path / "out").read_bytes() == naive(before, weights, {key: new_flat[key] for key in keys})
    assert (tmp_path / "model.ckpt").read_bytes() == before
    loaded = torch.load(tmp_path / "out", weights_only=True)
    assert loaded["epoch"] == 7
    for key, tensor in new["state_dict"].items():
        assert raw(loaded["state_dict"][key]) == raw(tensor)
    with open_tensors(tmp_path / "out") as file:  # which compares the checksums
        assert raw(file.tensors["d.weight"].load()) == raw(new_flat["d.weight"])


def test_a_storage_of_which_a_part_changes(tmp_path, monkeypatch):
    from loratools.io import _archive_sums

    monkeypatch.setattr(_archive_sums, "_PIECE", 64)
    base = torch.randn(100)
    flat = {"first": base[:40], "second": base[40:], "other": torch.randn(3)}
    torch.save(flat, tmp_path / "model.pt")
    shard, weights = pickled(tmp_path / "model.pt", flat)
    rewritten(shard, weights, {"second": torch.zeros(60)}, tmp_path / "out")
    assert zipfile.ZipFile(tmp_path / "out").testzip() is None
    loaded = torch.load(tmp_path / "out", weights_only=True)
    assert loaded["first"].equal(flat["first"])
    assert not loaded["second"].any()
    assert loaded["other"].equal(flat["other"])


def test_the_form_before_zip_has_no_checksums(tmp_path):
    flat = {"a": torch.randn(50), "b": torch.randn(7).half()}
    torch.save({**flat, "epoch": 3}, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    shard, weights = pickled(tmp_path / "model.pt", flat)
    before = (tmp_path / "model.pt").read_bytes()
    new = {"b": torch.ones(7).half()}
    assert rewritten(shard, weights, new, tmp_path / "out") == naive(before, weights, new)
    assert torch.load(tmp_path / "out", weights_only=True)["b"].equal(new["b"])


class Pipe(io.RawIOBase):
    """What cannot seek: zipfile then writes data descriptors, as torch does."""

    def __init__(self, path):
        self.file = open(path, "wb")  # noqa: SIM115 - closed with the test

    def writable(self):
        return True

    def write(self, data):
        return self.file.write(data)

    def flush(self):
        self.file.flush()


def by_zipfile(path, content, *, piped, zip64):
    with zipfile.ZipFile(Pipe(path) if piped else path, "w") as archive:
        for name, data in content.items():
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=zip64) as member:
                member.write(data)


def by_hand(path, content):
    """Data descriptors without a signature, which is optional."""
    out = bytearray()
    directory = bytearray()
    for name, data in content.items():
        crc = zlib.crc32(data).to_bytes(4, "little")
        sizes = len(data).to_bytes(4, "little") * 2
        version = b"\x14\0\x08\0\0\0\0\0\x21\0"  # 2.0, with a descriptor, stored, 1980-01-01
        lengths = len(name).to_bytes(2, "little") + b"\0\0"
        directory += b"PK\x01\x02\x14\0" + version + crc + sizes + lengths + bytes(10)
        directory += len(out).to_bytes(4, "little") + name.encode()
        out += b"PK\x03\x04" + version + bytes(12) + lengths + name.encode() + data + crc + sizes
    count = len(content).to_bytes(2, "little")
    tail = b"PK\x05\x06" + bytes(4) + count * 2 + len(directory).to_bytes(4, "little")
    path.write_bytes(out + directory + tail + len(out).to_bytes(4, "little") + bytes(2))


ARCHIVES = {
    "plain": lambda path, content: by_zipfile(path, content, piped=False, zip64=False),
    "zip64": lambda path, content: by_zipfile(path, content, piped=False, zip64=True),
    "descriptors": lambda path, content: by_zipfile(path, content, piped=True, zip64=False),
    "descriptors of zip64": lambda path, content: by_zipfile(path, content, piped=True, zip64=True),
    "descriptors without a signature": by_hand,
}


@pytest.fixture(params=ARCHIVES, ids=str)
def archive(request, tmp_path):
    """An archive of three records, its Shard, and a Weight in the second."""
    data = {"m/data.pkl": b"pickle", "m/data/0": bytes(range(100)), "m/data/1": b"other" * 9}
    path = tmp_path / "model.pt"
    ARCHIVES[request.param](path, data)
    found = path.read_bytes()
    weight = Weight("w", (25,), "F32", str(path), found.index(data["m/data/0"]))
    return Shard(str(path), path.name, "", "pickle", len(found), {}, ("w",)), weight, found


def test_every_form_of_zip_archive(archive, tmp_path):
    shard, weight, before = archive
    data = rewritten(shard, {"w": weight}, {"w": torch.arange(25.0)}, tmp_path / "out")
    content = raw(torch.arange(25.0))
    old, new = (zlib.crc32(value).to_bytes(4, "little") for value in (bytes(range(100)), content))
    assert before.count(old) == 2
    assert data == before.replace(bytes(range(100)), content).replace(old, new)
    found = zipfile.ZipFile(tmp_path / "out")
    assert found.testzip() is None
    assert found.read("m/data/0") == content
    assert found.read("m/data/1") == b"other" * 9


def test_a_checksum_that_is_not_where_it_belongs(archive, tmp_path):
    shard, weight, before = archive
    crc = zlib.crc32(bytes(range(100))).to_bytes(4, "little")
    Path(shard.path).write_bytes(before.replace(crc, b"\1\2\3\4", 1))
    with pytest.raises(MalformedFileError, match=r"checksum of m/data/0 is not where it belongs"):
        rewritten(shard, {"w": weight}, {"w": torch.arange(25.0)}, tmp_path / "out")


def test_a_tensor_outside_of_the_records(archive, tmp_path):
    shard, weight, _ = archive
    with pytest.raises(MalformedFileError, match="lie in no record"):
        rewritten(
            shard, {"w": weight._replace(start=weight.start - 8)}, {"w": torch.ones(25)}, tmp_path / "out"
        )


def test_tied_tensors_change_together_or_not_at_all(tmp_path):
    flat = {"a": torch.randn(6, 4), "other": torch.randn(4)}
    flat["b"] = flat["a"]
    flat["part"] = flat["a"][2:3]
    torch.save(flat, tmp_path / "model.pt")
    shard, weights = pickled(tmp_path / "model.pt", flat)
    for changed in (["a"], ["b"], ["part"], ["a", "b"], ["a", "b", "part"]):
        with pytest.raises(ConversionError, match="share their bytes"):
            Rewrite(shard, weights, str(tmp_path / "out"), changed)
    shard = shard._replace(keys=("a", "b", "other"))
    with pytest.raises(ConversionError, match="share their bytes"):
        Rewrite(shard, weights, str(tmp_path / "out"), ["b", "other"])
    new = torch.randn(6, 4)
    rewritten(shard, weights, {"a": new, "b": new}, tmp_path / "out")
    assert torch.load(tmp_path / "out", weights_only=True)["b"].equal(new)
    with pytest.raises(ConversionError, match="tensor b shares its bytes with another"):
        rewritten(shard, weights, {"a": new, "b": new + 1}, tmp_path / "out")
