"""What a merge method is: parts in, one pair of factors out, and its options as data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from loratools.errors import OptionError, ShapeError
from loratools.maths.lowrank import Factors


@dataclass(frozen=True, slots=True)
class Part:
    """What one adapter brings to one merged weight: ΔW = scale · up @ down.

    Attributes:
        factors: up and down.
        weight: The user's multiplier; 0 is absence, negative subtracts.
        scale: The module's own.
        source: The adapter's position among the inputs, of which some may not change this weight.
    """

    factors: Factors
    weight: float = 1.0
    scale: float = 1.0
    source: int = 0

    @property
    def multiplier(self) -> float:
        """What up @ down is multiplied by, weight and scale together."""
        return self.weight * self.scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The settings of every method together; each method declares which of them it reads.

    Attributes:
        rank: Of the result, a count; None for what the method does without one.
        density: The fraction of elements kept when trimming, in (0, 1].
        lam: λ, what the merged matrix is multiplied by.
        seed: Of whatever is random.
        epsilon: How far probabilities of being kept lie apart, as a fraction of all elements.
        gamma: The fraction of the largest elements that is removed, in [0, 1).
        majority: How a sign is elected: "total" (by the sum) or "frequency" (by the count).
        common: The fraction of the result's directions that all adapters share, in [0, 1].
        part_rank: How many directions of each adapter are used, a count; None for what the method does without one.
        beta: The share that the past keeps in a moving average, in [0, 1).
        width: The relative width of a power-function average (σ_rel), or 0 for a moving average of ``beta``.
        key: The module's name, which random draws depend on; set by the operation.
        max_tile_bytes: How large a full matrix may be (bytes, as float64) and still be held between sweeps
            rather than computed again. It changes speed and memory, never the result.
    """

    rank: int | None = None
    density: float = 0.2
    lam: float = 1.0
    seed: int = 0
    epsilon: float = 0.1
    gamma: float = 0.01
    majority: str = "total"
    common: float = 0.8
    part_rank: int | None = None
    beta: float = 0.95
    width: float = 0.0
    key: str = ""
    max_tile_bytes: int = 256 << 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """One merged weight.

    Attributes:
        factors: The merged ΔW.
        energy: The fraction of Σσ² retained of the method's own result at full rank; 1.0 where nothing was
            lost.
        square: ‖ΔW‖_F² of the merged ΔW where the method knows it, else None.
        note: What the user should know of how it was computed, a clause without a full stop; or empty.
    """

    factors: Factors
    energy: float | None = 1.0
    square: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Option:
    """A setting that a method reads, declared so that a command line can offer and explain it.

    Attributes:
        name: As the user spells it ("lambda").
        field: The field of ``Options`` that holds it ("lam").
        default: Used where the user says nothing.
        help: One sentence.
        valid: The valid values in words.
        check: Whether a value is valid.
    """

    name: str
    field: str
    default: Any
    help: str
    valid: str
    check: Callable[[Any], bool]

    def validate(self, value: Any) -> None:
        """Refuse a value outside the valid range.

        Raises:
            OptionError: It is.
        """
        if not self.check(value):
            usual = "" if self.default is None else f" for {self.default}"
            raise OptionError(
                f"{self.name} is {value!r}",
                expected=f"A valid {self.name} is {self.valid}",
                todo=f"Pass another {self.name}, or leave it out{usual}",
            )


