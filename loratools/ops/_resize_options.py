"""What a resize is asked for: the rank rule, its limits, and where the result has to load; checked beforehand."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import NamedTuple

from loratools.errors import OptionError
from loratools.maths.rank import Rule
from loratools.ops import _extract_options, files

# Ranks that programs which serve adapters provide for.
BUCKETS: Mapping[str, tuple[int, ...]] = {
    # vLLM's documented choices of --max-lora-rank above 1 (vllm/config/lora.py, MaxLoRARanks).
    "vllm": (8, 16, 32, 64, 128, 256, 320, 512),
    # The ranks that Punica's SGMV kernels are compiled for (csrc/sgmv_flashinfer/sgmv_config.h).
    "punica": (16, 32, 64),
    # SGLang states no list: its buffers are as deep as --max-lora-rank says. Powers of two suit its kernels' blocks.
    "sglang": (8, 16, 32, 64, 128, 256),
}
NORMS = ("frobenius", "spectral")
_UNLIMITED = 1 << 30


class Options(NamedTuple):
    """A request that is consistent in itself.

    Attributes:
        kind: Of the rank rule: "rank", "energy", "ratio", "error" or "size"; "whole" where only a server's ranks were
            asked for, and nothing else is to be lost.
        value: Its value: a count, a fraction, or for "size" bytes.
        text: The rule in words: "energy 0.9".
        least: The smallest rank, a count.
        most: The largest rank, a count; None for no limit.
        conv_rank: The (largest) rank of convolutions with a kernel, a count; None as all others, 0 to leave them out.
        multiple: Ranks are rounded up to multiples of this, a count, where a module has as many directions.
        server: The program whose ranks are taken, or empty.
        norm: The base weight's norm that directions are scored against: "frobenius", "spectral", or empty for none.
        dtype: The store dtype, a key of ``tensors.DTYPES``; empty for each module's own.
    """

    kind: str
    value: float
    text: str
    least: int
    most: int | None
    conv_rank: int | None
    multiple: int
    server: str
    norm: str
    dtype: str

    @property
    def together(self) -> bool:
        """Whether the ranks of modules depend on one another, so that all spectra have to be known first."""
        return self.kind == "size" or bool(self.norm) or bool(self.server)

    def limit(self, *, wide: bool) -> int | None:
        """The largest rank of a module, a count, and a multiple of what ranks are to be; None for no limit.

        Args:
            wide: Whether it is a convolution with a kernel.
        """
        special = self.conv_rank if wide and self.kind != "rank" else None
        most = min((each for each in (special, self.most) if each), default=None)
        return None if most is None else most - most % self.multiple

    def rule(self, *, wide: bool) -> Rule:
        """The rank rule of one module; for a size, which is spent over all modules together, its limits."""
        most = self.limit(wide=wide)
        if self.kind in ("size", "whole"):
            return Rule("rank", most or _UNLIMITED, self.least, most)
        value = self.conv_rank if wide and self.conv_rank and self.kind == "rank" else self.value
        return Rule(self.kind, value, self.least, most)

    def fixed(self, *, wide: bool) -> int | None:
        """The rank of a module where it does not depend on its spectrum; None where it does."""
        if self.kind != "rank":
            return None
        rule = self.rule(wide=wide)
        return self.rounded(max(int(rule.value), self.least), wide=wide)

    def rounded(self, rank: int, *, wide: bool) -> int:
        """A rank brought to the next multiple, within the limit."""
        most = self.limit(wide=wide)
        up = -(-rank // self.multiple) * self.multiple
        return up if most is None else min(up, most)


def options(
    rules: Mapping[str, float | str | None],
    *,
    min_rank: int,
    max_rank: int | None,
    conv_rank: int | None,
    multiple_of: int,
    to_rank_of: str | None,
    against_norm: str,
    dtype: str,
) -> Options:
    """The request, checked.

    Args:
        rules: The rank rules by name; exactly one has a value, or none where ``to_rank_of`` has.
        min_rank: See ``Options.least``.
        max_rank: See ``Options.most``.
        conv_rank: See ``Options``.
        multiple_of: See ``Options.multiple``.
        to_rank_of: See ``Options.server``.
        against_norm: See ``Options.norm``.
        dtype: "float32", "float16", "bfloat16", "float64", or "keep".

    Raises:
        OptionError: A value is out of its range, or options contradict each other.
    """
    given = {name: value for name, value in rules.items() if value is not None}
    if given or to_rank_of is None:
        kind, value, text, _ = _extract_options.rule_of(given)
    else:
        kind, value, text = "whole", _UNLIMITED, f"the next rank that {to_rank_of} takes"
    _extract_options.check_ranks(min_rank, max_rank, conv_rank)
    if multiple_of < 1 or multiple_of != int(multiple_of):
        raise OptionError(
            f"ranks are to be multiples of {multiple_of}", expected="A whole number of at least 1"
        )
    if dtype != "keep" and dtype not in files.STORE_DTYPES:
        raise OptionError(f"there is no store dtype {dtype!r}", candidates=[*files.STORE_DTYPES, "keep"])
    found = Options(
        kind,
        value,
        text,
        min_rank,
        max_rank,
        conv_rank,
        multiple_of,
        to_rank_of or "",
        against_norm,
        files.STORE_DTYPES.get(dtype, ""),
    )
    _check_multiples(found)
    _check_server(found)
    _check_against(found)
    return found


def _check_multiples(asked: Options) -> None:
    """Refuse limits that no multiple lies within."""
    least = -(-asked.least // asked.multiple) * asked.multiple
    # Convolutions may have a limit below the smallest rank of all others.
    floors = {False: least, True: asked.multiple if asked.conv_rank else least}
    for wide, floor in floors.items():
        most = asked.limit(wide=wide)
        if most is not None and most < floor:
            raise OptionError(
                f"the largest rank is {asked.conv_rank if wide else asked.most}, and the smallest multiple of "
                f"{asked.multiple} that is allowed is {floor}",
                expected="Limits with a multiple between them were expected",
                todo="Raise the largest rank, or choose a smaller multiple",
            )


def _check_server(asked: Options) -> None:
    if not asked.server:
        return
    if asked.server not in BUCKETS:
        raise OptionError(
            f"it is not known which ranks {asked.server!r} loads",
            candidates=difflib.get_close_matches(asked.server, BUCKETS),
            expected=f"Known are {', '.join(BUCKETS)}",
        )
    others = {
        "a size": asked.kind == "size",
        "a rank for convolutions": asked.conv_rank is not None,
        "a multiple": asked.multiple > 1,
    }
    second = next((what for what, stated in others.items() if stated), "")
    if second:
        raise OptionError(
            f"the ranks of {asked.server} and {second} exclude each other",
            expected="Servers read one rank for all modules",
            todo="Choose one of them",
        )
    least = BUCKETS[asked.server][0]
    if asked.most is not None and asked.most < least:
        raise OptionError(
            f"the largest rank is {asked.most}, and the smallest that {asked.server} provides for is {least}",
            todo="Leave the largest rank away",
        )


def _check_against(asked: Options) -> None:
    if not asked.norm:
        return
    if asked.norm not in NORMS:
        raise OptionError(f"there is no norm {asked.norm!r} to score against", candidates=NORMS)
    if asked.kind in ("rank", "whole"):
        raise OptionError(
            "directions cannot be scored against a base where every module keeps the same rank",
            expected="An energy, an error, a ratio or a size was expected",
            todo="Choose one of them, or leave the base away",
        )


def bucket(asked: Options, rank: int) -> int:
    """The smallest rank of the server's that holds a rank, or the largest that is allowed."""
    allowed = [each for each in BUCKETS[asked.server] if asked.most is None or each <= asked.most]
    return next((each for each in allowed if each >= max(rank, asked.least)), allowed[-1])
