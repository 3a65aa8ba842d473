"""A bake and an extraction of the largest public models on 8 to 1,024 workers, simulated; and predictions checked.

The plans are those that the commands make, from headers of the real shapes (rank 64 on all linear layers, extracted by
randomised decompositions). Workers take batches as the engine sends them: the largest first. Beside it stand the same
batches in the order of the plan, and as many neighbouring tasks for each worker beforehand. Efficiency is the lower
bound (all work in equal shares, the longest task, all bytes at the storage's bandwidth) by the time of the run. Tasks
compute more or less than was estimated, by a tenth or so (the same in every run): were all exactly alike, all workers
would read at one time and compute at another.

With --check, both are run for real on a model of 2.5 GB, with one and with two workers, and what was measured is
divided by what a dry run had predicted.

Run: python -m tests.bench.scale [--only llama|deepseek] [--gflops N] [--worker GB/s] [--together GB/s] [--spread F]
     python -m tests.bench.scale --check [--rounds N] [--layers N]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from loratools.engine import Item
from loratools.engine._cut import cut
from loratools.engine.predict import Rates, Speed, predict
from tests.bench._giants import Giant, deepseek_v3, llama_405b, write_adapter, write_model
from tests.bench._processes import Ran, commands, watched
from tests.bench.bake import remove

_WORKERS = (8, 16, 32, 64, 128, 256, 512, 1024)
_RANK = 64
_MODELS = {"llama": llama_405b, "deepseek": deepseek_v3}
# Of a task and of a batch, beside what they compute and move: opening files, and Ray's way there and back.
_TASK, _BATCH = 0.005, 0.01


class Planned(NamedTuple):
    """The plan of one command for one model.

    Attributes:
        title: For people.
        items: What its tasks cost.
        seconds: That planning took.
    """

    title: str
    items: Sequence[Item]
    seconds: float


def bake_plan(base: Path, adapter: Path) -> Planned:
    """The plan of a bake that other processes do."""
    from loratools.io.base import keys_of
    from loratools.ops import _locate, files
    from loratools.ops._bake_plan import plan_of
    from loratools.ops._bake_run import Options
    from loratools.ops._bake_shards import shard_plans

    started = time.perf_counter()
    found, loaded = keys_of(base), files.bakeable(adapter, arch=None)
    plan = _locate.plan(found, (loaded,), (1.0,), arch=None, components=None, skip_missing=False)
    shards = shard_plans(found, plan, container="safetensors", store=None)
    items = plan_of(shards, Options(), lambda name: name).items
    return Planned("bake", items, time.perf_counter() - started)


def extract_plan(base: Path, tuned: Path) -> Planned:
    """The plan of an extraction."""
    from loratools.io.base import keys_of
    from loratools.ops import _extract_on
    from loratools.ops._extract_jobs import work
    from loratools.ops._extract_options import options
    from loratools.ops._extract_plan import compare
    from loratools.ops._extract_side import sides

    started = time.perf_counter()
    rule: dict[str, Any] = {"rank": _RANK, "energy": None, "ratio": None, "error": None, "size": None}
    asked = options(
        rule,
        max_rank=None,
        min_rank=1,
        conv_rank=None,
        components=None,
        include=(),
        exclude=(),
        dtype="keep",
        svd="randomized",
        tolerance=1e-3,
        seed=0,
        embeddings=False,
        full_small=False,
    )
    own, other = sides(keys_of(base), keys_of(tuned), None)
    items = _extract_on.plan_of(work(compare(own, other, asked), asked, replaces=True).jobs, apart=True).items
    return Planned("extract", items, time.perf_counter() - started)


def varied(items: Sequence[Item], spread: float) -> list[Item]:
    """Tasks that take other times than was estimated, by a factor of e to the power of ``spread`` or so."""
    random = Random(0)
    return [item._replace(cost=item.cost * random.lognormvariate(0.0, spread)) for item in items]


def simulate(planned: Planned, rates: Rates, spread: float) -> None:
    """Print a row for each number of workers."""
    items = varied(planned.items, spread)
    total = predict(items, rates, 1, batches=[range(len(items))], processes=True)
    longest = max(items, key=rates.alone)
    print(
        f"\n{planned.title}: {len(items):,} tasks, {total.read / 1e9:,.0f} GB read, {total.written / 1e9:,.0f} GB"
        f" written, {sum(map(rates.computing, items)) / 3600:,.2f} hours of one worker computing; the longest task"
        f" {rates.alone(longest):.1f} s ({longest.name.rpartition('/')[2]}); planned in {planned.seconds:.1f} s"
    )
    print(
        "| workers | batches | time | bound | efficiency | in order | static shares | memory of a worker | cutting |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for workers in _WORKERS:
        started = time.perf_counter()
        batches = cut(planned.items, workers)
        cutting = time.perf_counter() - started
        ours, in_order, static = (
            predict(items, rates, workers, batches=each, processes=True)
            for each in (batches, sorted(batches, key=min), list(shares(len(items), workers)))
        )
        print(
            f"| {workers:,} | {len(batches):,} | {ours.seconds:,.1f} s | {ours.bound:,.1f} s | {ours.efficiency:.1%}"
            f" | {in_order.efficiency:.1%} | {static.efficiency:.1%} | {ours.memory / 2**30:.1f} GiB"
            f" | {1000 * cutting:,.0f} ms |",
            flush=True,
        )


def shares(count: int, workers: int) -> Iterator[range]:
    """As many neighbouring tasks for each worker, as good as it goes."""
    for worker in range(min(workers, count)):
        yield range(worker * count // min(workers, count), (worker + 1) * count // min(workers, count))


def giants(asked: argparse.Namespace) -> None:
    """Simulate the models that are asked for."""
    speed = Speed(asked.worker * 1e9, asked.together * 1e9)
    operation = 1e-9 / asked.gflops
    kinds = ("bake", "factors", "norm", "full", "cast")
    rates = Rates(
        speed,
        speed,
        dict.fromkeys(kinds, operation),
        dict.fromkeys((*kinds, "copy"), _TASK),
        batch=_BATCH,
        process=asked.process << 20,
    )
    print(
        f"Each worker: {asked.gflops:g} GFLOP/s, {asked.worker:g} GB/s to and from a storage that reads and writes"
        f" {asked.together:g} GB/s in all, {asked.process} MiB before it works on anything"
    )
    for name, make in _MODELS.items():
        if asked.only in (None, name):
            with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
                for planned in _plans(Path(folder), make()):
                    simulate(planned, rates, asked.spread)


def _plans(folder: Path, giant: Giant) -> Iterator[Planned]:
    base, tuned = write_model(folder / "base", giant), write_model(folder / "tuned", giant)
    adapter = write_adapter(folder / "adapter", giant, _RANK)
    for planned in (bake_plan(base, adapter), extract_plan(base, tuned)):
        yield planned._replace(title=f"{planned.title} of {giant.title}")


def check(asked: argparse.Namespace) -> None:
    """Print what was measured by what had been predicted."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        for what, arguments, output in commands(Path(name), asked.layers).each():
            for workers in (1, 2):
                command = [*arguments, "--threads", str(workers)]
                pairs = []
                for number in range(asked.rounds + 1):
                    planned = watched([*command, "--dry-run"])
                    size = _size(output)
                    assert not size, "a dry run has written something"
                    ran = watched(command)
                    size = _size(output)
                    remove(output)
                    if number:  # the first warms the cache
                        pairs.append((planned, ran, size))
                _compare(f"{what}, {workers} worker{'s' * (workers > 1)}", pairs)


