"""What ``doctor`` found, as a person reads it: the verdict, then each finding with what mends it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from loratools.report import values
from loratools.report.tables import folded, wrapped
from loratools.report.values import Symbols, clean

if TYPE_CHECKING:
    from loratools.ops.doctor_results import DoctorReport, Finding

_STYLES = {"error": "red", "warning": "yellow", "info": "dim"}
_INDENT = 2
_SAME = "The command above mends this, too."
# What goes on in the next line ends in a space and a backslash.
_JOIN = 2


def doctor_text(report: DoctorReport, *, width: int, symbols: Symbols) -> RenderableType:
    """The findings, errors first.

    Args:
        report: From the operation.
        width: Of the output, in cells.
        symbols: What the output can show.
    """
    parts: list[RenderableType] = [Text(folded(clean(report.path), width - 1), style="bold")]
    parts.append(Padding(_verdict(report, width, symbols), (0, 0, 1, 0), expand=False))
    told: set[str] = set()
    for each in report.findings:
        parts.append(_finding(each, width, again=each.command in told))
        told.add(each.command)
    return Padding(Group(*parts), (0, 0, 0, 1), expand=False)


def _verdict(report: DoctorReport, width: int, symbols: Symbols) -> Text:
    facts = [
        f"{clean(report.layout)} layout" if report.layout != "unknown" else "",
        clean(report.arch) if report.arch != "unknown" else "",
        values.plural(report.modules, "module") if report.modules else "",
        f"base {clean(report.base)}" if report.base else "",
    ]
    where = f" in {clean(report.runtime)}" if report.runtime else ""
    said = f"would work{where}" if report.ok else f"would not work{where}"
    counts = [values.plural(count, word) for word, count in report.counts.items() if count and word != "info"]
    told = f"{said} ({', '.join(counts)})" if counts else said
    line = f" {symbols.dot} ".join([*filter(None, facts), told])
    return Text(wrapped(line, width - 1), style="green" if report.ok else "red")


def _finding(finding: Finding, width: int, *, again: bool) -> RenderableType:
    """One finding; a command that was shown with one before it is not shown again."""
    room = width - _INDENT - 1
    head = wrapped(f"{finding.severity}: {clean(finding.what)} [{finding.code}]", width - 1)
    lines = [Text(head, style=_STYLES[finding.severity])]
    lines += [
        Text(" " * _INDENT + line) for text in _rest(finding) for line in wrapped(text, room).split("\n")
    ]
    if finding.command and again:
        lines.append(Text(" " * _INDENT + _SAME))
    elif finding.command:
        lines += [Text(line, style="bold", overflow="fold") for line in _shell(finding.command, room)]
    return Padding(Group(*lines), (0, 0, 1, 0), expand=False)


def _shell(command: str, width: int) -> Iterator[str]:
    """A command over several lines as a shell takes it: broken between words, with a backslash at the ends."""
    line = "$"
    # A backslash inside quotes would be a part of the word.
    for word in (clean(shlex.quote(word)) for word in shlex.split(command)):
        # A word that is longer than the line has to fold wherever the terminal does it.
        if line != "$" and cell_len(f"{line} {word}") > width - _JOIN:
            yield f"{' ' * _INDENT}{line} \\"
            line = f"   {word}"
        else:
            line = f"{line} {word}"
    yield " " * _INDENT + line


def _rest(finding: Finding) -> Iterator[str]:
    yield clean(finding.why).rstrip(".") + "."
    if finding.mend:
        yield clean(finding.mend).rstrip(".") + "."
