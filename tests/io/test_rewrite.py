"""Checkpoints written from others: byte for byte what a naive rewrite gives."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from rewriting import CHANGES, checkpoint, naive, pickled, raw, refuse, rewritten, safetensors, tensors
from safetensors.torch import save_file

from loratools.errors import (
    ConversionError,
    LayoutError,
    MalformedFileError,
    NameResolutionError,
    ShapeError,
    WriteError,
)
from loratools.io import _layout, header, open_tensors, pieces, regions
from loratools.io.rewrite import Computed, Copied, Restream, Rewrite, fits


@CHANGES
@pytest.mark.parametrize("way", ["kernel", "sendfile", "memory"])
def test_safetensors_are_those_of_a_naive_rewrite(tmp_path, monkeypatch, changed, way):
    if way != "kernel":
        monkeypatch.setattr(os, "copy_file_range", refuse(errno.EXDEV), raising=False)
    if way == "memory":
        monkeypatch.setattr(os, "sendfile", refuse(errno.EINVAL), raising=False)
    monkeypatch.setattr(regions, "_CHUNK", 100)
    shard, weights = safetensors(tmp_path / "base", {"format": "pt"})
    before = (tmp_path / "base").read_bytes()
    new = {key: tensors(1)[key] for key in changed}
    data = rewritten(shard, weights, new, tmp_path / "out")
    assert data == naive(before, weights, new)
    assert (tmp_path / "base").read_bytes() == before
    with open_tensors(tmp_path / "out") as file:
        for key, tensor in {**tensors(), **new}.items():
            assert raw(file.tensors[key].load()) == raw(tensor)


@CHANGES
def test_a_shared_file_is_rewritten_alike(tmp_path, monkeypatch, changed):
    """Where the file system shares blocks nothing is copied; here a copy stands for it."""
    copied = []

    def clone(source, target):
        with open(target, "r+b") as new:
            new.write(Path(source).read_bytes())
        return True

    monkeypatch.setattr(_layout, "clone_file", clone)
    monkeypatch.setattr(pieces, "copy_range", lambda *args, **_: copied.append(args))
    shard, weights = safetensors(tmp_path / "base", {"hash": "abc", "format": "pt"})
    new = {key: tensors(1)[key] for key in changed}
    expected = naive((tmp_path / "base").read_bytes(), weights, new)
    assert rewritten(shard, weights, new, tmp_path / "out") == expected
    assert copied == []
    data = rewritten(shard, weights, new, tmp_path / "out2", metadata={"format": "pt"})
    start = min(weight.start for weight in weights.values())
    assert data[start:] == expected[start:]
    assert header.parse(data, len(data), "out").metadata == {"format": "pt"}


def test_other_metadata_in_the_same_room(tmp_path):
    metadata = {"modelspec.hash_sha256": "0x" + "f" * 64, "title": "Stil Ü"}
    shard, weights = safetensors(tmp_path / "base", metadata)
    before = (tmp_path / "base").read_bytes()
    new = {"c.weight": tensors(1)["c.weight"]}
    for wanted in ({"title": "Stil Ü"}, {}, {"title": "Öl", "x": "y"}):
        assert fits(shard, wanted)
        data = rewritten(shard, weights, new, tmp_path / "out", metadata=wanted)
        start = header.parse(before, len(before), "base").data_start
        assert header.parse(data, len(data), "out")._replace(metadata={}) == header.parse(
            before, len(before), "base"
        )._replace(metadata={})
        assert header.parse(data, len(data), "out").metadata == wanted
        assert data[start:] == naive(before, weights, new)[start:]
    same = rewritten(shard, weights, {}, tmp_path / "same", metadata=metadata)
    assert json.loads(same[8:start]) == json.loads(before[8:start])
    assert list(json.loads(same[8:start])) == list(json.loads(before[8:start]))


def test_metadata_that_does_not_fit(tmp_path):
    shard, weights = safetensors(tmp_path / "base", {"a": "b"})
    assert not fits(shard, {"a": "b" * 100})
    with pytest.raises(LayoutError, match="no room for the new metadata"):
        Rewrite(shard, weights, str(tmp_path / "out"), (), metadata={"a": "b" * 100})
    with pytest.raises(LayoutError, match="not Unicode text"):
        fits(shard, {"a": 1})
    with pytest.raises(LayoutError, match=r"torch\.save holds no metadata"):
        Rewrite(shard._replace(container="pickle"), weights, str(tmp_path / "out"), (), metadata={"a": "b"})
    assert os.listdir(tmp_path) == ["base"]


@CHANGES
def test_a_restreamed_file_is_the_one_that_the_package_writes(tmp_path, changed):
    shard, weights = safetensors(tmp_path / "base")
    _, others = safetensors(tmp_path / "more", None, {"more": torch.randn(5), "most": torch.randn(3)})
    new = {key: tensors(1)[key].double() for key in changed}
    outputs: list[Copied | Computed] = [
        Computed(key, "F64", weights[key].shape) if key in new else Copied(key, weights[key])
        for key in weights
    ]
    outputs += [Copied("renamed", others["most"]), Computed("added", "F16", (9,))]
    new["added"] = torch.randn(9).half()
    with open_tensors(tmp_path / "more") as file:
        content = {**tensors(), "renamed": file.tensors["most"].load().clone(), **new}
    save_file(content, tmp_path / "expected", metadata={"k": "v"})
    specs = [(key, *spec(content[key])) for key in content]
    order = [name for name, _, _ in header.canonical_order(specs)]
    outputs.sort(key=lambda item: order.index(item.name))
    writer = Restream(outputs, str(tmp_path / "out"), {"k": "v"})
    writer.start()
    for key, tensor in new.items():
        writer.put(key, memoryview(raw(tensor)))
    writer.finish()
    assert (tmp_path / "out").read_bytes() == (tmp_path / "expected").read_bytes()
    assert writer.progress == writer.total == (tmp_path / "out").stat().st_size
    assert shard.size == (tmp_path / "base").stat().st_size


def spec(tensor):
    from loratools.tensors import dtype_of

    return dtype_of(tensor), tuple(tensor.shape)


def test_a_pickle_becomes_safetensors(tmp_path):
    value, flat = checkpoint(0)
    torch.save(value, tmp_path / "model.ckpt")
    _, weights = pickled(tmp_path / "model.ckpt", flat)
    outputs = [Computed(k, "F32", w.shape) if k == "a.weight" else Copied(k, w) for k, w in weights.items()]
    writer = Restream(outputs, str(tmp_path / "out"), {})
    writer.start()
    writer.put("a.weight", raw(torch.zeros(64, 33)))
    writer.finish()
    with open_tensors(tmp_path / "out") as file:
        assert list(file.tensors) == list(weights)
        for key, ref in file.tensors.items():
            assert raw(ref.load()) == (bytes(64 * 33 * 4) if key == "a.weight" else raw(flat[key]))


def test_neighbours_are_copied_as_one(tmp_path):
    _, weights = safetensors(tmp_path / "base")
    writer = Restream([Copied(key, weight) for key, weight in weights.items()], str(tmp_path / "out"), {})
    assert sum(len(piece.ranges) for piece in writer.pieces) == 1


def test_names_sizes_and_turns_that_are_wrong(tmp_path):
    shard, weights = safetensors(tmp_path / "base")
    with pytest.raises(NameResolutionError, match=r"does not have \(none\)"):
        Rewrite(shard, weights, str(tmp_path / "out"), ["none"])
    scattered = {**weights, "odd": weights["odd"]._replace(start=None)}
    with pytest.raises(ConversionError, match=r"do not lie in the file as they are.*\(odd\)"):
        Rewrite(shard, scattered, str(tmp_path / "out"), ["odd"])
    with pytest.raises(ConversionError, match=r"\(odd\)"):
        Restream([Copied("odd", scattered["odd"])], str(tmp_path / "out"), {})
    with pytest.raises(MalformedFileError, match=r"behind the end of the file \(odd\)"):
        Rewrite(shard, {**weights, "odd": weights["odd"]._replace(start=shard.size)}, "", ["odd"])
    with pytest.raises(LayoutError, match="same name"):
        Restream([Computed("a", "F32", (1,))] * 2, str(tmp_path / "out"), {})
    writer = Rewrite(shard, weights, str(tmp_path / "out"), ["odd", "step"])
    with pytest.raises(WriteError, match="not open"):
        writer.put("odd", bytes(13))
    writer = Rewrite(shard, weights, str(tmp_path / "out"), ["odd", "step"])
    with writer:
        with pytest.raises(NameResolutionError, match=r"no tensor a\.weight was announced"):
            writer.put("a.weight", b"")
        with pytest.raises(ShapeError, match=r"tensor step: its data has 3 bytes.*holds 4"):
            writer.put("step", b"123")
        writer.put("odd", bytes(13))
        with pytest.raises(NameResolutionError, match="odd was put before"):
            writer.put("odd", bytes(13))
