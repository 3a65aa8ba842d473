"""What a resize returns: plain values that a report shows and ``--json`` writes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from loratools.model import EMPTY
from loratools.ops.prediction_results import Estimate


class ResizedModule(NamedTuple):
    """One module of a resize's result.

    Attributes:
        target: The base weight.
        component: Its component.
        kind: What the module was: "lora", "dora", "loha", …
        before: Its rank in the input, a count; None where its kind has none.
        rank: Its rank in the result; None where it was carried and has none (norms, full differences).
        energy: The fraction of its Σσ² that is kept.
        error: ‖ΔW − ΔW'‖_F / ‖ΔW‖_F of what is stored: truncation, and the store dtype's rounding.
        norm: ‖ΔW‖_F of the input, scale included.
        shape: The base weight's shape (out, in[, kh, kw]).
        changed: Whether its tensors are new; False where they were carried as they are.
        weight_norm: The norm of the base weight that its directions were scored against, or None.
    """

    target: str
    component: str
    kind: str
    before: int | None
    rank: int | None
    energy: float
    error: float
    norm: float
    shape: tuple[int, ...] | None = None
    changed: bool = True
    weight_norm: float | None = None


class ResizedGroup(NamedTuple):
    """Modules that are looked at together.

    Attributes:
        modules: In order.
    """

    modules: tuple[ResizedModule, ...]

    @property
    def energy(self) -> float:
        """The fraction of Σσ² over all of them that is kept; 1 where all are zero."""
        top = max((module.norm for module in self.modules), default=0.0)
        if top == 0.0:
            return 1.0
        # Relative to the largest, so that squares neither overflow nor underflow.
        squares = [(module.norm / top) ** 2 for module in self.modules]
        kept = math.fsum(square * each.energy for square, each in zip(squares, self.modules, strict=True))
        return min(1.0, kept / math.fsum(squares))

    @property
    def error(self) -> float:
        """‖ΔW − ΔW'‖_F / ‖ΔW‖_F over all of them; 0 where all are zero."""
        norm = math.hypot(*(module.norm for module in self.modules))
        return math.hypot(*(each.error * each.norm for each in self.modules)) / norm if norm else 0.0


class ResizeReport(NamedTuple):
    """What a resize did.

    Attributes:
        rule: In words: "energy 0.9".
        input: Path of the input.
        output: Where it was written, or empty.
        bytes_before: Size of the input, with the configuration that is written beside it; 0 where it came from no
            file.
        bytes: Size of what was (or would be) written; 0 where unknown.
        layout: Of the result.
        arch: Of the result.
        modules: Of the result, in order.
        curves: By component, the fraction of Σσ² kept if every module is cut to a rank, by rank.
        dropped: Targets that were left out because the caller asked for it.
        carried: Keys of tensors that belong to no module and were taken over.
        dtypes: How many tensors of the result have each store dtype.
        notes: What the caller should know.
        resumed: How many modules were decomposed before, by the run that was interrupted.
        estimate: What it would take, on a dry run; None otherwise.
    """

    rule: str
    input: str
    output: str
    bytes_before: int
    bytes: int
    layout: str
    arch: str
    modules: tuple[ResizedModule, ...]
    curves: Mapping[str, Mapping[int, float]]
    dropped: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    dtypes: Mapping[str, int] = EMPTY
    notes: tuple[str, ...] = ()
    resumed: int = 0
    estimate: Estimate | None = None

    @property
    def energy(self) -> float:
        """The fraction of Σσ² over all modules together that is kept."""
        return ResizedGroup(self.modules).energy

    @property
    def error(self) -> float:
        """‖ΔW − ΔW'‖_F / ‖ΔW‖_F over all modules together."""
        return ResizedGroup(self.modules).error

    def components(self) -> dict[str, ResizedGroup]:
        """The modules grouped by component, in order."""
        groups: dict[str, list[ResizedModule]] = {}
        for module in self.modules:
            groups.setdefault(module.component, []).append(module)
        return {name: ResizedGroup(tuple(own)) for name, own in groups.items()}
