"""How the modules of a resize are stored: in which dtype, with which alpha, and what that rounds away."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from loratools.engine.kept import held
from loratools.errors import NonFiniteError
from loratools.kinds import lora
from loratools.maths.lowrank import COMPUTE, Factors
from loratools.model import Module
from loratools.ops.as_lora import store_dtype
from loratools.tensors import DTYPES, LazySource, TensorRef

BIASES = ("up_bias", "diff_b")
# A relative error of rounding whose square no longer vanishes beside it.
_COARSE = 0.03


class Form(NamedTuple):
    """How a module is stored.

    Attributes:
        dtype: The store dtype, a key of ``tensors.DTYPES``; empty for the module's own.
        alpha: What every module states, or None for its own rank.
        place: The device to compute on.
        rank: The rank that all are padded to with zeros, or None.
    """

    dtype: str
    alpha: float | None
    place: str
    rank: int | None = None

    def scale(self, rank: int) -> float:
        """What a module of a rank is applied with."""
        return self.alpha / rank if self.alpha else 1.0

    def store(self, module: Module) -> str:
        """The dtype that a module's factors are stored in."""
        return self.dtype or store_dtype(module)


def shaped(module: Module, rank: int, shape: tuple[int, ...], form: Form) -> Module:
    """A module as ``resized`` would return it for a rank, without its values: for what depends on shapes alone."""
    if stays(module, rank, form):
        return module
    dtype = form.store(module)
    ones = (1,) * (len(shape) - 2)
    up, down = (shape[0], rank, *ones), (rank, *shape[1:])
    made = {"up": _empty(up, dtype), "down": _empty(down, dtype)}
    for role in BIASES:
        if role in module.factors:
            made[role] = _empty(module.factors[role].shape, dtype)
    return _lora(module._replace(shape=shape), made, rank, form)


def cost(module: Module, shape: tuple[int, ...], form: Form) -> int:
    """The bytes of one more rank."""
    return (shape[0] + math.prod(shape[1:])) * DTYPES[form.store(module)].bits // 8


def stays(module: Module, rank: int, form: Form) -> bool:
    """Whether a module is a plain LoRA of this rank and store dtype already."""
    pair = {module.factors[role].dtype for role in ("up", "down") if role in module.factors}
    plain = lora.is_product(module) and module.factors.keys() <= {"up", "down", *BIASES}
    return plain and module.rank == rank and pair == {form.store(module)}


def padded(factors: Factors, rank: int) -> Factors:
    """The factors with zero terms up to a rank."""
    more = rank - factors.rank
    if more <= 0:
        return factors
    up = torch.nn.functional.pad(factors.up, (0, more))
    return Factors(up, torch.nn.functional.pad(factors.down, (0, 0, 0, more)))


def scaled(factors: Factors, scale: float) -> Factors:
    """Both factors with the root of a scale in them, the sign in up."""
    root = math.sqrt(abs(scale))
    return Factors(factors.up * math.copysign(root, scale), factors.down * root)


def stored(module: Module, factors: Factors, form: Form, dtype: str) -> Module:
    """Factors as a module in the store dtype."""
    shape = module.shape or factors.shape
    up, down = factors.up, factors.down
    if len(shape) > 2:
        up = up.reshape(*up.shape, *(1 for _ in shape[2:]))
        down = down.reshape(-1, *shape[1:])
    made = {"up": _store(up, dtype, module), "down": _store(down, dtype, module)}
    for role in BIASES:
        ref = module.factors.get(role)
        if ref is not None:
            # PEFT's lora_bias is multiplied by the scale that the factors have now.
            factor = module.scale / form.scale(factors.rank) if role == "up_bias" else 1.0
            made[role] = _store(ref.load().to(COMPUTE) * factor, dtype, module)
    return _lora(module._replace(shape=shape), made, factors.rank, form)


def _lora(module: Module, factors: dict[str, TensorRef], rank: int, form: Form) -> Module:
    shape = module.shape or ()
    return module._replace(
        kind="lora",
        factors=factors,
        scale=form.scale(rank),
        alpha=form.alpha or float(rank),
        rank=rank,
        op="conv" if len(shape) > 2 else module.op,
        alpha_tensor=None,
        magnitude=None,
        magnitude_axis=None,
        variant="",
    )


def _store(tensor: torch.Tensor, dtype: str, module: Module) -> TensorRef:
    after = tensor.to("cpu", getattr(torch, DTYPES[dtype].torch)).contiguous()
    if not bool(after.isfinite().all()):
        raise NonFiniteError(
            f"{module.target}: values up to {float(tensor.abs().max()):.3g} do not fit {dtype}",
            keys=[ref.name for ref in module.factors.values() if ref.name],
            todo="Choose --dtype float32 or bfloat16",
        )
    return held("", after)


def _empty(shape: tuple[int, ...], dtype: str) -> TensorRef:
    return TensorRef("", shape, dtype, LazySource(lambda: torch.zeros(shape)))


def rounding(exact: Factors, rounded: Module, norm: float) -> float:
    """What the store dtype rounded away, relative to ‖ΔW‖.

    What is left out of ΔW is orthogonal to what is kept, so that the squares of both errors add up. Rounding counts to
    its first order, where that is little.

    Args:
        exact: With √σ on both sides, so that UᵀU and DDᵀ are the same diagonal matrix.
        rounded: The factors that were rounded from them.
        norm: ‖ΔW‖_F.
    """
    if not norm:
        return 0.0
    up, down = (rounded.factors[role].load().to(exact.up, copy=True).flatten(1) for role in ("up", "down"))
    left, right = up.sub_(exact.up), down.sub_(exact.down)
    # ‖δU·D + U·δD‖² with D·Dᵀ and Uᵀ·U diagonal.
    sizes = exact.up.square().sum(dim=0)
    apart = sizes @ (left.square().sum(dim=0) + right.square().sum(dim=1))
    mixed = ((left.T @ exact.up) * (exact.down @ right.T)).sum()
    lost = abs(rounded.scale) * math.sqrt(max(0.0, float(apart + 2.0 * mixed))) / norm
    if lost < _COARSE:
        return lost
    # And with δU·δD, as ‖δU·(D + δD) + U·δD‖².
    after = exact.down + right
    whole = ((left.T @ left) * (after @ after.T)).sum() + (sizes * right.square().sum(dim=1)).sum()
    whole += 2.0 * ((left.T @ exact.up) * (after @ right.T)).sum()
    return abs(rounded.scale) * math.sqrt(max(0.0, float(whole))) / norm
