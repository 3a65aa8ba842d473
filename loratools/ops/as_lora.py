"""Any adapter kind as plain LoRA: exactly where ΔW has factors, else by a truncated decomposition of ΔW."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from loratools import kinds
from loratools.errors import NonFiniteError, UnsupportedKindError
from loratools.kinds._base import SPARSE, Kind, needed
from loratools.maths import kron, tiles
from loratools.maths.lowrank import (
    COMPUTE,
    Compressed,
    Factors,
    Svd,
    balanced,
    check_rank,
    compress,
    dense_svd,
    numerical_rank,
    retained,
    signed,
)
from loratools.maths.randomized import compress_operator
from loratools.model import Module
from loratools.tensors import DTYPES, TensorRef, from_torch

# Up to this smaller side, in elements, a dense matrix is decomposed as a whole; beyond, by randomised iteration.
_WHOLE = 1024
# What a plain LoRA consists of; biases come along as they are.
_PLAIN = {"up", "down", "up_bias", "diff_b", "scalar"}
_BIASES = ("up_bias", "diff_b")


class Converted(NamedTuple):
    """A module as LoRA.

    Attributes:
        module: Of kind "lora"; the module itself where there is no ΔW to convert (norm layers, biases alone).
        error: ‖ΔW − ΔW'‖_F / ‖ΔW‖_F of what is stored: truncation and the store dtype's rounding; 0 for a zero ΔW.
        exact: Whether nothing but that rounding was lost.
    """

    module: Module
    error: float
    exact: bool


class _Found(NamedTuple):
    """Factors for a module, and how they came about.

    Attributes:
        factors: In float64.
        scale: What multiplies their product.
        energy: The fraction of Σσ² that they keep.
        size: ‖ΔW‖_F of the whole, scale included.
        shape: Of the weight: (out, in[, kh, kw]).
    """

    factors: Factors
    scale: float
    energy: float
    size: float
    shape: tuple[int, ...]


def to_lora(
    module: Module, *, rank: int | None = None, base: torch.Tensor | None = None, dtype: str | None = None
) -> Converted:
    """A module of any kind as plain LoRA.

    LoKr, LoHa, AdaLoRA, VeRA, VB-LoRA, Uni-LoRA, MiSS and GLoRA (with the base) and LoRA in Tucker form become exact
    factors without building ΔW, which keep the module's scale; where these would be no smaller than ΔW, and for full
    differences, (IA)³, OFT, DoRA and whatever lies beside factors (``diff``, a sparse residual), ΔW is decomposed.
    Factors that were decomposed or truncated are balanced, have the scale in them, and alpha is their rank. A plain
    LoRA of at most the rank asked for stays as it is. Differences of norm layers and of biases are no LoRA: a module
    of them alone stays as it is, and a bias beside a weight (``diff_b``, ``up_bias``) comes along.

    Args:
        module: Of any kind.
        rank: The most ranks, a count of at least 1; None for as many as ΔW has.
        base: The rows of the base weight that the module changes, (out, in[, kh, kw]); for the kinds that need it,
            and for DoRA. Where it is given, it tells the kernel that a flattened kind does not.
        dtype: Store dtype, a key of ``tensors.DTYPES``; None for that of the module's factors.

    Raises:
        UnsupportedKindError: The kind has no ΔW that could be computed, or needs the base and there is none.
        ShapeError: The base does not fit the module.
        NonFiniteError: A factor holds NaN or Inf, or the result does not fit the store dtype.
        OptionError: The rank is below 1.
    """
    check_rank(rank)
    kind = kinds.get(module.kind)
    if _has_no_matrix(module):
        return Converted(module, 0.0, True)
    lacking = (kind.needs_base and not kind.alone(module)) or module.magnitude is not None
    if base is None and lacking:
        needed(module, base, "DoRA" if module.magnitude is not None else kind.title)
    store = dtype or store_dtype(module)
    plain = _is_plain(module) and (rank is None or rank >= module.factors["up"].shape[1])
    if plain and all(module.factors[role].dtype == store for role in ("up", "down")):
        return Converted(module, 0.0, True)
    found = _as_it_is(module, base) if plain else _factors(module, kind, rank, base)
    stored = _module(module, found, store)
    return Converted(stored, _error(found, stored), found.energy == 1.0)


def _has_no_matrix(module: Module) -> bool:
    """Whether only vectors change: norm layers, and biases by themselves."""
    if module.kind != "full":
        return False
    weight = module.factors.get("diff")
    return weight is None or len(weight.shape) < 2


def _is_plain(module: Module) -> bool:
    return module.kind == "lora" and module.magnitude is None and module.factors.keys() <= _PLAIN


def _as_it_is(module: Module, base: torch.Tensor | None) -> _Found:
    """The factors of a plain LoRA, for another store dtype."""
    factors = Factors(*(module.factors[role].load().to(COMPUTE).flatten(1) for role in ("up", "down")))
    return _Found(
        factors, module.scale, 1.0, _size(factors, module.scale), _shape(module, base, factors.shape)
    )


def _factors(module: Module, kind: Kind, rank: int | None, base: torch.Tensor | None) -> _Found:
    """Factors of at most the rank asked for."""
    beside = module.magnitude is not None or not module.factors.keys().isdisjoint((*SPARSE, "diff"))
    if kind.factored is not None and not beside:
        weight = base.detach().to(torch.empty(0).device, COMPUTE) if base is not None else None
        made = kind.factored(module, weight, rank)
        if made is not None:
            factors = Factors(made.up, made.down)
            return _of_product(module, factors, made.energy, rank, _shape(module, base, factors.shape))
    if kind.dense is None:
        raise UnsupportedKindError(
            f"{module.target}: {kind.title} modules cannot be turned into LoRA",
            keys=[ref.name for _, ref in module.tensors() if ref.name],
            expected="A kind was expected whose ΔW is known: LoRA, LoHa, LoKr, OFT, VeRA, MiSS, (IA)³, …",
            todo="Leave the module out with --drop",
        )
    delta = kinds.delta(module, base, wide=True)
    best = _of_dense(delta.flatten(1), rank)
    return _Found(best.factors, 1.0, best.energy, float(delta.norm()), tuple(delta.shape))


def _of_product(
    module: Module, factors: Factors, energy: float, rank: int | None, shape: tuple[int, ...]
) -> _Found:
    """Factors as they are where no rank was asked for that they exceed; else truncated, with the scale in them."""
    size = _size(factors, module.scale) / math.sqrt(energy)
    whole = energy == 1.0 and (rank is None or factors.rank <= rank)
    if whole:
        even = factors if module.kind == "lora" else kron.evened(factors)
        return _Found(even, module.scale, 1.0, size, shape)
    if energy == 1.0:
        best = compress(factors, rank)
        factors, energy = best.factors, best.energy
    root = math.sqrt(abs(module.scale))
    scaled = Factors(factors.up * math.copysign(root, module.scale), factors.down * root)
    return _Found(scaled, 1.0, energy, size, shape)


def _of_dense(matrix: torch.Tensor, rank: int | None) -> Compressed:
    """The best approximation of a matrix (out, in) of a given rank, or itself at its numerical rank."""
    shape = (matrix.shape[0], matrix.shape[1])
    if rank is not None and min(shape) > _WHOLE:
        height = tiles.tile_height(shape)
        return compress_operator(
            lambda: ((start, matrix[start : start + height]) for start in range(0, shape[0], height)),
            shape,
            rank,
        )
    found = dense_svd(matrix)
    real = numerical_rank(found.sigma, shape, COMPUTE)
    kept = real if rank is None else min(rank, real)
    part = signed(Svd(found.u[:, :kept], found.sigma[:kept], found.vh[:kept]))
    energy = 1.0 if kept == real else retained(found.sigma, kept)
    return Compressed(balanced(part), energy, found.sigma)


def _size(factors: Factors, scale: float) -> float:
    return abs(scale) * kron.frobenius(factors)


def _shape(module: Module, base: torch.Tensor | None, flat: tuple[int, int]) -> tuple[int, ...]:
    """The weight's shape, with its kernel as far as anything tells."""
    if base is not None:
        return tuple(base.shape)
    said = module.shape
    return said if said is not None and math.prod(said) == math.prod(flat) else flat


