"""A short form of the fuzzing: every target with fixed choices; and that the campaign finds what is there to be found.

The long form is ``python -m tests.fuzz``; docs/security.md has its figures.
"""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import pytest

from loratools.errors import LoraError, MalformedFileError
from tests.fuzz import __main__, chosen, targets, watch
from tests.fuzz.mutators import flips

# Executions: fewer of those that read a whole adapter, or start a parser in Python, each time.
USUAL, FEW = 200, 50
SLOW = (
    *("adapter", "peft-config", "mlx-config", "pattern", "yaml-recipe", "recipe"),
    *("pack-index", "pack-journal"),
)
NEEDS = {"yaml-recipe": "yaml"}


@pytest.mark.parametrize("name", targets.TARGETS)
def test_hostile_bytes_give_a_value_or_an_error_of_ours(name: str, tmp_path: Path) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    target = targets.TARGETS[name]
    run, first = target.open(tmp_path), target.seeds()
    random = Random(name)
    for number in range(FEW if name in SLOW else USUAL):
        data = chosen.changed(target, first[number % len(first)], random)
        found = watch.watched(run, data)
        assert found is None, f"{found}\n{data!r}"


ACCEPTED = {
    # Whatever is seeded is valid, but for what is there in order to be refused.
    "index": 1,  # the other names a shard that is not there
    "bin-index": 1,
    "npz": 2,  # the other has an array of objects
    "pipeline": 0,  # a pipeline has its weights in subfolders
    "torch-zip": 4,
    "torch-legacy": 2,
    "adapter": 6,
    "header": 3,
    "gguf": 2,
    "journal": 2,
    "recipe": 2,
    "pack-index": 2,
    "pack-journal": 1,
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_the_first_inputs_reach_the_end_of_the_reader(name: str, tmp_path: Path) -> None:
    """From inputs that are refused at the gate no change would lead inside."""
    run = targets.TARGETS[name].open(tmp_path)
    accepted = 0
    for data in targets.TARGETS[name].seeds():
        try:
            run(data)
            accepted += 1
        except LoraError:
            pass
    if name == "gguf":  # as a base model it is refused, after its tensors have been read
        assert accepted == 0
        return
    assert accepted == ACCEPTED[name]


@pytest.mark.parametrize("name", ["header", "torch-zip", "npz", "journal"])
def test_changes_keep_the_frame_of_a_file_often_enough(name: str) -> None:
    """Of the framed formats a good part of the changed inputs still has its frame: lengths, checksums, directories."""
    frames = {
        "header": lambda data: int.from_bytes(data[:8], "little") <= len(data) - 8 and data[8:9] == b"{",
        "torch-zip": lambda data: data[:2] == b"PK" and b"PK\x05\x06" in data[-200:],
        "npz": lambda data: data[:2] == b"PK" and b"PK\x05\x06" in data[-200:],
        "journal": lambda data: all(line[8:9] == b" " for line in data.split(b"\n") if line),
    }
    target = targets.TARGETS[name]
    random = Random(name)
    first = target.seeds()[0]
    made = [target.mutate(first, random, flips(random)) for _ in range(200)]
    kept = sum(map(frames[name], made))
    assert kept >= 60
    assert len({*made}) > 100


def test_what_should_not_come_of_an_input_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(data: bytes) -> None:
        raise KeyError("x")

    def deep(data: bytes) -> None:
        deep(data)

    def refused(data: bytes) -> None:
        raise MalformedFileError("no")

    assert watch.watched(broken, b"").what == "KeyError"
    assert watch.watched(deep, b"").what == "RecursionError"
    assert watch.watched(refused, b"") is None
    assert watch.watched(len, b"") is None
    monkeypatch.setattr(watch, "SECONDS", -1.0)
    assert watch.watched(len, b"").what == "slow"
    monkeypatch.setattr(watch, "SECONDS", 1e9)
    monkeypatch.setattr(watch, "GROWTH", -1)
    assert watch.watched(len, b"").what == "memory"


def test_one_input_of_each_kind_is_kept(tmp_path: Path) -> None:
    kept = watch.Kept(tmp_path / "k")
    first = watch.Finding("KeyError", "header.py:1", "told")
    assert kept.add(first, b"one")
    assert not kept.add(first._replace(told="otherwise"), b"two")
    assert kept.add(first._replace(where="header.py:2"), b"three")
    assert sorted(path.read_bytes() for path in (tmp_path / "k").glob("*.bin")) == [b"one", b"three"]


def test_a_campaign_without_coverage_finds_and_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ready(_: Path) -> targets.Run:
        def run(data: bytes) -> None:
            if len(data) % 2:
                raise KeyError("odd")

        return run

    monkeypatch.setitem(chosen.TARGETS, "odd", chosen.TARGETS["header"]._replace(open=ready))
    scratch = tmp_path / "s"
    scratch.mkdir()
    assert chosen.campaign("odd", scratch, tmp_path / "k", 30, 60, 1) == 30
    assert len(list((tmp_path / "k").glob("*.bin"))) == 1


def test_the_command_prints_its_figures_and_an_unknown_target_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("atheris")
    command = ["fuzz", "--corpus", str(tmp_path), "--runs", "40"]
    monkeypatch.setattr(sys, "argv", [*command, "opcodes"])
    assert __main__.main() == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()]
    assert rows[2][1].strip() == "opcodes"
    assert int(rows[2][2]) == int(rows[3][2]) >= 40
    assert int(rows[2][4]) > 0
    assert (tmp_path / "opcodes" / "seed-0").exists()
    monkeypatch.setattr(sys, "argv", [*command, "opcode"])
    with pytest.raises(SystemExit, match="2"):
        __main__.main()
    assert "no target 'opcode'" in capsys.readouterr().err
