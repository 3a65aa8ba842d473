"""What a merge does before and after any method: inputs kept off what is protected, small singular values raised."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from loratools.errors import OptionError
from loratools.io import storage
from loratools.model import Adapter

ENERGY = 1.0
STRENGTH: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Steps:
    """What is done before and after any method.

    Attributes:
        styles: Adapters whose main directions the inputs must leave alone.
        energy: Which directions those are: the first that hold this fraction of each ΔW's Σσ², in (0, 1].
        strength: μ, how strongly the inputs are kept off them: the share μ/(1 + μ) is taken away, all of it for
            infinity.
        boost: Where the smaller singular values of the result are raised, a fraction of Σσ in [0, 1]; None for no.
        exempt: Positions of the inputs that are styles themselves, which are not kept off anything.
    """

    styles: tuple[Adapter, ...] = ()
    energy: float = ENERGY
    strength: float = math.inf
    boost: float | None = None
    exempt: frozenset[int] = frozenset()

    @property
    def stated_strength(self) -> float | None:
        """μ as the user states it and JSON can hold it: None for infinity."""
        return None if math.isinf(self.strength) else self.strength

    def named(self) -> dict[str, Any]:
        """Those that are asked for, as a report shows them."""
        said: dict[str, Any] = {}
        if self.styles:
            said["protect"] = ", ".join(shown_name(style.path) or "an adapter" for style in self.styles)
            said["protect-energy"] = self.energy
            said["protect-strength"] = self.stated_strength
        if self.boost is not None:
            said["boost"] = self.boost
        return said


def shown_name(path: str) -> str:
    """A file's name, with its folder's where the name alone says nothing.

    The full path says more of somebody's disk than a shared file should.
    """
    folder, name = os.path.split(path)
    return f"{os.path.basename(folder)}/{name}" if name.startswith("adapter") else name


def checked(steps: Steps, adapters: Sequence[Adapter]) -> Steps:
    """The steps with the inputs that are exempt from them.

    Raises:
        OptionError: A value is out of range, or nothing is left to be kept off the styles.
    """
    ranges = (
        ("protect energy", steps.energy, 0.0 < steps.energy <= 1.0, "a fraction in (0, 1]"),
        ("protect strength", steps.strength, steps.strength >= 0.0, "a number of at least 0"),
        ("boost", steps.boost, steps.boost is None or 0.0 <= steps.boost <= 1.0, "a fraction in [0, 1]"),
    )
    for name, value, valid, words in ranges:
        if not valid:
            raise OptionError(
                f"{name} is {value!r}",
                expected=f"A valid {name} is {words}",
                todo="Pass another, or leave it out",
            )
    exempt = frozenset(
        number
        for number, adapter in enumerate(adapters)
        if any(_same(adapter, style) for style in steps.styles)
    )
    if steps.styles and len(exempt) == len(adapters):
        raise OptionError(
            "every input is one of the protected adapters: there is nothing to keep off them",
            keys=[style.path for style in steps.styles if style.path],
            expected="An input that is not protected was expected",
            todo="Name fewer files with --protect",
        )
    return replace(steps, exempt=exempt)


def _same(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters are one: the same object, or read from the same file."""
    if one is other:
        return True
    return bool(one.path and other.path) and storage.same(one.path, other.path)