def _module(module: Module, found: _Found, store: str) -> Module:
    """Factors as a module in the store dtype."""
    up, down = found.factors.up, found.factors.down
    rank, shape = found.factors.rank, found.shape
    if len(shape) > 2:
        up, down = up.reshape(*up.shape, *(1 for _ in shape[2:])), down.reshape(rank, *shape[1:])
    factors = {"up": _stored(module, up, store), "down": _stored(module, down, store)}
    for role in _BIASES:
        ref = module.factors.get(role)
        if ref is not None:
            # A LoRA's own bias is multiplied by its scale, which may be in the factors now.
            rescaled = role == "up_bias" and found.scale != module.scale
            bias = ref.load().to(COMPUTE) * (module.scale if rescaled else 1.0)
            factors[role] = _stored(module, bias, store)
    kept = found.scale == module.scale and rank == module.rank
    return module._replace(
        kind="lora",
        factors=factors,
        scale=found.scale,
        alpha=module.alpha if kept else found.scale * rank,
        rank=rank,
        shape=shape,
        op="conv" if len(shape) > 2 else module.op,
        alpha_tensor=None,
        magnitude=None,
        magnitude_axis=None,
        variant="",
    )


def _stored(module: Module, tensor: torch.Tensor, store: str) -> TensorRef:
    after = tensor.to(getattr(torch, DTYPES[store].torch)).contiguous()
    if not bool(after.isfinite().all()):
        raise NonFiniteError(
            f"{module.target}: values up to {float(tensor.abs().max()):.3g} do not fit {store}",
            keys=[ref.name for ref in module.factors.values() if ref.name],
            todo="Choose --dtype float32 or bfloat16",
        )
    return from_torch("", after)


def store_dtype(module: Module) -> str:
    """The dtype of the module's factors, or one that holds the values of all."""
    found = {
        ref.dtype for role, ref in module.factors.items() if role not in SPARSE and DTYPES[ref.dtype].floating
    }
    wide = {dtype for dtype in found if DTYPES[dtype].bits >= 16}
    if len(wide) == 1:
        return wide.pop()
    if not wide:
        return "F16" if found else "F32"
    return "F64" if "F64" in wide else "F32"


def _error(found: _Found, stored: Module) -> float:
    """The relative error of a stored module: what was truncated, and what its dtype rounded away.

    What a singular value decomposition leaves out is orthogonal to the factors it keeps, so that, but for products of
    two rounding errors, the squares of both parts add up.
    """
    if found.size == 0.0:
        return 0.0
    up, down = (stored.factors[role].load().to(COMPUTE).flatten(1) for role in ("up", "down"))
    exact = found.factors
    # U'D' − UD = (U' − U)·D' + U·(D' − D), in which nothing large cancels.
    rounding = Factors(torch.cat([up - exact.up, exact.up], dim=1), torch.cat([down, down - exact.down]))
    rounded = _size(rounding, found.scale) / found.size
    return math.hypot(math.sqrt(max(0.0, 1.0 - found.energy)), rounded)
