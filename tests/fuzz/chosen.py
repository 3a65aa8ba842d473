"""The same targets without coverage: hypothesis chooses a seed and the changes, for where atheris is not installed."""

from __future__ import annotations

import time
from pathlib import Path
from random import Random

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from tests.fuzz.mutators import flips
from tests.fuzz.targets import TARGETS, Target
from tests.fuzz.watch import Kept, watched

_CHANGES = 4  # most of them, one on top of the other


def changed(target: Target, first: bytes, random: Random) -> bytes:
    """A seed with a few changes."""
    data = first
    for _ in range(random.randrange(1, _CHANGES + 1)):
        data = target.mutate(data, random, flips(random))
    return data


def campaign(name: str, scratch: Path, kept: Path, runs: int, seconds: float, seed: int) -> int:
    """Run a target and keep what is found; gives how often it was run.

    Args:
        name: Of the target.
        scratch: An empty folder.
        kept: Where findings go.
        runs: How often at most.
        seconds: How long at most.
        seed: Of all choices.
    """
    target = TARGETS[name]
    run, first, findings = target.open(scratch), target.seeds(), Kept(kept)
    stop = time.monotonic() + seconds
    count = 0

    @seeded(seed)
    @settings(
        max_examples=runs,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(first), st.randoms(use_true_random=True))
    def once(start: bytes, random: Random) -> None:
        nonlocal count
        if time.monotonic() > stop:
            return
        data = changed(target, start, Random(random.getrandbits(64)))
        count += 1
        found = watched(run, data)
        if found is not None:
            findings.add(found, data)

    once()
    return count
