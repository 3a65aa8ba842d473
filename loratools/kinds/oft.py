"""OFT and BOFT (arXiv 2306.07280, 2311.06243): the base weight is multiplied by an orthogonal matrix.

Kohya and LyCORIS turn the outputs: W' = blockdiag(R)ᵀ W with R = (I + Q)(I − Q)⁻¹ and Q = B − Bᵀ from ``oft_blocks``
(blocks, size, size); an alpha above 0 is a constraint, by which Q is shortened to a norm of alpha · out at most.
``oft_diag`` of older LyCORIS holds R itself. With four axes (steps, blocks, size, size) the blocks are a butterfly:
in step i the rows are exchanged at a stride of 2^i · size / 2 and R multiplies each block. ``rescale`` (out, 1, …)
multiplies the rows of the result.

PEFT and OneTrainer turn the inputs: W' = W · blockdiag(R)ᵀ. ``oft_R.weight`` (blocks, size · (size − 1) / 2) holds the
upper triangle of Q, one row for all blocks where they are shared, and R = I + 2Q + 2Q² + 2Q³ + Q⁴: the first five
terms of its Neumann series, PEFT's default. Where its configuration says so (``Module.variant``), the terms are others
("neumann=7"); R is what the default of older releases makes it, (I − Q)(I + Q)⁻¹, which turns the other way round
("cayley"); or each block of Q is shortened to a norm of eps / √blocks before ("coft=6e-05").
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from loratools.errors import ShapeError, UnsupportedKindError
from loratools.kinds._base import Factors, Kind, StandIn, by_rows, needed, said, wide, with_residual
from loratools.model import Module

if TYPE_CHECKING:
    import torch


def _row_axes(factors: Factors) -> Mapping[str, int] | None:
    if "oft_r" in factors:
        return by_rows(factors) if len(factors["oft_r"].shape) == 2 and "oft_s" not in factors else None
    blocks = factors.get("oft_blocks") or factors.get("oft_diag")
    if blocks is None or len(blocks.shape) != 3:
        return None
    return by_rows(factors, oft_blocks=0, oft_diag=0, rescale=0)


def constraint(module: Module) -> float:
    """The norm per output beyond which Q is shortened, or 0 where it is not; it holds for all rows together."""
    if "oft_blocks" not in module.factors:
        return 0.0
    stated = module.alpha
    if stated is None and module.alpha_tensor is not None:
        stated = module.alpha_tensor.scalar()
    return max(0.0, stated or 0.0)


def _dense(module: Module, base: torch.Tensor | None) -> torch.Tensor:
    flat = needed(module, base, "OFT").flatten(1)
    if "oft_r" in module.factors:
        return _inputs_turned(module, flat) - flat
    return _outputs_turned(module, flat) - flat


def _apply(module: Module, x: torch.Tensor, base: StandIn) -> torch.Tensor:
    import torch

    if "oft_r" in module.factors:
        right = base.right[None]
        return torch.outer(base.left, ((_inputs_turned(module, right) - right) @ x)[0])
    left = base.left[:, None]
    return (_outputs_turned(module, left) - left) @ (base.right[None] @ x)


def _outputs_turned(module: Module, weight: torch.Tensor) -> torch.Tensor:
    """W' from a matrix (out, n)."""
    import torch

    factors = module.factors
    if "oft_blocks" in factors:
        turns = _cayley(_shortened(module, _skew(wide(factors["oft_blocks"]))))
    elif "oft_diag" in factors:
        turns = wide(factors["oft_diag"])
    else:
        raise _unknown(module)
    # A butterfly's steps exchange rows in pairs, at a stride that doubles.
    uneven = turns.ndim == 4 and (turns.shape[2] % 2 or turns.shape[1] % 2 ** (turns.shape[0] - 1))
    if uneven or math.prod(turns.shape[-3:-1]) != weight.shape[0]:
        raise _misfit(module, turns, weight.shape[0], "outputs")
    if turns.ndim == 4:
        weight = _butterfly(turns, weight)
    else:
        blocks = weight.reshape(turns.shape[0], turns.shape[1], -1)
        weight = torch.einsum("bij,bin->bjn", turns, blocks).flatten(0, 1)
    rescale = factors.get("rescale")
    return weight if rescale is None else weight * wide(rescale).reshape(-1, 1)


