"""Resizes that look at a base model: kinds whose ΔW depends on it, and scores against its weights."""

from __future__ import annotations

import math

import factories
import numpy as np
import pytest
import torch

import loratools as lt
from loratools.errors import LoraError, OptionError
from loratools.ops import files
from loratools.ops.resize import resize, resize_file

SCALES = {"model.layers.0.self_attn.q_proj": 10.0, "model.layers.1.self_attn.v_proj": 0.1}


@pytest.fixture(scope="module")
def weights():
    """The base's weights: two of them much larger or smaller than the others."""
    rng = np.random.default_rng(7)
    return {path: SCALES.get(path, 1.0) * rng.standard_normal(shape) for path, shape in factories.LLAMA}


@pytest.fixture(scope="module")
def base(tmp_path_factory, weights):
    path = tmp_path_factory.mktemp("base") / "model.safetensors"
    tensors = {f"{name}.weight": torch.from_numpy(array).float() for name, array in weights.items()}
    factories.write_safetensors(path, tensors, None)
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return factories.peft(tmp_path_factory.mktemp("plain") / "in", rank=6)


def short(key):
    return key.split("/", 1)[1]


def ranks_of(report):
    return {each.target: each.rank for each in report.modules}


def scores(plain, weights, norm):
    """σ / ‖W‖ of every direction, by numpy from dense matrices."""
    order = None if norm == "frobenius" else 2
    return {
        short(key): np.linalg.svd(delta, compute_uv=False)[:6]
        / np.linalg.norm(np.float32(weights[short(key)]).astype(np.float64), order)
        for key, delta in plain.deltas.items()
    }


def test_dora_becomes_the_nearest_lora_of_what_it_does(tmp_path, base, weights):
    made = factories.peft(tmp_path / "in", rank=3, dora=True)
    true = {}
    for key, delta in made.deltas.items():
        weight = np.float32(weights[short(key)]).astype(np.float64)
        magnitude = factories.f64(made.tensors[f"base_model.model.{short(key)}.lora_magnitude_vector"])
        changed = weight + delta
        scale = magnitude / np.linalg.norm(changed, axis=1)
        true[key] = scale[:, None] * changed - weight
    for rank in (2, 8):
        report = resize_file(made.path, tmp_path / str(rank), rank=rank, base=base)
        found = factories.deltas_of(lt.load(tmp_path / str(rank)))
        for each in report.modules:
            key = factories.key_of(each.component, each.target)
            u, sigma, vh = np.linalg.svd(true[key], full_matrices=False)
            best = (u[:, :rank] * sigma[:rank]) @ vh[:rank]
            np.testing.assert_allclose(found[key], best, atol=2e-5 * sigma[0])
            assert each.kind == "dora"
            lost = np.sqrt((sigma[rank:] ** 2).sum() / (sigma**2).sum())
            assert abs(each.error - lost) < 1e-6
    assert not lt.load(tmp_path / "2").config.get("use_dora")


@pytest.mark.parametrize("rule", [{"energy": 0.8}, {"energy": 0.8, "max_rank": 2}, {"size": 4_000}])
def test_dora_takes_every_rule(tmp_path, base, rule):
    made = factories.peft(tmp_path / "in", rank=3, dora=True)
    report = resize_file(made.path, tmp_path / "out", base=base, **rule)
    adapter = lt.load(made.path)
    found = lt.load(tmp_path / "out")
    tensors, _ = factories.read_safetensors(base)
    for target, module in adapter.modules.items():
        _, shape, data = tensors[f"{target.path}.weight"]
        weight = torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(shape)
        true = module.delta(weight).double()
        lost = float((found.modules[target].delta().double() - true).norm() / true.norm())
        each = next(each for each in report.modules if each.target == target.path)
        assert abs(each.error - lost) < 1e-5
        assert abs(each.energy - (1 - lost**2)) < 1e-5
    if "size" in rule:
        assert report.bytes <= rule["size"]


def test_scores_decide_between_modules(plain, base, weights):
    """Large weights hide what is added to them: their modules get fewer ranks of one size."""
    adapter = lt.load(plain.path)
    _, alone = resize(adapter, size=4_500)
    _, scored = resize(adapter, size=4_500, against=base)
    loud, quiet = SCALES
    assert ranks_of(scored)[loud] == 1 < ranks_of(alone)[loud]
    assert ranks_of(scored)[quiet] >= ranks_of(alone)[quiet]
    for each in scored.modules:
        norm = np.linalg.norm(weights[each.target])
        assert math.isclose(each.weight_norm, norm, rel_tol=1e-6)


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_a_ratio_is_of_the_weights_norm(plain, base, weights, norm):
    found = scores(plain, weights, norm)
    share = float(np.median(np.concatenate(list(found.values()))))
    _, report = resize(lt.load(plain.path), ratio=share, against=base, against_norm=norm)
    # The spectral norm is found to a thousandth.
    for target, rank in ranks_of(report).items():
        low, high = (max(1, np.count_nonzero(found[target] > share * f)) for f in (1.002, 0.998))
        assert low <= rank <= high
    assert len(set(ranks_of(report).values())) > 1


