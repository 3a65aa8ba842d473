"""A process that fuzzes one target, guided by coverage (atheris): ``python -m tests.fuzz.guided TARGET FOLDER …``.

It ends without returning, as libFuzzer does; ``tests.fuzz`` starts it, and reads the figures that it prints.
"""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(include=["loratools"], enable_loader_override=False):
    from tests.fuzz.targets import TARGETS
    from tests.fuzz.watch import Kept, limit_memory, watched


def main(name: str, corpus: str, scratch: str, flags: list[str]) -> None:
    """Fuzz until the flags' limits are reached."""
    target = TARGETS[name]
    with atheris.instrument_imports(include=["loratools"], enable_loader_override=False):
        run = target.open(Path(scratch))
        for seed in target.seeds():  # what is imported where it is needed has to be watched, too
            watched(run, seed)
    kept = Kept(Path(corpus) / name)

    def once(data: bytes) -> None:
        found = watched(run, data)
        if found is not None and kept.add(found, data):
            print(f"FINDING {found.what} {found.where}", file=sys.stderr)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        made = target.mutate(data, Random(seed), lambda part: atheris.Mutate(part, max(len(part) + 64, 8)))
        return made[:most]

    limit_memory()
    atheris.Setup([sys.argv[0], *flags], once, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:4], sys.argv[4:])
