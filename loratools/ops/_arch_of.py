"""Which architecture a base and its adapters are of: the adapters say, and where they leave it open, the base."""

from __future__ import annotations

from collections.abc import Sequence

from loratools import archs
from loratools.errors import ArchitectureError
from loratools.io.base import Base
from loratools.model import Adapter
from loratools.ops import files
from loratools.ops._identify import detect, settled
from loratools.ops._pieces import meaning

UNKNOWN = "unknown"


def settle(base: Base, adapters: Sequence[Adapter], arch: str | None) -> tuple[str, list[Adapter]]:
    """The architecture, and the adapters in its names.

    Args:
        base: From :func:`loratools.io.base.keys_of`.
        adapters: The inputs.
        arch: The architecture, overriding detection.

    Returns:
        The architecture's name, and the adapters; those that were read as a relative's are read again where the base
        is of another one that has all their names (Stable Diffusion 3 and 3.5 Large differ in one block).

    Raises:
        ArchitectureError: Two adapters are of different architectures, or nobody has described ``arch``.
    """
    if arch is not None:
        name = archs.get(arch).name
        return name, [_read_as(adapter, name) for adapter in adapters]
    said = _agreed(adapters)
    if said and not archs.get(said).has_table:
        return said, list(adapters)
    open_ones = [adapter for adapter in adapters if adapter.arch == UNKNOWN and adapter.candidates]
    if not said and not open_ones:
        return UNKNOWN, list(adapters)
    found = detect(base)
    name = settled(found, adapters)
    if name == said or not archs.get(name).has_table:
        name = said or _first(adapters)
    elif said and not _names_all(name, adapters):
        name = said
    return name, [_read_as(adapter, name) for adapter in adapters]


def looks_like(base: Base) -> str:
    """What a base seems to be, for messages."""
    return archs.get(detect(base).arch).title


def _agreed(adapters: Sequence[Adapter]) -> str:
    """The architecture that adapters state; empty where none does.

    Raises:
        ArchitectureError: They state different ones.
    """
    table = archs.all_archs()
    known = [adapter for adapter in adapters if adapter.arch != UNKNOWN]
    names = list(dict.fromkeys(adapter.arch for adapter in known))
    # Language, speech and vision models are told by words in their paths, which parts of one model may share.
    if len(names) > 1 and any(table[name].has_table for name in names):
        raise ArchitectureError(
            "adapters of different architectures cannot be baked into one base",
            keys=[f"{adapter.path or 'an adapter'}: {table[adapter.arch].title}" for adapter in known],
            todo="Give adapters of one base model; --arch NAME overrides what was detected",
        )
    return names[0] if names else ""


def _first(adapters: Sequence[Adapter]) -> str:
    """The first candidate of the adapters that have any."""
    return next((name for adapter in adapters for name in adapter.candidates), UNKNOWN)


def _names_all(arch: str, adapters: Sequence[Adapter]) -> bool:
    """Whether an architecture has every name that the adapters change."""
    for adapter in adapters:
        for target in adapter.modules:
            row = archs.component(arch, target.component)
            if row is None or row.table is None or meaning(row.table, target.path) is None:
                return False
    return True


def _read_as(adapter: Adapter, arch: str) -> Adapter:
    """An adapter read again as another architecture's, where it still is what its file says."""
    if adapter.arch == arch or not adapter.path or not adapter.order:
        return adapter
    return files.read(adapter.path, arch=arch)
