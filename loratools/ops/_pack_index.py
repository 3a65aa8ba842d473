"""index.json of a pack: what is in it, and where."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from loratools.errors import MalformedFileError, MissingFileError, NotAnAdapterError
from loratools.io import json_text, storage
from loratools.io.links import refuse_leaving
from loratools.ops import _pack_fields
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
        MalformedFileError: The index is damaged, of another version, or names places outside the pack.
    """
    given = os.fspath(folder)
    if not storage.is_dir(given):
        raise MissingFileError(
            "no such folder", path=given, todo="Give the folder that `loratools pack` wrote"
        )
    refuse_leaving(storage.below(given, NAME), given)
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
        raise _damaged(
            given, f"it is of version {json_text.brief(found.get('version'))}, where {_VERSION} is known"
        )
    return _index(given, found)


def _index(folder: str, found: Mapping[str, Any]) -> Index:
    place = storage.below(folder, NAME)
    adapters = {
        each.name: each
        for each in (_pack_fields.packed(entry, place) for entry in _rows(found, "adapters", place))
    }
    aliases = {
        each.name: each
        for each in (_pack_fields.alias(entry, place) for entry in _rows(found, "aliases", place))
    }
    lost = [each.name for each in aliases.values() if each.of not in adapters]
    if lost:
        raise _pack_fields.malformed(f"{len(lost)} aliases are of no adapter, such as {lost[0]!r}", place)
    for name in ("layout", "arch"):
        if not isinstance(found.get(name), str):
            raise _pack_fields.malformed(f"{name} is {json_text.brief(found.get(name))}", place)
    shared = _pack_fields.shared(found.get("shared_basis"), place)
    return Index(folder, found["layout"], found["arch"], adapters, aliases, shared)


def _rows(found: Mapping[str, Any], name: str, place: str) -> list[Any]:
    rows = found.get(name)
    if not isinstance(rows, list):
        raise _pack_fields.malformed(f"{name} is {json_text.brief(rows)}", place)
    return rows


def said(entry: Packed) -> dict[str, Any]:
    """A value as an entry of the index."""
    return {**entry._asdict(), "ranks": dict(entry.ranks), "errors": dict(entry.errors)}


def check(index: Index, name: str, file: str, sha256: str) -> None:
    """Refuse a file of a pack that is not the one that was written.

    Raises:
        MalformedFileError: It is missing, another, or behind a link that leaves the pack.
    """
    path = storage.below(index.path, file)
    refuse_leaving(path, index.path)
    try:
        found = file_digest(path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
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
    with open(storage.local(os.fspath(path)), "rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


def _parsed(folder: str) -> Any:
    return json_text.loads(storage.read_all(storage.below(folder, NAME), storage.TEXT).decode())


def _damaged(folder: str, why: str) -> MalformedFileError:
    return MalformedFileError(
        f"{NAME} cannot be used: {why}",
        path=folder,
        expected="The index as `loratools pack` wrote it was expected",
        todo="Make the pack again",
    )
