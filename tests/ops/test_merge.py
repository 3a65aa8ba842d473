"""What merging means, through files: laws that hold whatever the inputs are."""

from __future__ import annotations

from pathlib import Path

import factories as make
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import loratools as lt
from loratools.ops.merge import merge

LOSSLESS = ["linear", "concat"]


@pytest.mark.parametrize("method", LOSSLESS)
@pytest.mark.parametrize(
    "maker",
    [
        lambda to: make.kohya(to / "a.safetensors", "sd15", mid=True, dtype=torch.float16),
        lambda to: make.diffusers(to / "a.safetensors", "flux", dtype=torch.bfloat16),
        lambda to: make.peft(to / "a", embedding=True, lora_bias=True),
        lambda to: make.peft(to / "a", make.GPT2, config={"fan_in_fan_out": True, "use_rslora": True}),
        lambda to: make.peft(to / "a", make.STRANGE, component="model"),
    ],
    ids=["kohya", "diffusers", "peft", "gpt2", "unknown"],
)
def test_one_adapter_at_weight_one_keeps_its_factors_byte_for_byte(
    maker, method: str, tmp_path: Path
) -> None:
    made = maker(tmp_path)
    output = tmp_path / ("out" if made.path.is_dir() else "out.safetensors")
    lt.save(lt.merge([lt.load(made.path)], method=method), output)
    old, _ = make.read_safetensors(made.file)
    new, _ = make.read_safetensors(output / "adapter_model.safetensors" if output.is_dir() else output)
    assert set(old) <= set(new)
    assert {key: new[key] for key in old} == old
    assert all(key.endswith(".alpha") for key in set(new) - set(old))
    make.assert_close(make.deltas_of(lt.load(output)), made.deltas, 1e-6)


@pytest.mark.parametrize("method", LOSSLESS)
def test_a_module_that_only_one_input_has_is_carried(method: str, pair, tmp_path: Path) -> None:
    one, two = pair
    lt.save(lt.merge([lt.load(one.path), lt.load(two.path)], method=method), tmp_path / "m.safetensors")
    old, _ = make.read_safetensors(one.path)
    new, _ = make.read_safetensors(tmp_path / "m.safetensors")
    alone = [key for key in old if key.startswith("lora_te2_text_model_encoder_layers_0_mlp")]
    assert len(alone) == 3
    assert all(new[key] == old[key] for key in alone)


@pytest.mark.parametrize("method", LOSSLESS)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.3), (1.0, -1.0), (-0.5, 2.0), (1.5, 0.0)])
def test_the_result_is_the_weighted_sum(
    method: str, weights: tuple[float, float], pair, tmp_path: Path
) -> None:
    one, two = pair
    merged = lt.merge([lt.load(one.path), lt.load(two.path)], weights=weights, method=method, dtype="float32")
    again = make.saved(merged, tmp_path / "m.safetensors")
    want = make.total((weights[0], one.deltas), (weights[1], two.deltas))
    make.assert_close(make.deltas_of(again), want, 2e-6)


@given(weight=st.floats(-8, 8).filter(lambda weight: abs(weight) > 1e-3))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_weight_scales_the_delta(weight: float, pair) -> None:
    one, _ = pair
    merged = lt.merge([lt.load(one.path)], weights=[weight])
    make.assert_close(make.deltas_of(merged), make.total((weight, one.deltas)), 1e-5)


@pytest.mark.parametrize("method", [*LOSSLESS, "ties"])
def test_a_weight_of_zero_is_absence(method: str, pair) -> None:
    one, two = (lt.load(made.path) for made in pair)
    with_zero = make.deltas_of(lt.merge([one, two], weights=[0.5, 0.0], method=method, dtype="float32"))
    without = make.deltas_of(lt.merge([one], weights=[0.5], method=method, dtype="float32"))
    make.assert_close({key: with_zero[key] for key in without}, without, 1e-5)
    assert all(not delta.any() for key, delta in with_zero.items() if key not in without)


@pytest.mark.parametrize("method", [*LOSSLESS, "ties"])
def test_order_does_not_matter(method: str, pair) -> None:
    one, two = (lt.load(made.path) for made in pair)
    options = {"method": method, "dtype": "float32"}
    forth = make.deltas_of(lt.merge([one, two], weights=[0.7, -0.4], **options))
    back = make.deltas_of(lt.merge([two, one], weights=[-0.4, 0.7], **options))
    make.assert_close(forth, back, 1e-5)


