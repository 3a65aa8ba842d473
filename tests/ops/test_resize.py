"""Resize: the best of every rank, exact minima, and nothing lost that the rule did not ask for."""

from __future__ import annotations

import json
import math

import factories
import numpy as np
import pytest
import torch

import loratools as lt
from loratools.errors import LayoutError, NonFiniteError, OptionError, UnsupportedKindError
from loratools.ops.resize import resize, resize_file

RULES = [("energy", 0.9), ("energy", 0.5), ("error", 0.3), ("ratio", 0.5), ("ratio", 3.0)]


def spectra(deltas):
    """The singular values of every ΔW, by numpy from the dense matrix."""
    return {
        key: np.linalg.svd(delta.reshape(delta.shape[0], -1), compute_uv=False)
        for key, delta in deltas.items()
    }


def nearest(delta, rank):
    flat = delta.reshape(delta.shape[0], -1)
    u, sigma, vh = np.linalg.svd(flat, full_matrices=False)
    return ((u[:, :rank] * sigma[:rank]) @ vh[:rank]).reshape(delta.shape)


def meets(rule, value, sigma, rank):
    """Whether so many singular values satisfy a rule; written from its definition."""
    squares = sigma**2
    kept = squares[:rank].sum() / squares.sum()
    if rule == "energy":
        return kept >= value - 1e-12
    if rule == "error":
        return math.sqrt(max(0.0, 1 - kept)) <= value + 1e-7
    share = value if value <= 1 else 1 / value
    return rank >= np.count_nonzero(sigma > share * sigma[0])


