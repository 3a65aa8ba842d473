"""Singular values of fused experts: ΔW of a layer's experts is one block-diagonal matrix, each expert a block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loratools.kinds import experts
from loratools.model import Module

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    Values = NDArray[numpy.float64]


def is_counted(module: Module) -> bool:
    """Whether a module is of fused experts, of a known number."""
    return module.kind == experts.KIND.name and experts.count(module) is not None


def spectra(module: Module) -> Values:
    """The singular values of every expert's up · down, without the scale.

    Args:
        module: Stacked, or packed with its count known.

    Returns:
        (experts, k), each row descending.
    """
    import numpy

    from loratools.maths import norms

    count = experts.count(module) or 0
    up, down = (module.factors[role].numpy(widen=False) for role in ("up", "down"))
    return numpy.stack(norms.spectra(_pair(up, down, number, count) for number in range(count)))


def _pair(up: Any, down: Any, number: int, count: int) -> tuple[Any, Any]:
    if up.ndim == 3:
        return up[number], down[number]
    rank = down.shape[0] // count
    return up[:, number::count], down[number * rank : (number + 1) * rank]


def together(sigma: Values) -> Values:
    """The singular values of all experts' ΔW as one matrix, descending.

    Args:
        sigma: (experts, k).
    """
    import numpy

    return numpy.sort(sigma, axis=None)[::-1]


def energy(sigma: Values) -> dict[int, float]:
    """The fraction of Σσ² kept if every expert were cut to a rank, by rank: 1, 2, 4, … below the experts' own.

    Args:
        sigma: (experts, k), each row descending.
    """
    squares = (sigma**2).sum(0)
    total = float(squares.sum())
    smaller = [1 << power for power in range(len(squares).bit_length()) if 1 << power < len(squares)]
    return {rank: float(squares[:rank].sum()) / total if total else 1.0 for rank in smaller}
