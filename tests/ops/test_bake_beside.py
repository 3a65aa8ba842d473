"""Baking into folders that hold other weights: variants are told of, and no older model is left to be loaded."""

from __future__ import annotations

import json
import shutil

import factories
import pytest

from loratools.io.base import keys_of
from loratools.ops.bake import bake
from tests.ops import sd15_checkpoints

INDEX = "model.safetensors.index.json"
ONE = "model.safetensors"


@pytest.fixture
def made(tmp_path):
    """A sharded model, one in a single file, and an adapter."""
    state = sd15_checkpoints.tensors()
    sharded = sd15_checkpoints.sharded(tmp_path / "sharded", state)
    (tmp_path / "one").mkdir()
    sd15_checkpoints.safetensors(tmp_path / "one" / ONE, state)
    for folder in (sharded, tmp_path / "one"):
        (folder / "config.json").write_text("{}")
    return sharded, tmp_path / "one", factories.kohya(tmp_path / "a.safetensors", "sd15").path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("into", ["one", "sharded"])
def test_an_older_model_is_not_left_to_be_loaded(made, tmp_path, into):
    sharded, one, adapter = made
    base, older = (sharded, one) if into == "one" else (one, sharded)
    out = tmp_path / "out"
    shutil.copytree(older, out)
    (out / "mine.txt").write_text("x")
    planned = bake(base, [adapter], out, overwrite=True, dry_run=True)
    assert names(out) == sorted([*names(older), "mine.txt"])
    report = bake(base, [adapter], out, overwrite=True)
    assert names(out) == sorted([*names(base), "mine.txt"])
    assert {shard.name for shard in keys_of(out).shards} == {shard.name for shard in keys_of(base).shards}
    gone = ONE if into == "one" else INDEX
    for notes in (planned.notes, report.notes):
        assert any("give way to the new ones" in note and gone in note for note in notes)


def test_an_interrupted_bake_leaves_the_older_model(made, tmp_path, monkeypatch):
    sharded, one, adapter = made
    shutil.copytree(one, tmp_path / "out")

    def stop(*_given):
        raise KeyboardInterrupt

    monkeypatch.setattr("loratools.io.model_folder.replace_files", stop)
    with pytest.raises(KeyboardInterrupt):
        bake(sharded, [adapter], tmp_path / "out", overwrite=True)
    assert names(tmp_path / "out") == names(one)


def test_in_its_own_folder_a_model_loses_nothing(made):
    _, one, adapter = made
    (one / "pytorch_model.bin").write_bytes(b"other")
    report = bake(one, [adapter], one, overwrite=True)
    assert names(one) == ["config.json", ONE, "pytorch_model.bin"]
    assert (one / "pytorch_model.bin").read_bytes() == b"other"
    assert any("the adapters are not in 1 file of weights" in note for note in report.notes)


def test_variants_are_copied_and_told_of(made, tmp_path):
    _, one, adapter = made
    shutil.copy(one / ONE, one / "model.fp16.safetensors")
    (one / "training_args.bin").write_bytes(b"x")
    report = bake(one, [adapter], tmp_path / "out")
    assert (tmp_path / "out" / "model.fp16.safetensors").read_bytes() == (one / ONE).read_bytes()
    told = [note for note in report.notes if "the adapters are not in" in note]
    assert len(told) == 1
    assert "model.fp16.safetensors" in told[0]
    assert "training_args.bin" not in told[0]
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {}
