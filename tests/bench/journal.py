"""The cost of the journal: bake and extract with it and without, as whole processes taken in turn.

Without it is the same command in a process in which nothing is found worth a record: no checksum is taken, no result is
put away, and nothing but the output is brought to the disk. With it there are two ways: as usual, and with --resume,
which records from the first task on. The median of the pairs' ratios is printed.

Run: python -m tests.bench.journal [--rounds N] [--layers N]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

from tests.bench._common import PYTHON
from tests.bench._processes import commands, watched
from tests.bench.bake import remove

_WITHOUT = "--without"
_WAYS = ((), ("--resume",))


def without(arguments: list[str]) -> None:
    """Run a command that records nothing."""
    from loratools.io.work_folder import WorkFolder

    setattr(WorkFolder, "recording", property(lambda _: False))  # noqa: B010 - mypy: a property is read-only
    setattr(WorkFolder, "record", lambda *_: None)  # noqa: B010
    setattr(WorkFolder, "flush", lambda _: None)  # noqa: B010
    from loratools.cli import main as command

    sys.argv = ["loratools", *arguments]
    command()


def compare(name: str, arguments: tuple[str, ...], output: Path, rounds: int) -> None:
    """Print the ratios of a command with a journal to the same without."""
    own = [PYTHON, "-c", "from loratools.cli import main; main()", *arguments[1:]]
    bare = [PYTHON, "-m", "tests.bench.journal", _WITHOUT, *arguments[1:]]
    for way in _WAYS:
        pairs: list[tuple[float, float]] = []
        for number in range(rounds + 1):
            # In turn, now one first and now the other: a disk still busy with the one delays the next.
            seconds: dict[bool, float] = {}
            for recorded in (number % 2 == 0, number % 2 == 1):
                seconds[recorded] = watched([*own, *way] if recorded else bare).seconds
                remove(output)
            if number:  # the first warms the cache
                pairs.append((seconds[True], seconds[False]))
        ratios = sorted(mine / theirs for mine, theirs in pairs)
        mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(
            f"{name} {' '.join(way) or 'as usual'}: {mine:.2f} s against {theirs:.2f} s without a journal; ratio"
            f" {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})",
            flush=True,
        )


def main() -> None:
    """Print everything."""
    if len(sys.argv) > 1 and sys.argv[1] == _WITHOUT:
        without(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=16, help="of the model: 16 make 2.5 GB")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        for what, arguments, output in commands(Path(name), asked.layers).each():
            compare(what, arguments, output, asked.rounds)


if __name__ == "__main__":
    main()