def ranks_of(report):
    return {factories.key_of(each.component, each.target): each.rank for each in report.modules}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Mixed ranks, a negative alpha, convolutions with and without the Tucker form."""
    return factories.kohya(
        tmp_path_factory.mktemp("mixed") / "in.safetensors",
        "sd15",
        rank=6,
        ranks={"to_k": 4, "fc1": 3},
        alphas={"to_v": -3.0},
        alpha=2.0,
        mid=True,
        metadata={"ss_network_dim": "6", "ss_network_alpha": "2.0", "sshs_model_hash": "0" * 64},
    )


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_every_module_is_the_nearest_of_its_rank(mixed, tmp_path, rank):
    report = resize_file(mixed.path, tmp_path / "out.safetensors", rank=rank)
    found = factories.deltas_of(lt.load(tmp_path / "out.safetensors"))
    wanted = {key: nearest(delta, rank) for key, delta in mixed.deltas.items()}
    factories.assert_close(found, wanted, 2e-6)
    assert {each.rank for each in report.modules} <= {rank, 4, 3}
    for each in report.modules:
        key = factories.key_of(each.component, each.target)
        true = np.linalg.norm(found[key] - mixed.deltas[key]) / np.linalg.norm(mixed.deltas[key])
        assert abs(each.error - true) < 1e-6
        assert abs(each.energy - (1 - true**2)) < 1e-6


@pytest.mark.parametrize(("rule", "value"), RULES)
def test_ranks_are_exact_minima(mixed, rule, value):
    """sd-scripts keeps one more than its rules ask for, and never fewer than two."""
    _, report = resize(lt.load(mixed.path), **{rule: value})
    for key, rank in ranks_of(report).items():
        sigma = spectra(mixed.deltas)[key]
        assert meets(rule, value, sigma, rank)
        assert rank == 1 or not meets(rule, value, sigma, rank - 1)


def test_one_direction_is_enough_where_one_is(tmp_path):
    made = factories.kohya(tmp_path / "in.safetensors", "sd15", rank=1, only=["to_q"])
    _, report = resize(lt.load(made.path), energy=0.9)
    assert set(ranks_of(report).values()) == {1}


def test_factors_are_balanced_and_alpha_is_one_for_all(mixed, tmp_path):
    resize_file(mixed.path, tmp_path / "out.safetensors", rank=2)
    found = lt.load(tmp_path / "out.safetensors")
    for module in found.modules.values():
        up, down = (module.factors[role].load().double().flatten(1) for role in ("up", "down"))
        assert torch.allclose(up.norm(dim=0), down.norm(dim=1), rtol=1e-5)
        assert (module.alpha, module.scale) == (2.0, 1.0)
        assert "mid" not in module.factors
    assert found.metadata["ss_network_dim"] == "2"
    assert found.metadata["ss_network_alpha"] == "2"
    assert found.metadata["sshs_model_hash"] != "0" * 64
    record = json.loads(found.metadata["loratools.resize"])
    assert record["rule"] == "rank 2"
    assert record["input"]["name"] == "in.safetensors"


def test_metadata_says_dynamic_where_ranks_differ(mixed, tmp_path):
    resize_file(mixed.path, tmp_path / "out.safetensors", energy=0.8)
    assert lt.load(tmp_path / "out.safetensors").metadata["ss_network_dim"] == "Dynamic"


def test_what_is_not_cut_is_carried_byte_for_byte(tmp_path):
    made = factories.kohya(tmp_path / "in.safetensors", "sd15", rank=3, dtype=torch.float16)
    report = resize_file(made.path, tmp_path / "out.safetensors", rank=8)
    before, _ = factories.read_safetensors(made.path)
    after, _ = factories.read_safetensors(tmp_path / "out.safetensors")
    assert after == before
    assert not any(each.changed for each in report.modules)
    assert (report.energy, report.error) == (1.0, 0.0)
    assert any("fewer directions than rank 8" in note for note in report.notes)


def test_limits(mixed):
    adapter = lt.load(mixed.path)
    wide = {key for key, delta in mixed.deltas.items() if delta.shape[2:] == (3, 3)}
    _, most = resize(adapter, energy=0.999, max_rank=2)
    assert set(ranks_of(most).values()) == {2}
    _, least = resize(adapter, ratio=0.99, min_rank=3)
    assert set(ranks_of(least).values()) == {3}
    _, conv = resize(adapter, rank=4, conv_rank=1)
    assert {key for key, rank in ranks_of(conv).items() if rank == 1} == wide
    _, multiple = resize(adapter, energy=0.6, multiple_of=4)
    for key, rank in ranks_of(multiple).items():
        assert rank in (4, np.linalg.matrix_rank(mixed.deltas[key].reshape(len(mixed.deltas[key]), -1)))
    smaller, left = resize(adapter, rank=2, conv_rank=0)
    assert len(left.dropped) == len(wide) == 2
    assert len(smaller.modules) == len(mixed.deltas) - 2


@pytest.mark.parametrize("slack", [0, 1, 95, 96, 777])
def test_a_size_is_never_exceeded_and_never_wasted(mixed, tmp_path, slack):
    output = tmp_path / "out.safetensors"
    budget = 30_000 + slack
    report = resize_file(mixed.path, output, size=budget)
    assert output.stat().st_size == report.bytes <= budget
    cheapest = min(
        (each.shape[0] + math.prod(each.shape[1:])) * 4
        for each in report.modules
        if each.rank < (each.before or 0)
    )
    # Some bytes more may be needed for padding and for digits of larger offsets.
    assert budget - report.bytes < cheapest + 16


def test_a_size_spends_ranks_where_they_keep_most(mixed, tmp_path):
    """The same greedy, written out: σ² per byte over all modules."""
    report = resize_file(mixed.path, tmp_path / "out.safetensors", size=30_000)
    ranks = ranks_of(report)
    sigma = spectra(mixed.deltas)
    cost = {key: delta.shape[0] + math.prod(delta.shape[1:]) for key, delta in mixed.deltas.items()}
    gains = {key: sigma[key] ** 2 / cost[key] for key in ranks}
    left = {key: own[ranks[key]] for key, own in gains.items() if ranks[key] < own.size}
    for key, gain in left.items():
        for other, rank in ranks.items():
            if rank > 1 and cost[other] >= cost[key]:
                assert gains[other][rank - 1] >= gain * (1 - 1e-9)


def test_the_smallest_possible_size_is_named(mixed, tmp_path):
    with pytest.raises(OptionError, match="does not hold rank 1 of all 12") as caught:
        resize_file(mixed.path, tmp_path / "out.safetensors", size="1kB")
    smallest = int("".join(char for char in caught.value.expected if char.isdigit()))
    report = resize_file(mixed.path, tmp_path / "out.safetensors", size=smallest)
    assert report.bytes <= smallest
    with pytest.raises(OptionError):
        resize_file(mixed.path, tmp_path / "no.safetensors", size=smallest - 1)
    assert not (tmp_path / "no.safetensors").exists()


def test_multiples_and_sizes_go_together(mixed, tmp_path):
    report = resize_file(mixed.path, tmp_path / "out.safetensors", size=34_000, multiple_of=2)
    assert report.bytes <= 34_000
    assert all(each.rank % 2 == 0 or each.rank == each.before for each in report.modules)


def zeroed(path, **tensors):
    """A file with some tensors replaced."""
    made = factories.kohya(path, "sd15", rank=4, only=["to_q", "to_k", "fc1"], dtype=torch.float16)
    changed = {
        key: next((change(tensor) for part, change in tensors.items() if part in key), tensor)
        for key, tensor in made.tensors.items()
    }
    factories.write_safetensors(path, changed, None)
    return made


def test_a_zero_module_becomes_rank_one_zero(tmp_path):
    zeroed(tmp_path / "in.safetensors", fc1=torch.zeros_like)
    for number, rule in enumerate(({"rank": 2}, {"energy": 0.9}, {"ratio": 0.5}, {"size": 20_000})):
        output = tmp_path / f"{number}.safetensors"
        report = resize_file(tmp_path / "in.safetensors", output, **rule)
        zero = next(each for each in report.modules if each.component == "text_encoder" and not each.norm)
        assert (zero.rank, zero.energy, zero.error) == (1, 1.0, 0.0)
        assert any("is zero throughout" in note for note in report.notes)
        tensors, _ = factories.read_safetensors(output)
        assert all(not any(data) for key, (_, _, data) in tensors.items() if "fc1.lora" in key)


def test_rank_deficient_factors_lose_nothing_but_their_rank(tmp_path):
    def twice(tensor):
        return torch.cat([tensor[:2], tensor[:2]]) if tensor.dim() else tensor

    zeroed(tmp_path / "in.safetensors", **{"to_k.lora_down": twice})
    result, report = resize(lt.load(tmp_path / "in.safetensors"), rank=4, dtype="float32")
    found = next(each for each in report.modules if "to_k" in each.target)
    assert (found.before, found.rank) == (4, 2)
    assert found.error < 1e-6
    assert len(result.modules) == len(report.modules)


@pytest.mark.parametrize("factor", [1e-3, 3e4])
def test_uneven_factors_are_balanced_and_never_infinite(tmp_path, factor):
    path = tmp_path / "in.safetensors"
    zeroed(path, lora_up=lambda t: (t.float() * factor).half(), alpha=lambda t: torch.full_like(t, 6e4))
    _, report = resize(lt.load(path), rank=2)
    for each in report.modules:
        # The error is truncation, and float16's rounding.
        assert abs(each.error**2 - (1 - each.energy)) < 1e-5
    tensors = resize(lt.load(path), rank=2)[0].modules.values()
    assert all(ref.load().isfinite().all() for module in tensors for ref in module.factors.values())


def test_what_does_not_fit_the_store_dtype_is_refused(tmp_path):
    made = factories.kohya(tmp_path / "in.safetensors", "sd15", only=["to_q"], alpha=1e13)
    with pytest.raises(NonFiniteError, match="--dtype float32"):
        resize(lt.load(made.path), rank=2, dtype="float16")


@pytest.mark.parametrize("rule", [{"rank": 2}, {"energy": 0.5}, {"size": 20_000}])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_a_number_is_refused_by_name(tmp_path, rule, value):
    def spoil(tensor):
        spoilt = tensor.clone()
        spoilt[0, 0] = value
        return spoilt

    zeroed(tmp_path / "in.safetensors", **{"to_k.lora_down": spoil, "fc1.lora_up": spoil})
    with pytest.raises(NonFiniteError, match="2 tensors with NaN or Inf") as caught:
        resize_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", **rule)
    assert sorted(key.rsplit(".", 2)[-2] for key in caught.value.keys) == ["lora_down", "lora_up"]
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"rank": 2, "energy": 0.9},
        {"rank": 0},
        {"energy": 1.5},
        {"rank": 2, "min_rank": 4, "max_rank": 2},
        {"rank": 2, "multiple_of": 0},
        {"rank": 2, "dtype": "float8"},
        {"rank": 2, "to_rank_of": "vlm"},
        {"size": 10**6, "to_rank_of": "vllm"},
        {"rank": 2, "conv_rank": 1, "to_rank_of": "vllm"},
        {"rank": 40, "max_rank": 4, "to_rank_of": "vllm"},
    ],
)
def test_requests_without_meaning_are_refused(mixed, given):
    with pytest.raises(OptionError):
        resize(lt.load(mixed.path), **given)


DEEP = (("model.layers.0.mlp.up_proj", (96, 100)), ("model.layers.0.self_attn.q_proj", (40, 44)))


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return factories.peft(
        tmp_path_factory.mktemp("deep") / "in", DEEP, rank=80, ranks={"model.layers.0.self_attn.q_proj": 3}
    )


@pytest.mark.parametrize(
    ("given", "rank", "more"),
    [
        ({"rank": 20, "to_rank_of": "vllm"}, 32, 0),
        ({"rank": 20, "to_rank_of": "sglang"}, 32, 0),
        ({"rank": 2, "to_rank_of": "punica"}, 16, 0),
        ({"to_rank_of": "vllm"}, 128, 0),
        ({"to_rank_of": "punica"}, 64, 1),
        ({"rank": 1000, "to_rank_of": "punica"}, 64, 1),
        ({"rank": 20, "max_rank": 24, "to_rank_of": "vllm"}, 16, 1),
    ],
)
def test_a_servers_rank_is_one_for_all_modules(deep, tmp_path, given, rank, more):
    """vLLM reads one rank from the configuration; Punica's kernels know three."""
    report = resize_file(deep.path, tmp_path / "out", **given)
    found = lt.load(tmp_path / "out")
    assert {module.rank for module in found.modules.values()} == {rank}
    assert (found.config["r"], found.config["rank_pattern"]) == (rank, {})
    assert {module.scale for module in found.modules.values()} == {1.0}
    wanted = {key: nearest(delta, rank) for key, delta in deep.deltas.items()}
    factories.assert_close(factories.deltas_of(found), wanted, 1e-5)
    said = [note for note in report.notes if "that is allowed" in note]
    assert len(said) == more


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr_full"])
def test_other_kinds_become_lora_of_the_rank(tmp_path, kind):
    """sd-scripts copies them, and claims that they were resized."""
    made = factories.kohya(tmp_path / "in.safetensors", "sd15", kind=kind, rank=3)
    before = factories.deltas_of(lt.load(made.path))
    resize_file(made.path, tmp_path / "out.safetensors", rank=2)
    found = lt.load(tmp_path / "out.safetensors")
    assert found.kinds == {"lora": len(before)}
    flat = {key: delta.reshape(len(delta), -1) for key, delta in factories.deltas_of(found).items()}
    wanted = {key: nearest(delta.reshape(len(delta), -1), 2) for key, delta in before.items()}
    factories.assert_close(flat, wanted, 1e-5)