def _inputs_turned(module: Module, weight: torch.Tensor) -> torch.Tensor:
    """W' from a matrix (n, in · kh · kw)."""
    import torch

    packed = module.factors["oft_r"]
    if len(packed.shape) != 2 or "oft_s" in module.factors:
        raise _unknown(module)
    size = (1 + math.isqrt(1 + 8 * packed.shape[1])) // 2
    triangle = wide(packed)
    skew = triangle.new_zeros(triangle.shape[0], size, size)
    rows, columns = torch.triu_indices(size, size, 1)
    skew[:, rows, columns] = triangle
    turns = _turns_of(module, skew - skew.mT)
    count = weight.shape[1] // size if turns.shape[0] == 1 else turns.shape[0]
    if count * size != weight.shape[1] or size * (size - 1) != 2 * packed.shape[1]:
        raise _misfit(module, turns, weight.shape[1], "inputs")
    blocks = weight.reshape(-1, count, size)
    return torch.einsum("bij,nbj->nbi", turns.expand(count, -1, -1), blocks).flatten(1)


def _butterfly(turns: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """BOFT's steps, one after the other: rows gathered into blocks, turned, and put back."""
    import torch

    _, count, size, _ = turns.shape
    for step, turn in enumerate(turns):
        stride = 2**step * (size // 2)
        gathered = weight.reshape(-1, 2, stride, weight.shape[1]).transpose(1, 2)
        turned = torch.einsum("bij,bjn->bin", turn, gathered.reshape(count, size, -1))
        weight = turned.reshape(-1, stride, 2, weight.shape[1]).transpose(1, 2).flatten(0, 2)
    return weight


def _skew(blocks: torch.Tensor) -> torch.Tensor:
    return blocks - blocks.mT


def _shortened(module: Module, skew: torch.Tensor) -> torch.Tensor:
    limit = constraint(module) * math.prod(skew.shape[-3:-1])
    norm = float(skew.norm())
    return skew * (limit / norm) if 0.0 < limit < norm else skew


def _cayley(skew: torch.Tensor) -> torch.Tensor:
    """(I + Q)(I − Q)⁻¹ of every block."""
    import torch

    identity = torch.eye(skew.shape[-1], dtype=skew.dtype)
    # Both are polynomials in Q and commute.
    turns: torch.Tensor = torch.linalg.solve(identity - skew, identity + skew)
    return turns


def _turns_of(module: Module, skew: torch.Tensor) -> torch.Tensor:
    """R of every block by PEFT's rule, which the module's variant names.

    Raises:
        UnsupportedKindError: Nobody knows that variant.
    """
    stated = said(module)
    if stated.keys() - {"cayley", "coft", "neumann"}:
        raise _unknown(module)
    if "coft" in stated:
        skew = _projected(skew, float(stated["coft"]))
    return _cayley(-skew) if "cayley" in stated else _neumann(skew, int(stated.get("neumann", 5)))


def _projected(skew: torch.Tensor, eps: float) -> torch.Tensor:
    """Constrained OFT: blocks of a norm of eps / √blocks at most."""
    limit = eps / math.sqrt(len(skew))
    norms: torch.Tensor = skew.flatten(1).norm(dim=1).clamp_min(limit)
    return skew * (limit / norms)[:, None, None]


def _neumann(skew: torch.Tensor, terms: int) -> torch.Tensor:
    """The first terms of the series of (I + Q)(I − Q)⁻¹; beyond two terms, the last is not doubled.

    Source: PEFT ``tuners/oft/layer.py``, whose last term has the power ``terms − 1``, and is a cube at the least.
    """
    import torch

    turns = torch.eye(skew.shape[-1], dtype=skew.dtype) + (2 * skew if terms > 1 else 0)
    if terms <= 2:
        return turns.expand_as(skew)
    power = skew @ skew
    turns = turns + 2 * power
    for _ in range(3, terms - 1):
        power = power @ skew
        turns = turns + 2 * power
    return turns + power @ skew


def _unknown(module: Module) -> UnsupportedKindError:
    return UnsupportedKindError(
        f"{module.target}: OFT in this form cannot be computed yet",
        keys=[ref.name for ref in module.factors.values() if ref.name],
        expected="oft_blocks, oft_diag or a packed oft_R was expected",
    )


def _misfit(module: Module, turns: torch.Tensor, length: int, what: str) -> ShapeError:
    return ShapeError(
        f"{module.target}: blocks of shape {list(turns.shape)} for a weight with {length} {what}",
        keys=[ref.name for ref in module.factors.values() if ref.name],
        expected=f"Blocks that cover all {what} were expected",
        todo="Give the base model that the adapter was trained on",
    )


KIND = Kind(
    name="oft",
    title="OFT",
    needs=(("oft_blocks",), ("oft_diag",), ("oft_r",), ("boft_r",)),
    may=("rescale", "oft_s", "boft_s"),
    row_axes=_row_axes,
    needs_base=True,
    apply=with_residual(_apply),
    dense=_dense,
)
