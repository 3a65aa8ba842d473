"""Collect one constant per module file of a package, and refuse duplicates.

Adding an architecture, a layout, a kind or a merge method is adding one file: no list has to be edited.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from functools import cache
from types import MappingProxyType
from typing import Any


@cache
def scan(package: str, constant: str) -> MappingProxyType[str, Any]:
    """The ``constant`` of every public module file in ``package``, by its ``name``, in order of file names.

    Args:
        package: Dotted name of the package, whose files beginning with "_" are helpers.
        constant: The name each file must define; its value has a ``name``.

    Raises:
        RuntimeError: A file defines no such constant, or two define the same name.
    """
    found: dict[str, Any] = {}
    for name in public_modules(package):
        module = importlib.import_module(f"{package}.{name}")
        value = getattr(module, constant, None)
        if value is None:
            raise RuntimeError(f"{module.__name__} defines no {constant}")
        if value.name in found:
            raise RuntimeError(f"{module.__name__}: {constant} named {value.name!r} exists already")
        found[value.name] = value
    return MappingProxyType(found)


def public_modules(package: str) -> list[str]:
    """The names of the public module files in ``package``, in order; nothing is imported but the package."""
    files = _module_files(importlib.import_module(package).__path__)
    return sorted([name for name in files if not name.startswith("_")])


def _module_files(folders: Iterable[str]) -> set[str]:
    """The names of the modules in a package's folders, which may lie in an archive."""
    try:
        return {name[:-3] for folder in folders for name in os.listdir(folder) if name.endswith(".py")}
    except OSError:
        import pkgutil

        return {info.name for info in pkgutil.iter_modules(folders)}