def test_full_differences_and_norms_are_carried(tmp_path):
    name = "lora_unet_down_blocks_0_attentions_0_norm"
    extra = {f"{name}.diff": torch.ones(12), f"{name}.diff_b": torch.ones(12)}
    full = {"lora_unet_mid_block_attentions_0_proj_in.diff": torch.ones(14, 14)}
    path = tmp_path / "in.safetensors"
    factories.kohya(path, "sd15", only=["to_q", "to_k", "fc1"], extra=extra | full)
    report = resize_file(path, tmp_path / "out.safetensors", rank=2)
    after, _ = factories.read_safetensors(tmp_path / "out.safetensors")
    before, _ = factories.read_safetensors(path)
    for key in (*extra, *full):
        assert after[key] == before[key]
    assert any("1 modules are full differences" in note for note in report.notes)


def test_nothing_to_cut_is_refused(tmp_path):
    made = factories.kohya(tmp_path / "in.safetensors", "sd15", kind="full")
    with pytest.raises(OptionError, match=r"no module has a rank to be cut.*convert --as lora"):
        resize(lt.load(made.path), rank=2)


@pytest.mark.parametrize("slots", [{}, {"config": {"use_rslora": True}}])
def test_peft_folders_keep_extras_biases_and_embeddings(tmp_path, slots):
    extra = {"base_model.model.lm_head.weight": torch.arange(80.0).reshape(5, 16)}
    made = factories.peft(
        tmp_path / "in", rank=8, alpha=16, embedding=True, lora_bias=True, extra=extra, **slots
    )
    report = resize_file(made.path, tmp_path / "out", rank=3)
    before, found = lt.load(made.path), lt.load(tmp_path / "out")
    wanted = {key: nearest(delta, 3) for key, delta in made.deltas.items()}
    factories.assert_close(factories.deltas_of(found), wanted, 1e-5)
    assert (found.config["r"], found.config.get("use_rslora", False)) == (3, False)
    assert list(found.extras) == list(report.carried) == list(extra)
    for target, module in before.modules.items():
        if "up_bias" in module.factors:
            bias = module.scale * f64(module.factors["up_bias"])
            after = found.modules[target]
            np.testing.assert_allclose(after.scale * f64(after.factors["up_bias"]), bias, rtol=1e-6)


