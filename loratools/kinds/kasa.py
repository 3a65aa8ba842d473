"""KaSA (arXiv 2412.06071): ΔW = scale · up · diag(d) · down, less the ``rank`` smallest components of the base weight.

Training begins by taking these components (by singular value) out of the frozen weight, whenever the adapter is put on
a model: what it changes in the weight as it was published is both. Source: PEFT ``tuners/lora/variants.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.errors import ShapeError
from loratools.kinds._base import Factored, Factors, Kind, Shape, first_axis, needed, wide
from loratools.model import Module

if TYPE_CHECKING:
    import torch

_TITLE = "KaSA"


def _shape(factors: Factors) -> Shape:
    return (factors["up"].shape[0], factors["down"].shape[1])


def _factored(module: Module, base: torch.Tensor | None, rank: int | None) -> Factored | None:  # noqa: ARG001
    """Both changes as one product, which the module's scale multiplies; None where that is 0."""
    import torch

    factors = module.factors
    if not module.scale:
        return None
    up, down = wide(factors["up"]), wide(factors["lora_diag"]).reshape(-1, 1) * wide(factors["down"])
    lost_up, lost_down = _lost(module, needed(module, base, _TITLE))
    return Factored(torch.cat([up, -lost_up / module.scale], dim=1), torch.cat([down, lost_down]))


def _lost(module: Module, base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The base weight's smallest components, as many as the module has ranks: (out, rank) and (rank, in)."""
    import torch

    count = module.factors["down"].shape[0]
    if count >= min(base.shape):
        raise ShapeError(
            f"{module.target}: {count} components of a weight of shape {list(base.shape)} would be taken out",
            keys=[ref.name for ref in module.factors.values()],
            expected="A rank below the weight's smaller side was expected",
            todo="Give the base model that the adapter was trained on",
        )
    left, values, right = torch.linalg.svd(base.to(torch.float64), full_matrices=False)
    return left[:, -count:] * values[-count:], right[-count:]


def _dense(module: Module, base: torch.Tensor | None) -> torch.Tensor:
    factors = module.factors
    lost_up, lost_down = _lost(module, needed(module, base, _TITLE))
    down = wide(factors["lora_diag"]).reshape(-1, 1) * wide(factors["down"])
    return module.scale * (wide(factors["up"]) @ down) - lost_up @ lost_down


KIND = Kind(
    name="kasa",
    title=_TITLE,
    needs=(("up", "down", "lora_diag"),),
    rank=first_axis("down"),
    shape=_shape,
    specific=2,
    needs_base=True,
    dense=_dense,
    factored=_factored,
)
