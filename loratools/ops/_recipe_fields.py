"""Whether what a recipe holds is a recipe: its fields, their types, and numbers that YAML reads as text."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from loratools.errors import MalformedFileError, OptionError
from loratools.io.json_text import brief

_ROW: Mapping[str, tuple[type, ...]] = {
    "path": (str,),
    "weight": (int, float, str),
    "sha256": (str,),
    "config_sha256": (str,),
}
_TYPES: Mapping[str, tuple[type, ...]] = {
    "recipe": (int,),
    "version": (str,),
    "inputs": (list,),
    "method": (str,),
    "options": (dict,),
    "component_weights": (list,),
    "block_weights": (list,),
    "weight_for": (dict,),
    "protect": (list,),
    "protect_energy": (int, float, str),
    "protect_strength": (int, float, str),
    "boost": (int, float, str),
    "layout": (str,),
    "dtype": (str,),
    "device": (str,),
    "arch": (str,),
    "drop": (list,),
    "full_modules": (str, int),
    "base": (str,),
    "allow_nonfinite": (bool,),
}
_WORDS = {
    str: "text",
    int: "a number",
    float: "a number",
    dict: "a mapping",
    list: "a list",
    bool: "true or false",
}


def checked(found: Any, path: str) -> dict[str, Any]:
    """A recipe whose fields are all known and of their types, with numbers for weights.

    Raises:
        MalformedFileError: They are not.
        OptionError: The recipe is of a later format.
    """
    _check(found, _TYPES, "the recipe", path)
    if found.get("recipe", 1) != 1:
        raise OptionError(
            f"the recipe is of format {brief(found['recipe'])}",
            path=path,
            expected="Format 1 was expected",
            todo="Use a later loratools",
        )
    if not found.get("inputs"):
        raise MalformedFileError(
            "the recipe has no inputs", path=path, expected='At least one {"path": …} was expected'
        )
    for name in ("inputs", "protect"):
        for row in found.get(name) or ():
            _check(row, _ROW, f"an entry of {name}", path)
            if not row.get("path"):
                raise MalformedFileError(
                    f"an entry of {name} has no path",
                    path=path,
                    expected="The path of a file, from the recipe's folder, was expected",
                    todo="Name the file; adapters that were made in memory have none",
                )
    made = {name: value for name, value in found.items() if value is not None}
    for name in ("component_weights", "block_weights"):
        made[name] = [_set(each, name, path) for each in made.get(name, ())]
    if "boost" in made:
        made["boost"] = number(made["boost"], "boost", path)
    return made


def number(value: Any, name: str, path: str) -> float:
    """A finite number; YAML 1.1 reads 1e-5 as text, for want of a point.

    Raises:
        MalformedFileError: It is none.
    """
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise MalformedFileError(
            f"{name} is {brief(value)}",
            path=path,
            expected="A finite number was expected",
            todo="Correct the recipe",
        )
    return int(found) if isinstance(value, int) else found


def _set(given: Any, name: str, path: str) -> Any:
    """One set of multipliers: a preset's name, a vector, or weights by name."""
    if isinstance(given, str):
        return given
    if isinstance(given, list):
        return [number(each, name, path) for each in given]
    if not isinstance(given, dict):
        raise _no_mapping(given, f"a set of {name}", path)
    return {str(key): number(value, name, path) for key, value in given.items()}


def _no_mapping(found: Any, what: str, path: str) -> MalformedFileError:
    return MalformedFileError(
        f"{what} is {brief(found)}",
        path=path,
        expected="A mapping was expected",
        todo="Compare with one that --save-recipe writes",
    )


def _check(found: Any, types: Mapping[str, tuple[type, ...]], what: str, path: str) -> None:
    """Refuse what is no mapping from known fields to values of their types."""
    if not isinstance(found, dict):
        raise _no_mapping(found, what, path)
    for name, value in found.items():
        if name not in types:
            raise MalformedFileError(
                f"{what} has a field {brief(name)}, which means nothing",
                path=path,
                candidates=difflib.get_close_matches(str(name), types),
                expected=f"The fields are {', '.join(types)}",
            )
        wrong = isinstance(value, bool) and bool not in types[name]
        if value is not None and (wrong or not isinstance(value, types[name])):
            raise MalformedFileError(
                f"{name} of {what} is {brief(value)}",
                path=path,
                expected=f"For {name}, {_WORDS[types[name][0]]} was expected",
            )
