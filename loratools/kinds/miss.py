"""MiSS, formerly Bone (arXiv 2409.15371): a small block that is repeated over the weight.

Stored as (rank, out), ΔW[o, i] = block[i mod rank, o]: a product with a row of identities, so that its rank is exact.
Stored as (rank, n) with an ``n`` that divides the outputs ("mini"), the block is repeated along the outputs too:
ΔW[o, i] = block[i mod rank, o mod n]. Stored as (out / size, size, size) ("bat"), it depends on the base weight: with
W in square blocks, ΔW[o, i] = W[o, i] · block[o] + block[o]. How many inputs there are, the base alone tells.
Source: PEFT ``tuners/miss/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from loratools.errors import ShapeError
from loratools.kinds._base import Factored, Factors, Kind, StandIn, by_rows, needed, wide, with_residual
from loratools.model import Module

if TYPE_CHECKING:
    import torch

_TITLE = "MiSS"


def _is_bat(factors: Factors) -> bool:
    return len(factors["miss_block"].shape) == 3


def _rank(factors: Factors) -> int | None:
    return None if _is_bat(factors) else factors["miss_block"].shape[0]


def _row_axes(factors: Factors) -> Mapping[str, int] | None:
    # Of a block (rank, n) the shape does not tell whether n are the weight's rows, or a part that is repeated.
    return by_rows(factors, miss_block=0) if _is_bat(factors) else None


def _pair(module: Module, out: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """up (out, k) and down (k, in) of ΔW, where k is the shorter side of the block.

    Raises:
        ShapeError: The block does not fit the weight.
    """
    import torch

    block = wide(module.factors["miss_block"])
    rank, width = block.shape
    if not width or out % width or rank > inputs:
        raise _misfit(module, out, inputs)
    times = out // width
    if width < rank:
        up = torch.eye(width, dtype=block.dtype).repeat(times, 1)
        return up, block.T[:, torch.arange(inputs) % rank]
    return block.T.repeat(times, 1), torch.eye(rank, dtype=block.dtype)[:, torch.arange(inputs) % rank]


def _factored(module: Module, base: torch.Tensor | None, rank: int | None) -> Factored | None:  # noqa: ARG001
    if _is_bat(module.factors):
        return None
    weight = needed(module, base, _TITLE)
    up, down = _pair(module, weight.shape[0], weight.shape[1])
    return Factored(up, down)


def _blocks(module: Module, out: int, inputs: int) -> torch.Tensor:
    """The blocks of "bat", (out / size, size, size).

    Raises:
        ShapeError: They do not fit the weight.
    """
    blocks = wide(module.factors["miss_block"])
    count, size, width = blocks.shape
    if size != width or not size or count * size != out or inputs % size:
        raise _misfit(module, out, inputs)
    return blocks


def _dense(module: Module, base: torch.Tensor | None) -> torch.Tensor:
    import torch

    weight = needed(module, base, _TITLE).flatten(1)
    out, inputs = weight.shape
    if not _is_bat(module.factors):
        up, down = _pair(module, out, inputs)
        return module.scale * (up @ down)
    blocks = _blocks(module, out, inputs)
    size = blocks.shape[1]
    parts = weight.reshape(len(blocks), size, inputs // size, size)
    changed = torch.einsum("oirk,okj->oirj", parts, blocks) + blocks[:, :, None]
    return module.scale * changed.reshape(out, inputs)


def _apply(module: Module, x: torch.Tensor, base: StandIn) -> torch.Tensor:
    import torch

    out, inputs = len(base.left), len(x)
    if not _is_bat(module.factors):
        up, down = _pair(module, out, inputs)
        return module.scale * (up @ (down @ x))
    blocks = _blocks(module, out, inputs)
    size = blocks.shape[1]
    read = torch.einsum("rk,rjn->kjn", base.right.reshape(-1, size), x.reshape(-1, size, x.shape[1]))
    through = torch.einsum("okj,kjn->on", blocks, read)
    added = torch.einsum("oij,jn->oin", blocks, x.reshape(-1, size, x.shape[1]).sum(dim=0))
    changed = base.left.reshape(-1, size)[:, :, None] * through[:, None] + added
    return module.scale * changed.flatten(0, 1)


def _misfit(module: Module, out: int, inputs: int) -> ShapeError:
    block = module.factors["miss_block"]
    return ShapeError(
        f"{module.target}: a block of shape {list(block.shape)} for a weight of {out} outputs and {inputs} inputs",
        keys=[block.name] if block.name else [],
        expected="A block that can be repeated over the whole weight was expected",
        todo="Give the base model that the adapter was trained on",
    )


KIND = Kind(
    name="miss",
    title=_TITLE,
    needs=(("miss_block",),),
    rank=_rank,
    scaled=False,
    row_axes=_row_axes,
    needs_base=True,
    apply=with_residual(_apply),
    dense=_dense,
    factored=_factored,
)
