"""Merge methods, one file each: a file that defines ``METHOD`` is found by its presence."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from loratools.errors import OptionError
from loratools.methods._base import Method, Option, Options, Outcome, Part
from loratools.registry import scan

__all__ = ["Method", "Option", "Options", "Outcome", "Part", "get", "methods", "options"]

# Every method is asked for these, whether or not it declares them.
_COMMON = {"rank", "key", "max_tile_bytes"}


def methods() -> Mapping[str, Method]:
    """Every merge method by name."""
    return scan("loratools.methods", "METHOD")


def get(name: str, *, path: str | None = None) -> Method:
    """The merge method of a name.

    Args:
        name: As the user spells it.
        path: Of the file that names it, which the message then names too.

    Raises:
        OptionError: There is none.
    """
    known = methods()
    if name not in known:
        raise OptionError(
            f"there is no merge method {name!r}",
            path=path,
            candidates=difflib.get_close_matches(name, known),
            expected=f"Known are {', '.join(known)}",
        )
    return known[name]


def options(method: Method, **given: Any) -> Options:
    """Checked options for a method, from what the user gave; None counts as not given.

    Args:
        method: What they are for.
        given: By the names of the fields of ``Options``.

    Raises:
        OptionError: A value is out of range, or the method has no such option.
    """
    chosen = {field: value for field, value in given.items() if value is not None}
    known = {field.name for field in fields(Options)}
    own = _COMMON | {option.field for option in method.options}
    foreign = sorted(set(chosen) - (own & known))
    if foreign:
        raise OptionError(
            f"{method.name} has no option {foreign[0]!r}",
            expected=f"Its options are: {', '.join(option.name for option in method.options) or 'none'}",
            todo=_who_has(foreign[0]),
        )
    made = Options(**chosen)
    method.check(made)
    return made


def _who_has(field: str) -> str:
    having = [name for name, method in methods().items() if field in {own.field for own in method.options}]
    return f"It is an option of {', '.join(having)}" if having else ""
