"""Offsets of tensors in files of torch.save: the bytes there are the tensor's, and nobody else's in part."""

from __future__ import annotations

import itertools
import struct
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.io import open_tensors
from loratools.io.base import keys_of, tied
from loratools.io.pickle_offsets import offsets

FORMS = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
KINDS = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn)


def saved(path, value, legacy=False):
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


def found(path):
    with open_tensors(path) as opened:
        return offsets(opened), opened.tensors, Path(path).read_bytes()


def assert_true(starts, tensors, content):
    for key, start in starts.items():
        assert content[start : start + tensors[key].nbytes] == bytes(tensors[key].raw()), key


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(KINDS), st.lists(st.integers(0, 4), max_size=3), st.integers(0, 3)),
        min_size=1,
        max_size=12,
    ),
    st.booleans(),
)
def test_tensors_of_their_own_are_all_found(kinds, legacy):
    """Of few values, so that many tensors have the same bytes and only their places differ."""
    # torch writes float8 to the older form and cannot read it from there.
    kinds = [kind for kind in kinds if not (legacy and kind[0] is torch.float8_e4m3fn)]
    value = {f"w.{i}": torch.full(shape, number).to(kind) for i, (kind, shape, number) in enumerate(kinds)}
    with tempfile.TemporaryDirectory() as folder:
        starts, tensors, content = found(saved(Path(folder, "m.pt"), {"state_dict": value}, legacy))
    assert set(starts) == {key for key, tensor in value.items() if tensor.numel()}
    assert_true(starts, tensors, content)
    spans = sorted((start, start + tensors[key].nbytes) for key, start in starts.items())
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(spans))


@FORMS
def test_rewriting_at_the_offset_changes_that_tensor_alone(legacy, tmp_path):
    """The offset is the tensor's own place even where another one has the same bytes."""
    value = {f"w.{i}": torch.zeros(40) for i in range(6)}
    path = saved(tmp_path / "m.pt", value, legacy)
    wanted = {key: float(number) for number, key in enumerate(value, 1)}
    for key, start in found(path)[0].items():
        with path.open("r+b") as file:
            file.seek(start)
            file.write(struct.pack("<40f", *[wanted[key]] * 40))
    loaded = torch.load(path, weights_only=True)
    assert {key: set(tensor.tolist()) for key, tensor in loaded.items()} == {
        key: {number} for key, number in wanted.items()
    }


@FORMS
def test_tied_tensors_have_one_offset_and_are_told(legacy, tmp_path):
    shared = torch.arange(6.0)
    value = {"emb": shared, "other": torch.ones(6), "head": shared, "folded": shared.reshape(2, 3)}
    path = saved(tmp_path / "m.pt", value, legacy)
    starts, tensors, content = found(path)
    assert_true(starts, tensors, content)
    assert starts["emb"] == starts["head"] == starts["folded"] != starts["other"]
    assert [sorted(weight.key for weight in group) for group in tied(keys_of(path))] == [
        ["emb", "folded", "head"]
    ]


def test_safetensors_and_empty_tensors_are_not_tied(tmp_path):
    path = saved(tmp_path / "m.pt", {"a": torch.zeros(0), "b": torch.zeros(0), "c": torch.ones(1)})
    assert tied(keys_of(path)) == ()


@FORMS
def test_views_have_an_offset_where_they_share_no_bytes_in_part(legacy, tmp_path):
    fused, whole, base = torch.arange(30.0).reshape(6, 5), torch.arange(12.0), torch.arange(20.0)
    value = {
        **{name: fused[2 * i : 2 * i + 2] for i, name in enumerate("qkv")},
        "turned": whole.reshape(3, 4).t(),
        "stepped": whole[::2],
        "long": base[:15],
        "inside": base[5:10],
        "expanded": torch.ones(1).expand(4),
    }
    starts, tensors, content = found(saved(tmp_path / "m.pt", value, legacy))
    assert_true(starts, tensors, content)
    assert set(starts) == {"q", "k", "v"}
    assert starts["v"] - starts["q"] == 4 * 5 * 4


@FORMS
def test_a_conjugate_view_has_none_and_the_others_keep_theirs(legacy, tmp_path):
    value = {f"w.{i}": torch.full((i + 2,), float(i)) for i in range(4)}
    value["conjugate"] = torch.tensor([1 + 2j, 3.0], dtype=torch.complex64).conj()
    starts, tensors, content = found(saved(tmp_path / "m.pt", value, legacy))
    assert_true(starts, tensors, content)
    assert "conjugate" not in starts
    assert legacy or len(starts) == 4


def test_compressed_records_have_no_offset(tmp_path):
    path = saved(tmp_path / "whole.pt", {"a": torch.arange(64.0), "b": torch.ones(7)})
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "m.pt", "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info), zipfile.ZIP_DEFLATED)
    assert found(tmp_path / "m.pt")[0] == {}
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "m.pt", "w") as new:
        for info in old.infolist():  # stored, but not aligned
            new.writestr(info.filename, old.read(info))
    starts, tensors, content = found(tmp_path / "m.pt")
    assert_true(starts, tensors, content)
    assert set(starts) == {"a", "b"}


def test_files_of_big_endian_machines_have_no_offsets(tmp_path):
    path = saved(tmp_path / "little.pt", {"zeros": torch.zeros(64), "a": torch.arange(64.0)})
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "m.pt", "w") as new:
        for info in old.infolist():
            content = b"big" if info.filename.endswith("byteorder") else old.read(info)
            new.writestr(info.filename, content)
    assert found(tmp_path / "m.pt")[0] == {}


def test_records_that_nothing_refers_to_do_not_confuse(tmp_path):
    path = saved(tmp_path / "whole.pt", {f"w.{i}": torch.full((16,), float(i % 2)) for i in range(5)})
    with zipfile.ZipFile(path, "a") as archive:
        for number in range(3):
            archive.writestr(f"whole/data/{90 + number}", bytes(64))
    starts, tensors, content = found(path)
    assert_true(starts, tensors, content)
    assert set(starts) == {f"w.{i}" for i in range(5)}
