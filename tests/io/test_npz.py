"""numpy's archives: every dtype and order that have a place, and reasons for the rest."""

from __future__ import annotations

import io
import os
import warnings
import zipfile

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.errors import LoraError, MalformedFileError
from loratools.io import open_tensors, write_safetensors
from loratools.tensors import DTYPES

NUMPY_DTYPES = {row.name: row.numpy for row in DTYPES.values() if row.numpy}


def random_array(dtype, shape, fortran, seed):
    random = numpy.random.default_rng(seed)
    count = int(numpy.prod(shape)) * numpy.dtype(dtype).itemsize
    data = random.integers(0, 2 if dtype == "?" else 256, count, dtype=numpy.uint8)
    return numpy.array(data.view(dtype).reshape(shape), order="F" if fortran else "C")


arrays = st.dictionaries(
    st.text("abc.é_0", min_size=1, max_size=8).filter(
        lambda name: not name.endswith(".npy") and name != "file"
    ),
    st.tuples(
        st.sampled_from(sorted(NUMPY_DTYPES)),
        st.lists(st.integers(0, 3), max_size=4).map(tuple),
        st.booleans(),
    ),
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(arrays, st.booleans())
def test_reads_what_numpy_saves(tmp_path_factory, specs, compressed):
    folder = tmp_path_factory.mktemp("x")
    expected = {
        name: random_array(NUMPY_DTYPES[dtype], shape, fortran, seed)
        for seed, (name, (dtype, shape, fortran)) in enumerate(specs.items())
    }
    if not expected:
        return
    (numpy.savez_compressed if compressed else numpy.savez)(folder / "x.npz", **expected)
    with open_tensors(folder / "x.npz") as file:
        assert file.container == "npz"
        assert {name: (ref.dtype, ref.shape) for name, ref in file.tensors.items()} == {
            name: spec[:2] for name, spec in specs.items()
        }
        for name, array in expected.items():
            assert bytes(file.tensors[name].raw()) == array.tobytes("C")


def test_tensors_are_equal_and_load_without_warning(tmp_path):
    array = numpy.arange(24, dtype="f4").reshape(2, 3, 4)
    numpy.savez(tmp_path / "x.npz", c=array, f=numpy.asfortranarray(array), one=numpy.float16(1.5))
    with warnings.catch_warnings(), open_tensors(tmp_path / "x.npz") as file:
        warnings.simplefilter("error")
        assert file.tensors["c"].load().tolist() == file.tensors["f"].load().tolist() == array.tolist()
        assert file.tensors["f"].numpy().tolist() == array.tolist()
        assert file.tensors["one"].scalar() == 1.5
        write_safetensors(tmp_path / "y", file.tensors.values(), {})
    with open_tensors(tmp_path / "y") as copy:
        assert copy.tensors["f"].load().tolist() == array.tolist()


def test_data_is_gone_after_closing(tmp_path):
    numpy.savez(tmp_path / "x.npz", a=numpy.ones(2))
    file = open_tensors(tmp_path / "x.npz")
    file.close()
    with pytest.raises(LoraError, match="the file was closed"):
        file.tensors["a"].raw()


def npy(descr="<f4", shape="(2,)", data=b"\0" * 8, *, head=None, version=1):
    if head is None:
        head = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}"
    raw = head.encode()
    return (
        b"\x93NUMPY"
        + bytes([version, 0])
        + len(raw).to_bytes(2 if version == 1 else 4, "little")
        + raw
        + data
    )


def pickled_objects():
    buffer = io.BytesIO()
    numpy.save(buffer, numpy.array([{"a": 1}, None], dtype=object), allow_pickle=True)
    return buffer.getvalue()


BROKEN = {
    "objects": (pickled_objects(), "Python objects.*may run code"),
    "bfloat16 as void": (npy("|V2", data=b"\0" * 4), "two bytes without a meaning .bfloat16"),
    "big-endian": (npy(">f4"), "dtype >f4 is big-endian"),
    "text": (npy("<U1"), "dtype '<U1' has no place"),
    "structured": (
        npy(head="{'descr': [('a','<f4')], 'fortran_order': False, 'shape': (2,)}"),
        "has no place",
    ),
    "complex128": (npy("<c16", data=b"\0" * 32), "dtype '<c16' has no place"),
    "short data": (npy(data=b"\0" * 7), r"it has 7 bytes of data, its shape \(2,\) takes 8"),
    "long data": (npy(data=b"\0" * 9), "it has 9 bytes of data"),
    "negative shape": (npy(shape="(-2,)"), r"its header gives shape \(-2,\)"),
    "shape of booleans": (npy(shape="(True, 2)"), "its header gives shape"),
    "code for a header": (npy(head="__import__('os').mkdir('victim')"), "not a Python literal"),
    "no fields": (npy(head="{}"), "lacks descr"),
    "cut header": (npy()[:20], "cut off"),
    "version 9": (npy(version=9), "not in numpy's format"),
    "not an array": (b"hello world", "not in numpy's format"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_unreadable_members_are_named(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    content, words = BROKEN[case]
    with zipfile.ZipFile("x.npz", "w") as archive:
        archive.writestr("fine.npy", npy())
        archive.writestr("odd.npy", content)
    with pytest.raises(MalformedFileError, match=f"1 of 2 arrays cannot be read: .*{words}") as caught:
        open_tensors("x.npz")
    assert caught.value.keys == ("odd",)
    assert os.listdir() == ["x.npz"]


@pytest.mark.parametrize("version", [1, 2, 3])
def test_versions_of_the_header(tmp_path, version):
    with zipfile.ZipFile(tmp_path / "x", "w") as archive:
        archive.writestr("a.npy", npy(version=version))
    with open_tensors(tmp_path / "x") as file:
        assert file.tensors["a"].load().tolist() == [0, 0]


def test_a_wrong_checksum_is_found_when_data_is_read(tmp_path):
    numpy.savez(tmp_path / "x.npz", a=numpy.arange(50_000.0))
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[200_000] ^= 1
    (tmp_path / "x.npz").write_bytes(content)
    with (
        open_tensors(tmp_path / "x.npz") as file,
        pytest.raises(MalformedFileError, match=r"a\.npy.*damaged: Bad CRC"),
    ):
        file.tensors["a"].load()
