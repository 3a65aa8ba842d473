"""Every operation gives the same on every engine, with any number of workers: one row for each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import factories
import pytest

import loratools as lt
from loratools.engine import Engine, Plan, Task
from loratools.engine.local import Local
from loratools.engine.ray import Ray
from loratools.errors import OptionError
from loratools.ops import _bake_plan
from loratools.ops.extract import extract
from loratools.ops.merge import merge_files
from loratools.ops.resize import resize_file
from loratools.report import checkpoint_data, compare_data, merge_data, pack_data, resize_data
from tests.engine.processes import Processes
from tests.ops import checkpoints as make

Found = TypeVar("Found")


class Inputs(NamedTuple):
    """What operations work on: a base, what came of it by tuning, an adapter of it, its bake, and a library.

    The base is in files, in one, and in a torch zip.
    """

    base: Path
    one: Path
    packed: Path
    tuned: Path
    adapter: Path
    baked: Path
    library: Path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    state = make.llama()
    base = make.shard(state, folder / "base")
    tuned = make.save(make.tuned(state), folder / "tuned.safetensors")
    adapter, baked = folder / "adapter", folder / "baked.safetensors"
    lt.save(lt.extract(base, tuned, rank=3), adapter)
    one, packed = make.save(state, folder / "one.safetensors"), make.save(state, folder / "one.ckpt")
    lt.bake(one, [adapter], baked, weights=[0.5])
    for number in range(4):
        factories.peft(folder / f"library/a{number}", seed=number, rank=4 + number % 2)
    factories.peft(folder / "library/z_same", seed=0, rank=4)
    return Inputs(base, one, packed, tuned, adapter, baked, folder / "library")


def _compare(given: Inputs, output: Path, engine: Engine) -> Any:
    paths = [given.library / f"a{number}" for number in range(3)]
    return compare_data.compare_json(lt.compare(paths, modules=True, suggest=True, engine=engine))


def _pack(given: Inputs, output: Path, engine: Engine) -> Any:
    return pack_data.pack_json(lt.pack([given.library], output, ranks=[8], engine=engine), dry_run=False)


def _shared(given: Inputs, output: Path, engine: Engine) -> Any:
    return pack_data.pack_json(lt.pack([given.library], output, shared_basis=3, engine=engine), dry_run=False)


def _verify(given: Inputs, output: Path, engine: Engine) -> Any:
    found = lt.verify(given.base, [given.adapter], given.baked, weights=[0.5], engine=engine)
    assert found.ok
    return checkpoint_data.verify_json(found)


def _bake(given: Inputs, output: Path, engine: Engine, **run: Any) -> Any:
    found = lt.bake(given.base, [given.adapter], output, weights=[0.7], precise=True, engine=engine, **run)
    return checkpoint_data.bake_json(found, dry_run=False)


def _bake_file(given: Inputs, output: Path, engine: Engine, **run: Any) -> Any:
    options = {"dtype": "bfloat16", "rounding": "stochastic", "seed": 3}
    found = lt.bake(given.one, [given.adapter], f"{output}.safetensors", engine=engine, **run, **options)
    return checkpoint_data.bake_json(found, dry_run=False)


def _bake_packed(given: Inputs, output: Path, engine: Engine, **run: Any) -> Any:
    found = lt.bake(
        given.packed, [given.adapter], f"{output}.ckpt", rounding="compensated", engine=engine, **run
    )
    return checkpoint_data.bake_json(found, dry_run=False)


def _extract(given: Inputs, output: Path, engine: Engine, **run: Any) -> Any:
    _, found = extract(given.packed, given.tuned, output, error=0.3, embeddings=True, engine=engine, **run)
    return checkpoint_data.extract_json(found, dry_run=False)


def _extract_size(given: Inputs, output: Path, engine: Engine, **run: Any) -> Any:
    _, found = extract(given.base, given.tuned, output, size="12KB", engine=engine, **run)
    return checkpoint_data.extract_json(found, dry_run=False)


def _merge(given: Inputs, output: Path, engine: Engine, **run: Any) -> Any:
    paths = [given.library / f"a{number}" for number in range(3)]
    options = {"method": "ties", "rank": 4, "weights": [0.5, 0.3, 0.2]}
    return merge_data.merge_json(merge_files(paths, output, engine=engine, **run, **options), dry_run=False)


def _resize(given: Inputs, output: Path, engine: Engine, **run: Any) -> Any:
    found = resize_file(given.library / "a1", output, energy=0.8, engine=engine, **run)
    return resize_data.resize_json(found, dry_run=False)


# An operation reads its inputs, writes the output (a file or a folder) if it writes anything, and returns what it says.
RESUMED: dict[str, Callable[..., Any]] = {
    "bake": _bake,
    "bake a file": _bake_file,
    "bake a torch zip": _bake_packed,
    "extract": _extract,
    "extract --size": _extract_size,
    "merge": _merge,
    "resize": _resize,
}
OPERATIONS: dict[str, Callable[..., Any]] = {
    **RESUMED,
    "compare": _compare,
    "pack": _pack,
    "pack --shared-basis": _shared,
    "verify": _verify,
}
# What a report says of the run and not of the result.
_OF_THE_RUN = {"seconds", "estimate", "output", "resumed", "resumed_bytes", "notes"}


@pytest.fixture(scope="module", autouse=True)
def small_tasks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_bake_plan, "_TOGETHER", 1)
        yield


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[str, Engine]]:
    with Processes() as processes:
        yield {"two-threads": Local(2), "four-threads": Local(4), "processes": processes}


@pytest.fixture(scope="module")
def ray() -> Iterator[Engine]:
    pytest.importorskip("ray")
    with Ray(workers=2) as engine:
        yield engine


class Result(NamedTuple):
    """What an operation said and wrote: bytes by name."""

    said: str
    files: dict[str, bytes]


def _result(operation: Callable[..., Any], given: Inputs, folder: Path, engine: Engine) -> Result:
    folder.mkdir(exist_ok=True)
    output = folder / "out"
    said = operation(given, output, engine)
    kept = {key: value for key, value in said.items() if key not in _OF_THE_RUN}
    text = json.dumps(kept, sort_keys=True, default=str)
    files = {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}
    assert not [each for each in files if ".work" in each], (
        "what a run leaves until it is done is still there"
    )
    return Result(text, files)


@pytest.fixture(scope="module")
def alone(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Result]:
    """The results of one thread."""
    known: dict[str, Result] = {}

    def result(name: str) -> Result:
        if name not in known:
            known[name] = _result(
                OPERATIONS[name], inputs, tmp_path_factory.mktemp("alone") / "run", Local(1)
            )
        return known[name]

    return result


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("where", ["two-threads", "four-threads", "processes"])
def test_any_number_of_workers_gives_the_same_bytes(
    inputs: Inputs,
    engines: dict[str, Engine],
    alone: Callable[[str], Result],
    tmp_path: Path,
    name: str,
    where: str,
) -> None:
    assert _result(OPERATIONS[name], inputs, tmp_path / "run", engines[where]) == alone(name)


@pytest.mark.parametrize("name", OPERATIONS)
def test_ray_gives_the_same_bytes(
    inputs: Inputs, ray: Engine, alone: Callable[[str], Result], tmp_path: Path, name: str
) -> None:
    assert _result(OPERATIONS[name], inputs, tmp_path / "run", ray) == alone(name)


class Interrupted(NamedTuple):
    """An engine that somebody interrupts after two results.

    Attributes:
        engine: What runs the tasks.
        kind: What it says that they are computed on; empty for what the engine says.
    """

    engine: Engine
    kind: str = ""

    @property
    def remote(self) -> bool:
        return self.engine.remote

    @property
    def devices(self) -> tuple[str, ...]:
        return self.engine.devices

    @property
    def device_kind(self) -> str:
        return self.kind or self.engine.device_kind

    def run(self, plan: Plan[Task, Found]) -> Iterator[tuple[int, Found]]:
        yield from islice(self.engine.run(plan), 2)
        raise KeyboardInterrupt


def _resumed(name: str, given: Inputs, folder: Path, before: Engine, after: Engine) -> Result:
    """What comes of a run that is interrupted on one engine and gone on with on another."""
    folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        RESUMED[name](given, folder / "out", Interrupted(before), resume=True)
    assert [each.suffix for each in folder.iterdir()] == [".work"]
    said: dict[str, Any] = {}

    def resuming(*arguments: Any) -> Any:
        said.update(RESUMED[name](*arguments, resume=True))
        return said

    found = _result(resuming, given, folder, after)
    assert said["resumed"] > 0
    return found


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_that_is_interrupted_and_resumed_elsewhere_gives_the_same_bytes(
    inputs: Inputs, engines: dict[str, Engine], alone: Callable[[str], Result], tmp_path: Path, name: str
) -> None:
    there, here = engines["processes"], engines["two-threads"]
    assert _resumed(name, inputs, tmp_path / "there", here, there) == alone(name)
    assert _resumed(name, inputs, tmp_path / "here", there, here) == alone(name)


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_that_is_interrupted_here_is_resumed_by_ray(
    inputs: Inputs, ray: Engine, alone: Callable[[str], Result], tmp_path: Path, name: str
) -> None:
    assert _resumed(name, inputs, tmp_path / "run", Local(2), ray) == alone(name)


@pytest.mark.parametrize("name", RESUMED)
def test_results_of_another_kind_of_device_are_not_gone_on_with(
    inputs: Inputs, tmp_path: Path, name: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        RESUMED[name](inputs, tmp_path / "out", Interrupted(Local(1)), resume=True)
    with pytest.raises(OptionError, match="interrupted run is another") as caught:
        RESUMED[name](inputs, tmp_path / "out", Interrupted(Local(1), "cuda"), resume=True)
    assert [key for key in caught.value.keys if "device" in key]
    assert len(caught.value.keys) == 1
