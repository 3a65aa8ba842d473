"""Whether a value is of an annotated type, as far down as it goes: what was read from a journal is not believed."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation says.

    Args:
        value: Of plain types, and of named tuples and dataclasses, whose fields are looked at by ``field_types``.
        hint: A class, a union, ``tuple[…]``, ``list[…]``, ``Mapping[…]``, or Any. Protocols take everything, as do
            arrays of any dtype.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (types.UnionType, Union):
        return any(fits(value, each) for each in inner)
    if origin is tuple:
        return isinstance(value, tuple) and _are(value, inner)
    if origin is list:
        return isinstance(value, list) and all(fits(each, inner[0]) for each in value)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            fits(key, inner[0]) and fits(each, inner[1]) for key, each in value.items()
        )
    kind = hint if origin is None else origin
    if kind is None:
        return value is None
    if getattr(kind, "_is_protocol", False):
        return True
    if kind in (float, int):
        return isinstance(value, float | int if kind is float else int) and not isinstance(value, bool)
    return isinstance(value, kind)


@functools.cache
def field_types(kind: type) -> Mapping[str, Any]:
    """The annotations of a class's fields."""
    return get_type_hints(kind)


def _are(values: tuple[Any, ...], hints: tuple[Any, ...]) -> bool:
    if len(hints) == 2 and hints[1] is Ellipsis:
        return all(fits(each, hints[0]) for each in values)
    return len(values) == len(hints) and all(map(fits, values, hints))