@pytest.mark.parametrize(("rule", "value"), [("energy", 0.9), ("energy", 0.99), ("error", 0.2)])
def test_the_fewest_directions_of_all_modules_together(plain, base, weights, rule, value):
    squares = {target: own**2 for target, own in scores(plain, weights, "frobenius").items()}
    flat = np.sort(np.concatenate(list(squares.values())))[::-1]
    share = value if rule == "energy" else 1 - value**2
    least = len(squares)
    _, report = resize(lt.load(plain.path), against=base, **{rule: value})
    ranks = ranks_of(report)
    kept = sum(squares[target][:rank].sum() for target, rank in ranks.items())
    assert kept >= share * flat.sum() * (1 - 1e-12)
    # One fewer misses it: the smallest that was taken beyond the first of each module.
    extra = [squares[target][rank - 1] for target, rank in ranks.items() if rank > 1]
    assert extra
    assert kept - min(extra) < share * flat.sum()
    assert sum(ranks.values()) >= least


def test_a_zero_weight_counts_as_one_of_norm_one(tmp_path, plain):
    path = tmp_path / "zero.safetensors"
    tensors = {f"{name}.weight": torch.zeros(shape) for name, shape in factories.LLAMA}
    factories.write_safetensors(path, tensors, None)
    _, scored = resize(lt.load(plain.path), size=4_500, against=path)
    _, alone = resize(lt.load(plain.path), size=4_500)
    assert ranks_of(scored).keys() == ranks_of(alone).keys()
    assert abs(scored.energy - alone.energy) < 0.02


@pytest.mark.parametrize(
    "given", [{"rank": 2}, {"to_rank_of": "vllm"}, {"size": 8_000, "against_norm": "nuclear"}]
)
def test_scores_without_a_use_are_refused(plain, base, given):
    with pytest.raises(OptionError, match=r"score"):
        resize(lt.load(plain.path), against=base, **given)


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    """A checkpoint with the weights that the factories' adapters change."""
    rng = np.random.default_rng(3)
    prefixes = {"denoiser": "model.diffusion_model.", "text_encoder": "cond_stage_model.transformer."}
    tensors = {
        f"{prefixes[each.component]}{each.target}.weight": torch.from_numpy(
            rng.normal(size=each.shape)
        ).float()
        for each in factories.SD15
    }
    path = tmp_path_factory.mktemp("sd15") / "model.safetensors"
    factories.write_safetensors(path, tensors, None)
    return path, {key.split(".", 2)[2].removesuffix(".weight"): value for key, value in tensors.items()}


@pytest.mark.parametrize("kind", ["loha", "lokr_full", "glora", "oft", "ia3"])
def test_kinds_that_need_the_base_become_lora(tmp_path, sd15, kind):
    path, held = sd15
    # LyCORIS makes no GLoRA of the factories' shapes for convolutions.
    linear = ["to_", "fc1", "q_proj", "ff"] if kind == "glora" else None
    made = factories.kohya(tmp_path / "in.safetensors", "sd15", kind=kind, rank=2, only=linear)
    resize_file(made.path, tmp_path / "out.safetensors", rank=3, base=path, arch="sd15")
    found = lt.load(tmp_path / "out.safetensors", arch="sd15")
    assert found.kinds == {"lora": len(found.modules)}
    assert linear or len(found.modules) == len(factories.SD15)
    before = {
        target.path: module for target, module in files.bakeable(made.path, arch="sd15").modules.items()
    }
    for target, module in found.modules.items():
        weight = held[target.path]
        # The base tells the kernel that flattened factors do not.
        assert module.shape == tuple(weight.shape)
        true = before[target.path].delta(weight).double().flatten(1).numpy()
        u, sigma, vh = np.linalg.svd(true, full_matrices=False)
        best = (u[:, :3] * sigma[:3]) @ vh[:3]
        after = module.delta().double().flatten(1).numpy()
        np.testing.assert_allclose(after, best, atol=2e-5 * sigma[0])


def test_a_base_that_lacks_the_weights_is_refused(tmp_path, plain):
    path = tmp_path / "other.safetensors"
    factories.write_safetensors(path, {"encoder.weight": torch.zeros(4, 4)}, None)
    for option in ("against", "base"):
        with pytest.raises(LoraError):
            resize_file(plain.path, tmp_path / "out", size=4_500, **{option: path})
    assert not (tmp_path / "out").exists()
