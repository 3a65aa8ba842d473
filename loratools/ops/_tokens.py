"""Vocabularies that several adapters have added words to, united: each word one row, whatever its id was.

Which id means which word only a tokenizer knows: ``tokenizer.json`` or ``added_tokens.json`` beside an adapter. Rows of
one id and one meaning stay where they are; a word whose id another adapter uses for something else moves behind all.
Sources: transformers ``tokenization_utils_base.py`` (added_tokens.json is {word: id}) and the ``added_tokens`` of
tokenizers' JSON.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from loratools.errors import LayoutError, MalformedFileError
from loratools.io import storage
from loratools.io._model_files import read_json
from loratools.model import Adapter
from loratools.ops._merge_steps import shown_name

TOKENIZER = "tokenizer.json"
ADDED = "added_tokens.json"


class Side(NamedTuple):
    """What one adapter's vocabulary becomes.

    Attributes:
        rows: For each row of the result the adapter's row that it is, or -1.
        moved: Words that got another id: the old and the new one.
        lost: How many rows without a word gave way to other adapters' words: padding.
    """

    rows: tuple[int, ...]
    moved: Mapping[str, tuple[int, int]]
    lost: int = 0


class United(NamedTuple):
    """One vocabulary.

    Attributes:
        height: How many rows it has.
        words: The added words by id, ascending, as far as tokenizers name them.
        sides: What becomes of each adapter's, in their order.
    """

    height: int
    words: Mapping[int, str]
    sides: tuple[Side, ...]

    @property
    def changed(self) -> bool:
        """Whether any adapter's rows are elsewhere than they were."""
        return any(side.moved or side.lost for side in self.sides)


class Words(NamedTuple):
    """What a tokenizer says of its words.

    Attributes:
        own: The size of its own vocabulary, a count of rows; None where it does not say.
        added: The words beside that by id, ascending.
    """

    own: int | None
    added: Mapping[int, str]


def words_of(adapter: Adapter) -> Words | None:
    """What the tokenizer's files beside an adapter say; None without any.

    Raises:
        MalformedFileError: A file cannot be read as what it should be.
    """
    if not adapter.path:
        return None
    folder = adapter.path if storage.is_dir(adapter.path) else os.path.dirname(adapter.path)
    whole, added = os.path.join(folder, TOKENIZER), os.path.join(folder, ADDED)
    own, found = None, None
    if storage.is_file(whole):
        own, found = _of_tokenizer(_json(whole), whole)
    if storage.is_file(added):
        found = {**(found or {}), **_of_added(_json(added), added)}
    return None if found is None else Words(own, dict(sorted(found.items())))


def united(adapters: Sequence[Adapter], heights: Sequence[int]) -> United:
    """One vocabulary of those of several adapters of one base.

    Args:
        adapters: Those that hold rows of a vocabulary.
        heights: How many rows each one's has, a count.

    Raises:
        LayoutError: The heights differ, and a tokenizer is missing, so that nothing tells which row is which word.
        MalformedFileError: A tokenizer's file is damaged, or names a row that the adapter does not have.
    """
    words = [words_of(adapter) for adapter in adapters]
    if len({*heights}) > 1 or any(words):
        _refuse_unknown(adapters, heights, words)
    there = [each for each in words if each is not None]
    common = _common(there)
    known = [
        {place: word for place, word in each.added.items() if place >= common} if each is not None else {}
        for each in words
    ]
    _refuse_beyond(adapters, heights, known)
    ids = _ids(known, heights)
    owners = {place: word for word, place in ids.items()}
    height = max(max(heights), max(owners, default=-1) + 1)
    sides = [_side(own, rows, ids, owners, height) for own, rows in zip(known, heights, strict=True)]
    return United(height, dict(sorted(owners.items())), tuple(sides))


def _common(words: Sequence[Words]) -> int:
    """How many rows mean the same for all: the base tokenizer's own vocabulary.

    Only tokenizer.json tells its size; added_tokens.json has nothing but what lies behind it.
    """
    stated = [each.own for each in words if each.own is not None]
    return max(stated) if stated else min((place for each in words for place in each.added), default=0)


def _ids(known: Sequence[Mapping[int, str]], heights: Sequence[int]) -> dict[str, int]:
    """One id for each word: its own where it is the first that wants it, else behind all rows that there are."""
    ids: dict[str, int] = {}
    taken: dict[int, str] = {}
    behind = max(heights)
    for words in known:
        for place, word in words.items():
            if word in ids:
                continue
            free = place not in taken
            ids[word] = place if free else behind
            taken[ids[word]] = word
            behind += not free
    return ids


