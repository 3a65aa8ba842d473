"""ΔW of fused experts against its definition, one expert after the other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools import kinds
from loratools.errors import UnsupportedKindError
from loratools.kinds import experts
from loratools.model import Module, Target
from loratools.ops.as_lora import to_lora
from loratools.tensors import from_torch

COUNT = st.integers(1, 5)


def stacked(count: int, out: int, width: int, rank: int, *, in_first: bool = False) -> Module:
    torch.manual_seed(count * 1000 + out * 100 + width * 10 + rank)
    up = torch.randn(count, out, rank, dtype=torch.float64)
    down = torch.randn(count, rank, width, dtype=torch.float64)
    shape = (count, width, out) if in_first else (count, out, width)
    factors = {"up": from_torch("up", up), "down": from_torch("down", down)}
    return Module(
        Target("language_model", "experts"),
        "experts",
        factors,
        scale=-0.5,
        rank=rank,
        shape=shape,
        in_first=in_first,
    )


@settings(deadline=None, max_examples=30)
@given(count=COUNT, out=COUNT, width=COUNT, rank=COUNT, in_first=st.booleans())
def test_every_expert_has_a_product_of_its_own(
    count: int, out: int, width: int, rank: int, in_first: bool
) -> None:
    module = stacked(count, out, width, rank, in_first=in_first)
    found = kinds.delta(module, wide=True)
    assert tuple(found.shape) == module.shape
    up, down = module.factors["up"].load(), module.factors["down"].load()
    for expert in range(count):
        delta = -0.5 * up[expert] @ down[expert]
        torch.testing.assert_close(found[expert], delta.T if in_first else delta)


def test_stacked_factors_say_rank_and_shape() -> None:
    factors = stacked(3, 6, 4, 2).factors
    assert experts.is_stacked(factors)
    assert (experts.KIND.rank(factors), experts.KIND.shape(factors)) == (2, (3, 6, 4))


def test_packed_factors_say_neither_and_are_refused() -> None:
    factors = {"up": from_torch("up", torch.ones(6, 6)), "down": from_torch("down", torch.ones(6, 4))}
    module = Module(Target("language_model", "experts"), "experts", factors)
    assert (experts.KIND.rank(factors), experts.KIND.shape(factors)) == (None, None)
    with pytest.raises(UnsupportedKindError, match="packed") as caught:
        kinds.delta(module, torch.zeros(3, 6, 4))
    assert caught.value.keys == ("up", "down")


def test_experts_are_no_lora_of_a_convolution() -> None:
    with pytest.raises(UnsupportedKindError, match="every expert has factors of its own"):
        to_lora(stacked(3, 6, 4, 2))
