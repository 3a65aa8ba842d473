"""Bakes that were killed: no input changed, no output, and gone on with to the same bytes from where they were."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import factories
import pytest
import torch

from loratools.errors import ConversionError, OptionError
from loratools.io import _journal_file, pieces, work_folder
from loratools.io._layout import Layout, Slot
from loratools.ops import _bake_output, _bake_plan, _bake_run
from loratools.ops._bake_identity import identity
from loratools.ops.bake import bake
from tests.ops import sd15_checkpoints

ROOT = Path(__file__).resolve().parents[2]
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
KINDS = ("file", "sharded", "diffusers", "zip")
OUT = {"file": "out.safetensors", "sharded": "out", "diffusers": "out", "zip": "out.ckpt"}
OPTIONS = {"weights": [0.7], "rounding": "stochastic", "seed": 5}

# A bake that ends by SIGKILL as soon as so many of its tasks are in the journal. Every record is written at once, and
# tasks are small; from then on the tensors' own writes wait, so that the run cannot be over before.
KILLED = """
import json, os, signal, sys, threading, time
from loratools.io import _copier, _output, work_folder
from loratools.io._journal_file import Journal
from loratools.ops import _bake_plan
_copier._SYNCED, _copier._SECONDS, _bake_plan._TOGETHER = 1, 0.01, 1
work_folder._EVERY = work_folder._FIRST = 0.0
said, left, full = json.loads(sys.argv[1]), [int(sys.argv[2])], threading.Event()
append, put = Journal.append, _output.Output.put
def appended(self, records):
    append(self, records)
    left[0] -= len(records)
    if left[0] <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
puts = []
def waiting(self, key, data):
    puts.append(key)
    if len(puts) > int(sys.argv[2]):
        time.sleep(60)
    return put(self, key, data)
Journal.append, _output.Output.put = appended, waiting
class Here:
    remote = True
    devices, device_kind = (), "cpu"
    def run(self, plan):
        import torch
        torch.set_num_threads(1)
        for number, task in enumerate(plan.tasks):
            yield number, plan.work(task)
