"""The files of a bake side by side: each is recorded once it is whole, and after an error nothing goes on."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import factories
import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.engine import local
from loratools.io import _journal_file
from loratools.io import base as io_base
from loratools.io._load import Room
from loratools.io.rewrite import Rewrite
from loratools.ops import _bake_lanes, files
from loratools.ops._unmapped import unmapped
from loratools.ops.bake import bake

WIDTH, RANK, SHARDS = 8, 2, 6
UNCHANGED = "model-00002.safetensors"


def weight(number: int) -> str:
    return f"model.layers.{number}.self_attn.q_proj.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of six files with a weight each, of which the second holds none that an adapter changes."""
    folder = tmp_path / "model"
    folder.mkdir()
    random = torch.Generator().manual_seed(0)
    names = {}
    for number in range(SHARDS):
        file = f"model-{number + 1:05}.safetensors"
        key = "model.norm.weight" if file == UNCHANGED else weight(number)
        shape = (WIDTH,) if file == UNCHANGED else (WIDTH, WIDTH)
        save_file({key: torch.randn(shape, generator=random)}, folder / file)
        names[key] = file
    index = {"metadata": {"total_size": 0}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    tensors = {}
    random = torch.Generator().manual_seed(1)
    for number in (0, *range(2, SHARDS)):
        path = f"base_model.model.{weight(number).removesuffix('.weight')}"
        tensors[f"{path}.lora_A.weight"] = torch.randn(RANK, WIDTH, generator=random)
        tensors[f"{path}.lora_B.weight"] = torch.randn(WIDTH, RANK, generator=random)
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def changed(model: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Every tensor as it should be."""
    found = {
        key: value for file in sorted(model.glob("*.safetensors")) for key, value in load_file(file).items()
    }
    factors = load_file(adapter / "adapter_model.safetensors")
    for number in (0, *range(2, SHARDS)):
        path = f"base_model.model.{weight(number).removesuffix('.weight')}"
        found[weight(number)] = torch.addmm(
            found[weight(number)], factors[f"{path}.lora_B.weight"], factors[f"{path}.lora_A.weight"]
        )
    return found


class Elsewhere:
    """An engine that computes one task after the other, the last first, away from the writers."""

    remote = True
    devices, device_kind = (), "cpu"

    def run(self, plan):
        for number in reversed(range(len(plan.tasks))):
            yield number, plan.work(plan.tasks[number])


@pytest.mark.parametrize("engine", [None, Elsewhere()], ids=["here", "elsewhere"])
@pytest.mark.parametrize("threads", [1, 3])
def test_each_tensor_goes_to_its_own_file(model, adapter, tmp_path, engine, threads):
    report = bake(model, [adapter], tmp_path / "out", engine=engine, threads=threads)
    expected = changed(model, adapter)
    for file in sorted(model.glob("*.safetensors")):
        (key,) = load_file(file)
        (pair,) = load_file(tmp_path / "out" / file.name).items()
        assert pair[0] == key
        torch.testing.assert_close(pair[1], expected[key])
    assert [tensor.key for tensor in report.tensors] == [weight(number) for number in (0, *range(2, SHARDS))]


def test_few_files_are_open_at_a_time(model, adapter, tmp_path, monkeypatch):
    is_open: set[str] = set()
    most: list[int] = []
    start, finish = Rewrite.start, Rewrite.finish

    def started(self):
        start(self)
        is_open.add(self.path)
        most.append(len(is_open))

    def finished(self, progress=None):
        finish(self, progress)
        is_open.discard(self.path)

    monkeypatch.setattr(Rewrite, "start", started)
    monkeypatch.setattr(Rewrite, "finish", finished)
    bake(model, [adapter], tmp_path / "out")
    assert len(most) == SHARDS
    # Besides those that are computed and those that are closed: the one that is copied, and the next.
    assert max(most) <= _bake_lanes._OPEN + _bake_lanes._CLOSING + 2


def test_an_error_in_one_file_stops_all_and_keeps_what_is_done(model, adapter, tmp_path, monkeypatch):
    finish = Rewrite.finish

    def broken(self, progress=None):
        if "00005" in self.path:
            raise OSError(28, "No space left on device")
        finish(self, progress)

    with monkeypatch.context() as patch:
        patch.setattr(Rewrite, "finish", broken)
        with pytest.raises(OSError, match="No space left"):
            bake(model, [adapter], tmp_path / "out", resume=True)
    journal = tmp_path / ".out.work" / "journal"
    recorded = [*_journal_file.read(journal).records]
    assert any(name.startswith("model-00001.safetensors\t") for name in recorded)
    assert not (tmp_path / "out").exists()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("loratools")]

    report = bake(model, [adapter], tmp_path / "out", resume=True)
    assert report.resumed == len(recorded)
    for key, value in changed(model, adapter).items():
        (file,) = (file for file in (tmp_path / "out").glob("*.safetensors") if key in load_file(file))
        torch.testing.assert_close(load_file(file)[key], value)


def test_progress_never_goes_back_and_ends_at_the_whole(model, adapter, tmp_path):
    told: list[tuple[int, int]] = []
    bake(model, [adapter], tmp_path / "out", progress=lambda _, done, total: told.append((done, total)))
    done = [each for each, _ in told]
    assert done == sorted(done)
    assert done[-1] == told[-1][1] == sum(file.stat().st_size for file in model.glob("*.safetensors"))


def test_a_room_serves_each_thread_alone():
    room = Room()
    first = room.of(100)
    assert room.of(40).data_ptr() == first.data_ptr()
    (other,) = local.run(lambda size: room.of(size), [100], threads=1)
    assert other.data_ptr() != first.data_ptr()


def test_tensors_in_a_room_are_those_of_the_file(model):
    room = Room()
    base = io_base.keys_of(model)
    for loaded in base.parts[""].values():
        assert torch.equal(io_base.load(loaded, room), io_base.load(loaded))


def test_an_adapter_that_is_not_mapped_has_the_same_tensors(tmp_path):
    path = factories.kohya(tmp_path / "a.safetensors", "sd15", seed=3).path
    mapped = files.bakeable(path)
    read = unmapped(mapped)
    assert {**read.modules}.keys() == {**mapped.modules}.keys()
    for target, module in mapped.modules.items():
        for (role, one), (other, two) in zip(module.tensors(), read.modules[target].tensors(), strict=True):
            assert role == other
            assert torch.equal(one.load(), two.load())
            assert bytes(one.raw()) == bytes(two.raw())