def _size(output: Path) -> int:
    if output.is_dir():
        return sum(file.stat().st_size for file in output.iterdir())
    return output.stat().st_size if output.exists() else 0


def _compare(title: str, pairs: list[tuple[Ran, Ran, int]]) -> None:
    estimates = [planned.report["estimate"] for planned, _, _ in pairs]
    times = [ran.report["seconds"] for _, ran, _ in pairs]
    ratios = sorted(estimate["seconds"] / seconds for estimate, seconds in zip(estimates, times, strict=True))
    written = [estimate["written"] / size for estimate, (_, _, size) in zip(estimates, pairs, strict=True)]
    memory = [estimate["peak"] / ran.own for estimate, (_, ran, _) in zip(estimates, pairs, strict=True)]
    middle = statistics.median
    print(
        f"{title}: predicted {middle(each['seconds'] for each in estimates):.1f} s, took {middle(times):.1f} s, ratio"
        f" {middle(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); bytes written, ratio {middle(written):.3f};"
        f" memory, ratio {middle(memory):.2f} (of {middle(ran.own for _, ran, _ in pairs) / 2**20:.0f} MiB);"
        f" the dry run took {middle(planned.report['seconds'] for planned, _, _ in pairs):.1f} s",
        flush=True,
    )


def options() -> argparse.Namespace:
    """What is asked for on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=tuple(_MODELS))
    parser.add_argument(
        "--gflops", type=float, default=20.0, help="of a worker, in 10^9 operations per second"
    )
    parser.add_argument("--worker", type=float, default=1.0, help="GB/s that a worker reads or writes")
    parser.add_argument("--together", type=float, default=40.0, help="GB/s that all read, and all write")
    parser.add_argument(
        "--process", type=int, default=400, help="MiB of a worker before it works on anything"
    )
    parser.add_argument("--spread", type=float, default=0.1, help="of what tasks compute, a fraction")
    parser.add_argument("--check", action="store_true", help="run for real, and compare")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=16, help="of the model that is run: 16 make 2.5 GB")
    return parser.parse_args()


def main() -> None:
    """Print everything that is asked for."""
    asked = options()
    if asked.check:
        check(asked)
    else:
        giants(asked)


if __name__ == "__main__":
    main()
