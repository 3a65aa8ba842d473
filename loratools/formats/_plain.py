"""What layouts share that hold nothing but products of two matrices: no alpha, no magnitudes, no convolutions."""

from __future__ import annotations

from loratools.formats._base import cannot_hold
from loratools.model import Layout, Module
from loratools.tensors import TensorRef

ROLES = frozenset({"up", "down"})


def factors(module: Module, layout: Layout) -> tuple[TensorRef, TensorRef]:
    """A module's up (out, rank) and down (rank, in).

    Raises:
        LayoutError: It is more than their product.
    """
    problem = _problem(module)
    if problem:
        todo = "`loratools convert` multiplies the scale into the factors" if problem == _SCALED else ""
        raise cannot_hold(layout, problem, [str(module.target)], todo)
    return module.factors["up"], module.factors["down"]


_SCALED = "a scale other than 1"


def _problem(module: Module) -> str:
    """What such a layout has no place for; empty where the module is a plain product."""
    if module.kind != "lora":
        return f"modules of kind {module.kind}"
    if module.magnitude is not None:
        return "DoRA magnitudes"
    if module.factors.keys() != ROLES:
        return "tensors beside up and down"
    if module.op == "embedding":
        return "embeddings"
    if any(len(ref.shape) != 2 for ref in module.factors.values()):
        return "convolutions"
    return _SCALED if module.scale != 1.0 else ""
