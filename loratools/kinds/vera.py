"""VeRA (arXiv 2310.11454): ΔW = diag(lambda_b) · B · diag(lambda_d) · A around two frozen random matrices.

All modules share A (rank, in) and B (out, rank), as wide as the widest of the weights; a module takes the columns and
rows that it has. lambda_b (out,) tells its outputs; how many inputs it has, the base tells, or ``Module.variant``
("inputs=4096") where the file leaves no doubt. PEFT saves A and B unless ``save_projection`` is false; then the variant
has their seed ("key=0"), and they are drawn anew as wide as the base wants them (:func:`drawn`).
Source: PEFT ``tuners/vera/layer.py`` and ``model.py``.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

from loratools.errors import ShapeError, UnsupportedKindError
from loratools.kinds._base import Factored, Kind, StandIn, first_axis, needed, said, wide, with_residual
from loratools.kinds._product import dense_of
from loratools.model import Module
from loratools.tensors import LazySource, TensorRef

if TYPE_CHECKING:
    import torch

_TITLE = "VeRA"
_PAIRS_KEPT = 2


def drawn(key: int, rank: int, outputs: int, inputs: int) -> tuple[TensorRef, TensorRef]:
    """A (rank, inputs) and B (outputs, rank) as PEFT draws them, once they are asked for.

    They are uniform within √(6 / fan-in), He's initialisation, in float32 from torch's generator on the CPU.

    Args:
        key: PEFT's ``projection_prng_key``.
        rank: A count.
        outputs: Of the weight that has most, a count.
        inputs: Of the weight that has most, a count.
    """
    first = LazySource(lambda: _drawn(key, rank, outputs, inputs)[0])
    second = LazySource(lambda: _drawn(key, rank, outputs, inputs)[1])
    return TensorRef("", (rank, inputs), "F32", first), TensorRef("", (outputs, rank), "F32", second)


@lru_cache(maxsize=_PAIRS_KEPT)
def _drawn(key: int, rank: int, outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    generator = torch.Generator(device="cpu").manual_seed(key)
    pair = []
    for shape in ((rank, inputs), (outputs, rank)):
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
        pair.append(torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator))
    return pair[0], pair[1]


def seed(module: Module) -> int | None:
    """The seed of the projections that have to be drawn for a module; None where it has them."""
    stated = said(module).get("key")
    return int(stated) if stated is not None and "vera_a" not in module.factors else None


def _inputs(module: Module) -> int | None:
    stated = said(module).get("inputs")
    return int(stated) if stated is not None else None


def _pair(module: Module, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """up (out, rank) and down (rank, inputs), with the two vectors in them.

    Raises:
        UnsupportedKindError: The projections are not there.
        ShapeError: They do not reach as far as the weight does.
    """
    factors = module.factors
    if "vera_a" not in factors or "vera_b" not in factors:
        raise UnsupportedKindError(
            f"{module.target}: the projections that all VeRA modules share are not in the file",
            keys=[ref.name for ref in factors.values() if ref.name],
            expected="vera_A and vera_B were expected, or a configuration with save_projection and their seed",
            todo="Turn it into LoRA with `loratools convert --as lora --base BASE`, which draws them from their seed",
        )
    outputs, rank = factors["vera_lambda_b"].numel, factors["vera_lambda_d"].numel
    reach = (factors["vera_b"].shape[0], factors["vera_a"].shape[1])
    ranks = (factors["vera_b"].shape[1], factors["vera_a"].shape[0])
    if reach[0] < outputs or reach[1] < inputs or ranks != (rank, rank):
        raise ShapeError(
            f"{module.target}: vera_A is {list(factors['vera_a'].shape)} and vera_B {list(factors['vera_b'].shape)} "
            f"for {outputs} outputs, {inputs} inputs and rank {rank}",
            keys=[ref.name for ref in factors.values() if ref.name],
            expected="Projections at least as wide as the weight, and of its rank, were expected",
            todo="Give the base model that the adapter was trained on",
        )
    up = wide(factors["vera_lambda_b"]).reshape(-1, 1) * wide(factors["vera_b"])[:outputs]
    return up, wide(factors["vera_lambda_d"]).reshape(-1, 1) * wide(factors["vera_a"])[:, :inputs]


def _factored(module: Module, base: torch.Tensor | None, rank: int | None) -> Factored:  # noqa: ARG001
    stated = _inputs(module)
    # The base itself goes before what the file suggests.
    if base is None and stated is not None:
        up, down = _pair(module, stated)
        return Factored(up, down)
    weight = needed(module, base, _TITLE)
    outputs = module.factors["vera_lambda_b"].numel
    if weight.shape[0] != outputs:
        raise ShapeError(
            f"{module.target}: lambda_b has {outputs} values, the base weight {weight.shape[0]} outputs",
            keys=[module.factors["vera_lambda_b"].name],
            expected="One value per output was expected",
            todo="Give the base model that the adapter was trained on",
        )
    up, down = _pair(module, weight.shape[1])
    return Factored(up, down)


def _apply(module: Module, x: torch.Tensor, base: StandIn) -> torch.Tensor:  # noqa: ARG001 - it adds to any base
    up, down = _pair(module, len(x))
    return module.scale * (up @ (down @ x))


KIND = Kind(
    name="vera",
    title=_TITLE,
    needs=(("vera_lambda_b", "vera_lambda_d"),),
    may=("vera_a", "vera_b"),
    rank=first_axis("vera_lambda_d"),
    scaled=False,
    shared=("vera_a", "vera_b"),
    needs_base=True,
    alone=lambda module: _inputs(module) is not None,
    apply=with_residual(_apply),
    dense=dense_of(_factored),
    factored=_factored,
)
