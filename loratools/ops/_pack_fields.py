"""Whether what an index of a pack, or the journal of one, says of its adapters is of the types and within the folder.

Both may come from others: a path in them that left the pack would have a file of the user's read, or removed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from loratools.errors import MalformedFileError
from loratools.io import names
from loratools.io.json_text import brief
from loratools.ops.pack_results import Alias, Packed

_Check = Callable[[Any], bool]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _by_name(check: _Check) -> _Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _list_of(check: _Check, count: int = 0, least: int = 0) -> _Check:
    return lambda value: (
        isinstance(value, list | tuple)
        and all(map(check, value))
        and (len(value) == count if count else len(value) >= least)
    )


def _or_none(check: _Check) -> _Check:
    return lambda value: value is None or check(value)


def is_inside(path: Any) -> bool:
    """Whether this is the path of a file or folder below another, on whatever system it is read."""
    return isinstance(path, str) and all(
        part not in ("", ".", "..") and not names.refusal(part) for part in path.split("/")
    )


_PACKED: Mapping[str, _Check] = {
    **dict.fromkeys(
        ("name", "source", "source_sha256", "hash", "layout", "dtype", "base", "sha256"), _is_text
    ),
    **dict.fromkeys(("rank", "bucket", "modules", "bytes"), _is_count),
    "path": lambda value: value == "" or is_inside(value),
    "ranks": _by_name(_is_count),
    "scales": _list_of(_is_number, 2),
    "rounded": _is_flag,
    "error": _or_none(_is_number),
    "errors": _by_name(_is_number),
}
_ALIAS: Mapping[str, _Check] = {
    **dict.fromkeys(("name", "of", "source", "source_sha256"), _is_text),
    "error": _is_number,
}
_SHARED: Mapping[str, _Check] = {
    "rank": _is_count,
    "diagonal": _is_flag,
    "file": is_inside,
    "sha256": _is_text,
    "dtype": _is_text,
    "modules": _list_of(lambda value: isinstance(value, dict)),
}
_MODULE: Mapping[str, _Check] = {
    **dict.fromkeys(("name", "component", "path", "op"), _is_text),
    "rows": _or_none(_list_of(_list_of(_is_count, 2), least=1)),
    "of": _is_count,
    "in_first": _is_flag,
    "shape": _list_of(_is_count, least=2),
    "rank": _is_count,
    "adapters": _or_none(_list_of(_is_text)),
}
_LEFT_OUT = ("error", "errors")  # of an adapter that is not in a shared basis


def packed(entry: Any, path: str) -> Packed:
    """An entry of the index, or of the journal, as a value.

    Args:
        entry: What was read.
        path: Where, for the message.

    Raises:
        MalformedFileError: It is none, or names a place outside the pack.
    """
    _check(entry, _PACKED, "an adapter", path, optional=_LEFT_OUT)
    low, high = entry["scales"]
    return Packed(**{**entry, "scales": (low, high)})


def alias(entry: Any, path: str) -> Alias:
    """Another name of an adapter; as for :func:`packed`."""
    _check(entry, _ALIAS, "an alias", path)
    return Alias(**entry)


def shared(found: Any, path: str) -> Mapping[str, Any]:
    """What the index says of a shared basis, empty where there is none; as for :func:`packed`."""
    if not found:
        return {}
    _check(found, _SHARED, "the shared basis", path)
    for module in found["modules"]:
        _check(module, _MODULE, "a module of the shared basis", path)
        if module["rows"] is not None and not _are_rows(module["rows"], module["of"]):
            raise malformed(f"rows of {brief(module['name'])} are {brief(module['rows'])}", path)
    return dict(found)


def are_shapes(found: Any) -> bool:
    """Whether these are the shapes of weights by module, as a journal has them."""
    return _by_name(_list_of(_is_count, least=2))(found)


def malformed(problem: str, path: str) -> MalformedFileError:
    """The error for an index that no run of ours has written."""
    return MalformedFileError(
        problem,
        path=path,
        expected="What `loratools pack` writes was expected: names and paths within the pack, and numbers",
        todo="Make the pack again, and do not use one that was changed",
    )


def _are_rows(spans: Collection[tuple[int, int]], of: int) -> bool:
    return all(start < stop <= of for start, stop in spans)


def _check(
    found: Any, fields: Mapping[str, _Check], what: str, path: str, optional: Collection[str] = ()
) -> None:
    """Refuse what has other fields than these, or values of other types."""
    if not isinstance(found, dict):
        raise malformed(f"{what} is {brief(found)}", path)
    for name in fields:
        if name not in found and name not in optional:
            raise malformed(f"{what} has no {name}", path)
    for name, value in found.items():
        if name not in fields:
            raise malformed(f"{what} has a field {brief(name)}, which means nothing", path)
        if not fields[name](value):
            raise malformed(f"{name} of {what} is {brief(value)}", path)