from loratools.ops.bake import bake
bake(*said["inputs"], engine=Here() if said["engine"] else None, threads=1, **said["options"])
"""


class Here:
    """An engine that runs one task after the other, the last first, as another process would."""

    remote = True
    devices, device_kind = (), "cpu"

    def run(self, plan):
        for number in reversed(range(len(plan.tasks))):
            yield number, plan.work(plan.tasks[number])


def diffusers_folder(folder: Path) -> Path:
    """A model folder with two networks, each with a file of tensors of its own."""
    names: dict[str, dict[str, torch.Tensor]] = {"unet": {}, "text_encoder": {}}
    for key, tensor in sd15_checkpoints.tensors().items():
        own = key.removeprefix("model.diffusion_model.")
        part = "text_encoder" if own == key else "unet"
        names[part][own.removeprefix("cond_stage_model.transformer.")] = tensor
    folder.mkdir()
    (folder / "model_index.json").write_text(
        '{"_class_name": "P", "unet": ["a", "b"], "text_encoder": ["a", "b"]}'
    )
    (folder / "notes.md").write_text("notes")
    for name, tensors in names.items():
        (folder / name).mkdir()
        sd15_checkpoints.safetensors(folder / name / "model.safetensors", tensors)
        (folder / name / "config.json").write_text("{}")
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return factories.kohya(tmp_path / "a.safetensors", "sd15", seed=1).path


def base_of(kind: str, folder: Path) -> Path:
    state = sd15_checkpoints.tensors()
    if kind == "file":
        return sd15_checkpoints.safetensors(folder / "base.safetensors", state)
    if kind == "zip":
        return sd15_checkpoints.pickle(folder / "base.ckpt", state)
    if kind == "sharded":
        made = sd15_checkpoints.sharded(folder / "base", state)
        (made / "config.json").write_text("{}")
        return made
    return diffusers_folder(folder / "base")


def content(path: Path) -> dict[str, str]:
    """Digests of a file, or of all files of a folder, hidden ones too."""
    files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
    return {
        file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }


def killed(base: Path, adapter: Path, output: Path, after: int, *, engine: bool = False, **options) -> None:
    """Have a bake killed once ``after`` of its tasks are recorded."""
    said = {
        "inputs": [str(base), [str(adapter)], str(output)],
        "engine": engine,
        "options": {**OPTIONS, **options},
    }
    done = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(said), str(after)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def tensors_of(base: Path, adapter: Path) -> int:
    """How many tensors the adapter changes."""
    return len(bake(base, [adapter], base.with_name("dry.safetensors"), dry_run=True).tensors)


def journal_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.work") / "journal"


def recorded(output: Path) -> list[str]:
    """The tensors that the journal says are done, with their file."""
    found = _journal_file.read(journal_of(output)).records
    return [name for name in found if "\ttensor " in name]


@pytest.fixture
def computed(monkeypatch) -> list[str]:
    """The keys of the tensors that are computed from now on."""
    keys: list[str] = []
    real = _bake_run.made

    def made(options, task, room=None):
        keys.extend(task.keys)
        return real(options, task, room)

    monkeypatch.setattr(_bake_run, "made", made)
    return keys


@pytest.fixture(scope="module")
def a_killed_bake(tmp_path_factory) -> Path:
    """A folder with a base, an adapter, and what a bake left that was killed after five tasks."""
    folder = tmp_path_factory.mktemp("killed")
    style = factories.kohya(folder / "a.safetensors", "sd15", seed=1).path
    base = base_of("file", folder)
    bake(base, [style], folder / "whole.safetensors", **OPTIONS)
    killed(base, style, folder / "out.safetensors", 5)
    return folder


@pytest.fixture
def interrupted(a_killed_bake, tmp_path) -> tuple[Path, Path, Path]:
    """A copy of it: the base, the adapter, and the output that is not there."""
    folder = shutil.copytree(a_killed_bake, tmp_path / "copy")
    return folder / "base.safetensors", folder / "a.safetensors", folder / "out.safetensors"


@posix
@pytest.mark.parametrize(
    ("kind", "path"),
    [
        *((kind, "here") for kind in KINDS),
        ("sharded", "away, then here"),
        ("zip", "away, then here"),
        ("zip", "here, then away"),
        ("diffusers", "here, then away"),
    ],
)
def test_a_killed_bake_is_gone_on_with_to_the_same_bytes(kind, path, adapter, tmp_path, computed):
    base = base_of(kind, tmp_path)
    inputs = {**content(base), **content(adapter)}
    whole = tmp_path / "whole" / OUT[kind]
    whole.parent.mkdir()
    report = bake(base, [adapter], whole, **OPTIONS)
    everything = len(computed)
    output = tmp_path / OUT[kind]
    killed(base, adapter, output, 4, engine=path.startswith("away"))
    assert {**content(base), **content(adapter)} == inputs
    assert not output.exists()
    names = recorded(output)
    assert 0 < len(names) < everything

    computed.clear()
    again = bake(
        base, [adapter], output, resume=True, engine=Here() if path.endswith("away") else None, **OPTIONS
    )
    assert content(output) == content(whole)
    assert len(computed) == everything - len(names)
    assert not {name.partition("\ttensor ")[2] for name in names} & {*computed}
    assert again.tensors == report.tensors
    assert again.resumed >= len(names)
    assert again.resumed_bytes > 0
    assert not journal_of(output).parent.exists()
    assert {**content(base), **content(adapter)} == inputs


@posix
def test_without_resume_a_killed_bake_is_swept_and_begun_anew(interrupted, computed):
    base, adapter, output = interrupted
    report = bake(base, [adapter], output, **OPTIONS)
    assert report.resumed == 0
    assert len(computed) == len(report.tensors)
    assert not journal_of(output).parent.exists()


@posix
@pytest.mark.parametrize("engine", [None, Here()], ids=["here", "away"])
def test_a_flipped_bit_in_what_was_done_is_found_and_done_again(engine, interrupted, computed):
    base, adapter, output = interrupted
    everything = tensors_of(base, adapter)
    names = recorded(output)
    half = journal_of(output).parent / "new" / output.name
    data = bytearray(half.read_bytes())
    # One of a tensor that was done, and of all that was copied.
    torch_key = names[0].partition("\ttensor ")[2]
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    first = 8 + int.from_bytes(data[:8], "little")
    for key, said in header.items():
        if key == torch_key or not any(name.endswith(key) for name in names):
            data[first + said["data_offsets"][0]] ^= 4
    half.write_bytes(data)
    computed.clear()
    bake(base, [adapter], output, resume=True, engine=engine, **OPTIONS)
    assert output.read_bytes() == output.with_name("whole.safetensors").read_bytes()
    assert torch_key in computed
    assert len(computed) == everything - len(names) + 1


@posix
def test_a_journal_that_was_torn_counts_as_far_as_it_is_whole(interrupted, computed):
    base, adapter, output = interrupted
    everything = tensors_of(base, adapter)
    journal = journal_of(output)
    before = recorded(output)
    journal.write_bytes(journal.read_bytes()[:-9])
    after = recorded(output)
    assert len(before) - 1 <= len(after) <= len(before)
    computed.clear()
    bake(base, [adapter], output, resume=True, **OPTIONS)
    assert output.read_bytes() == output.with_name("whole.safetensors").read_bytes()
    assert len(computed) == everything - len(after)


@posix
def test_a_journal_of_other_inputs_or_options_is_refused_and_kept(interrupted, tmp_path):
    base, adapter, output = interrupted
    journal_of(output).with_name("lock").unlink()
    before = content(journal_of(output).parent)
    for changed, word in (
        ({"rounding": "nearest"}, "option rounding"),
        ({"weights": [0.8]}, "option weights"),
        ({"seed": 6}, "option seed"),
    ):
        with pytest.raises(OptionError, match=word):
            bake(base, [adapter], output, resume=True, **{**OPTIONS, **changed})
    other = factories.kohya(tmp_path / "b.safetensors", "sd15", seed=2).path
    with pytest.raises(OptionError, match="input adapter 1"):
        bake(base, [other], output, resume=True, **OPTIONS)
    os.utime(base, ns=(1, 1))
    with pytest.raises(OptionError, match=r"input base base\.safetensors"):
        bake(base, [adapter], output, resume=True, **OPTIONS)
    assert content(journal_of(output).parent) == before
    assert not output.exists()


@posix
@pytest.mark.parametrize(
    "record",
    [
        1,
        [],
        {"sums": "x"},
        {"sums": ["0" * 8], "crcs": [], "result": None},
        {"sums": [], "crcs": [], "result": {"key": 1}},
        {"sums": ["0" * 8], "crcs": [1e400], "result": {}},
    ],
)
def test_what_a_journal_says_is_not_believed_beyond_its_form(record, interrupted, computed):
    base, adapter, output = interrupted
    everything = tensors_of(base, adapter)
    found = _journal_file.read(journal_of(output))
    forged = dict.fromkeys(found.records, record) | {"../out\ttensor x": record, "new\tbytes 0-9": record}
    _journal_file.Journal(journal_of(output), found.identity, forged).close()
    computed.clear()
    bake(base, [adapter], output, resume=True, **OPTIONS)
    assert output.read_bytes() == output.with_name("whole.safetensors").read_bytes()
    assert len(computed) == everything


@posix
def test_a_link_in_the_work_folder_is_not_written_through(interrupted, tmp_path):
    base, adapter, output = interrupted
    half = journal_of(output).parent / "new" / output.name
    victim = tmp_path / "victim"
    shutil.copyfile(half, victim)
    before = victim.read_bytes()
    half.unlink()
    half.symlink_to(victim)
    bake(base, [adapter], output, resume=True, **OPTIONS)
    assert victim.read_bytes() == before
    assert not output.is_symlink()


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("engine", [None, Here()], ids=["here", "away"])
def test_an_interrupt_keeps_what_is_done_only_for_resuming(
    resume, engine, adapter, tmp_path, monkeypatch, computed
):
    base, output = base_of("sharded", tmp_path), tmp_path / "out"
    monkeypatch.setattr(_bake_plan, "_TOGETHER", 1)
    real, left = _bake_run.made, [3]

    def interrupted(*given):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(_bake_run, "made", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bake(base, [adapter], output, resume=resume, engine=engine, threads=1, **OPTIONS)
    assert not output.exists()
    assert journal_of(output).parent.exists() is resume
    for thread in threading.enumerate():
        if thread.name.startswith("loratools"):
            thread.join(10)
            assert not thread.is_alive()
    assert journal_of(output).parent.exists() is resume
    if resume:
        assert len(recorded(output)) == 3
        computed.clear()
        report = bake(base, [adapter], output, resume=True, **OPTIONS)
        assert len(computed) == len(report.tensors) - 3
        bake(base, [adapter], tmp_path / "whole", **OPTIONS)
        assert content(output) == content(tmp_path / "whole")


def test_resuming_what_was_never_begun_says_so(adapter, tmp_path):
    report = bake(base_of("file", tmp_path), [adapter], tmp_path / "out.safetensors", resume=True)
    assert report.resumed == 0
    assert any("nothing to resume" in note for note in report.notes)


def test_tensors_of_one_place_that_differ_are_refused(tmp_path):
    for crcs, fine in (({"a": 1, "b": 1}, True), ({"a": 1, "b": 2}, False)):
        layout = Layout(str(tmp_path / "out"), 4, {"a": Slot(0, 4), "b": Slot(0, 4)}, (), b"")
        assert not layout.lay_out()
        if fine:
            layout.complete(crcs)
            continue
        with pytest.raises(ConversionError, match="tensor b shares its bytes with another"):
            layout.complete(crcs)


def test_every_task_has_a_name_of_its_own_and_says_what_it_costs(adapter, tmp_path, monkeypatch):
    base = base_of("sharded", tmp_path)
    plans = []

    class Asked(Here):
        def run(self, plan):
            plans.append(plan)
            for task in plan.tasks:
                plan.sample(task)
            yield from super().run(plan)

    monkeypatch.setattr(_bake_plan, "_TOGETHER", 1)
    bake(base, [adapter], tmp_path / "out", engine=Asked())
    (plan,) = plans
    items = plan.items
    assert len({item.name for item in items}) == len(items)
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert sum(item.written for item in items) <= size
    assert {item.kind for item in items} == {"bake", "copy"}
    assert all(item.memory > 0 and item.read > 0 for item in items)
    assert all((item.cost > 0) == (item.kind == "bake") for item in items)
    bound = plan.bind(plan.tasks[0], "cuda:1")
    assert bound.options.device == "cuda:1"
    assert bound.parts == plan.tasks[0].parts


def test_ranges_are_cut_and_small_ones_go_together():
    ranges = [pieces.Range("a", 0, 10, 100), pieces.Range("b", 5, 6, 110), pieces.Range("a", 20, 22, 111)]
    found = pieces.cut(ranges, 4)
    assert [part for piece in found for part in piece.ranges] == [
        pieces.Range("a", 0, 4, 100),
        pieces.Range("a", 4, 8, 104),
        pieces.Range("a", 8, 10, 108),
        pieces.Range("b", 5, 6, 110),
        pieces.Range("a", 20, 22, 111),
    ]
    assert [piece.size for piece in found] == [4, 4, 3, 2]
    assert [piece.name for piece in found] == [
        "bytes 100-104",
        "bytes 104-108",
        "bytes 108-111",
        "bytes 111-113",
    ]


def test_what_decides_no_byte_is_not_part_of_the_identity(adapter, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(work_folder, "_EVERY", 0.0)
    monkeypatch.setattr(_bake_output, "identity", lambda *given: said.append(identity(*given)) or said[-1])
    base = base_of("file", tmp_path)
    for number, threads in enumerate((1, 2)):
        bake(base, [adapter], tmp_path / f"{number}.safetensors", threads=threads, resume=True)
    assert len(said) == 2
    assert said[0].inputs == said[1].inputs
    assert {**said[0].options, "tensors": ""} == {**said[1].options, "tensors": ""}
