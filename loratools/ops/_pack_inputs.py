"""The adapters of a library: folders are walked, and every adapter gets a name of its own."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from loratools.errors import MissingFileError
from loratools.io import names, storage
from loratools.ops import files, inspect

_STRANGE = re.compile(r"[^\w.+-]+")
_BETWEEN = "--"  # what stands for a folder in a name


class Source(NamedTuple):
    """One input.

    Attributes:
        name: Unique, and fit for a file's name on every system.
        path: What to load: a file.
    """

    name: str
    path: str

    def state(self) -> list[str]:
        """What tells the content of its files from another; what is not there has none."""
        beside = os.path.join(os.path.dirname(self.path), files.CONFIG)
        return [storage.tag(each) for each in (self.path, beside) if storage.is_file(each)]


def sources(libraries: Sequence[files.PathLike]) -> list[Source]:
    """The inputs in order, those of a folder by name.

    Args:
        libraries: Adapters, or folders in which they lie at any depth.

    Raises:
        MissingFileError: There is no such path, or nothing in it could be an adapter.
    """
    found: dict[str, str] = {}
    for library in libraries:
        given = storage.whole(library)
        walked = _walked(given) if storage.is_dir(given) else [given]
        if not walked:
            raise MissingFileError(
                "the library is empty: no file in it could be an adapter",
                path=os.fspath(library),
                expected="Files of tensors were expected (.safetensors, .bin, .pt, .npz), at any depth",
                todo="Give the folder that the adapters lie in",
            )
        for path in walked:
            found.setdefault(storage.real(path), _name(path, given))
    return _named(found)


def _walked(folder: str) -> list[str]:
    """The files of a folder that could be adapters; of a folder that is one, its weights alone."""
    by_folder: dict[str, list[str]] = {}
    for path in inspect.candidates(folder):
        by_folder.setdefault(os.path.dirname(path), []).append(path)
    found: list[str] = []
    for where, paths in by_folder.items():
        weights = files.weights_of(where) if storage.is_file(os.path.join(where, files.CONFIG)) else None
        found += paths if weights is None else [weights]
    return found


def _name(path: str, library: str) -> str:
    """A name by where a file lies: its folder, where that is an adapter's, else the file."""
    where, file = os.path.split(path)
    whole = files.weights_of(where) == path
    own = where if whole else os.path.join(where, os.path.splitext(file)[0])
    inside = os.path.relpath(own, library) if storage.is_dir(library) else "."
    if inside == "." or inside.startswith(".."):
        inside = os.path.basename(own)
    parts = [_STRANGE.sub("_", part).strip(".") for part in inside.split(os.sep)]
    return _BETWEEN.join(filter(None, parts)) or "adapter"


def _named(paths: dict[str, str]) -> list[Source]:
    """The inputs with a number behind a name that is taken, in whatever case."""
    return [Source(name, path) for name, path in zip(names.distinct(paths.values()), paths, strict=True)]
