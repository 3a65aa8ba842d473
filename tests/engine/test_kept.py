"""Results that survive: what a journal says is believed as far as it holds, and nothing of it is ever run."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch

from loratools.engine import Item, Plan, kept
from loratools.engine._kept_codec import DamagedError, decoded, encoded
from loratools.engine.kept import Kept, Results, head, held, table
from loratools.engine.local import Local
from loratools.errors import OptionError, OutputExistsError
from loratools.io.work_folder import Identity, place_of
from loratools.tensors import TensorRef, from_torch
from tests.engine.processes import Processes


class Inner(NamedTuple):
    """A result's part."""

    values: tuple[float, ...]
    more: dict[str, TensorRef]


@dataclass(frozen=True, eq=False)
class Outer:
    """A result."""

    name: str
    inner: Inner | None
    sigma: Any = None
    whole: torch.Tensor | None = None


RESULTS = Results(table(Inner, Outer), {"work": Outer})
IDENTITY = Identity("test", {"a": "1"}, {"rank": 3})


def work(task: int) -> Outer:
    """A result of every type."""
    marker = os.environ.get("LORATOOLS_TEST_DONE")
    if marker:
        with open(marker, "a") as file:
            file.write(f"{task}\n")
    refs = {"up": held("", torch.full((2, 3), float(task))), "empty": held("", torch.empty(0, 4))}
    return Outer(
        str(task),
        Inner((float(task), float("inf"), 0.1), refs),
        numpy.arange(task, dtype=numpy.float64),
        torch.tensor([task]),
    )


def plan(count: int = 4) -> Plan[int, Outer]:
    """A plan of so many tasks."""
    return Plan(work, range(count), [Item(f"task {number}", kind="work") for number in range(count)])


def told(result: Outer) -> tuple[Any, ...]:
    """A result's values."""
    assert result.inner is not None
    assert result.whole is not None
    refs = {role: (ref.shape, ref.load().tolist()) for role, ref in result.inner.more.items()}
    return result.name, result.inner.values, refs, result.sigma.tolist(), result.whole.tolist()


WANTED = {number: told(work(number)) for number in range(4)}


class EndedError(Exception):
    """What ends a run."""


@pytest.fixture
def done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """The tasks that were worked on since it was last asked."""
    marker = tmp_path / "done"
    marker.touch()
    monkeypatch.setenv("LORATOOLS_TEST_DONE", str(marker))

    def since() -> list[int]:
        found = sorted(map(int, marker.read_text().split()))
        marker.write_text("")
        return found

    return since


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Processes]:
    with Processes() as engine:
        yield engine


def ended(output: Path, steps: Callable[[Kept], object], *, resume: bool = True) -> None:
    """A run that an error ends after some steps."""
    with Kept(Local(1), output, IDENTITY, RESULTS, resume=resume) as engine:
        steps(engine)
        raise EndedError


def interrupted(output: Path, after: int = 2) -> None:
    """A run that ends early, and is to be resumed."""
    with pytest.raises(EndedError):
        ended(output, lambda engine: list(islice(engine.run(plan()), after)))


def resumed(output: Path, engine: Any = None) -> tuple[dict[int, tuple[Any, ...]], int]:
    """The results of a run that goes on, and how many were there."""
    with Kept(engine or Local(1), output, IDENTITY, RESULTS, resume=True) as run:
        found = {number: told(result) for number, result in run.run(plan())}
        return found, run.taken


