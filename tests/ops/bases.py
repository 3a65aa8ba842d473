"""Bases and adapters by name and shape alone, made from the architectures' tables: no files, no data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from loratools import archs
from loratools.archs._table import DIFFUSERS, NATIVE, Component
from loratools.io.base import Base, Weight
from loratools.model import Adapter, Layout, Module, Rows, Target
from loratools.tensors import BytesSource, TensorRef

WIDTH = 4
WHOLE = Rows(((0, 1),), 1)
_NOTHING = BytesSource(memoryview(b""))


class Named(NamedTuple):
    """A weight of a table.

    Attributes:
        path: Its native path, holes filled.
        height: A count of rows that all dialects' shares divide.
    """

    path: str
    height: int


def ref(name: str, *shape: int) -> TensorRef:
    """A tensor without data."""
    return TensorRef(name, shape, "F32", _NOTHING)


def weight(key: str, *shape: int, dtype: str = "F16") -> Weight:
    """A stored tensor that lies nowhere."""
    return Weight(key, shape, dtype, "nowhere.safetensors")


def base(keys: Mapping[str, tuple[int, ...]], part: str = "") -> Base:
    """A base of these keys and shapes."""
    return Base("base.safetensors", {part: {key: weight(key, *shape) for key, shape in keys.items()}})


def lora(target: Target, out: int, into: int, *, op: str = "linear", in_first: bool = False) -> Module:
    """A LoRA module of rank 1."""
    factors = {"up": ref(f"{target.path}.up", out, 1), "down": ref(f"{target.path}.down", 1, into)}
    return Module(target, "lora", factors, rank=1, shape=(out, into), op=op, in_first=in_first)


def adapter(modules: Iterable[Module], arch: str = "unknown", layout: str = "kohya") -> Adapter:
    """An adapter in memory."""
    return Adapter({module.target: module for module in modules}, arch=arch, layout=Layout(layout))


def weights_of(row: Component) -> Iterator[Named]:
    """Every weight of a component's table, the first block of each kind."""
    assert row.table is not None
    seen: set[str] = set()
    for native, _ in row.table.rows:
        path = native.replace("{}", "0")
        if path in seen:
            continue
        seen.add(path)
        ofs = [rows.of for dialect in dialects(row) for rows in row.table.pieces(path, dialect) if rows]
        yield Named(path, 2 * math.lcm(*ofs))


def dialects(row: Component) -> tuple[str, ...]:
    """The dialects of a component, its own first."""
    assert row.table is not None
    return (NATIVE, DIFFUSERS, *row.table.further)


def spelt(row: Component, dialect: str) -> dict[str, tuple[Named, Rows | None]]:
    """A component in a dialect: what each name holds; empty where the dialect has not all names."""
    assert row.table is not None
    found: dict[str, tuple[Named, Rows | None]] = {}
    for named in weights_of(row):
        pieces = row.table.pieces(named.path, dialect)
        if not pieces:
            return {}
        for rows in pieces:
            name = row.table.spell(named.path, rows, dialect)
            assert name is not None
            found[name] = (named, rows)
    return found


def rows_of(named: Named, rows: Rows | None) -> list[int]:
    """The numbers of the weight's rows that a choice of them has, in order."""
    rows = rows or WHOLE
    unit = named.height // rows.of
    return [row for start, stop in rows.spans for row in range(start * unit, stop * unit)]


def tabled() -> list[tuple[str, str]]:
    """Every component that has a table: (architecture, component)."""
    return [
        (name, row.name) for name, arch in archs.all_archs().items() for row in arch.components if row.table
    ]
