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
from loratools.errors import (
    ArchitectureError,
    LayoutError,
    NonFiniteError,
    OptionError,
    ShapeError,
    UnsupportedKindError,
)
from loratools.ops.merge import merge, merge_files

LOSSLESS = ["linear", "concat"]


def saved(adapter: lt.Adapter, path: Path) -> lt.Adapter:
    """Written and read again."""
    lt.save(adapter, path)
    return lt.load(path)


def total(*terms: tuple[float, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The exact weighted sum of what each input does to each weight."""
    found: dict[str, np.ndarray] = {}
    for weight, deltas in terms:
        for key, delta in deltas.items():
            found[key] = found.get(key, 0.0) + weight * delta
    return found


@pytest.fixture
def pair(tmp_path: Path) -> tuple[make.Made, make.Made]:
    """Two files of one architecture that differ in rank, alpha, dtype and modules."""
    one = make.kohya(tmp_path / "one.safetensors", "sdxl", seed=1, rank=4, alpha=2.0)
    two = make.kohya(
        tmp_path / "two.safetensors",
        "sdxl",
        seed=2,
        rank=3,
        alpha=5.0,
        dtype=torch.float16,
        only=["attn", "te1", "output_blocks", "in_layers"],
        ranks={"attn2": 7},
    )
    return one, two


# ------------------------------------------------------------------------------------------- identity


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
def test_one_adapter_at_weight_one_keeps_its_factors_byte_for_byte(maker, method: str, tmp_path: Path) -> None:
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


# ------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("method", LOSSLESS)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.3), (1.0, -1.0), (-0.5, 2.0), (1.5, 0.0)])
def test_the_result_is_the_weighted_sum(method: str, weights: tuple[float, float], pair, tmp_path: Path) -> None:
    one, two = pair
    merged = lt.merge([lt.load(one.path), lt.load(two.path)], weights=weights, method=method, dtype="float32")
    again = saved(merged, tmp_path / "m.safetensors")
    want = total((weights[0], one.deltas), (weights[1], two.deltas))
    make.assert_close(make.deltas_of(again), want, 2e-6)


@given(weight=st.floats(-8, 8).filter(lambda weight: abs(weight) > 1e-3))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_weight_scales_the_delta(weight: float, pair) -> None:
    one, _ = pair
    merged = lt.merge([lt.load(one.path)], weights=[weight])
    make.assert_close(make.deltas_of(merged), total((weight, one.deltas)), 1e-5)


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
    first = saved(lt.merge([one, two], weights=[1, 2], dtype="float64"), tmp_path / "first.safetensors")
    make.assert_close(
        make.deltas_of(lt.merge([first, three], weights=[1, 3], dtype="float64")), make.deltas_of(at_once), 1e-6
    )


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_rank_gives_the_nearest_matrix_of_that_rank(rank: int, pair) -> None:
    one, two = pair
    merged, report = merge([lt.load(one.path), lt.load(two.path)], weights=[1, 0.5], rank=rank, dtype="float64")
    want = total((1.0, one.deltas), (0.5, two.deltas))
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
    make.assert_close(make.deltas_of(merged), total((0.5, one.deltas)), 1e-5)


def test_ties_is_the_papers_algorithm_on_the_dense_deltas(pair) -> None:
    one, two = pair
    density = 0.3
    full = 200  # no weight of these files has a larger rank
    merged = lt.merge(
        [lt.load(one.path), lt.load(two.path)], weights=[1, 0.6], method="ties", density=density, rank=full, dtype="float64"
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


# ------------------------------------------------------------------------------------------- what is stored


def test_keep_is_the_inputs_dtype_or_the_wider(pair, tmp_path: Path) -> None:
    half = make.kohya(tmp_path / "half.safetensors", "sdxl", dtype=torch.float16, seed=5)
    adapters = {name: lt.load(path) for name, path in (("f32", pair[0].path), ("f16", half.path))}

    def stored(*names: str) -> set[str]:
        merged = lt.merge([adapters[name] for name in names], weights=[0.5] * len(names))
        return {ref.dtype for module in merged.modules.values() for ref in module.factors.values()}

    assert stored("f16", "f16") == {"F16"}
    assert stored("f32", "f16") == {"F32"}


@pytest.mark.parametrize(("dtype", "name"), [("float16", "F16"), ("bfloat16", "BF16"), ("float32", "F32")])
def test_a_store_dtype_is_kept_to_even_for_carried_modules(dtype: str, name: str, pair) -> None:
    merged = lt.merge([lt.load(pair[0].path)], dtype=dtype)
    assert {ref.dtype for module in merged.modules.values() for ref in module.factors.values()} == {name}
    make.assert_close(make.deltas_of(merged), pair[0].deltas, make.TOLERANCE[name])


def test_a_merged_value_that_does_not_fit_is_refused(pair) -> None:
    one = lt.load(pair[0].path)
    with pytest.raises(NonFiniteError, match="do not fit F16"):
        lt.merge([one], weights=[1e9], dtype="float16")
    lt.merge([one], weights=[1e9], dtype="bfloat16")


def test_a_merge_is_balanced_enough_for_half_precision(tmp_path: Path) -> None:
    """ΔW of 1e-9 and 1e4 survive float16: neither factor carries it alone."""
    made = make.kohya(tmp_path / "a.safetensors", "sdxl", only=["attn"])
    for weight in (1e-7, 1e5):
        merged = lt.merge([lt.load(made.path), lt.load(made.path)], weights=[weight, weight], dtype="float16")
        make.assert_close(make.deltas_of(merged), total((2 * weight, made.deltas)), 5e-3)


def test_the_same_inputs_give_the_same_bytes(pair, tmp_path: Path) -> None:
    for name in ("m", "n"):
        lt.save(lt.merge([lt.load(made.path) for made in pair], weights=[0.5, 0.5]), tmp_path / f"{name}.safetensors")
    assert (tmp_path / "m.safetensors").read_bytes() == (tmp_path / "n.safetensors").read_bytes()


def test_inputs_are_not_changed(pair, tmp_path: Path) -> None:
    before = [make.digest(made.path) for made in pair]
    merge_files([made.path for made in pair], tmp_path / "m.safetensors", weights=[0.5, 2.0], method="ties")
    assert [make.digest(made.path) for made in pair] == before


# ------------------------------------------------------------------------------------------- refusals


def test_other_architectures_are_refused_with_both_names(tmp_path: Path) -> None:
    one, two = make.kohya(tmp_path / "a.safetensors", "sd15"), make.kohya(tmp_path / "b.safetensors", "sdxl")
    with pytest.raises(ArchitectureError, match=r"a\.safetensors is Stable Diffusion 1.*b\.safetensors is .*XL"):
        merge_files([one.path, two.path], tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


def test_shapes_that_disagree_are_named(tmp_path: Path) -> None:
    one = make.peft(tmp_path / "a")
    wide = tuple((path, (2 * shape[0], shape[1])) for path, shape in make.LLAMA)
    two = make.peft(tmp_path / "b", wide)
    with pytest.raises(ShapeError, match=r"q_proj: \[16, 16\] against \[32, 16\]") as caught:
        lt.merge([lt.load(one.path), lt.load(two.path)])
    assert len(caught.value.keys) == len(make.LLAMA)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_refused_by_name_unless_allowed(bad: float, tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sdxl")
    name = next(key for key in made.tensors if "lora_down" in key)
    made.tensors[name].view(-1)[1] = bad
    make.write_safetensors(made.path, made.tensors, None)
    other = make.kohya(tmp_path / "b.safetensors", "sdxl", seed=4)
    adapters = [lt.load(made.path), lt.load(other.path)]
    with pytest.raises(NonFiniteError, match="NaN or Inf") as caught:
        lt.merge(adapters, weights=[0.5, 0.5])
    assert caught.value.keys == (name,)
    assert caught.value.path == str(made.path)
    merged = lt.merge(adapters, weights=[0.5, 0.5], method="concat", allow_nonfinite=True)
    assert len(merged.modules) == len(made.deltas)
    finite = {key: d for key, d in make.deltas_of(merged).items() if np.isfinite(d).all()}
    assert len(finite) == len(made.deltas) - 1


def test_linear_goes_on_with_nan_where_it_is_allowed(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sdxl")
    name = next(key for key in made.tensors if "lora_down" in key)
    made.tensors[name].view(-1)[1] = float("nan")
    make.write_safetensors(made.path, made.tensors, None)
    other = make.kohya(tmp_path / "b.safetensors", "sdxl", seed=4)
    merged = lt.merge([lt.load(made.path), lt.load(other.path)], allow_nonfinite=True)
    assert len(merged.modules) == len(made.deltas)


@pytest.mark.parametrize("dora", ["out", "in"])
def test_dora_is_refused_by_name(dora: str, tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", dora=dora)
    with pytest.raises(UnsupportedKindError, match="DoRA"):
        lt.merge([lt.load(made.path), lt.load(made.path)])


@pytest.mark.parametrize(
    ("kind", "title"), [("loha", "LoHa"), ("lokr", "LoKr"), ("oft", "OFT"), ("glora", "GLoRA"), ("full", "full difference")]
)
def test_other_kinds_are_refused_by_name(kind: str, title: str, tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", kind=kind)
    with pytest.raises(UnsupportedKindError, match=title):
        lt.merge([lt.load(made.path), lt.load(made.path)])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weights": [1.0]}, "1 weights for 2"),
        ({"weights": [1.0, float("nan")]}, "finite"),
        ({"weights": [1.0, float("inf")]}, "finite"),
        ({"method": "liner"}, "linear"),
        ({"rank": 0}, "rank"),
        ({"rank": -1}, "rank"),
        ({"method": "ties", "density": 0.0}, "density"),
        ({"method": "ties", "density": 1.5}, "density"),
        ({"density": 0.5}, "density"),
        ({"dtype": "int8"}, "int8"),
        ({"device": "quantum"}, "quantum"),
        ({"drop": ["modules"]}, "modules"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, match: str, pair) -> None:
    with pytest.raises(OptionError, match=match):
        lt.merge([lt.load(made.path) for made in pair], **options)


def test_nothing_to_merge() -> None:
    with pytest.raises(OptionError):
        lt.merge([])


def test_an_existing_output_is_refused_before_any_work(pair, tmp_path: Path) -> None:
    output = tmp_path / "m.safetensors"
    output.write_bytes(b"mine")
    with pytest.raises(lt.LoraError, match="exists"):
        merge_files([tmp_path / "missing.safetensors"], output)
    assert output.read_bytes() == b"mine"


def test_a_dry_run_says_the_size_and_writes_nothing(pair, tmp_path: Path) -> None:
    paths = [made.path for made in pair]
    planned = merge_files(paths, tmp_path / "m.safetensors", dry_run=True)
    assert not (tmp_path / "m.safetensors").exists()
    done = merge_files(paths, tmp_path / "m.safetensors")
    assert done.bytes == (tmp_path / "m.safetensors").stat().st_size
    assert 0 < planned.bytes <= done.bytes
    assert planned.bytes > 0.5 * done.bytes


# ------------------------------------------------------------------------------------------- extras


def test_extras_that_agree_are_carried_and_others_refused(tmp_path: Path) -> None:
    key = "base_model.model.lm_head.weight"
    head = torch.ones(3, 16)
    one = make.peft(tmp_path / "a", extra={key: head}, config={"modules_to_save": ["lm_head"]})
    same = make.peft(tmp_path / "b", seed=1, extra={key: head.clone()}, config={"modules_to_save": ["lm_head"]})
    other = make.peft(tmp_path / "c", seed=2, extra={key: head * 2})
    merged = lt.merge([lt.load(one.path), lt.load(same.path)])
    lt.save(merged, tmp_path / "m")
    new, _ = make.read_safetensors(tmp_path / "m" / "adapter_model.safetensors")
    old, _ = make.read_safetensors(one.file)
    assert new[key] == old[key]
    assert lt.load(tmp_path / "m").config["modules_to_save"] == ["lm_head"]
    with pytest.raises(LayoutError, match="lm_head"):
        lt.merge([lt.load(one.path), lt.load(other.path)])
    dropped = lt.merge([lt.load(one.path), lt.load(other.path)], drop=["extras"])
    assert not dropped.extras


def test_dropped_modules_to_save_leave_the_configuration(tmp_path: Path) -> None:
    key = "base_model.model.lm_head.weight"
    one = make.peft(tmp_path / "a", extra={key: torch.ones(3, 16)}, config={"modules_to_save": ["lm_head"]})
    lt.save(lt.merge([lt.load(one.path)], weights=[0.5], drop=["extras"]), tmp_path / "m")
    assert not lt.load(tmp_path / "m").config.get("modules_to_save")


def test_biases_are_summed_with_their_scales(tmp_path: Path) -> None:
    one = make.peft(tmp_path / "a", lora_bias=True, rank=4, alpha=8)
    two = make.peft(tmp_path / "b", seed=1, lora_bias=True, rank=2, alpha=2)
    merged = saved(lt.merge([lt.load(one.path), lt.load(two.path)], weights=[0.5, -1]), tmp_path / "m")
    for target, module in merged.modules.items():
        key = f"base_model.model.{target.path}.lora_B.bias"
        want = 0.5 * 2.0 * one.tensors[key] - 1.0 * 1.0 * two.tensors[key]
        found = module.factors["up_bias"].load() * module.scale
        assert torch.allclose(found, want, atol=1e-6)
