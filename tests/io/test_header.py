"""The safetensors header: the package's bytes exactly, and every way in which one can be broken."""

from __future__ import annotations

import ctypes
import json
import re

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.errors import LayoutError, MalformedFileError
from loratools.io import build, canonical_order, parse
from loratools.tensors import DTYPES, nbytes

# What the safetensors package calls the dtypes that it writes.
PACKAGE_NAMES = {
    row.name: row.torch for row in DTYPES.values() if row.torch and row.name not in ("F6_E2M3", "F6_E3M2")
}

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
spec_lists = st.lists(
    st.tuples(
        text.filter(lambda name: name != "__metadata__"), st.sampled_from(sorted(PACKAGE_NAMES)), shapes
    ),
    unique_by=lambda spec: spec[0],
    min_size=1,
    max_size=8,
).map(lambda specs: [s for s in specs if DTYPES[s[1]].bits >= 8])


def package_header(specs, metadata):
    """The header that the safetensors package writes for tensors of zeros."""
    zeros = ctypes.create_string_buffer(8192)
    tensors = {}
    for name, dtype, shape in specs:
        if dtype == "F4":  # torch counts pairs, the package's header counts elements
            shape = (*shape[:-1], shape[-1] // 2)
        length = nbytes(shape, dtype) * (2 if dtype == "F4" else 1)
        tensors[name] = safetensors.TensorSpec(
            dtype=PACKAGE_NAMES[dtype], shape=shape, data_ptr=ctypes.addressof(zeros), data_len=length
        )
    whole = bytes(safetensors.serialize(tensors, metadata or None))
    return whole[: 8 + int.from_bytes(whole[:8], "little")]


def blob(table, data=b"", *, raw=None):
    """A file around a header given as a table or as bytes."""
    head = json.dumps(table).encode() if raw is None else raw
    return len(head).to_bytes(8, "little") + head + data


def entry(dtype="U8", shape=(4,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def read(content):
    return parse(content, len(content), "x.safetensors")


def test_golden_bytes():
    header = build([("b", "F32", (2, 3)), ("a", "F16", ())], {"k": 'é"\n'})
    body = (
        '{"__metadata__":{"k":"é\\"\\n"},"b":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
        '"a":{"dtype":"F16","shape":[],"data_offsets":[24,26]}}'
    ).encode()
    padded = body + b" " * (-len(body) % 8)
    assert header == len(padded).to_bytes(8, "little") + padded
    assert build([], {}) == b"\x08\0\0\0\0\0\0\0{}      "


def test_every_dtype_is_ordered_and_spelt_as_the_package_does():
    specs = [(f"{prefix}_{dtype}", dtype, (2, 4)) for prefix in "zaé" for dtype in PACKAGE_NAMES]
    assert build(canonical_order(specs), {"format": "pt"}) == package_header(specs, {"format": "pt"})


def test_order_ranks_every_dtype_of_the_table():
    specs = [("x", dtype, (8,)) for dtype in DTYPES]
    ordered = [DTYPES[dtype].bits for _, dtype, _ in canonical_order(specs)]
    assert len(ordered) == len(DTYPES)
    assert ordered[:-1] == sorted(ordered[:-1], reverse=True)  # BOOL alone comes after the smaller ones


@settings(max_examples=150, deadline=None)
@given(spec_lists.filter(bool), st.dictionaries(text, text, max_size=1))
def test_headers_equal_the_packages(specs, metadata):
    assert build(canonical_order(specs), metadata) == package_header(specs, metadata)


@settings(max_examples=150, deadline=None)
@given(spec_lists, st.dictionaries(text, text, max_size=4))
def test_parse_inverts_build(specs, metadata):
    header = build(specs, metadata)
    size = len(header) + sum(nbytes(shape, dtype) for _, dtype, shape in specs)
    parsed = parse(header, size, "x")
    assert [(name, e.dtype, e.shape) for name, e in parsed.entries.items()] == specs
    assert list(parsed.metadata.items()) == list(metadata.items())
    assert parsed.data_start == len(header)
    assert len(header) % 8 == 0


GOOD = {"a": entry()}
DEEP = b'{"a":' + b"[" * 200_000
BROKEN = {
    "empty": (b"", "empty (0 bytes)"),
    "short": (b"\x08\0\0", "too short: 3 bytes"),
    "length beyond the file": (b"\xff\0\0\0\0\0\0\0{}", "claims 255 bytes, but only 2 follow"),
    "no brace": (blob({}, raw=b' {"a":1}'), "begins with b' '"),
    "no header": (blob({}, raw=b""), "begins with b''"),
    "bad UTF-8": (blob({}, raw=b'{"\xff":1}'), "not UTF-8 text: byte 0xff at 10"),
    "not JSON": (blob({}, raw=b'{"a":'), "not JSON: Expecting value"),
    "control character": (blob({}, raw=b'{"a\n":1}'), "not JSON: Invalid control character"),
    "trailing garbage": (blob({}, raw=b"{} x"), "other than spaces follows the header's JSON at character 3"),
    "trailing NUL": (blob({}, raw=b"{}\0\0"), "other than spaces follows"),
    "number of 5000 digits": (blob({}, raw=b'{"a":' + b"1" * 5000 + b"}"), "not JSON we can read"),
    "nested": (blob({}, raw=DEEP), "nested too deeply"),
    "name twice": (
        blob({}, b"1234", raw=b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2)),
        "same key more than once (a)",
    ),
    "field twice": (
        blob({}, b"12", raw=b'{"a":{"dtype":"U8","dtype":"I8","shape":[2],"data_offsets":[0,2]}}'),
        "same key more than once (dtype)",
    ),
    "metadata a list": (blob({"__metadata__": []}), "__metadata__ is not a table of strings"),
    "metadata with numbers": (blob({"__metadata__": {"a": "1", "b": 2}}), "is not a table of strings (b)"),
    "entry a list": (blob({"a": [1]}), "its fields are list"),
    "field missing": (blob({"a": {"dtype": "U8", "shape": []}}), "its fields are ['dtype', 'shape']"),
    "field extra": (blob({"a": entry() | {"x": 1}}, b"1234"), "'x'], not"),
    "unknown dtype": (blob({"a": entry("Q4")}, b"1234"), "unknown dtype 'Q4' (a)"),
    "dtype a list": (blob({"a": entry() | {"dtype": ["U8"]}}, b"1234"), "unknown dtype ['U8']"),
    "shape a number": (blob({"a": entry() | {"shape": 4}}, b"1234"), "shape 4 is not a list of whole"),
    "negative dimension": (
        blob({"a": entry(shape=(-4, -1))}, b"1234"),
        "shape [-4, -1] is not a list of whole",
    ),
    "boolean dimension": (blob({"a": entry(shape=(True, 4))}, b"1234"), "shape [true, 4] is not a list"),
    "float dimension": (blob({"a": entry(shape=(4.0,))}, b"1234"), "shape [4.0] is not a list"),
    "many dimensions": (
        blob({"a": entry(shape=(1,) * 65, offsets=(0, 1))}, b"1"),
        "a shape of 65 dimensions",
    ),
    "absurd dimension": (
        blob({"a": entry(shape=(2**64, 0), offsets=(0, 0))}),
        "more elements than can be addressed",
    ),
    "absurd product": (blob({"a": entry(shape=(2**40, 2**40), offsets=(0, 4))}, b"1234"), "can be addressed"),
    "one offset": (blob({"a": entry(offsets=(0,))}), "data_offsets [0] are not two whole numbers"),
    "boolean offset": (
        blob({"a": entry(shape=(1,), offsets=(False, True))}, b"1"),
        "are not two whole numbers",
    ),
    "offsets falling": (blob({"a": entry(offsets=(4, 0))}, b"1234"), "data_offsets [4, 0] do not rise"),
    "negative offset": (blob({"a": entry(offsets=(-4, 0))}, b"1234"), "data_offsets [-4, 0] do not rise"),
    "wrong length": (
        blob({"a": entry("F32")}, b"1234"),
        "F32 of shape [4] takes 16 bytes, but its data_offsets span 4",
    ),
    "half a byte": (blob({"a": entry("F4", (3,), (0, 1))}, b"1"), "F4 of shape [3] takes 1.5 bytes"),
    "truncated data": (
        blob({"a": entry(), "b": entry("F32", (2,), (4, 12))}, b"1234567"),
        "truncated: 5 of 12 bytes of data are missing (b)",
    ),
    "overlap": (
        blob({"a": entry(), "b": entry(offsets=(2, 6))}, b"123456"),
        "overlaps that of another tensor",
    ),
    "hole": (blob({"a": entry(), "b": entry(offsets=(6, 10))}, b"1" * 10), "a hole before the data"),
    "hole at the start": (blob({"a": entry(offsets=(1, 5))}, b"12345"), "offset 1 where 0 was expected"),
    "data beyond": (blob(GOOD, b"1234567"), "3 bytes follow the last tensor"),
    "data of no tensor": (blob({}, b"12"), "2 bytes follow the last tensor"),
    "lone surrogate": (
        blob({"\ud800": entry()}, b"1234"),
        r"half of a surrogate pair in a name or in the metadata (\ud800)",
    ),
    "surrogate in metadata": (blob({"__metadata__": {"a": "\udfff"}}), r"(\udfff)"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_malformed(case):
    content, words = BROKEN[case]
    with pytest.raises(MalformedFileError, match=re.escape(words)) as caught:
        read(content)
    assert str(caught.value).startswith("x.safetensors: ")


def test_header_over_the_limit():
    with pytest.raises(MalformedFileError, match=r"claims 100,000,001 bytes.*at most 100,000,000"):
        parse((100_000_001).to_bytes(8, "little") + b"{", 200_000_000, "x")


def test_all_broken_entries_are_named():
    content = blob({f"t{i}": entry("Q4") for i in range(7)})
    with pytest.raises(MalformedFileError, match=r"7 broken header entries.*t4 and 2 more") as caught:
        read(content)
    assert caught.value.keys == tuple(f"t{i}" for i in range(7))


def test_accepted_oddities():
    assert read(blob({"__metadata__": None})).metadata == {}
    assert read(blob({}, raw=b"{} \n\t")).entries == {}
    odd = read(blob({}, b"1", raw=b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}} '))
    assert odd.data_start % 8
    empty = read(blob({"a": entry(), "z": entry("F32", (0, 7), (4, 4))}, b"1234"))
    assert empty.entries["z"] == ("F32", (0, 7), 4, 4)
    backwards = read(blob({"b": entry(offsets=(4, 8)), "a": entry()}, b"12345678"))
    assert list(backwards.entries) == ["b", "a"]
    assert read(blob({"😀": entry()}, b"1234")).entries.keys() == {"😀"}  # a whole surrogate pair in the JSON


@pytest.mark.parametrize(
    ("specs", "metadata", "words"),
    [
        ([("a", "U8", ()), ("a", "I8", ())], {}, r"same name \(a\)"),
        ([("__metadata__", "U8", ())], {}, r"cannot hold \(__metadata__\)"),
        ([("\ud800", "U8", ())], {}, r"cannot hold \(\\ud800\)"),
        ([], {"a": 1}, r"not Unicode text \(a\)"),
        ([], {"a": "\ud800"}, r"not Unicode text \(a\)"),
        ([], {"a": "x" * 100_000_000}, r"would take 100,000,0\d\d bytes"),
    ],
)
def test_build_refuses(specs, metadata, words):
    with pytest.raises(LayoutError, match=words):
        build(specs, metadata)
