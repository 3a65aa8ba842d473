"""index.json of a pack: what is in it, and where."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from loratools.errors import MalformedFileError, MissingFileError, NotAnAdapterError
from loratools.ops.pack_results import Alias, Packed

NAME = "index.json"
FORMAT = "loratools-pack"
SHARED = "shared_basis.safetensors"
ADAPTERS = "adapters"
_VERSION = 1
_BLOCK = 1 << 20


class Index(NamedTuple):
    """A pack as its index describes it.

    Attributes:
        path: The pack's folder.
        layout: Of its adapters.
        arch: The architecture that they are read with.
        adapters: By name, in their order.
        aliases: By name.
        shared: What the shared basis is, or empty: ``rank``, ``diagonal``, ``modules``.
    """

    path: str
    layout: str
    arch: str
    adapters: Mapping[str, Packed]
    aliases: Mapping[str, Alias]
    shared: Mapping[str, Any]


def text(fields: Mapping[str, Any]) -> str:
    """The file of an index."""
    return json.dumps({"format": FORMAT, "version": _VERSION, **fields}, indent=1, ensure_ascii=False) + "\n"


def is_pack(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is a pack: its index says so."""
    try:
        found = _parsed(os.fspath(folder))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT


def read(folder: str | os.PathLike[str]) -> Index:
    """The index of a pack.

    Raises:
        MissingFileError: There is no such folder.
        NotAnAdapterError: It is no pack.
        MalformedFileError: The index is damaged, or of another version.
    """
    given = os.fspath(folder)
    if not os.path.isdir(given):
        raise MissingFileError(
            "no such folder", path=given, todo="Give the folder that `loratools pack` wrote"
        )
    try:
        found = _parsed(given)
    except FileNotFoundError:
        raise NotAnAdapterError(
            f"the folder has no {NAME}: it is no pack",
            path=given,
            expected="A folder that `loratools pack` wrote was expected",
            todo="Make one with: loratools pack LIBRARY -o OUT",
        ) from None
    except ValueError as error:
        raise _damaged(given, f"it is no JSON: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise NotAnAdapterError(
            f"{NAME} is not a pack's",
            path=given,
            expected=f"An object with the format {FORMAT!r} was expected",
            todo="Make one with: loratools pack LIBRARY -o OUT",
        )
    if found.get("version") != _VERSION:
        raise _damaged(given, f"it is of version {found.get('version')!r}, where {_VERSION} is known")
    try:
        return _index(given, found)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _damaged(given, f"{type(error).__name__}: {error}") from error


def _index(folder: str, found: Mapping[str, Any]) -> Index:
    adapters = [packed(each) for each in found["adapters"]]
    aliases = [Alias(**each) for each in found["aliases"]]
    return Index(
        folder,
        str(found["layout"]),
        str(found["arch"]),
        {each.name: each for each in adapters},
        {each.name: each for each in aliases},
        found.get("shared_basis") or {},
    )


def packed(entry: Mapping[str, Any]) -> Packed:
    """An entry of the index as a value."""
    low, high = entry["scales"]
    return Packed(**{**entry, "scales": (low, high)})


def said(entry: Packed) -> dict[str, Any]:
    """A value as an entry of the index."""
    return {**entry._asdict(), "ranks": dict(entry.ranks), "errors": dict(entry.errors)}


def check(index: Index, name: str, file: str, sha256: str) -> None:
    """Refuse a file of a pack that is not the one that was written.

    Raises:
        MalformedFileError: It is missing or another.
    """
    path = os.path.join(index.path, file)
    try:
        found = file_digest(path)
    except FileNotFoundError:
        raise MalformedFileError(
            f"{file} of {name} is missing", path=index.path, todo="Make the pack again"
        ) from None
    if found != sha256:
        raise MalformedFileError(
            f"{file} of {name} is another than was packed: its sha256 is {found[:12]}…",
            path=index.path,
            expected=f"{NAME} says {sha256[:12]}…",
            todo="Make the pack again; what is in it must not be changed",
        )


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


def _parsed(folder: str) -> Any:
    with open(os.path.join(folder, NAME), encoding="utf-8") as file:
        return json.load(file)


def _damaged(folder: str, why: str) -> MalformedFileError:
    return MalformedFileError(
        f"{NAME} cannot be used: {why}",
        path=folder,
        expected="The index as `loratools pack` wrote it was expected",
        todo="Make the pack again",
    )
