"""LoRA on fused experts: one pair of factors for all experts of a layer, stacked in three axes or packed in two.

Stacked, ``up`` is (experts, out, rank) and ``down`` (experts, rank, in), and ΔW[e] = scale · up[e] · down[e].
PEFT's ``target_parameters`` packs down as (experts · rank, in) expert-major and up as (out, rank · experts)
rank-major, so that multiplying them as they lie gives no expert's ΔW; how many experts there are, and so the scale,
the base weight alone tells. Source: PEFT ``tuners/lora/layer.py``, ParamWrapper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.errors import UnsupportedKindError
from loratools.kinds._base import Factored, Factors, Kind, Shape, wide
from loratools.model import Module

if TYPE_CHECKING:
    import torch

_TITLE = "LoRA on fused experts"


def is_stacked(factors: Factors) -> bool:
    """Whether both factors have an axis for the experts."""
    return all(role in factors and len(factors[role].shape) == 3 for role in ("up", "down"))


def _rank(factors: Factors) -> int | None:
    return factors["down"].shape[1] if is_stacked(factors) else None


def _shape(factors: Factors) -> Shape | None:
    if not is_stacked(factors):
        return None
    experts, out, _ = factors["up"].shape
    return (experts, out, factors["down"].shape[2])


def _dense(module: Module, base: torch.Tensor | None) -> torch.Tensor:  # noqa: ARG001 - it adds to any base
    """ΔW as the base stores it: (experts, out, in), or (experts, in, out) where the module says ``in_first``."""
    import torch

    if not is_stacked(module.factors):
        raise UnsupportedKindError(
            f"{module.target}: the ΔW of {_TITLE} cannot be computed from packed factors alone",
            keys=[ref.name for ref in module.factors.values() if ref.name],
            expected="The base weight was expected, which tells how many experts they are for",
            todo="Bake the adapter into its base model",
        )
    change = torch.bmm(wide(module.factors["up"]), wide(module.factors["down"])).mul_(module.scale)
    return change.transpose(1, 2) if module.in_first else change


def _factored(module: Module, base: torch.Tensor | None, rank: int | None) -> Factored:  # noqa: ARG001
    raise UnsupportedKindError(
        f"{module.target}: {_TITLE} cannot be turned into LoRA: every expert has factors of its own",
        keys=[ref.name for ref in module.factors.values() if ref.name],
        expected="A module of one weight was expected",
        todo="Leave the module out with --drop",
    )


# Readers assign this kind by the shape of the factors or by the configuration; no role is its own.
KIND = Kind(
    name="experts",
    title=_TITLE,
    needs=(("up", "down"),),
    specific=0,
    rank=_rank,
    shape=_shape,
    dense=_dense,
    factored=_factored,
)
