"""The text of a recipe: JSON, which needs nothing, or other YAML, which needs PyYAML."""

from __future__ import annotations

import importlib
from typing import Any

from loratools.errors import LoraError, MalformedFileError, MissingFileError, OptionError, ReadError
from loratools.io import json_text, storage

_LONGEST_YAML = 1_000_000  # characters: PyYAML takes some seconds for as many


def parsed(path: str) -> Any:
    """What a file holds as JSON, or else as YAML.

    Raises:
        MissingFileError: It is not there.
        ReadError: It cannot be read.
        MalformedFileError: It is neither.
        OptionError: It is YAML, and PyYAML is not installed.
    """
    try:
        text = storage.read_all(path, storage.TEXT).decode("utf-8")
    except LoraError:
        raise
    except FileNotFoundError:
        raise MissingFileError("there is no such recipe", path=path) from None
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a path that can be none
        raise ReadError(f"the recipe cannot be read: {error}", path=path) from error
    try:
        return json_text.loads(text)
    except ValueError as error:
        if not path.lower().endswith((".yaml", ".yml")):
            raise MalformedFileError(
                f"the recipe is no JSON: {error}",
                path=path,
                expected="A recipe as --save-recipe writes it was expected",
                todo="Correct it; in other YAML its name ends in .yaml",
            ) from error
    return _yaml(text, path)


def _yaml(text: str, path: str) -> Any:
    if len(text) > _LONGEST_YAML:
        raise MalformedFileError(
            f"the recipe has {len(text):,} characters of YAML other than JSON",
            path=path,
            expected=f"At most {_LONGEST_YAML:,} were expected",
            todo="Write it as JSON",
        )
    try:
        # An optional package, which is for recipes that are written by hand alone.
        yaml = importlib.import_module("yaml")
    except ImportError:
        raise OptionError(
            "the recipe is YAML other than JSON, and PyYAML is not installed",
            path=path,
            expected="JSON is YAML too, and needs nothing",
            todo="Install pyyaml, or write the recipe as JSON",
        ) from None
    try:
        return yaml.safe_load(text)
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: dates and numbers that are none
        raise MalformedFileError(
            f"the recipe is no YAML: {' '.join(str(error).split())}",
            path=path,
            expected="A mapping with the inputs was expected",
            todo="Correct it, or write it as JSON",
        ) from error