@dataclass(frozen=True, slots=True)
class Method:
    """A way to merge the changes that several adapters make to one weight.

    Attributes:
        name: As the user spells it.
        summary: One sentence.
        lossless: Whether the result without a rank holds the full ΔW that the method defines.
        options: The settings it reads.
        rule: The arithmetic, given at least one part of weight other than 0 and checked options.
        laws: What holds of the ΔW that it defines, before any truncation: "identity" (one adapter at weight 1 is
            itself), "order-free" (the order of the adapters does not matter), "linear" (it is linear in each weight),
            "homogeneous" (all weights multiplied by one positive number multiply the result), "sum" (it is the
            weighted sum at density 1).
        most: How many adapters it can take, a count; None for any number.
        batched: The same arithmetic for several weights at once, whose j-th parts have factors of one shape and rank;
            None where it has to be one weight after the other.
    """

    name: str
    summary: str
    lossless: bool
    options: tuple[Option, ...]
    rule: Callable[[Sequence[Part], Options], Outcome]
    laws: tuple[str, ...] = ()
    most: int | None = None
    batched: Callable[[Sequence[Sequence[Part]], Options], list[Outcome]] | None = None

    def __reduce__(self) -> tuple[Callable[[str], Method], tuple[str]]:
        """Sent elsewhere, it is its name."""
        from loratools.methods import get

        return get, (self.name,)

    def check(self, options: Options) -> None:
        """Refuse values that this method cannot use.

        Raises:
            OptionError: A declared option is out of range, or a rank is given to a method that has none.
        """
        for option in self.options:
            option.validate(getattr(options, option.field))
        if options.rank is not None and RANK.field not in {option.field for option in self.options}:
            raise OptionError(
                f"{self.name} was given rank {options.rank}",
                expected=f"{self.name} never truncates: its rank follows from those of the adapters",
                todo="Use linear with --rank for the nearest sum at a rank of your choice",
            )

    def combine(self, parts: Sequence[Part], options: Options | None = None) -> Outcome:
        """Merge one weight.

        Args:
            parts: At least one, all of one shape (out, in); those of weight 0 count as absent.
            options: Defaults where left out.

        Returns:
            The merged factors; zero factors of rank 1 where every weight is 0.

        Raises:
            NonFiniteError: A factor holds NaN or Inf.
            OptionError: An option or a weight is out of range, or there are no parts.
            ShapeError: The parts differ in shape.
        """
        options = options or Options()
        self.check(options)
        _check_parts(parts)
        present = [part for part in parts if part.weight != 0.0]
        if not present:
            up, down = parts[0].factors.up, parts[0].factors.down
            return Outcome(Factors(up.new_zeros(up.shape[0], 1), down.new_zeros(1, down.shape[1])))
        return self.rule(present, options)

    def combine_batch(self, batch: Sequence[Sequence[Part]], options: Options) -> list[Outcome]:
        """Merge several weights whose j-th parts have factors of one shape and rank: all at once where it can.

        Args:
            batch: The parts of every weight, at least one, none of weight 0.
            options: As for ``combine``.

        Raises:
            LoraError: As ``combine``, for any of them.
        """
        if self.batched is None:
            return [self.combine(parts, options) for parts in batch]
        self.check(options)
        for parts in batch:
            _check_parts(parts)
        return self.batched(batch, options)


def _check_parts(parts: Sequence[Part]) -> None:
    if not parts:
        raise OptionError(
            "nothing to merge", expected="At least one adapter that changes this weight was expected"
        )
    wrong = [part.weight for part in parts if not math.isfinite(part.weight)]
    if wrong:
        raise OptionError(f"weight {wrong[0]}", expected="A weight is a finite number")
    shapes = sorted({part.factors.shape for part in parts})
    if len(shapes) > 1:
        raise ShapeError(
            f"the adapters change one weight in the shapes {shapes}",
            expected="One shape (out, in) was expected",
            todo="Merge adapters of the same base model",
        )


def _is_rank(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1)


RANK = Option(
    "rank",
    "rank",
    None,
    "Rank of the result, a count; without it the result is whole where the method is lossless.",
    "a whole number of at least 1",
    _is_rank,
)
DENSITY = Option(
    "density",
    "density",
    0.2,
    "Fraction of each ΔW's elements kept, the largest by magnitude.",
    "a fraction in (0, 1]",
    lambda value: 0.0 < value <= 1.0,
)
LAMBDA = Option(
    "lambda",
    "lam",
    1.0,
    "What the merged ΔW is multiplied by.",
    "a finite number",
    lambda value: math.isfinite(value),
)
SEED = Option(
    "seed",
    "seed",
    0,
    "Seed of the randomised compression.",
    "a whole number in [0, 2^63)",
    lambda value: isinstance(value, int) and 0 <= value < 1 << 63,
)