def rewritten(output: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Somebody writes to the journal, checksums and all."""
    journal = place_of(output) / "journal"
    lines = journal.read_bytes().split(b"\n")
    records = dict(json.loads(line.partition(b" ")[2]) for line in lines[1:] if line)
    change(records)
    texts = [json.dumps([name, value]).encode() for name, value in records.items()]
    journal.write_bytes(
        lines[0] + b"\n" + b"".join(b"%08x %s\n" % (zlib.crc32(text), text) for text in texts)
    )


def test_a_resumed_run_does_what_is_missing_and_nothing_else(
    tmp_path: Path, done: Callable[[], list[int]]
) -> None:
    interrupted(tmp_path / "out")
    done()
    found, taken = resumed(tmp_path / "out")
    assert found == WANTED
    assert taken == 2
    assert done() == [2, 3]
    assert not place_of(tmp_path / "out").exists()


def test_a_run_that_ends_with_an_error_leaves_nothing_unless_it_is_to_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(EndedError):
        ended(tmp_path / "out", lambda engine: list(engine.run(plan())), resume=False)
    assert list(tmp_path.iterdir()) == []


def test_workers_elsewhere_put_their_tensors_away_and_send_places(
    elsewhere: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    real = decoded
    monkeypatch.setattr(kept, "decoded", lambda said, *rest: seen.append(said) or real(said, *rest))
    found, taken = resumed(tmp_path / "out", elsewhere)
    assert found == WANTED
    assert taken == 0
    assert json.loads(json.dumps(seen)) == seen


def test_another_engine_goes_on(elsewhere: Processes, tmp_path: Path) -> None:
    interrupted(tmp_path / "out", after=3)
    assert resumed(tmp_path / "out", elsewhere) == (WANTED, 3)


def test_plans_of_one_run_are_told_apart(tmp_path: Path) -> None:
    def both(engine: Kept) -> None:
        list(engine.run(plan()))
        next(iter(engine.run(plan())))

    with pytest.raises(EndedError):
        ended(tmp_path / "out", both)
    with Kept(Local(1), tmp_path / "out", IDENTITY, RESULTS, resume=True) as engine:
        assert len(list(engine.run(plan()))) == 4
        assert engine.taken == 4
        assert len(list(engine.run(plan()))) == 4
        assert engine.taken == 5


def test_tensors_leave_memory_when_they_are_put_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_EVERY", 0.0)
    with Kept(Local(1), tmp_path / "out", IDENTITY, RESULTS) as engine:
        for number, result in engine.run(plan()):
            assert told(result) == WANTED[number]
            assert result.inner is not None
            ref = result.inner.more["up"]
            assert isinstance(ref.source._lies, tuple)
            assert head(ref, 1).load().tolist() == ref.load()[:1].tolist()
    assert list(tmp_path.iterdir()) == []


def test_a_bit_that_flips_in_a_part_file_has_its_task_done_again(
    tmp_path: Path, done: Callable[[], list[int]]
) -> None:
    interrupted(tmp_path / "out")
    (part,) = place_of(tmp_path / "out").glob("part-*.bin")
    data = bytearray(part.read_bytes())
    data[3] ^= 1
    part.write_bytes(data)
    done()
    found, taken = resumed(tmp_path / "out")
    assert found == WANTED
    assert taken == 1
    assert done() == [0, 2, 3]


@pytest.mark.parametrize("lost", [0, 1, 200])
def test_a_part_file_that_is_short_or_gone_is_made_again(tmp_path: Path, lost: int) -> None:
    interrupted(tmp_path / "out")
    (part,) = place_of(tmp_path / "out").glob("part-*.bin")
    if lost:
        os.truncate(part, part.stat().st_size - lost)
    else:
        part.unlink()
    assert resumed(tmp_path / "out")[0] == WANTED


def test_a_torn_journal_is_read_as_far_as_it_is_whole(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", after=3)
    journal = place_of(tmp_path / "out") / "journal"
    journal.write_bytes(journal.read_bytes()[:-20])
    assert resumed(tmp_path / "out") == (WANTED, 2)


def test_a_journal_of_another_run_is_refused_and_stays(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    other = IDENTITY._replace(options={"rank": 4})
    with (
        pytest.raises(OptionError, match="option rank"),
        Kept(Local(1), tmp_path / "out", other, RESULTS, resume=True),
    ):
        pass
    assert resumed(tmp_path / "out") == (WANTED, 2)


def test_two_runs_of_one_output_exclude_each_other(tmp_path: Path) -> None:
    first = Kept(Local(1), tmp_path / "out", IDENTITY, RESULTS)
    second = Kept(Local(1), tmp_path / "out", IDENTITY, RESULTS, resume=True)
    with first, pytest.raises(OutputExistsError, match="another process"):
        second.__enter__()


def _each_place(said: Any, change: Callable[[list[Any]], None]) -> None:
    """Change every place that a record names."""
    if isinstance(said, list):
        if said and said[0] == "ref":
            change(said[5])
        for each in said:
            _each_place(each, change)


def _set(index: int, value: Any) -> Callable[[list[Any]], None]:
    return lambda place: place.__setitem__(index, value)


HOSTILE: dict[str, Callable[[Any], Any]] = {
    "path": lambda said: _each_place(said, _set(0, "../../secret")),
    "absolute": lambda said: _each_place(said, _set(0, "/etc/passwd")),
    "journal": lambda said: _each_place(said, _set(0, "journal")),
    "behind": lambda said: _each_place(said, _set(1, 1 << 40)),
    "negative": lambda said: _each_place(said, _set(1, -8)),
    "huge": lambda said: _each_place(said, _set(2, [1 << 62, 1 << 62])),
    "dtype": lambda said: _each_place(said, _set(3, "__class__")),
    "text": lambda said: _each_place(said, _set(1, "0")),
    "class": lambda said: said.__setitem__(1, "Popen"),
    "fields": lambda said: said[2].pop(),
    "type": lambda said: said[2].__setitem__(0, 7),
    "inner": lambda said: said[2].__setitem__(1, "x"),
    "word": lambda said: said.__setitem__(0, "eval"),
    "empty": lambda said: said.clear(),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_journal_that_somebody_has_written_to_is_not_believed(
    tmp_path: Path, name: str, done: Callable[[], list[int]]
) -> None:
    (tmp_path / "secret").write_bytes(bytes(4096))
    interrupted(tmp_path / "out")
    rewritten(tmp_path / "out", lambda records: [HOSTILE[name](said) for said in records.values()])
    done()
    found, taken = resumed(tmp_path / "out")
    assert found == WANTED
    assert taken == 0
    assert done() == [0, 1, 2, 3]


def test_a_link_in_the_place_of_a_part_file_is_not_followed(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    (part,) = place_of(tmp_path / "out").glob("part-*.bin")
    moved = part.rename(tmp_path / "elsewhere.bin")
    part.symlink_to(moved)
    assert resumed(tmp_path / "out") == (WANTED, 0)


def test_only_classes_of_the_table_are_written() -> None:
    with pytest.raises(TypeError, match="Path"):
        encoded(Path("x"), {}, lambda ref: [])


@pytest.mark.parametrize(
    "value", [{"a": 1}, [["tuple"]], ["dict", [[["list", []], 1]]], ["ref", "x"], ["tensor", 3]]
)
def test_what_was_never_written_is_refused(value: Any) -> None:
    with pytest.raises(DamagedError):
        decoded(value, {}, lambda said: from_torch("", torch.zeros(1)))