def f64(ref):
    return ref.load().double().numpy()


def test_a_peft_folders_size_counts_its_configuration(tmp_path):
    made = factories.peft(tmp_path / "in", rank=8)
    report = resize_file(made.path, tmp_path / "out", size=5_500)
    written = sum(each.stat().st_size for each in (tmp_path / "out").iterdir())
    assert written == report.bytes <= 5_500
    assert len({each.rank for each in report.modules}) > 1


def test_fused_weights_are_cut_after_they_are_fused(tmp_path):
    made = factories.diffusers(tmp_path / "in.safetensors", "flux", rank=4)
    before = factories.whole(lt.load(made.path))
    report = resize_file(made.path, tmp_path / "out.safetensors", layout="kohya", rank=4)
    found = lt.load(tmp_path / "out.safetensors")
    assert {each.rank for each in report.modules} == {4}
    assert report.layout == "kohya"
    factories.assert_close(
        factories.whole(found), {key: nearest(delta, 4) for key, delta in before.items()}, 1e-5
    )


def test_other_kinds_reach_another_layout(tmp_path):
    made = factories.kohya(
        tmp_path / "in.safetensors", "sd15", kind="lokr", rank=2, only=["to_q", "to_v", "fc1"]
    )
    before = factories.deltas_of(lt.load(made.path))
    resize_file(made.path, tmp_path / "out.safetensors", layout="diffusers", rank=2)
    found = lt.load(tmp_path / "out.safetensors")
    assert found.layout.name == "diffusers"
    factories.assert_close(
        factories.deltas_of(found), {key: nearest(delta, 2) for key, delta in before.items()}, 1e-5
    )
    with pytest.raises(OptionError, match="convert --as lora"):
        resize(lt.load(made.path), layout="diffusers", size="20kB")


