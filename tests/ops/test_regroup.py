"""Fused and split weights: regrouping loses nothing, and undoes itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools import formats
from loratools.errors import NameResolutionError
from loratools.model import Adapter, Layout, Module, Rows, Target
from loratools.ops import _regroup
from loratools.tensors import from_torch

QKV = "double_blocks.0.img_attn.qkv"
LINEAR1 = "single_blocks.0.linear1"
NORM = "final_layer.adaLN_modulation.1"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WIDTH = 5


def lora(
    path: str,
    rows: Rows | None,
    height: int,
    rank: int,
    *,
    seed: int = 0,
    scale: float = 1.0,
    dtype: str = "F32",
    down: torch.Tensor | None = None,
) -> Module:
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(height, rank, generator=generator).to(DTYPES[dtype])
    down = torch.randn(rank, WIDTH, generator=generator).to(DTYPES[dtype]) if down is None else down
    factors = {"up": from_torch("up", up), "down": from_torch("down", down)}
    return Module(Target("denoiser", path, rows), "lora", factors, scale, scale * rank, rank, (height, WIDTH))


def adapter(modules: Sequence[Module]) -> Adapter:
    return Adapter({module.target: module for module in modules}, arch="flux", layout=Layout("kohya"))


def regrouped(modules: Sequence[Module], layout: str) -> list[Module]:
    steps = _regroup.regroup(adapter(modules), formats.get(layout)).steps
    assert all(step.problem is None for step in steps)
    return [step.module for step in steps]


def bits(module: Module) -> dict[str, tuple[tuple[int, ...], bytes]]:
    return {role: (ref.shape, bytes(ref.raw())) for role, ref in module.factors.items()}


def delta(modules: Sequence[Module], of: int, height: int) -> np.ndarray:
    """ΔW of a whole weight, in float64, written out with loops."""
    whole = np.zeros((height, WIDTH))
    share = height // of
    for module in modules:
        up, down = (module.factors[role].load().double().numpy() for role in ("up", "down"))
        product = module.scale * (up @ down)
        spans = module.target.rows.spans if module.target.rows else ((0, of),)
        factor = of // module.target.rows.of if module.target.rows else 1
        at = 0
        for start, stop in spans:
            size = (stop - start) * factor * share
            whole[start * factor * share : start * factor * share + size] += product[at : at + size]
            at += size
    return whole


def thirds(ranks: Sequence[int], **fields: object) -> list[Module]:
    return [
        lora(QKV, Rows(((place, place + 1),), 3), 4, rank, seed=place, **fields)
        for place, rank in enumerate(ranks)
        if rank
    ]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=3, max_size=3).filter(any),
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from([1.0, 0.25, 3.0]),
)
def test_fused_parts_split_into_the_same_bits(ranks: list[int], dtype: str, scale: float) -> None:
    parts = thirds(ranks, dtype=dtype, scale=scale)
    (fused,) = regrouped(parts, "kohya")
    assert fused.rank == sum(ranks)
    assert np.array_equal(delta([fused], 3, 12), delta(parts, 3, 12))
    again = regrouped([fused], "diffusers")
    assert [module.target for module in again] == [part.target for part in parts]
    assert [bits(module) for module in again] == [bits(part) for part in parts]
    assert [module.scale for module in again] == [part.scale for part in parts]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.sampled_from(sorted(DTYPES)))
def test_a_trained_fused_module_splits_with_one_down_and_fuses_to_the_same_bits(
    rank: int, dtype: str
) -> None:
    whole = lora(QKV, None, 12, rank, dtype=dtype)
    parts = regrouped([whole], "diffusers")
    assert [part.rank for part in parts] == [rank] * 3
    assert {bits(part)["down"] for part in parts} == {bits(whole)["down"]}
    assert np.array_equal(delta(parts, 3, 12), delta([whole], 3, 12))
    (again,) = regrouped(parts, "kohya")
    assert (again.target, bits(again), again.rank) == (whole.target, bits(whole), rank)


def test_the_four_unequal_shares_of_linear1() -> None:
    whole = lora(LINEAR1, None, 7 * 4, 3)
    parts = regrouped([whole], "diffusers")
    assert [part.shape for part in parts] == [(4, WIDTH)] * 3 + [(16, WIDTH)]
    assert np.array_equal(delta(parts, 7, 28), delta([whole], 7, 28))
    (again,) = regrouped(parts, "kohya")
    assert bits(again) == bits(whole)


def test_exchanged_halves_are_exchanged_back() -> None:
    whole = lora(NORM, None, 8, 2)
    (there,) = regrouped([whole], "diffusers")
    up, before = (module.factors["up"].load() for module in (there, whole))
    assert torch.equal(up, torch.cat([before[4:], before[:4]]))
    (again,) = regrouped([there], "kohya")
    assert (again.target.rows, bits(again)) == (None, bits(whole))


def test_two_parts_that_share_their_down_stay_at_one_rank() -> None:
    q, _, v = thirds([2, 2, 3])
    k = lora(QKV, Rows(((1, 2),), 3), 4, 2, seed=7, down=q.factors["down"].load())
    (fused,) = regrouped([q, k, v], "kohya")
    assert fused.rank == 5
    again = regrouped([fused], "diffusers")
    assert [bits(module) for module in again] == [bits(part) for part in (q, k, v)]


def test_a_missing_part_is_zero_and_said() -> None:
    parts = thirds([2, 0, 3])
    found = _regroup.regroup(adapter(parts), formats.get("kohya"))
    assert np.array_equal(delta([step.module for step in found.steps], 3, 12), delta(parts, 3, 12))
    assert any("1 of 3 shares" in note for note in found.notes)
    again = _regroup.regroup(adapter([found.steps[0].module]), formats.get("diffusers"))
    assert [step.module.target for step in again.steps] == [part.target for part in parts]
    assert any("is zero" in note for note in again.notes)


def test_ranks_that_were_never_trained_stay_with_their_part() -> None:
    parts = thirds([3, 3, 3])
    up = parts[1].factors["up"].load().clone()
    up[:, 1:] = 0  # two of three ranks are zero
    parts[1] = parts[1]._replace(factors={**parts[1].factors, "up": from_torch("up", up)})
    (fused,) = regrouped(parts, "kohya")
    assert [bits(module) for module in regrouped([fused], "diffusers")] == [bits(part) for part in parts]


def test_an_untrained_fused_module_keeps_its_rank() -> None:
    whole = lora(QKV, None, 12, 4)
    whole = whole._replace(factors={**whole.factors, "up": from_torch("up", torch.zeros(12, 4))})
    assert [part.rank for part in regrouped([whole], "diffusers")] == [4, 4, 4]


@pytest.mark.parametrize(("scales", "rounded"), [((1.0, 0.5, -2.0), False), ((1.0, 0.3, 1.0), True)])
def test_parts_of_different_scales(scales: tuple[float, ...], rounded: bool) -> None:
    parts = [part._replace(scale=scale) for part, scale in zip(thirds([2, 2, 2]), scales, strict=True)]
    (step,) = _regroup.regroup(adapter(parts), formats.get("kohya")).steps
    assert step.rounded is rounded
    np.testing.assert_allclose(
        delta([step.module], 3, 12),
        delta(parts, 3, 12),
        rtol=1e-6 if rounded else 0,
        atol=1e-7 if rounded else 0,
    )


def test_parts_of_different_dtypes_are_stored_in_the_wider() -> None:
    parts = thirds([2, 2, 2])
    parts[0] = lora(QKV, Rows(((0, 1),), 3), 4, 2, dtype="F16")
    parts[1] = lora(QKV, Rows(((1, 2),), 3), 4, 2, dtype="BF16")
    (fused,) = regrouped(parts, "kohya")
    assert {ref.dtype for ref in fused.factors.values()} == {"F32"}
    assert np.array_equal(delta([fused], 3, 12), delta(parts, 3, 12))
    (narrow,) = regrouped(parts[:2], "kohya")
    # Neither float16 nor bfloat16 holds the other's values.
    assert {ref.dtype for ref in narrow.factors.values()} == {"F32"}


def test_a_weight_that_is_changed_twice_is_refused() -> None:
    with pytest.raises(NameResolutionError, match="same rows"):
        regrouped([lora(QKV, None, 12, 2), *thirds([2])], "kohya")


def test_a_magnitude_is_split_and_fused_with_its_rows() -> None:
    magnitude = torch.arange(1.0, 13.0)
    whole = lora(QKV, None, 12, 2)._replace(magnitude=from_torch("m", magnitude), magnitude_axis="out")
    parts = regrouped([whole], "diffusers")
    assert [part.magnitude.load().tolist() for part in parts] == [
        list(map(float, range(start, start + 4))) for start in (1, 5, 9)
    ]
    (again,) = regrouped(parts, "kohya")
    assert torch.equal(again.magnitude.load(), magnitude)
    steps = _regroup.regroup(adapter(parts[:2]), formats.get("kohya")).steps
    assert "magnitude" in str(steps[0].problem)


def test_a_magnitude_per_input_cannot_be_split() -> None:
    whole = lora(QKV, None, 12, 2)._replace(magnitude=from_torch("m", torch.ones(WIDTH)), magnitude_axis="in")
    steps = _regroup.regroup(adapter([whole]), formats.get("diffusers")).steps
    assert all("--as lora --base" in str(step.problem) for step in steps)


def test_rows_that_a_layout_has_no_name_for_are_not_left_out() -> None:
    # XLabs names the q, k and v rows of linear1 alone.
    whole = lora(LINEAR1, None, 7 * 4, 3)
    (step,) = _regroup.regroup(adapter([whole]), formats.get("xlabs")).steps
    assert "4 of 7 shares" in str(step.problem)
