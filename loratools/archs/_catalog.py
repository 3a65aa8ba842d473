"""The architectures by name, each imported when it is asked for.

There will be dozens, and a file is of one: the index says which ones its names may be of, and only those are
imported. Where the index lists other files than there are (one has just been added), they are all read instead.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from functools import cache

from loratools.archs._arch import Arch
from loratools.archs._entry import Entry, entry
from loratools.archs._index import INDEX
from loratools.registry import public_modules, scan

_PACKAGE = "loratools.archs"


@cache
def entries() -> Mapping[str, Entry]:
    """What the index says of every architecture, by name, in the order of their files."""
    if public_modules(_PACKAGE) == list(INDEX):
        return INDEX
    return {name: entry(arch) for name, arch in scan(_PACKAGE, "ARCH").items()}


@cache
def _imported(name: str) -> Arch:
    """An architecture: asked for several times for every module of a file, and imported once."""
    if name not in entries():
        raise KeyError(name)
    found: Arch = importlib.import_module(f"{_PACKAGE}.{name}").ARCH
    return found


class Catalog(Mapping[str, Arch]):
    """Every architecture by name."""

    def __getitem__(self, name: str) -> Arch:
        return _imported(name)

    def __iter__(self) -> Iterator[str]:
        return iter(entries())

    def __len__(self) -> int:
        return len(entries())

    def __contains__(self, name: object) -> bool:
        return name in entries()


CATALOG = Catalog()
