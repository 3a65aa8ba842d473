"""Several files as a table: one row each, what could not be read in full below."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from loratools.ops.results import Info
from loratools.report import values
from loratools.report.info_text import kinds_text
from loratools.report.tables import Column, table
from loratools.report.values import Symbols, clean


def table_text(
    infos: Sequence[Info], *, width: int, symbols: Symbols, told: Collection[str] = ()
) -> RenderableType:
    """One row per file.

    Args:
        infos: What was found, unreadable files with their ``error``.
        width: Of the output, in cells.
        symbols: What the output can show.
        told: Paths whose error the reader is told elsewhere; the others' stand in full below the table.
    """
    names = short_paths([info.path for info in infos])
    modules = [f"{len(info.modules):,}" if info.modules else "" for info in infos]
    sizes = [values.size(info.bytes) if info.bytes else "" for info in infos]
    columns = [
        Column("file", names, fold=24, style=["red" if info.error else "" for info in infos]),
        Column("is", [_what(info) for info in infos], style=[_style(info) for info in infos]),
        Column("layout", [_layout(info) for info in infos], priority=3),
        Column("kind", [kinds_text(info, symbols) for info in infos], priority=4),
        Column("modules", modules, right=True, priority=2),
        Column("rank", [_ranks(info, symbols) for info in infos], right=True, priority=1),
        Column("norm", [values.number(_norm(info)) for info in infos], right=True, priority=5),
        Column("size", sizes, right=True),
    ]
    shown = table(columns, width=width, symbols=symbols)
    errors = [(name, info) for name, info in zip(names, infos, strict=True) if info.error]
    return Group(shown, *(_error(name, info) for name, info in errors if info.path not in told))


def short_paths(paths: Sequence[str]) -> list[str]:
    """The paths without the folder that they all share."""
    if len(paths) < 2:
        return [clean(path) for path in paths]
    try:
        shared = os.path.commonpath([os.path.dirname(path) for path in paths])
    except ValueError:  # absolute and relative paths, or two drives
        shared = ""
    return [clean(os.path.relpath(path, shared) if shared else path) for path in paths]


def _what(info: Info) -> str:
    """The architecture of an adapter, the type of anything else."""
    if info.error:
        return "unreadable"
    if info.type == "adapter":
        return clean(info.arch) if info.arch != "unknown" else "unknown arch"
    return clean(info.type)


def _style(info: Info) -> str:
    if info.error:
        return "red"
    return "green" if info.type == "adapter" else ""


def _layout(info: Info) -> str:
    return clean(info.layout) if info.layout != "unknown" else ""


def _ranks(info: Info, symbols: Symbols) -> str:
    found: dict[int, int] = {}
    for component in info.components.values():
        for rank, count in component.ranks.items():
            found[rank] = found.get(rank, 0) + count
    return values.ranks(found, symbols) if len(found) < 2 else f"{min(found)}{symbols.dash}{max(found)}"


def _norm(info: Info) -> float | None:
    norms = [component.norm for component in info.components.values() if component.norm is not None]
    return sum(norm**2 for norm in norms) ** 0.5 if norms else None


def _error(name: str, info: Info) -> RenderableType:
    text = clean(info.error)
    # The message begins with the path where it has one.
    whole = text if text.startswith(clean(info.path)) else f"{name}: {text}"
    return Padding(Text(whole, style="red", overflow="fold"), (0, 0, 1, 1), expand=False)
