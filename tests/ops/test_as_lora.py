"""Any kind as LoRA: the same ΔW at full rank, the best one below, and an error that is true."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import loratools as lt
from loratools import kinds
from loratools.errors import NonFiniteError, OptionError, UnsupportedKindError
from loratools.model import Module, Target
from loratools.ops.as_lora import to_lora
from tests.kinds import samples as make

# Kinds whose factors need no decomposition, and the rank that theirs make.
RANKS = {
    "lora": 3,
    "lora-conv": 3,
    "lora-mid": 3,
    "adalora": 3,
    "loha": 4,
    "loha-tucker": 4,
    "lokr": 4,
    "lokr-full": 8,
    "vera": 3,
    "miss": 3,
    "miss-mini": 3,
    "vblora": 3,
    "vblora-topk": 3,
    "unilora": 3,
    "lokr-both": 1,
    "lokr-conv": 8,
    "lokr-tucker": 4,
    "glora": 3,
    "glora-conv": 11,
}


def delta_of(module: Module) -> np.ndarray:
    """ΔW from the factors and the scale as they are stored."""
    up, down = (module.factors[role].load().double().flatten(1) for role in ("up", "down"))
    return (module.scale * up @ down).numpy()


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    flat = wanted.reshape(found.shape)
    return float(np.linalg.norm(found - flat) / np.linalg.norm(flat))


@pytest.mark.parametrize("name", make.NAMES)
def test_at_full_rank_nothing_is_lost(name: str) -> None:
    module, base, delta = make.sample(name)
    found, error, exact = to_lora(module, base=torch.from_numpy(base))
    assert exact
    assert relative(delta_of(found), delta) < 1e-12
    assert error < 1e-6
    assert found.kind == "lora"
    assert found.target == module.target
    assert found.shape == base.shape
    assert found.rank == found.factors["up"].shape[1] == found.factors["down"].shape[0]
    assert found.factors["down"].shape == (found.rank, *base.shape[1:])
    assert found.factors["up"].shape == (make.OUT, found.rank, *(1,) * (base.ndim - 2))
    assert found.op == ("conv" if base.ndim > 2 else "linear")
    assert {ref.dtype for ref in found.factors.values()} == {"F64"}
    assert found.alpha is None or math.isclose(found.scale, found.alpha / found.rank)


@pytest.mark.parametrize(("name", "rank"), RANKS.items())
def test_exact_factors_keep_the_scale(name: str, rank: int) -> None:
    module, base, _ = make.sample(name)
    found = to_lora(module, base=torch.from_numpy(base)).module
    assert (found.rank, found.scale) == (rank, module.scale)


@pytest.mark.parametrize("name", make.NAMES)
@pytest.mark.parametrize("rank", [1, 3])
def test_a_truncated_module_is_the_best_of_its_rank(name: str, rank: int) -> None:
    module, base, delta = make.sample(name)
    sigma = np.linalg.svd(delta.reshape(make.OUT, -1), compute_uv=False)
    best = float(np.linalg.norm(sigma[rank:]) / np.linalg.norm(sigma))
    found, error, exact = to_lora(module, rank=rank, base=torch.from_numpy(base))
    assert found.rank == min(rank, RANKS.get(name, rank))
    assert abs(relative(delta_of(found), delta) - best) < 1e-7
    assert abs(error - best) < 1e-7
    assert exact == (best < 1e-12)


@pytest.mark.parametrize("name", ["loha", "lokr", "full", "oft"])
def test_what_was_decomposed_is_balanced_and_has_its_scale_in_it(name: str) -> None:
    module, base, _ = make.sample(name)
    found = to_lora(module._replace(scale=abs(module.scale)), rank=2, base=torch.from_numpy(base)).module
    assert (found.scale, found.alpha, found.rank) == (1.0, 2.0, 2)
    up, down = (found.factors[role].load().flatten(1) for role in ("up", "down"))
    assert torch.allclose(up.norm(dim=0), down.norm(dim=1))


def test_a_negative_scale_goes_into_one_factor() -> None:
    module, _, delta = make.sample("loha")
    found = to_lora(module._replace(scale=-module.scale), rank=4).module
    assert relative(delta_of(found), -delta) < 1e-7


def stored_as(name: str, dtype: torch.dtype) -> make.Sample:
    """A sample whose factors are narrow, and ΔW of those."""
    module, base, _ = make.sample(name)
    factors = {role: make.ref(ref.load().numpy(), dtype) for role, ref in module.factors.items()}
    narrow = module._replace(factors=factors)
    return make.Sample(narrow, base, kinds.delta(narrow, torch.from_numpy(base), wide=True).numpy())


@pytest.mark.parametrize("name", ["loha", "lokr", "lora-mid", "full", "glora", "oft", "ia3-in"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [None, 2])
def test_the_error_counts_the_store_dtypes_rounding(name: str, dtype: torch.dtype, rank: int | None) -> None:
    module, base, delta = stored_as(name, dtype)
    found, error, _ = to_lora(module, rank=rank, base=torch.from_numpy(base))
    assert found.factors["up"].load().dtype == dtype
    true = relative(delta_of(found), delta)
    assert true < (1.0 if rank else 2 * torch.finfo(dtype).eps)
    assert abs(error - true) < max(1e-7, 0.02 * true)


def test_products_too_small_for_float16_are_not_lost() -> None:
    rng = np.random.default_rng(0)
    small = {role: 1e-4 * rng.normal(size=(12, 2)) for role in ("hada_w1_a", "hada_w2_a")}
    large = {role: 10 * rng.normal(size=(2, 8)) for role in ("hada_w1_b", "hada_w2_b")}
    module = make.module_of("loha", small | large, 1.0)
    found, error, _ = to_lora(module, dtype="F16")
    assert error < 1e-3
    assert relative(delta_of(found), kinds.delta(module, wide=True).numpy()) < 1e-3


def test_what_does_not_fit_the_store_dtype_is_refused() -> None:
    module = make.module_of("full", {"diff": 1e12 * np.eye(3)}, 1.0)
    with pytest.raises(NonFiniteError, match=r"do not fit F16.*--dtype"):
        to_lora(module, dtype="F16")


def test_a_plain_lora_stays_as_it_is() -> None:
    module = make.sample("lora").module
    for rank in (None, 3, 99):
        found, error, exact = to_lora(module, rank=rank)
        assert found is module
        assert (error, exact) == (0.0, True)


def test_a_plain_lora_in_another_dtype_keeps_rank_scale_and_alpha() -> None:
    module = make.sample("lora-conv").module._replace(alpha=1.5)
    found, error, exact = to_lora(module, dtype="F16")
    assert (found.rank, found.scale, found.alpha, exact) == (3, 0.5, 1.5, True)
    assert found.factors["up"].dtype == "F16"
    assert 0 < error < 1e-3
    assert np.array_equal(found.factors["up"].load(), module.factors["up"].load().half())


def test_biases_come_along() -> None:
    module = make.sample("lora").module
    bias, change = np.arange(12.0), np.arange(12.0)[::-1].copy()
    module = module._replace(
        factors={**module.factors, "up_bias": make.ref(bias), "diff_b": make.ref(change)}
    )
    found = to_lora(module, rank=1).module
    # The scale of -0.5 multiplies a LoRA's own bias, and is in the factors now.
    assert np.allclose(found.scale * found.factors["up_bias"].load().numpy(), -0.5 * bias)
    assert np.allclose(found.factors["diff_b"].load().numpy(), change)
    full = make.sample("full").module
    full = full._replace(factors={**full.factors, "diff_b": make.ref(change)})
    assert np.allclose(to_lora(full, rank=2).module.factors["diff_b"].load().numpy(), change)


@pytest.mark.parametrize(
    "factors", [{"diff_b": np.ones(4)}, {"w_norm": np.ones(4), "b_norm": np.ones(4)}, {"diff": np.ones(4)}]
)
def test_norms_and_biases_alone_stay_as_they_are(factors: dict[str, np.ndarray]) -> None:
    module = make.module_of("full", factors, 1.0)
    assert to_lora(module, rank=2) == (module, 0.0, True)


@pytest.mark.parametrize("axis", [0, 1])
def test_dora_becomes_lora_of_the_base_it_is_for(axis: int) -> None:
    module, base, _ = make.sample("lora")
    magnitude = np.linspace(1, 2, base.shape[axis])
    dora = module._replace(magnitude=make.ref(magnitude), magnitude_axis=("out", "in")[axis])
    weight = torch.from_numpy(base)
    found, _, exact = to_lora(dora, base=weight)
    assert exact
    assert found.magnitude is None
    assert relative(delta_of(found), kinds.delta(dora, weight, wide=True).numpy()) < 1e-12
    with pytest.raises(UnsupportedKindError, match=r"DoRA.*--base"):
        to_lora(dora)


@pytest.mark.parametrize("name", ["glora", "ia3-out", "oft", "boft", "oft-peft"])
def test_without_the_base_what_depends_on_it_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedKindError, match=r"depends on the base weight.*--base"):
        to_lora(make.sample(name).module, rank=2)


def test_a_kind_without_a_delta_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedKindError, match="VeRA"):
        to_lora(Module(Target("model", "w"), "vera", {}))


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(OptionError):
        to_lora(make.sample("loha").module, rank=0)


def test_a_zero_module_has_no_error() -> None:
    module = make.module_of("full", {"diff": np.zeros((4, 3))}, 1.0)
    found, error, exact = to_lora(module)
    assert (found.rank, error, exact) == (1, 0.0, True)


def test_a_loha_too_wide_for_factors_has_the_rank_of_its_matrix() -> None:
    rng = np.random.default_rng(0)
    sizes = {"hada_w1_a": (12, 4), "hada_w1_b": (4, 8), "hada_w2_a": (12, 4), "hada_w2_b": (4, 8)}
    module = make.module_of("loha", {role: rng.normal(size=size) for role, size in sizes.items()}, 0.5)
    found, _, exact = to_lora(module)
    assert (found.rank, exact) == (8, True)
    assert relative(delta_of(found), kinds.delta(module, wide=True).numpy()) < 1e-12


def test_a_large_matrix_is_decomposed_by_iteration() -> None:
    generator = torch.Generator().manual_seed(0)
    decay = torch.logspace(0, -3, 60, dtype=torch.float64)
    left, right = (
        torch.linalg.qr(torch.randn(1100, 60, dtype=torch.float64, generator=generator)).Q for _ in "ab"
    )
    module = make.module_of("full", {"diff": ((left * decay) @ right.T).numpy()}, 1.0)
    found, error, exact = to_lora(module, rank=20)
    best = float(decay[20:].norm() / decay.norm())
    assert (found.rank, exact) == (20, False)
    assert best <= error * (1 + 1e-9) <= best * 1.05
    assert abs(relative(delta_of(found), ((left * decay) @ right.T).numpy()) - error) < 1e-7


@pytest.mark.parametrize(("kind", "rank"), [("loha", 4), ("lokr", 8)])
def test_it_agrees_with_pefts_own_conversion(kind: str, rank: int, shared: Path) -> None:
    folder = shared / "oracle" / f"peft_tolora__{kind}"
    adapter = lt.load(folder / "input" / "adapter")
    truth = load_file(folder / "expected" / "delta.safetensors")
    stated = json.loads((folder / "input" / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert len(adapter.modules) == len(truth)
    for target, module in adapter.modules.items():
        scaled = module._replace(scale=stated["alpha"] / stated["r"])
        wanted = truth[target.path].double().numpy()
        assert relative(kinds.delta(scaled, wide=True).numpy(), wanted) < 1e-6
        for asked in (None, rank):
            found, error, _ = to_lora(scaled, rank=asked)
            assert relative(delta_of(found), wanted) < 1e-6
            assert error < 1e-6
            assert found.rank == rank


def test_vera_agrees_with_pefts_own_conversion(shared: Path) -> None:
    folder = shared / "oracle" / "peft_tolora__vera"
    adapter = lt.load(folder / "input" / "adapter")
    truth = load_file(folder / "expected" / "delta.safetensors")
    assert {target.path for target in adapter.modules} == truth.keys()
    for target, module in adapter.modules.items():
        wanted = truth[target.path].double()
        # The file leaves no doubt of the inputs, and a base of that shape says the same.
        for base in (None, torch.zeros_like(wanted)):
            assert relative(kinds.delta(module, base, wide=True).numpy(), wanted.numpy()) < 1e-6
            found, error, exact = to_lora(module, rank=8, base=base)
            assert relative(delta_of(found), wanted.numpy()) < 1e-6
            assert (found.rank, exact) == (8, True)
            assert error < 1e-6
