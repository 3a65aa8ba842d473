"""Architectures: which weights a model has, how files spell them, and how to tell models apart by names.

Data only: one file per architecture, holding an ``ARCH``; adding one is adding a file, and running
``python -m tests.archs.render_index`` so that detection need not import them all. Nothing here sees a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from loratools.archs._arch import Arch, Resolved, Width
from loratools.archs._catalog import CATALOG
from loratools.archs._detect import Detection, detect
from loratools.archs._table import Component, Table
from loratools.errors import ArchitectureError

__all__ = [
    "Arch",
    "Component",
    "Detection",
    "Resolved",
    "Table",
    "Width",
    "all_archs",
    "component",
    "detect",
    "get",
]


def all_archs() -> Mapping[str, Arch]:
    """Every architecture by name; each is imported when it is looked up."""
    return CATALOG


@cache
def component(arch: str, name: str) -> Component | None:
    """A component of an architecture, both by name; None where it has none, or nobody described it."""
    known = all_archs().get(arch)
    return next((row for row in known.components if row.name == name), None) if known is not None else None


def get(name: str) -> Arch:
    """The architecture of this name.

    Raises:
        ArchitectureError: Nobody has described it.
    """
    known = all_archs()
    if name not in known:
        import difflib  # only errors need it, and it costs a millisecond

        raise ArchitectureError(
            f"there is no architecture named {name!r}",
            candidates=difflib.get_close_matches(name, known),
            expected=f"Known are {', '.join(known)}",
        )
    return known[name]
