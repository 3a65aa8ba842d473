"""Headers that claim what is not there: lengths, counts, shapes, offsets; and a million tensors that are."""

from __future__ import annotations

import io
import json
import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from loratools.errors import LoraError, MalformedFileError
from loratools.io import header
from loratools.io.gguf_files import read_gguf
from loratools.io.reader import open_tensors
from tests.fuzz.mutators import zipped


def framed(text: str, data: bytes = b"") -> bytes:
    return len(text.encode()).to_bytes(8, "little") + text.encode() + data


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40 - 1, header.MAX_LENGTH + 1, 100])
def test_a_length_that_the_file_does_not_have_takes_no_memory(length: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b'{"a":' + bytes(40))
    tracemalloc.start()
    with pytest.raises(MalformedFileError):
        open_tensors(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def table(count: int) -> str:
    entries = (f'"{n:07}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for n in range(count))
    return "{" + ",".join(entries) + "}"


def measured(count: int) -> float:
    """Bytes of memory for each tensor of a file that has as many of them, at most."""
    data = framed(table(count))
    tracemalloc.start()
    found = header.parse(data, len(data), "x.safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.entries) == count
    return peak / count


def test_memory_grows_with_the_count_of_tensors_and_no_faster() -> None:
    few, many = measured(5_000), measured(40_000)
    assert many < 2 * few
    assert many < 4000


def test_the_same_name_any_number_of_times_is_found_in_linear_time() -> None:
    """Each counted among all the others, a hundred thousand would take ten thousand million steps."""
    entry = '"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    data = framed("{" + ",".join([entry] * 100_000) + "}")
    with pytest.raises(MalformedFileError, match="same key more than once") as caught:
        header.parse(data, len(data), "x.safetensors")
    assert caught.value.keys == ("a",)


DEEP = "[" * 900 + "]" * 900
ENTRIES = {
    "deep shape": f'{{"dtype":"F32","shape":{DEEP},"data_offsets":[0,0]}}',
    "deep dtype": f'{{"dtype":{DEEP},"shape":[],"data_offsets":[0,4]}}',
    "deep offsets": f'{{"dtype":"F32","shape":[],"data_offsets":{DEEP}}}',
    "many fields": "{" + ",".join(f'"f{n}":1' for n in range(50_000)) + "}",
    "huge offsets": f'{{"dtype":"F32","shape":[1],"data_offsets":[{10**30},{10**30 + 4}]}}',
    "huge dimension": f'{{"dtype":"F32","shape":[0,{10**400}],"data_offsets":[0,0]}}',
    "many dimensions": f'{{"dtype":"F32","shape":[{",".join(["0"] * 50_000)}],"data_offsets":[0,0]}}',
    "a list": "[]",
    "infinity": '{"dtype":"F32","shape":[1e999],"data_offsets":[0,NaN]}',
}


@pytest.mark.parametrize("case", ENTRIES)
def test_wild_entries_are_refused_in_a_few_words(case: str) -> None:
    data = framed(f'{{"a":{ENTRIES[case]}}}', bytes(4))
    with pytest.raises(MalformedFileError) as caught:
        header.parse(data, len(data), "x.safetensors")
    assert len(str(caught.value)) < 600


NAMES = ("../../x", "/etc/passwd", "a\\x00b", "\\x1b[2J", "C:\\\\x", "x" * 10_000, "\\u202e")


def test_names_are_only_names(tmp_path: Path) -> None:
    """Nothing is ever opened by a tensor's name; messages show what would steer a terminal as an escape."""
    names = [
        json.loads(f'"{name}"') if "\\u" in name else name.encode().decode("unicode_escape") for name in NAMES
    ]
    entries = {name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}
    path = tmp_path / "x.safetensors"
    path.write_bytes(framed(json.dumps(entries)))
    with open_tensors(path) as opened:
        assert list(opened.tensors) == names
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    broken = {name: {**entry, "dtype": "F0"} for name, entry in entries.items()}
    path.write_bytes(framed(json.dumps(broken)))
    with pytest.raises(MalformedFileError) as caught:
        open_tensors(path)
    assert caught.value.keys == tuple(names)
    assert not {"\x00", "\x1b", "\u202e"} & {*str(caught.value)}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


Told = tuple[str, tuple[int, ...], int, int]


def gguf(tensors: Sequence[Told], values: Sequence[bytes] = (), data: int = 0) -> bytes:
    """A file of such tensors: name, shape, type, offset."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values)) + b"".join(values)
    for name, shape, number, offset in tensors:
        head += (
            text(name)
            + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
            + struct.pack("<IQ", number, offset)
        )
    return head + bytes(-len(head) % 32 + data)


def read(tmp_path: Path, data: bytes) -> object:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    return read_gguf(str(path), len(data))


BINARY = {
    "a value of 2**63 letters": gguf([], [text("a") + struct.pack("<IQ", 8, 2**63)]),
    "an array of 2**61 numbers": gguf([], [text("a") + struct.pack("<IIQ", 9, 10, 2**61)]),
    "an array of 2**40 texts": gguf([], [text("a") + struct.pack("<IIQ", 9, 8, 2**40)]),
    "a shape of 2**256 values": gguf([("a", (2**64 - 1,) * 4, 0, 0)]),
    "an offset of 2**64": gguf([("a", (1,), 0, 2**64 - 1)]),
    "an alignment of 2**63": gguf(
        [("a", (1,), 0, 0)], [text("general.alignment") + struct.pack("<IQ", 10, 2**63)]
    ),
    "2**64 tensors": b"GGUF" + struct.pack("<IQQ", 3, 2**64 - 1, 0),
    "tensors over each other": gguf([("a", (8,), 0, 0), ("b", (8,), 0, 16)], data=64),
    "quantised tensors over each other": gguf([("a", (1024,), 2, 0), ("b", (1024,), 2, 32)], data=2048),
    "a quantised tensor of 2**60 values": gguf([("a", (2**60,), 2, 0)], data=64),
}


@pytest.mark.parametrize("case", BINARY)
def test_gguf_files_that_claim_too_much_are_refused(case: str, tmp_path: Path) -> None:
    tracemalloc.start()
    with pytest.raises(MalformedFileError):
        read(tmp_path, BINARY[case])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_model_s_long_arrays_are_told_of_by_their_length(tmp_path: Path) -> None:
    values = [text("tokens") + struct.pack("<IIQ", 9, 0, 1000) + bytes(1000)]
    found = read(tmp_path, gguf([], values))
    assert found.metadata == {"tokens": "[1,000 values]"}
    found.close()


def test_an_adapter_s_arrays_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratools.io.gguf_files._LONGEST_ARRAY", 100)
    adapter = text("general.type") + struct.pack("<I", 8) + text("adapter")
    values = [adapter, text("tokens") + struct.pack("<IIQ", 9, 0, 101) + bytes(101)]
    with pytest.raises(MalformedFileError, match="tokens has 101 values"):
        read(tmp_path, gguf([], values))


def array(head: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode() + bytes(24)


FIELDS = "{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}"
ARRAYS = {
    "objects": FIELDS.format(descr="'|O'", order="False", shape="(3,)"),
    "a record of objects": FIELDS.format(descr="[('a', '|O')]", order="False", shape="(3,)"),
    "a negative shape": FIELDS.format(descr="'<f4'", order="False", shape="(-6,)"),
    "a shape of two negative axes": FIELDS.format(descr="'<f4'", order="True", shape="(-2, -3)"),
    "a huge shape": FIELDS.format(descr="'<f4'", order="False", shape="(" + "9" * 4000 + ",)"),
    "many axes": FIELDS.format(descr="'<f4'", order="True", shape="(" + "1," * 1000 + "6)"),
    "a zero that hides a huge axis": FIELDS.format(descr="'<f4'", order="False", shape=f"(0, {10**30})"),
    "deep": "(" * 3000,
    "signs": "-" * 9000 + "1",
    "longer than numpy reads": " " * 20_000,
    "a call": "__import__('os').getcwd()",
}


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_that_are_none_are_refused_by_member(case: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(zipped([("a.npy", array(ARRAYS[case]))]))
    with pytest.raises(MalformedFileError, match="1 of 1 arrays cannot be read") as caught:
        open_tensors(path)
    assert caught.value.keys == ("a",)
    assert len(str(caught.value)) < 600


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    stream = io.BytesIO()
    np.savez(stream, a=np.array([Bomb()], dtype=object))
    path = tmp_path / "x.npz"
    path.write_bytes(stream.getvalue())
    with pytest.raises(LoraError, match="may run code"):
        open_tensors(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("shape", [(0,), (32, 0)], ids=["no values", "no rows"])
def test_a_quantised_tensor_without_values_is_read_as_none(shape: tuple[int, ...], tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (ref,) = read(tmp_path, gguf([("a", shape, 2, 0)], data=64)).tensors.values()
    assert bytes(ref.raw()) == b""
