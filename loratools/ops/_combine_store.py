"""What a merge found for a target as a module: in the store dtype, with the scale that the layout applies."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loratools.engine.kept import held
from loratools.errors import NonFiniteError
from loratools.maths.lowrank import Factors
from loratools.model import Module, Target
from loratools.ops._request import Request
from loratools.ops.align import Contribution
from loratools.tensors import DTYPES, TensorRef

# float16 loses digits below 6e-5; factors of a usual adapter are far larger.
_SMALL = 1e-3
# A relative error that is worth a sentence: float16's own is 5e-4.
_NOTABLE = 5e-3


def weight_of(asked: Request, each: Contribution) -> float:
    """What a contribution's ΔW is multiplied by."""
    return asked.weigh(each.source, each.module.target)


def _scale(asked: Request, rank: int) -> float:
    return asked.alpha / rank if asked.alpha else 1.0


def for_scale(asked: Request, factors: Factors) -> Factors:
    """The factors of the same ΔW for a module that is applied with this request's scale."""
    scale = _scale(asked, factors.rank)
    if scale == 1.0:
        return factors
    root = scale**-0.5
    return Factors(factors.up * root, factors.down * root)


def module_of(asked: Request, target: Target, active: Sequence[Contribution], factors: Factors) -> Module:
    """Factors as a module in the store dtype; alpha is the rank, or what the file's modules have in common."""
    first = active[0].module
    dtype = asked.dtype or _store_dtype([each.module for each in active])
    shape = (factors.up.shape[0], *(first.shape or ())[1:])
    up, down = factors.up, factors.down
    if len(shape) > 2:
        up = up.reshape(*up.shape, *(1 for _ in shape[2:]))
        down = down.reshape(-1, *shape[1:])
    stored = {"up": _store(up, dtype, target, asked), "down": _store(down, dtype, target, asked)}
    for role in ("up_bias", "diff_b"):
        bias = _bias(asked, active, role)
        if bias is not None:
            stored[role] = _store(bias, dtype, target, asked)
    rank = factors.rank
    return Module(
        target=target,
        kind="lora",
        factors=stored,
        scale=_scale(asked, rank),
        alpha=asked.alpha or float(rank),
        rank=rank,
        shape=shape,
        op=first.op,
        in_first=first.in_first,
    )


def underflow(module: Module, factors: Factors) -> str:
    """What to say where the store dtype is too coarse for values this small; empty where it is not."""
    for role, wide in (("up", factors.up), ("down", factors.down)):
        ref = module.factors[role]
        largest = float(wide.abs().max())
        if ref.dtype != "F16" or not 0.0 < largest < _SMALL:
            continue
        lost = float((ref.load().flatten(1).to(wide) - wide).norm() / wide.norm())
        if lost > _NOTABLE:
            return (
                f"{module.target}: values no larger than {largest:.1g} lose {lost:.1%} to float16's rounding; "
                "choose --dtype float32 or bfloat16"
            )
    return ""


def _bias(asked: Request, active: Sequence[Contribution], role: str) -> torch.Tensor | None:
    """What the inputs add to the layer's bias: PEFT's lora_bias with the scale, a full difference without."""
    total: torch.Tensor | None = None
    for each in active:
        ref = each.module.factors.get(role)
        if ref is not None:
            scale = each.module.scale if role == "up_bias" else 1.0
            bias = each.place(ref.load().to(torch.float64)) * scale * weight_of(asked, each)
            total = bias if total is None else total + bias
    return total


def _store_dtype(modules: Sequence[Module]) -> str:
    """The inputs' own dtype, or one that holds the values of all."""
    found = {module.factors[role].dtype for module in modules for role in ("up", "down")}
    if all(DTYPES[dtype].bits < 16 for dtype in found):
        return "F16"
    wide = {dtype for dtype in found if DTYPES[dtype].bits >= 16}
    if len(wide) == 1:
        return wide.pop()
    return "F64" if "F64" in wide else "F32"


def _store(tensor: torch.Tensor, dtype: str, target: Target, asked: Request) -> TensorRef:
    after = tensor.to("cpu", getattr(torch, DTYPES[dtype].torch)).contiguous()
    if not asked.allow_nonfinite and not torch.isfinite(after).all():
        raise NonFiniteError(
            f"{target}: merged values up to {tensor.abs().max().item():.3g} do not fit {dtype}",
            todo="Choose --dtype float32 or bfloat16",
        )
    return held("", after)
