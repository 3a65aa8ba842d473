"""docs/runtimes.md from the programs' own declarations: ``python -m tests.runtimes.render_docs`` writes it anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from loratools.ops.doctor_results import CODES
from loratools.runtimes import FEATURES, Runtime, runtimes
from tests.render_tables import table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "runtimes.md"
HOLDS, REFUSES, IGNORES = "yes", "stops", "**passes over**"

_INTRO = """\
# Programs that run adapters

What each program loads, where it stops, and what it passes over without a word. `loratools doctor ADAPTER --for NAME`
says what of this matters to one adapter, and which command mends it; exit status 1 means that it would not work.
This page is written by `python -m tests.runtimes.render_docs` from `loratools/runtimes/`, and a test holds it to that.
"""
_BEHAVIOUR = f"""\
## What they make of what an adapter uses

`{HOLDS}`: applied as PEFT does, or nothing that can come to it in one of its layouts. `{REFUSES}`: it stops with an
error. {IGNORES}: the adapter loads and does something else.
"""
_WHY = """\
## Why
"""
_CODES = """\
## What doctor finds

The `code` of a finding in `doctor --json` is stable. `severity` is `error` (it would not load, or do something else),
`warning` or `info`; the same code may come with different ones, depending on the program and the file.
"""


def programs() -> Iterator[tuple[str, ...]]:
    """What each program reads and runs."""
    yield ("`--for`", "program", "layouts", "kinds", "models", "rank", "read in")
    for name, runtime in runtimes().items():
        yield (
            f"`{name}`",
            runtime.title,
            ", ".join(f"`{layout}`" for layout in runtime.layouts),
            ", ".join(sorted(runtime.kinds)),
            ", ".join(sorted(runtime.families)) or "any",
            _limit(runtime),
            runtime.source,
        )


def _limit(runtime: Runtime) -> str:
    if not runtime.usual_rank:
        return f"as started (`{runtime.option.format('N')}`)" if runtime.option else "any"
    allowed = ", ".join(str(rank) for rank in runtime.ranks)
    return f"{runtime.usual_rank}, or with `{runtime.option.format('N')}` one of {allowed}"


def behaviour() -> Iterator[tuple[str, ...]]:
    """Features by programs."""
    known = runtimes()
    yield ("what", *(f"`{name}`" for name in known))
    for feature, words in FEATURES.items():
        yield (words, *(_answer(runtime, feature) for runtime in known.values()))


def _answer(runtime: Runtime, feature: str) -> str:
    if feature in runtime.refuses:
        return REFUSES
    return IGNORES if feature in runtime.ignores else HOLDS


def reasons(runtime: Runtime) -> str:
    """What a program says or does, feature by feature."""
    said = {**runtime.refuses, **runtime.ignores}
    lines = [f"- {FEATURES[feature]}: {words}" for feature, words in said.items()]
    lines += [f"- `{pair.there}` needs `{pair.needed}` beside it" for pair in runtime.pairs]
    if runtime.every_layer:
        lines.append("- a target that any layer lacks is left out of the whole model")
    return f"### {runtime.title}\n\n" + "\n".join(lines) + "\n"


def codes() -> Iterator[tuple[str, ...]]:
    """What doctor finds."""
    yield ("code", "what")
    for code, words in CODES.items():
        yield (f"`{code}`", words)


def page() -> str:
    """The whole page."""
    parts = [_INTRO, table(programs()) + "\n", _BEHAVIOUR, table(behaviour()) + "\n", _WHY]
    parts += [reasons(runtime) for runtime in runtimes().values()]
    return "\n".join([*parts, _CODES, table(codes()) + "\n"])


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8", newline="\n")
