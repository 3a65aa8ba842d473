"""What a merge returns: plain values that a report shows and ``--json`` writes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from loratools.ops.prediction_results import Estimate


class MergedModule(NamedTuple):
    """One module of a merge's result.

    Attributes:
        target: The base weight.
        component: Its component.
        inputs: Positions of the inputs that contributed.
        rank: Of the result.
        energy: Fraction retained of Σσ² of the method's own full-rank result; None where the module was carried.
        shape: The base weight's shape (out, in[, kh, kw]).
        before: The rank of each of ``inputs`` there, a count; of one that has the weight in pieces, of all together.
        norm: ‖ΔW‖_F of the method's result, which boosting may raise after it.
    """

    target: str
    component: str
    inputs: tuple[int, ...]
    rank: int
    energy: float | None = None
    shape: tuple[int, ...] | None = None
    before: tuple[int, ...] = ()
    norm: float = 0.0

    @property
    def kept(self) -> float:
        """The fraction of Σσ² that is retained; what was carried has lost nothing."""
        return 1.0 if self.energy is None else self.energy


class MergedGroup(NamedTuple):
    """Modules that are looked at together.

    Attributes:
        modules: In order.
    """

    modules: tuple[MergedModule, ...]

    @property
    def energy(self) -> float:
        """The fraction of Σσ² over all of them that is retained; 1 where all are zero."""
        top = max((module.norm for module in self.modules), default=0.0)
        if top == 0.0:
            return 1.0
        # Relative to the largest, so that squares neither overflow nor underflow.
        squares = [(module.norm / top) ** 2 for module in self.modules]
        # ``norm`` is of what is left: what was there is more by what was lost.
        whole = math.fsum(
            square / (module.kept or 1.0) for square, module in zip(squares, self.modules, strict=True)
        )
        return min(1.0, math.fsum(squares) / whole)

    @property
    def error(self) -> float:
        """‖ΔW − ΔW'‖_F / ‖ΔW‖_F over all of them, ΔW the method's full-rank result and ΔW' that of the ranks kept.

        What is cut off is orthogonal to what is kept, so that its share of Σσ² is the error's square. The store dtype's
        rounding is not in it.
        """
        return truncation(self.energy)


def truncation(energy: float) -> float:
    """The relative Frobenius error of a truncation that retains a fraction of Σσ²."""
    return math.sqrt(1.0 - min(energy, 1.0))


class MergeReport(NamedTuple):
    """What a merge did.

    Attributes:
        method: Its name.
        options: The method's options as used.
        inputs: One mapping per input: "path", "weight", "layout", "arch", "modules", "sha256", "bytes", and in
            "multipliers" what its block and component weights and patterns hit.
        modules: Of the result.
        energy: Fraction of Σσ² retained over all modules.
        layout: Of the result.
        arch: Of the result.
        dtypes: How many tensors of the result have each store dtype.
        ranks: How many modules of the result have each rank.
        carried: Keys of tensors that belong to no module and were taken over.
        dropped: Keys that were left out because the caller asked for it.
        notes: What the caller should know.
        output: Where it was written, or empty.
        bytes: Size of what was (or would be) written; 0 where unknown.
        resumed: How many targets were merged before, by the run that was interrupted.
        estimate: What it would take, on a dry run; None otherwise.
    """

    method: str
    options: Mapping[str, Any]
    inputs: tuple[Mapping[str, Any], ...]
    modules: tuple[MergedModule, ...]
    energy: float
    layout: str
    arch: str
    dtypes: Mapping[str, int]
    ranks: Mapping[int, int]
    carried: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    output: str = ""
    bytes: int = 0
    resumed: int = 0
    estimate: Estimate | None = None

    @property
    def error(self) -> float:
        """‖ΔW − ΔW'‖_F / ‖ΔW‖_F over all modules, as ``MergedGroup.error``."""
        return truncation(self.energy)

    def components(self) -> dict[str, MergedGroup]:
        """The modules grouped by component, in order."""
        groups: dict[str, list[MergedModule]] = {}
        for module in self.modules:
            groups.setdefault(module.component, []).append(module)
        return {name: MergedGroup(tuple(own)) for name, own in groups.items()}
