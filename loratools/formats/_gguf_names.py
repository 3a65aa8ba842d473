"""llama.cpp's names for the weights of language models, and back."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from functools import cache

from loratools.formats._gguf_tables import ARCHES, GgufArch

ARCHITECTURE = "general.architecture"
"""The key of the metadata that says of which architecture a file is."""

_NUMBER = r"(?<=\.)\d+(?=\.)"
_BY_NAME = {arch.name: arch for arch in ARCHES}
_BY_TYPE = {kind: arch for arch in ARCHES for kind in arch.model_types}

# What the same model's names begin with inside other classes of transformers, the longest first.
_OUTER = (
    *("model.language_model.", "language_model.model.", "language_model.", "base_model.model."),
    *("transformer.", "gpt_neox.", "roberta.", "model.", "bert."),
)


def arch_of(name: str) -> GgufArch | None:
    """The architecture of this name of llama.cpp's, or None where no table describes it."""
    return _BY_NAME.get(name)


def of_model_type(model_type: str) -> GgufArch | None:
    """The architecture of models with this ``model_type`` in their configuration, or None where none is described."""
    return _BY_TYPE.get(model_type)


def near(word: str) -> list[str]:
    """Names of architectures, and types of models that they stand for, which are spelt much like a word."""
    return difflib.get_close_matches(word, sorted({*_BY_NAME, *_BY_TYPE}))


def spelt(arch: GgufArch, path: str) -> str | None:
    """llama.cpp's name for a module of transformers, without ``.weight``; None where it has none."""
    skeleton, number = _without_number(path)
    for bare in (skeleton, *(skeleton[len(head) :] for head in _OUTER if skeleton.startswith(head))):
        for name in (bare, *(head + bare for head in _OUTER)):
            if name in arch.names:
                return arch.names[name].replace("#", number)
    return None


def understood(arch: GgufArch, name: str) -> str | None:
    """transformers' path of a module by its name of llama.cpp, without ``.weight``; None where it is unknown."""
    skeleton, number = _without_number(name)
    found = _inverse(arch.name).get(skeleton)
    return found.replace("#", number) if found is not None else None


def _without_number(name: str) -> tuple[str, str]:
    """A name with "#" for its first number, which is that of the block, and the number; others are parts of words."""
    found = re.search(_NUMBER, name)
    return (name[: found.start()] + "#" + name[found.end() :], found[0]) if found else (name, "")


@cache
def _inverse(name: str) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for path, spelling in _BY_NAME[name].names.items():
        found.setdefault(spelling, path)
    return found
