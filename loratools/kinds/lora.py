"""LoRA (arXiv 2106.09685): ΔW = scale · up · down; on convolutions LoCon, with ``mid`` its Tucker form.

With ``mid`` (rank, rank, kh, kw), as LyCORIS and Kohya's trainers store it, ``down`` is (rank, in, 1, 1) and
ΔW[o, i, y, x] = scale · Σ up[o, p] · mid[p, q, y, x] · down[q, i].
On a convolution in 1 to 3 dimensions ``up`` is (out, rank, 1, …) and ``down`` (rank, in, kernel…).
A full difference beside the factors (``diff``, ``diff_b``) is added to the weight and the bias as it is.
A magnitude (DoRA, arXiv 2402.09353) is recorded on the module; its ΔW needs the base weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.errors import IncompleteModuleError, ShapeError, UnsupportedKindError
from loratools.kinds._base import Factored, Factors, Kind, Shape, StandIn, by_rows, times, with_residual
from loratools.kinds._base import wide as widened
from loratools.model import Module

if TYPE_CHECKING:
    import torch


# Roles of which ΔW or the bias is made in factor space.
_OWN = ("up", "down", "mid", "up_bias", "diff_b", "scalar")


def is_product(module: Module) -> bool:
    """Whether ΔW is the product of the factors alone: no magnitude and nothing added beside them."""
    return module.kind == "lora" and module.magnitude is None and module.factors.keys() <= set(_OWN)


def _rank(factors: Factors) -> int:
    return factors["up"].shape[1]


def _shape(factors: Factors) -> Shape:
    up, down = factors["up"], factors["down"]
    kernel = factors["mid"].shape[2:] if "mid" in factors else down.shape[2:]
    return (up.shape[0], down.shape[1], *kernel)


def _product(factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
    """up (out, rank) and down (rank, in · kh · kw) in float64; ``mid`` is folded into down."""
    import torch

    up, down = widened(factors["up"]).flatten(1), widened(factors["down"])
    if "mid" in factors:
        down = torch.einsum("pq...,qi->pi...", widened(factors["mid"]), down.flatten(1))
    return up, down.flatten(1)


def _dense(module: Module, base: torch.Tensor | None) -> torch.Tensor:  # noqa: ARG001 - it adds to any base
    up, down = _product(module.factors)
    change = module.scale * (up @ down)
    beside = module.factors.get("diff")
    return change if beside is None else change + widened(beside).flatten(1)


def _apply(module: Module, x: torch.Tensor, base: StandIn) -> torch.Tensor:  # noqa: ARG001 - it adds to any base
    factors = module.factors
    if "mid" in factors:
        up, down = _product(factors)
        outputs = up @ (down @ x)
    else:
        outputs = times(factors["up"], times(factors["down"], x))
    outputs *= module.scale
    beside = factors.get("diff")
    return outputs if beside is None else outputs + times(beside, x)


def _factored(module: Module, base: torch.Tensor | None, rank: int | None) -> Factored:  # noqa: ARG001
    up, down = _product(module.factors)
    return Factored(up, down)


KIND = Kind(
    name="lora",
    title="LoRA",
    needs=(("up", "down"),),
    may=("mid", "up_bias", "diff", "diff_b"),
    rank=_rank,
    shape=_shape,
    low_rank=True,
    row_axes=lambda factors: by_rows(factors, up=0, up_bias=0, diff=0, diff_b=0),
    products=(("up", "down"),),
    linear=("up",),
    apply=with_residual(_apply),
    dense=_dense,
    factored=_factored,
)


def check(factors: Factors, name: str, path: str = "") -> None:
    """Refuse factors that cannot be multiplied.

    Args:
        factors: By role.
        name: The module, for the message.
        path: The file, for the message.

    Raises:
        IncompleteModuleError: A factor is missing.
        ShapeError: Ranks or kernels disagree.
    """
    up, down, mid = factors.get("up"), factors.get("down"), factors.get("mid")
    if up is None or down is None:
        raise IncompleteModuleError(
            f"{name} has no {'up' if up is None else 'down'} factor",
            path=path or None,
            keys=[ref.name for ref in factors.values()],
            todo="The file is incomplete; get it again from where it was made",
        )
    axes = len(up.shape), len(down.shape)
    if min(axes) < 2 or max(axes) > 5:
        expected = "Two axes were expected, or three to five for a convolution"
    elif mid is None and up.shape[1] != down.shape[0]:
        expected = "up (out, rank) and down (rank, in) must share the rank"
    elif mid is not None and mid.shape[:2] != (up.shape[1], down.shape[0]):
        expected = "up (out, rank), mid (rank, rank, …) and down (rank, in) must share the rank"
    elif up.shape[1] == 0:
        expected = "A rank of at least 1 was expected"
    else:
        return
    shapes = f"up is {list(up.shape)}, down is {list(down.shape)}"
    if mid is not None:
        shapes += f", mid is {list(mid.shape)}"
    raise ShapeError(
        f"{name}: {shapes}",
        path=path or None,
        keys=[ref.name for ref in factors.values()],
        expected=expected,
        todo="The file is damaged or was made by a faulty script",
    )


def matrices(module: Module, *, wide: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """The two matrices whose product, times the scale, is ΔW with its kernel flattened.

    Args:
        module: Of this kind.
        wide: Whether to widen them to float64; else they come in one dtype, the store dtype where both have it.

    Returns:
        up (out, rank) and down (rank, in · kh · kw); ``mid`` is folded into down.

    Raises:
        UnsupportedKindError: The module has a magnitude (DoRA) or a full difference beside its factors.
    """
    beside = [ref.name for role, ref in module.factors.items() if role not in _OWN]
    if beside:
        raise UnsupportedKindError(f"{module.target} has more than low-rank factors", keys=beside)
    if module.magnitude is not None:
        raise UnsupportedKindError(
            f"{module.target} is a DoRA: its ΔW depends on the base weight", keys=[module.magnitude.name]
        )
    up, down = module.factors["up"].load(), module.factors["down"].load()
    if not wide and up.dtype == down.dtype and up.is_floating_point() and "mid" not in module.factors:
        return up.flatten(1), down.flatten(1)
    return _product(module.factors)
