"""LoRA on fused experts: one pair of factors for all experts of a layer, stacked in three axes or packed in two.

Stacked, ``up`` is (experts, out, rank) and ``down`` (experts, rank, in), and ΔW[e] = scale · up[e] · down[e].
PEFT's ``target_parameters`` packs down as (experts · rank, in) expert-major and up as (out, rank · experts)
rank-major, so that multiplying them as they lie gives no expert's ΔW; how many experts there are, and so the scale,
the base weight tells, or the rank that the configuration states. Source: PEFT ``tuners/lora/layer.py``, ParamWrapper.
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


def count(module: Module) -> int | None:
    """How many experts a module is for; None where neither its factors nor what else is known of it tell."""
    if is_stacked(module.factors):
        return module.factors["up"].shape[0]
    known = module.shape is not None and len(module.shape) == 3 and module.rank
    return module.factors["down"].shape[0] // module.rank if known and module.rank else None


def pair(module: Module, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of one expert: up (out, rank) and down (rank, in), in their store dtype.

    Args:
        module: Stacked, or packed with its count known.
        number: Of the expert.
    """
    up, down = module.factors["up"].load(), module.factors["down"].load()
    experts = count(module)
    if up.dim() == 3 or not experts:
        return up[number], down[number]
    rank = down.shape[0] // experts
    return up[:, number::experts], down[number * rank : (number + 1) * rank]


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

    experts = count(module)
    if experts is None:
        raise UnsupportedKindError(
            f"{module.target}: the ΔW of {_TITLE} cannot be computed from packed factors alone",
            keys=[ref.name for ref in module.factors.values() if ref.name],
            expected="The base weight was expected, which tells how many experts they are for",
            todo="Bake the adapter into its base model",
        )
    up, down = wide(module.factors["up"]), wide(module.factors["down"])
    if not is_stacked(module.factors):
        up = up.reshape(up.shape[0], -1, experts).permute(2, 0, 1)
        down = down.reshape(experts, -1, down.shape[1])
    change = torch.bmm(up, down).mul_(module.scale)
    return change.transpose(1, 2) if module.in_first else change


def _factored(module: Module, base: torch.Tensor | None, rank: int | None) -> Factored:  # noqa: ARG001
    raise UnsupportedKindError(
        f"{module.target}: {_TITLE} cannot be turned into LoRA: every expert has factors of its own",
        keys=[ref.name for ref in module.factors.values() if ref.name],
        expected="A module of one weight was expected",
        todo="Write a module for each expert with --experts split, or leave the module out with --drop",
    )


# Readers assign this kind by the shape of the factors or by the configuration; no role is its own.
KIND = Kind(
    name="experts",
    title=_TITLE,
    needs=(("up", "down"),),
    specific=0,
    linear=("up",),
    rank=_rank,
    shape=_shape,
    dense=_dense,
    factored=_factored,
)
