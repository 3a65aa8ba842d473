"""What an extraction is asked for: the rank rule, which weights, and how; checked before anything is read."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from loratools.errors import OptionError
from loratools.maths.rank import Rule, parse_size
from loratools.ops import files

SVDS = ("auto", "exact", "randomized")
_RULES = ("rank", "energy", "ratio", "error", "size")
_UNLIMITED = 1 << 30
# What a rule's value is called in the output's name.
_SHORT = {"rank": "r", "energy": "e", "ratio": "ratio", "error": "err", "size": ""}


class Options(NamedTuple):
    """A request that is consistent in itself.

    Attributes:
        kind: Of the rank rule: "rank", "energy", "ratio", "error" or "size".
        value: Its value: a count, a fraction, or for "size" bytes.
        text: The rule in words: "rank 32", "size 20 MB".
        tag: The rule in the output's name: "r32", "e95".
        least: The smallest rank, a count.
        most: The largest rank, a count; None for no limit.
        conv_rank: The rank of convolutions with a kernel, a count; None as all others, 0 to leave them out.
        components: Those to extract; None for all.
        include: Only weights of which one of these matches a part of the path or key; none for all.
        exclude: No weights of which one of these does.
        svd: "auto", "exact" or "randomized".
        tolerance: How much larger than the optimum an error may be, a fraction of it.
        seed: Of the random starts.
        embeddings: Whether embeddings are extracted.
        full_small: Whether biases, norms and bare parameters are taken along as full differences.
        dtype: The store dtype, a safetensors name; empty for the base's own.
    """

    kind: str
    value: float
    text: str
    tag: str
    least: int
    most: int | None
    conv_rank: int | None
    components: frozenset[str] | None
    include: tuple[re.Pattern[str], ...]
    exclude: tuple[re.Pattern[str], ...]
    svd: str
    tolerance: float
    seed: int
    embeddings: bool
    full_small: bool
    dtype: str

    def rule(self, *, wide: bool) -> Rule | None:
        """The rank rule of one matrix; None where it is to be left out.

        For a size, which is spent over all matrices together, it is "rank" at the most that one of them may have.

        Args:
            wide: Whether it is a convolution with a kernel.
        """
        special = self.conv_rank if wide else None
        if special == 0:
            return None
        if self.kind == "rank":
            return Rule("rank", special or self.value, self.least, self.most)
        most = min((each for each in (special, self.most) if each), default=None)
        if self.kind == "size":
            return Rule("rank", most or _UNLIMITED, self.least, most)
        return Rule(self.kind, self.value, self.least, most)

    def chosen(self, *names: str) -> bool:
        """Whether the patterns choose a weight by its names."""
        if any(pattern.search(name) for pattern in self.exclude for name in names):
            return False
        return not self.include or any(pattern.search(name) for pattern in self.include for name in names)


def options(
    rules: Mapping[str, float | str | None],
    *,
    max_rank: int | None,
    min_rank: int,
    conv_rank: int | None,
    components: Collection[str] | None,
    include: Iterable[str],
    exclude: Iterable[str],
    dtype: str,
    **how: Any,
) -> Options:
    """The request, checked.

    Args:
        rules: The rank rules by name; exactly one has a value.
        max_rank: The largest rank, a count.
        min_rank: The smallest rank, a count.
        conv_rank: See ``Options``.
        components: See ``Options``.
        include: Regular expressions.
        exclude: Regular expressions.
        dtype: "float32", "float16", "bfloat16", or "keep".
        how: The other fields of ``Options`` by name.

    Raises:
        OptionError: A value is out of its range, or options contradict each other.
    """
    kind, value, text, tag = rule_of({name: given for name, given in rules.items() if given is not None})
    check_ranks(min_rank, max_rank, conv_rank)
    if dtype != "keep" and dtype not in files.STORE_DTYPES:
        raise OptionError(f"there is no store dtype {dtype!r}", candidates=[*files.STORE_DTYPES, "keep"])
    if how["svd"] not in SVDS:
        raise OptionError(f"there is no way to decompose called {how['svd']!r}", candidates=SVDS)
    if not 0.0 < how["tolerance"] < 1.0:
        raise OptionError(
            f"the tolerance is {how['tolerance']}", expected="A fraction between 0 and 1 was expected"
        )
    return Options(
        kind,
        value,
        text,
        tag,
        min_rank,
        max_rank,
        conv_rank,
        frozenset([components] if isinstance(components, str) else components) if components else None,
        _patterns(include),
        _patterns(exclude),
        dtype=files.STORE_DTYPES.get(dtype, ""),
        **how,
    )


def rule_of(given: Mapping[str, float | str]) -> tuple[str, float, str, str]:
    """Kind, value, words and tag of the one rule that is given."""
    if len(given) != 1:
        what = f"{' and '.join(given)} are given" if given else "no rank is given"
        raise OptionError(
            f"{what}", expected=f"Exactly one of {', '.join(_RULES)} was expected", todo="Choose one"
        )
    kind, said = next(iter(given.items()))
    if kind == "size":
        size = parse_size(said) if isinstance(said, str) else int(said)
        label = said if isinstance(said, str) else f"{size} B"
        if size <= 0:
            raise OptionError(f"the size is {label}", expected="More than 0 bytes were expected")
        return kind, size, f"size {label}", label.replace(" ", "")
    if isinstance(said, str):
        raise OptionError(f"the {kind} is {said!r}", expected="A number was expected")
    if kind == "rank" and (said < 1 or said != int(said)):
        raise OptionError(f"the rank is {said}", expected="A whole number of at least 1 was expected")
    # A ratio above 1 is Kohya's: the largest singular value is so many times the smallest that is kept.
    inside = said > 0 and math.isfinite(said) if kind in ("rank", "ratio") else 0 < said < 1
    if not inside and not (kind == "energy" and said == 1):
        raise OptionError(f"the {kind} is {said}", expected="A fraction between 0 and 1 was expected")
    number = f"{said * 100:g}" if kind == "energy" else f"{said:g}"
    return kind, said, f"{kind} {said:g}", _SHORT[kind] + number


def check_ranks(least: int, most: int | None, conv: int | None) -> None:
    """Refuse bounds of ranks that no module can keep, and a negative rank of convolutions."""
    if least < 1 or (most is not None and most < least):
        raise OptionError(
            f"the smallest rank is {least}, the largest {'unlimited' if most is None else most}",
            expected="At least 1, and no more than the largest, was expected",
        )
    if conv is not None and conv < 0:
        raise OptionError(
            f"the rank of convolutions is {conv}", expected="A count, or 0 to leave them out, was expected"
        )


def _patterns(texts: Iterable[str]) -> tuple[re.Pattern[str], ...]:
    found = []
    for text in [texts] if isinstance(texts, str) else texts:
        try:
            found.append(re.compile(text))
        except re.error as error:
            raise OptionError(
                f"{text!r} is no regular expression: {error}",
                todo="Put a backslash before signs that mean themselves",
            ) from error
    return tuple(found)


def check_components(wanted: Collection[str] | None, known: Collection[str]) -> None:
    """Refuse components that the base does not have.

    Raises:
        OptionError: Near misses are offered.
    """
    unknown = sorted(set(wanted or ()) - set(known))
    if unknown:
        raise OptionError(
            f"the base has no component {unknown[0]!r}",
            candidates=difflib.get_close_matches(unknown[0], known),
            expected=f"It has {', '.join(sorted(known))}",
        )