def _side(
    words: Mapping[int, str], rows: int, ids: Mapping[str, int], owners: Mapping[int, str], height: int
) -> Side:
    found = [-1] * height
    moved: dict[str, tuple[int, int]] = {}
    lost = 0
    for row in range(rows):
        word = words.get(row)
        place = row if word is None else ids[word]
        if word is None and row in owners:
            # A row of padding where another adapter has a word.
            lost += 1
            continue
        found[place] = row
        if word is not None and place != row:
            moved[word] = (row, place)
    return Side(tuple(found), moved, lost)


def described(united: United, names: Sequence[str]) -> list[str]:
    """What the caller has to know of a united vocabulary, in sentences.

    Args:
        united: The vocabulary.
        names: The adapters' paths.
    """
    said = []
    for side, path in zip(united.sides, names, strict=True):
        if side.moved:
            listed = ", ".join(f"{word} {old} -> {new}" for word, (old, new) in side.moved.items())
            said.append(f"added words of {shown_name(path) or 'an input'} have other ids now: {listed}")
        if side.lost:
            said.append(
                f"{side.lost} rows of {shown_name(path) or 'an input'} that no word of its tokenizer has gave way "
                "to words of other inputs"
            )
    if said:
        listed = ", ".join(f"{word} {place}" for place, word in united.words.items())
        said.append(
            f"the vocabulary has {united.height} rows; the result's tokenizer has to have these words: {listed}"
        )
    return said


def _refuse_unknown(
    adapters: Sequence[Adapter], heights: Sequence[int], words: Sequence[Words | None]
) -> None:
    """Refuse vocabularies that may differ where a tokenizer is missing."""
    lacking = [adapter for adapter, each in zip(adapters, words, strict=True) if each is None]
    if not lacking:
        return
    sizes = ", ".join(
        f"{shown_name(adapter.path) or 'an input'}: {height}"
        for adapter, height in zip(adapters, heights, strict=True)
    )
    raise LayoutError(
        f"the inputs' vocabularies may differ ({sizes} rows), and {len(lacking)} of them have no tokenizer",
        path=lacking[0].path or None,
        expected=f"{TOKENIZER} or {ADDED} was expected beside each, to tell which row is which word",
        todo="Put the tokenizer beside the adapter, or leave the tensors out with --drop extras",
    )


def _refuse_beyond(
    adapters: Sequence[Adapter], heights: Sequence[int], words: Sequence[Mapping[int, str]]
) -> None:
    for adapter, height, own in zip(adapters, heights, words, strict=True):
        beyond = [f"{word} {place}" for place, word in own.items() if place >= height]
        if beyond:
            raise MalformedFileError(
                f"{len(beyond)} words of the tokenizer have no row in the adapter's vocabulary of {height}",
                path=adapter.path or None,
                keys=beyond,
                expected="A row for each word was expected",
                todo="Put the tokenizer beside it that the adapter was trained with",
            )


def _json(path: str) -> Any:
    return read_json(path, "the tokenizer")


def _of_tokenizer(found: Any, path: str) -> tuple[int | None, dict[int, str]]:
    """The size of a tokenizer's own vocabulary, and its added words."""
    rows = found.get("added_tokens", []) if isinstance(found, dict) else None
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and _is_word(row.get("content"), row.get("id")) for row in rows
    ):
        raise _damaged(path, '"added_tokens", a list of {"id": …, "content": …},')
    model = found.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    # A Unigram model lists its words, the others give ids.
    if isinstance(vocabulary, dict):
        own = max((place for place in vocabulary.values() if isinstance(place, int)), default=-1) + 1
    else:
        own = len(vocabulary) if isinstance(vocabulary, list) else 0
    return own or None, {row["id"]: row["content"] for row in rows}


def _of_added(found: Any, path: str) -> dict[int, str]:
    if not isinstance(found, dict) or not all(_is_word(word, place) for word, place in found.items()):
        raise _damaged(path, "An object of ids by word")
    return {place: word for word, place in found.items()}


def _is_word(word: object, place: object) -> bool:
    return isinstance(word, str) and isinstance(place, int) and not isinstance(place, bool) and place >= 0


def _damaged(path: str, what: str) -> MalformedFileError:
    return MalformedFileError(
        "this is no tokenizer's file", path=path, expected=f"{what} was expected", todo="Save it again"
    )
