"""Which keys claim which rows of which weight: two that claim the same are refused."""

from __future__ import annotations

from functools import reduce
from math import lcm

from loratools.errors import NameResolutionError
from loratools.model import Rows, Target


class Claimed:
    """The weights of a file that have been claimed so far, and by whom."""

    def __init__(self, path: str = "") -> None:
        self.path = path
        self._owners: dict[tuple[str, str], dict[Rows | None, str]] = {}

    def add(self, target: Target, stem: str) -> None:
        """Claim a target.

        Raises:
            NameResolutionError: It is another stem's already.
        """
        owners = self._owners.setdefault((target.component, target.path), {})
        if target.rows in owners:
            raise self._error(target, owners[target.rows], stem)
        owners[target.rows] = stem

    def refuse_overlaps(self) -> None:
        """Refuse rows that are claimed twice by targets that differ: a fused weight beside its parts.

        Raises:
            NameResolutionError: There are such.
        """
        for (component, path), owners in self._owners.items():
            if len(owners) == 1:
                continue
            of = reduce(lcm, [rows.of for rows in owners if rows is not None], 1)
            taken: dict[int, str] = {}
            for rows, stem in owners.items():
                for unit in _units(rows, of):
                    other = taken.setdefault(unit, stem)
                    if other != stem:
                        raise self._error(Target(component, path, rows), other, stem)

    def _error(self, target: Target, one: str, other: str) -> NameResolutionError:
        return NameResolutionError(
            f"two modules name {target}", path=self.path or None, keys=[one, other], todo="Keep one of them"
        )


def _units(rows: Rows | None, of: int) -> list[int]:
    """The shares of these rows, in ``of`` shares of the whole weight."""
    if rows is None:
        return list(range(of))
    factor = of // rows.of
    return [unit for start, stop in rows.spans for unit in range(start * factor, stop * factor)]
