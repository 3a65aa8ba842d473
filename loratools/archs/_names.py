"""Names of weights, and how one is found among thousands in constant time.

Names are found by skeleton: dots and underscores are one separator and every whole number is ``0``, so that
one dictionary serves every dialect, dotted or flattened.

Within one dialect a name means one weight. Two dialects may use one name for different weights (homonyms:
Hunyuan-DiT's native norm2 is diffusers' norm3, and the other way round); who asks has to say which is spoken.
And two dialects may differ in a name's dots alone (ComfyUI's img_attn.qkv is the original's img_attn_qkv): the dots
tell them apart, and of a flattened name nothing does, which means the same weight in either.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from loratools.model import Rows

HOLE = "{}"
NATIVE = "native"
DIFFUSERS = "diffusers"

# A whole-number segment, between separators.
_NUMBER = re.compile(r"(?<=_)([0-9]+)(?=_)")


def parse(stem: str) -> tuple[str, tuple[str, ...]]:
    """A name's skeleton and its numbers: ``blocks.3.to_q`` is ``blocks_0_to_q`` and ``("3",)``.

    Zero stands for every number, and thus can stand for nothing else, whatever characters a name has.
    """
    flat = f"_{stem.replace('.', '_')}_"
    pieces = _NUMBER.split(flat)  # words and numbers in turn
    return "0".join(pieces[::2])[1:-1], tuple(pieces[1::2])


class Name(NamedTuple):
    """One spelling of one weight, or of some rows of it; ``%s`` where a number stands.

    Attributes:
        native: The weight's native template.
        rows: Which of its rows this names, or None for all.
        dialect: The spelling's dialect; None where native and diffusers agree.
        text: The spelling, dotted.
        homonyms: What the same spelling means in other dialects, in an index.
        variants: How other dialects dot the same spelling of the same weight, in an index.
    """

    native: str
    rows: Rows | None
    dialect: str | None
    text: str
    homonyms: tuple[Name, ...] = ()
    variants: tuple[Name, ...] = ()


class _Bucket(NamedTuple):
    """The names of one skeleton that have their holes in the same places, by their literal numbers."""

    literals: list[int]
    holes: list[int]
    names: dict[tuple[str, ...], Name]


class Index:
    """Names by skeleton."""

    def __init__(self) -> None:
        self._buckets: dict[str, list[_Bucket]] = {}

    def __contains__(self, skeleton: str) -> bool:
        return skeleton in self._buckets

    def find(self, skeleton: str, numbers: tuple[str, ...]) -> tuple[Name, tuple[str, ...]] | None:
        """The name with this skeleton and these numbers, and the numbers that fill its holes."""
        for bucket in self._buckets.get(skeleton, ()):
            name = bucket.names.get(tuple([numbers[place] for place in bucket.literals]))
            if name is not None:
                return name, tuple([numbers[place] for place in bucket.holes])
        return None

    def add(self, name: Name) -> None:
        """Enter a name.

        Raises:
            ValueError: Another weight has it in the same dialect.
        """
        words: list[str] = []
        numbers: list[str] = []
        literals: list[int] = []
        holes: list[int] = []
        for part in name.text.replace(".", "_").split("_"):
            if part == "%s":
                holes.append(len(literals) + len(holes))
                words.append("0")
            elif part.isdigit():
                literals.append(len(literals) + len(holes))
                numbers.append(part)
                words.append("0")
            else:
                words.append(part)
        bucket = self._bucket("_".join(words), literals, holes)
        key = tuple(numbers)
        known = bucket.names.setdefault(key, name)
        if known is not name:
            bucket.names[key] = _both(known, name)

    def _bucket(self, skeleton: str, literals: list[int], holes: list[int]) -> _Bucket:
        buckets = self._buckets.setdefault(skeleton, [])
        for bucket in buckets:
            if bucket.holes == holes:
                return bucket
        buckets.append(_Bucket(literals, holes, {}))
        found = buckets[-1]
        # A literal number is more specific than a hole.
        buckets.sort(key=lambda bucket: len(bucket.holes))
        return found


def _both(known: Name, name: Name) -> Name:
    """A name that is claimed again: by the same weight in another dialect, or by another weight."""
    for each in (known, *known.homonyms):
        if (each.native, each.rows) == (name.native, name.rows):
            return _agreed(known, name) if each is known else known
        if name.dialect == each.dialect or (each.dialect is None and name.dialect in (NATIVE, DIFFUSERS)):
            raise ValueError(f"{name.text} names both {each.native} and {name.native}")
    return known._replace(homonyms=(*known.homonyms, name))


def _agreed(known: Name, name: Name) -> Name:
    """A name that is claimed again by its own weight: as it is, or with other dots."""
    if known.text == name.text:
        both = {known.dialect, name.dialect} == {NATIVE, DIFFUSERS}
        return known._replace(dialect=None) if both else known
    if any(each.text == name.text for each in known.variants):
        return known
    return known._replace(variants=(*known.variants, name))


def spoken(name: Name, dialect: str) -> Name:
    """What a name means in a dialect; in the first that has it, where this one has it not."""
    return next((each for each in name.homonyms if each.dialect == dialect), name)


def dotted(name: Name, body: str, numbers: tuple[str, ...], dialect: str) -> Name:
    """The one of a name's variants that has a body's dots; of a flattened one, that of a dialect."""
    variants = (name, *name.variants)
    if "." in body:
        return next((each for each in variants if each.text % numbers == body), name)
    return next((each for each in variants if each.dialect == dialect), name)
