"""Bake and extract on a Ray cluster of two nodes on this machine, one of them killed on the way, against local runs.

A model of Llama's shapes in files of 500 MB, one that differs from it, and an adapter are made; each operation runs on
this machine's threads, and then on the cluster, whose second node is killed when the given share of the bytes is done.

Run: python -m tests.engine.two_nodes [--layers 16] [--at 0.3] [--folder DIR]
"""

from __future__ import annotations

import argparse
import filecmp
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from loratools.engine import Engine, Plan
from loratools.engine.ray import Ray
from loratools.ops.bake import bake
from loratools.ops.extract import extract
from tests.bench._checkpoints import CHANGE, llama, llama_adapter, write_sharded
from tests.engine.nodes import Nodes

_RANK = 32


class Told(NamedTuple):
    """An engine that says how many tasks it is given, a count for each plan.

    Attributes:
        engine: Where they run.
        tasks: As many numbers as plans.
    """

    engine: Ray
    tasks: list[int]

    @property
    def remote(self) -> bool:
        return self.engine.remote

    @property
    def devices(self) -> tuple[str, ...]:
        return self.engine.devices

    @property
    def device_kind(self) -> str:
        return self.engine.device_kind

    def run(self, plan: Plan) -> Iterator[tuple[int, Any]]:
        """Results as they come."""
        self.tasks.append(len(plan.tasks))
        return self.engine.run(plan)


class Killing:
    """Kills a node when a share of all bytes is done.

    Attributes:
        done: The share at which it was killed, in (0, 1]; None before.
    """

    def __init__(self, nodes: Nodes, node: Any, share: float) -> None:
        self.done: float | None = None
        self._nodes = nodes
        self._node = node
        self._share = share

    def __call__(self, name: str, done: int, total: int) -> None:
        if self.done is None and self._share * total <= done < total:
            self.done = done / total
            self._nodes.kill(self._node)


Operation = Callable[[Path, Engine | None, Callable[[str, int, int], None] | None], object]


def operations(folder: Path, layers: int) -> dict[str, Operation]:
    """Make the inputs, and say what is done with them."""
    shapes = llama(layers)
    base, tuned = folder / "base", folder / "tuned"
    write_sharded(base, shapes)
    write_sharded(tuned, shapes, change=CHANGE)
    adapter = llama_adapter(folder / "adapter", layers, _RANK)
    return {
        "bake": lambda output, engine, progress: bake(
            base, [adapter], output, engine=engine, progress=progress
        ),
        "extract": lambda output, engine, progress: extract(
            base, tuned, output, rank=_RANK, svd="randomized", engine=engine, progress=progress
        ),
    }


def equal(one: Path, other: Path) -> bool:
    """Whether two folders have the same files of the same bytes."""
    names = [sorted(each.name for each in folder.iterdir()) for folder in (one, other)]
    return names[0] == names[1] and filecmp.cmpfiles(one, other, names[0], shallow=False)[1:] == ([], [])


def check(name: str, operation: Operation, folder: Path, nodes: Nodes, share: float) -> bool:
    """Do it here and there, print what happened, and say whether the outputs are the same."""
    here, there = folder / f"{name}-here", folder / f"{name}-there"
    seconds = []
    node = nodes.add()
    killing = Killing(nodes, node, share)
    with Ray(nodes.address) as ray:
        told = Told(ray, [])
        for output, engine, progress in ((here, None, None), (there, told, killing)):
            started = time.perf_counter()
            operation(output, engine, progress)
            seconds.append(time.perf_counter() - started)
    same = equal(here, there)
    lost = "no node was killed" if killing.done is None else f"one of two nodes killed at {killing.done:.0%}"
    print(
        f"{name}: {sum(told.tasks)} tasks, {lost}; {seconds[1]:.1f} s, this machine's threads {seconds[0]:.1f} s;"
        f" {'equal, byte for byte' if same else 'DIFFERENT'}",
        flush=True,
    )
    return same and killing.done is not None


def main() -> None:
    """Print everything; the exit status is 1 where an output differs or no node was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=16, help="of the model: 16 make 2.5 GB")
    parser.add_argument(
        "--at", type=float, default=0.3, help="share of the bytes at which the node is killed"
    )
    parser.add_argument(
        "--folder", default=os.environ.get("TMPDIR"), help="with room for five times the size"
    )
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as name, Nodes() as nodes:
        todo = operations(Path(name), asked.layers)
        good = [check(each, work, Path(name), nodes, asked.at) for each, work in todo.items()]
    raise SystemExit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
