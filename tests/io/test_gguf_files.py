"""GGUF files: values and tensors as they are, both ways, and what is no such file refused by name."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import loratools as lt
from loratools import io
from loratools.errors import LayoutError, MalformedFileError, OutputExistsError
from loratools.tensors import from_torch

METADATA = {
    "general.architecture": "llama",
    "general.type": "adapter",
    "adapter.type": "lora",
    "adapter.lora.alpha": "16.0",
    "adapter.alora.invocation_tokens": "[3, 4, 5]",
    "general.name": "Ada, ÄÖ",
}


def _tensors() -> list:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "blk.0.attn_q.weight.lora_a": (3, 8),
        "blk.0.attn_q.weight.lora_b": (5, 3),
        "x.experts": (2, 3, 4),
    }
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    return [
        from_torch(name, torch.randn(shape, generator=generator).to(dtype))
        for (name, shape), dtype in zip(shapes.items(), dtypes, strict=True)
    ]


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _file(
    tensors: bytes = b"", values: bytes = b"", counts: tuple[int, int] = (0, 0), version: int = 3
) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + values + tensors


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tensors = _tensors()
    size = io.write_gguf(tmp_path / "x.gguf", tensors, METADATA)
    assert size == (tmp_path / "x.gguf").stat().st_size == io.gguf_size(tensors, METADATA)
    assert size % 32 == 0
    with io.open_tensors(tmp_path / "x.gguf") as opened:
        assert opened.container == io.sniff(tmp_path / "x.gguf") == "gguf"
        assert opened.metadata == METADATA
        assert list(opened.tensors) == [ref.name for ref in tensors]
        for ref in tensors:
            found = opened.tensors[ref.name]
            assert (found.shape, found.dtype) == (ref.shape, ref.dtype)
            assert torch.equal(found.load(), ref.load())


def test_the_type_of_every_value_is_kept(tmp_path: Path) -> None:
    codes = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    values = _string("general.type") + struct.pack("<I", 8) + _string("adapter")
    for number, code in codes.items():
        values += _string(f"one.{number}") + struct.pack("<I" + code, number, 1)
        values += _string(f"two.{number}") + struct.pack("<IIQ2" + code, 9, number, 2, 0, 1)
    values += _string("names") + struct.pack("<IIQ", 9, 8, 2) + _string("a") + _string("")
    data = _file(values=values, counts=(0, 2 * len(codes) + 2))
    data += bytes(-len(data) % 32)
    (tmp_path / "x.gguf").write_bytes(data)
    with io.open_tensors(tmp_path / "x.gguf") as opened:
        assert opened.metadata["names"] == '["a", ""]'
        io.write_gguf(tmp_path / "y.gguf", [], opened.metadata)
    assert (tmp_path / "y.gguf").read_bytes() == data


ENTRY = _string("a") + struct.pack("<I2QIQ", 2, 4, 4, 0, 0)
BAD = {
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "version 1": (_file(version=1), "version 1"),
    "version 9": (_file(version=9), "version 9"),
    "nothing behind the magic": (b"GGUF\3\0\0\0\1\0", "truncated"),
    "too many tensors": (_file(counts=(2**60, 0)), "announces .* tensors"),
    "too many values": (_file(counts=(0, 2**40)), "announces .* values"),
    "a name that is too long": (
        _file(values=struct.pack("<Q", 2**62) + bytes(20), counts=(0, 1)),
        "truncated",
    ),
    "a name that is no text": (
        _file(values=struct.pack("<Q", 2) + b"\xff\xfe" + bytes(20), counts=(0, 1)),
        "no text",
    ),
    "a type that is not there": (
        _file(values=_string("k") + struct.pack("<I", 99) + bytes(8), counts=(0, 1)),
        "k has type 99",
    ),
    "an array that is too long": (
        _file(values=_string("k") + struct.pack("<IIQ", 9, 4, 2**61), counts=(0, 1)),
        "truncated",
    ),
    "strings that are too many": (
        _file(values=_string("k") + struct.pack("<IIQ", 9, 8, 2**50), counts=(0, 1)),
        "announces .* strings",
    ),
    "arrays of arrays": (
        _file(values=_string("k") + struct.pack("<IIQ", 9, 9, 1), counts=(0, 1)),
        "array of arrays",
    ),
    "a value twice": (
        _file(values=2 * (_string("k") + struct.pack("<II", 4, 1)), counts=(0, 2)),
        "k is there twice",
    ),
    "an alignment of 3": (
        _file(values=_string("general.alignment") + struct.pack("<II", 4, 3), counts=(0, 1)),
        "general.alignment is 3",
    ),
    "many axes": (
        _file(tensors=_string("a") + struct.pack("<I", 7) + bytes(80), counts=(1, 0)),
        "7 axes",
    ),
    "no data": (_file(tensors=ENTRY, counts=(1, 0)), "a would end at byte"),
    "one name twice": (_file(tensors=ENTRY + ENTRY, counts=(2, 0)) + bytes(128), "one name"),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_files_are_refused_by_name(case: str, tmp_path: Path) -> None:
    data, message = BAD[case]
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(MalformedFileError, match=message) as caught:
        io.open_tensors(tmp_path / "x.gguf")
    assert caught.value.path == str(tmp_path / "x.gguf")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    io.write_gguf(tmp_path / "x.gguf", _tensors(), METADATA)
    whole = (tmp_path / "x.gguf").read_bytes()
    # The last tensor has 24 values of two bytes, then 16 of padding, which nobody misses.
    for length in range(9, len(whole) - 16, 7):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(MalformedFileError):
            io.open_tensors(tmp_path / "cut.gguf")


def test_what_gguf_cannot_hold_is_refused(tmp_path: Path) -> None:
    name = from_torch("x" * 64, torch.zeros(2))
    odd = from_torch("x", torch.zeros(2, dtype=torch.bool))
    for refs, metadata, message in (
        ([name], {}, "cannot be written as GGUF"),
        ([odd], {}, "is BOOL"),
        ([], {"adapter.lora.alpha": "many"}, "adapter.lora.alpha"),
    ):
        with pytest.raises(LayoutError, match=message):
            io.write_gguf(tmp_path / "x.gguf", refs, metadata)
    assert list(tmp_path.iterdir()) == []


def test_an_output_is_whole_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"old")
    with pytest.raises(OutputExistsError):
        io.write_gguf(tmp_path / "x.gguf", _tensors(), METADATA)

    def refuse(path: str) -> None:
        raise LayoutError("no")

    with pytest.raises(LayoutError):
        io.write_gguf(tmp_path / "x.gguf", _tensors(), METADATA, overwrite=True, check=refuse)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


@pytest.mark.peers
def test_the_gguf_package_reads_and_writes_the_same(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    tensors = _tensors()[:2]
    metadata = {key: text for key, text in METADATA.items() if "alora" not in key}
    io.write_gguf(tmp_path / "ours.gguf", tensors, metadata)
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 16.0)
    writer.add_string("general.name", METADATA["general.name"])
    for ref in tensors:
        writer.add_tensor(ref.name, ref.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


@pytest.mark.peers
def test_quantised_tensors_are_float32_and_copied_as_they_are(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    values = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    blocks = gguf.quantize(values, kind)
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    writer.add_type("adapter")
    writer.add_tensor("blk.0.attn_v.weight.lora_a", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with io.open_tensors(tmp_path / "q.gguf") as opened:
        (ref,) = opened.tensors.values()
        assert (ref.shape, ref.dtype) == ((6, 64), "F32")
        np.testing.assert_array_equal(ref.load().numpy(), gguf.dequantize(blocks, kind))
        assert np.abs(ref.numpy() - values).max() < np.abs(values).max() / 127
        io.write_gguf(tmp_path / "again.gguf", [ref], opened.metadata)
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "q.gguf").read_bytes()


def test_a_model_is_a_checkpoint(tmp_path: Path) -> None:
    refs = [from_torch(name, torch.zeros(4, 4)) for name in ("token_embd.weight", "blk.0.attn_q.weight")]
    metadata = {"general.architecture": "llama", "general.type": "model"}
    io.write_gguf(tmp_path / "model.gguf", refs, metadata)
    with pytest.raises(lt.errors.NotAnAdapterError, match="a model checkpoint, not a LoRA adapter"):
        lt.load(tmp_path / "model.gguf")