def test_an_adapter_minus_itself_is_nothing(pair) -> None:
    one = lt.load(pair[0].path)
    for delta in make.deltas_of(lt.merge([one, one], weights=[1, -1])).values():
        assert np.abs(delta).max() < 1e-7


def test_merging_in_two_steps_is_merging_at_once(pair, tmp_path: Path) -> None:
    one, two = (lt.load(made.path) for made in pair)
    three = lt.load(make.kohya(tmp_path / "three.safetensors", "sdxl", seed=3, rank=2).path)
    at_once = lt.merge([one, two, three], weights=[1, 2, 3], dtype="float64")
    first = make.saved(lt.merge([one, two], weights=[1, 2], dtype="float64"), tmp_path / "first.safetensors")
    make.assert_close(
        make.deltas_of(lt.merge([first, three], weights=[1, 3], dtype="float64")),
        make.deltas_of(at_once),
        1e-6,
    )


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_rank_gives_the_nearest_matrix_of_that_rank(rank: int, pair) -> None:
    one, two = pair
    merged, report = merge(
        [lt.load(one.path), lt.load(two.path)], weights=[1, 0.5], rank=rank, dtype="float64"
    )
    want = make.total((1.0, one.deltas), (0.5, two.deltas))
    kept = whole = 0.0
    for target, module in merged.modules.items():
        dense = want[make.key_of(target.component, str(target))]
        flat = dense.reshape(dense.shape[0], -1)
        u, sigma, vh = np.linalg.svd(flat, full_matrices=False)
        best = (u[:, :rank] * sigma[:rank]) @ vh[:rank]
        found = module.delta().double().numpy().reshape(flat.shape)
        assert module.rank == min(rank, np.linalg.matrix_rank(flat))
        np.testing.assert_allclose(found, best, atol=1e-6 * sigma[0])
        kept, whole = kept + (sigma[:rank] ** 2).sum(), whole + (sigma**2).sum()
    assert report.energy == pytest.approx(kept / whole, rel=1e-6)


def test_concats_rank_is_the_sum_and_linears_at_most(pair) -> None:
    adapters = [lt.load(made.path) for made in pair]
    concat, linear = lt.merge(adapters, method="concat"), lt.merge(adapters, method="linear")
    for target, module in concat.modules.items():
        ranks = [adapter.modules[target].rank for adapter in adapters if target in adapter.modules]
        assert module.rank == sum(ranks)
        assert linear.modules[target].rank <= sum(ranks)


def test_ties_of_one_adapter_at_full_density_is_the_adapter(pair) -> None:
    one = pair[0]
    merged = lt.merge([lt.load(one.path)], weights=[0.5], method="ties", density=1.0)
    make.assert_close(make.deltas_of(merged), make.total((0.5, one.deltas)), 1e-5)


def test_ties_is_the_papers_algorithm_on_the_dense_deltas(pair) -> None:
    one, two = pair
    density = 0.3
    full = 200  # no weight of these files has a larger rank
    merged = lt.merge(
        [lt.load(one.path), lt.load(two.path)],
        weights=[1, 0.6],
        method="ties",
        density=density,
        rank=full,
        dtype="float64",
    )
    for target, module in merged.modules.items():
        key = make.key_of(target.component, str(target))
        taus = [w * d[key] for w, d in ((1.0, one.deltas), (0.6, two.deltas)) if key in d]
        trimmed = []
        for tau in taus:
            keep = max(1, int(density * tau.size + 0.5))
            cut = np.sort(np.abs(tau), axis=None)[-keep]
            trimmed.append(np.where(np.abs(tau) >= cut, tau, 0.0))
        sign = np.sign(sum(trimmed))
        agree = [np.where(np.sign(t) == sign, t, 0.0) for t in trimmed]
        count = sum((a != 0).astype(int) for a in agree)
        want = np.divide(sum(agree), count, out=np.zeros_like(sign), where=count > 0)
        found = module.delta().double().numpy()
        assert np.linalg.norm(found - want) <= 2e-5 * np.linalg.norm(want), key
