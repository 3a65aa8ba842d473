"""What adapters are multiplied by on their way into a checkpoint, as the user gave it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from loratools.errors import OptionError


def strengths(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """One finite number for each adapter; 1 each where none is given.

    Args:
        weights: As given.
        count: Of adapters.

    Raises:
        OptionError: There is no adapter, or not one finite number for each.
    """
    if not count:
        raise OptionError("no adapter was given", expected="At least one adapter was expected")
    given = tuple(map(float, weights)) if weights is not None else (1.0,) * count
    if len(given) != count:
        raise OptionError(
            f"{len(given)} weights for {count} adapters",
            expected="One weight for each adapter was expected",
        )
    bad = [str(weight) for weight in given if not math.isfinite(weight)]
    if bad:
        raise OptionError("a weight is not a finite number", keys=bad)
    return given