def test_a_layout_that_cannot_hold_it_is_refused(tmp_path, mixed):
    with pytest.raises(LayoutError, match="more than one component"):
        resize_file(mixed.path, tmp_path / "out", layout="peft", rank=2)


def test_the_dtype_is_kept_or_changed(tmp_path):
    made = factories.kohya(tmp_path / "in.safetensors", "sd15", dtype=torch.bfloat16)
    kept, _ = resize(lt.load(made.path), rank=2)
    assert {ref.dtype for m in kept.modules.values() for ref in m.factors.values()} == {"BF16"}
    wide, report = resize(lt.load(made.path), rank=4, dtype="float32")
    assert set(report.dtypes) == {"F32"}
    factories.assert_close(factories.deltas_of(wide), made.deltas, 1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_error_counts_rounding(tmp_path, dtype):
    made = factories.kohya(tmp_path / "in.safetensors", "sd15", rank=6)
    result, report = resize(lt.load(made.path), rank=6, dtype=dtype)
    found = factories.deltas_of(result)
    for each in report.modules:
        key = factories.key_of(each.component, each.target)
        true = np.linalg.norm(found[key] - made.deltas[key]) / np.linalg.norm(made.deltas[key])
        assert 1e-4 < true < 1e-2
        assert abs(each.error - true) <= 0.02 * true


def test_a_dry_run_tells_what_would_be_written(mixed, tmp_path):
    wet = resize_file(mixed.path, tmp_path / "wet.safetensors", energy=0.9)
    dry = resize_file(mixed.path, tmp_path / "dry.safetensors", energy=0.9, dry_run=True)
    assert not (tmp_path / "dry.safetensors").exists()
    assert (dry.bytes, dry.modules, dry.curves) == (wet.bytes, wet.modules, wet.curves)
    assert dry.bytes_before == mixed.path.stat().st_size
    assert dry.estimate is not None
    assert dry.estimate.written == dry.bytes
    assert dry.estimate.seconds >= dry.estimate.sequential > 0.0


def test_threads_do_not_change_the_result(mixed, tmp_path):
    for threads in (1, 3):
        resize_file(mixed.path, tmp_path / f"{threads}.safetensors", energy=0.9, threads=threads)
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "3.safetensors").read_bytes()


def test_curves_are_the_energy_of_every_rank(mixed):
    _, report = resize(lt.load(mixed.path), rank=1)
    sigma = [own for key, own in spectra(mixed.deltas).items() if key.startswith("denoiser/")]
    for rank, share in report.curves["denoiser"].items():
        kept = sum((own[:rank] ** 2).sum() for own in sigma) / sum((own**2).sum() for own in sigma)
        assert abs(share - kept) < 1e-9
    assert max(report.curves["denoiser"].values()) == 1.0


def test_dora_is_refused_without_its_base(tmp_path):
    made = factories.kohya(tmp_path / "in.safetensors", "sd15", dora="out", only=["to_q", "to_k", "fc1"])
    with pytest.raises(UnsupportedKindError, match=r"are DoRA.*--base") as caught:
        resize(lt.load(made.path), rank=2)
    assert len(caught.value.keys) == len(made.deltas)
