"""The data of base models: every tensor as it was saved, wherever it lies, in memory of its own."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import factories as make
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.errors import MalformedFileError, ReadError
from loratools.io import open_tensors, write_safetensors
from loratools.io.base import Weight, keys_of, load, load_rows
from loratools.tensors import from_torch

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64),
)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def filled(shape, dtype, seed):
    values = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(seed))
    return values.to(torch.float32).to(dtype)


def same(one, other):
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and one.is_contiguous()
        and torch.equal(one.reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))
    )


@st.composite
def shards(draw):
    """Random tensors in a random number of files."""
    kinds = draw(st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), min_size=1, max_size=8))
    tensors = {f"block.{i}": filled(*kind, i) for i, kind in enumerate(kinds)}
    places = draw(st.lists(st.integers(1, 3), min_size=len(tensors), max_size=len(tensors)))
    found: dict[str, dict[str, torch.Tensor]] = {}
    for place, (key, tensor) in zip(places, tensors.items(), strict=True):
        found.setdefault(f"model-{place:05}-of-00003", {})[key] = tensor
    return found


@settings(max_examples=40, deadline=None)
@given(shards(), st.booleans())
def test_every_tensor_of_every_shard_comes_back_from_its_offset(found, pickled):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        suffix = ".bin" if pickled else ".safetensors"
        for stem, tensors in found.items():
            if pickled:
                torch.save(tensors, folder / (stem + suffix))
            else:
                refs = [from_torch(key, tensor) for key, tensor in tensors.items()]
                write_safetensors(folder / (stem + suffix), refs, {})
        weight_map = {key: stem + suffix for stem, tensors in found.items() for key in tensors}
        (folder / f"pytorch_model{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
        base = keys_of(folder)
        assert {key: Path(each.file).name for key, each in base.parts[""].items()} == weight_map
        assert {shard.name: set(shard.keys) for shard in base.shards} == {
            stem + suffix: set(tensors) for stem, tensors in found.items()
        }
        for shard in base.shards:
            assert shard.size == Path(shard.path).stat().st_size
        for tensors in found.values():
            for key, tensor in tensors.items():
                weight = base.parts[""][key]
                assert weight.start is not None or not weight.nbytes
                loaded = load(pickle.loads(pickle.dumps(weight)))
                assert same(loaded, tensor)
                if tensor.dim():
                    middle = len(tensor) // 2
                    assert same(load_rows(weight, middle, len(tensor)), tensor[middle:])
                    assert same(load_rows(weight, 0, middle), tensor[:middle])


def test_what_is_loaded_may_be_written_to_and_the_file_stays(tmp_path):
    file = make.write_safetensors(tmp_path / "m.safetensors", {"a": torch.ones(4)}, None)
    before = (tmp_path / "m.safetensors").read_bytes()
    weight = keys_of(tmp_path / "m.safetensors").parts[""]["a"]
    load(weight).zero_()
    assert load(weight).tolist() == [1, 1, 1, 1], file
    assert (tmp_path / "m.safetensors").read_bytes() == before


@pytest.mark.parametrize("legacy", [False, True])
def test_views_without_an_offset_are_loaded_all_the_same(legacy, tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    torch.save(
        {"t": whole.t(), "plain": torch.ones(2)}, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy
    )
    weights = keys_of(tmp_path / "m.pt").parts[""]
    assert weights["t"].start is None
    assert same(load(weights["t"]), whole.t())
    assert same(load_rows(weights["t"], 1, 3), whole.t()[1:3])
    load(weights["t"]).zero_()
    assert same(load(weights["t"]), whole.t())
    # A file that was replaced meanwhile is not taken for the one before.
    torch.save({"t": 2 * whole.t()}, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    assert same(load(weights["t"]), 2 * whole.t())
    with pytest.raises(ReadError, match=r"a tensor is gone \(plain\)"):
        load(weights["plain"]._replace(start=None))


def test_a_file_that_became_shorter_or_vanished_is_named(tmp_path):
    path = tmp_path / "m.safetensors"
    make.write_safetensors(path, {"a": torch.ones(4096)}, None)
    weight = keys_of(path).parts[""]["a"]
    with path.open("r+b") as file:
        file.truncate(weight.start + 100)
    with pytest.raises(MalformedFileError, match=r"m\.safetensors: the file ends at byte"):
        load(weight)
    path.unlink()
    for each in (weight, weight._replace(start=None)):
        with pytest.raises(ReadError, match=r"m\.safetensors: cannot be read") as caught:
            load(each)
        assert caught.value.keys == ("a",)


def test_a_dtype_that_torch_does_not_have_is_refused_by_name():
    with pytest.raises(MalformedFileError, match=r"data of dtype F6_E2M3 .*\(w\)"):
        load(Weight("w", (4,), "F6_E2M3", "m.safetensors", 8))


def test_memory_does_not_grow_with_what_was_read(tmp_path):
    """96 MiB in 24 tensors: read one after the other, the process holds two or three of them."""
    if sys.platform != "linux":
        pytest.skip("reads the resident memory from /proc")
    tensors = {f"w.{i}": torch.full((1024, 1024), float(i)) for i in range(24)}
    make.write_safetensors(tmp_path / "m.safetensors", tensors, None)
    code = f"""
import torch
from loratools.io.base import keys_of, load
def held():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
base = keys_of({str(tmp_path / "m.safetensors")!r})
weights = list(base.parts[""].values())
assert load(weights[0]).sum() == 0
before = held()
assert all(load(weight)[7, 7] == i for i, weight in enumerate(weights))
print(held() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 24 << 10  # KiB


def test_mapped_tensors_are_pickled_by_path_and_offsets(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    make.write_safetensors(path, {"a": torch.arange(50000.0), "b": torch.ones(3)}, None)
    monkeypatch.chdir(tmp_path)
    with open_tensors("m.safetensors") as opened:
        refs = list(opened.tensors.values())
        data = pickle.dumps(refs)
    assert len(data) < 1000
    monkeypatch.chdir(tmp_path.parent)  # another process may run elsewhere
    again = pickle.loads(data)
    assert [ref._replace(source=None) for ref in again] == [ref._replace(source=None) for ref in refs]
    assert again[0].load().tolist() == list(range(50000))
    assert again[0].source.file is again[1].source.file
    again[0].load().zero_()
    assert path.read_bytes()[-4:] == b"\x00\x00\x80\x3f"
    with pytest.raises(ReadError, match="closed"):
        pickle.dumps(refs)


def test_a_mapped_file_that_changed_is_not_unpickled(tmp_path):
    path = tmp_path / "m.safetensors"
    make.write_safetensors(path, {"a": torch.ones(5)}, None)
    with open_tensors(path) as opened:
        data = pickle.dumps(opened.tensors["a"])
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ReadError, match=r"has \d+ bytes now"):
        pickle.loads(data)
    path.unlink()
    with pytest.raises(ReadError, match="cannot be read again"):
        pickle.loads(data)
