"""Verifying whole checkpoints: a bake is found in any container, and whatever else was done is found out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import factories
import pytest
import torch
from safetensors.torch import load, load_file

from loratools.errors import ArchitectureError, OptionError
from loratools.ops.bake import bake
from loratools.ops.verify import verify
from tests.ops import sd15_checkpoints

TO_K = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
ORACLE = Path(__file__).resolve().parents[2] / ".." / "shared" / "oracle"
CASES = [case for name in ("peft_bake*", "diffusers_*", "kohya__*") for case in sorted(ORACLE.glob(name))]
VAE = "first_stage_model.decoder.conv_in.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, two adapters, and the tensors of the base with both in it at 0.8 and −0.5, in float64."""
    folder = tmp_path_factory.mktemp("verify")
    tensors = sd15_checkpoints.tensors()
    adapters = [factories.kohya(folder / f"{seed}.safetensors", "sd15", seed=seed) for seed in range(2)]
    target = {key: tensor.double() for key, tensor in tensors.items()}
    for strength, adapter in zip((0.8, -0.5), adapters, strict=True):
        for name, delta in adapter.deltas.items():
            path = name.partition("/")[2]
            key = next(key for key in tensors if key.endswith(f".{path}.weight"))
            target[key] = target[key] + strength * torch.from_numpy(delta).reshape(target[key].shape)
    base = sd15_checkpoints.safetensors(folder / "base.safetensors", tensors)
    return base, [adapter.path for adapter in adapters], target, tensors


def check(made, baked, **options):
    return verify(made[0], made[1], baked, weights=[0.8, -0.5], **options)


def stored(made, dtype=torch.float16):
    return {key: tensor.to(dtype) for key, tensor in made[2].items()}


def verdicts(report):
    return {tensor.key: tensor.verdict for tensor in report.tensors if tensor.verdict != "baked"}


@pytest.mark.parametrize(
    "write", [sd15_checkpoints.safetensors, sd15_checkpoints.pickle, sd15_checkpoints.sharded]
)
def test_a_result_computed_by_hand_is_baked_in_any_container(made, tmp_path, write):
    report = check(made, write(tmp_path / "baked", stored(made)))
    assert report.ok, verdicts(report)
    assert len(report.tensors) == len(made[2]) - 1
    assert report.untouched == 1
    assert report.arch == "sd15"
    assert report.kept == pytest.approx(1.0, abs=1e-3)
    assert report.error == pytest.approx(
        math.hypot(*(tensor.rounding * tensor.norm for tensor in report.tensors))
        / math.hypot(*(tensor.norm for tensor in report.tensors))
    )


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("dtype", ["keep", "float32", "bfloat16"])
def test_what_the_baker_makes_is_baked(made, tmp_path, rounding, dtype):
    out = tmp_path / "out.safetensors"
    bake(made[0], made[1], out, weights=[0.8, -0.5], rounding=rounding, dtype=dtype)
    report = check(made, out)
    assert report.ok, verdicts(report)
    assert report.untouched == 1


def test_the_norm_is_that_of_the_expected_change(made, tmp_path):
    report = check(made, sd15_checkpoints.safetensors(tmp_path / "baked", stored(made)))
    norms = {tensor.key: tensor.norm for tensor in report.tensors}
    expected = {key: float((made[2][key] - made[3][key].double()).norm()) for key in norms}
    assert norms == pytest.approx(expected, rel=1e-5)


def test_the_base_itself_is_not_baked(made):
    report = check(made, made[0])
    assert not report.ok
    assert {tensor.verdict for tensor in report.tensors} == {"not baked"}
    assert report.kept == 0.0
    assert report.error == pytest.approx(1.0)


def test_nothing_but_lost_changes_is_not_a_bake(made, tmp_path):
    tiny = sd15_checkpoints.safetensors(
        tmp_path / "flat.safetensors", {key: torch.full_like(tensor, 0.05) for key, tensor in made[3].items()}
    )
    adapter = made[1][:1]
    assert not verify(tiny, adapter, tiny, weights=[1e-9]).ok


def test_another_strength_is_told(made, tmp_path):
    half = {key: (made[3][key].double() + tensor).div(2).to(torch.float16) for key, tensor in made[2].items()}
    report = check(made, sd15_checkpoints.safetensors(tmp_path / "baked", half))
    assert not report.ok
    assert {tensor.verdict for tensor in report.tensors} == {"partly"}
    assert all(tensor.strength == pytest.approx(0.5, abs=0.01) for tensor in report.tensors)
    assert any("at 0.5 times the strength" in note for note in report.notes)


def test_single_faults_are_found(made, tmp_path):
    tensors = stored(made)
    keys = [key for key in tensors if key not in (TO_K, VAE)]
    faults = {keys[0]: "not baked", keys[1]: "wrong", keys[2]: "absent", keys[3]: "wrong", VAE: "unexpected"}
    tensors[keys[0]] = made[3][keys[0]]
    tensors[keys[1]] = -tensors[keys[1]]
    del tensors[keys[2]]
    tensors[keys[3]] = tensors[keys[3]].flatten()
    tensors[VAE] = tensors[VAE].clone()
    tensors[VAE][0, 0, 0, 0] += 0.001
    tensors["stranger"] = torch.ones(2)
    report = check(made, sd15_checkpoints.safetensors(tmp_path / "baked", tensors))
    assert verdicts(report) == {**faults, "stranger": "unexpected"}
    assert not report.ok
    assert report.untouched == 0


def test_nan_is_wrong_and_said(made, tmp_path):
    tensors = stored(made)
    tensors[TO_K] = tensors[TO_K].clone()
    tensors[TO_K][0, 0] = math.nan
    report = check(made, sd15_checkpoints.safetensors(tmp_path / "baked", tensors))
    assert verdicts(report) == {TO_K: "wrong"}
    assert any("NaN" in note for note in report.notes)


def test_only_the_chosen_components_are_expected(made, tmp_path):
    tensors = stored(made) | {
        key: tensor for key, tensor in made[3].items() if not key.startswith("model.diffusion_model.")
    }
    path = sd15_checkpoints.safetensors(tmp_path / "baked", tensors)
    assert check(made, path, components=["denoiser"]).ok
    assert set(verdicts(check(made, path)).values()) == {"not baked"}
    other = check(made, path, components=["text_encoder"])
    assert {"unexpected", "not baked"} == set(verdicts(other).values())


def test_another_model_is_refused(made, tmp_path):
    with pytest.raises(ArchitectureError, match="none of the"):
        check(made, sd15_checkpoints.safetensors(tmp_path / "other", {"a.weight": torch.ones(2, 2)}))


@pytest.mark.parametrize("weights", [[1.0], [1.0, math.nan], []])
def test_weights_have_to_fit_the_adapters(made, weights):
    with pytest.raises(OptionError):
        verify(made[0], made[1], made[0], weights=weights)


def test_progress_counts_all_bytes(made, tmp_path):
    told = []
    check(made, made[0], progress=lambda *each: told.append(each))
    assert len(told) == len(made[3])
    assert told[-1][1] == told[-1][2] == sum(tensor.nbytes for tensor in made[3].values())
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_threads_make_no_difference(made, tmp_path):
    path = sd15_checkpoints.safetensors(tmp_path / "baked", stored(made))
    assert check(made, path, threads=1) == check(made, path, threads=3)


def quantised(tensors):
    """The same in float8 with a scale beside each weight, as ComfyUI stores them; the last stays as it is."""
    found = {}
    for key, tensor in tensors.items():
        if key == VAE:
            found[key] = tensor
            continue
        scale = tensor.float().abs().max() / 400
        found[key] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        found[key.removesuffix("weight") + "scale_weight"] = scale
    return found


@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
def test_float8_with_scales_is_baked(made, tmp_path, rounding, dtype):
    base = sd15_checkpoints.safetensors(tmp_path / "base.safetensors", quantised(made[3]))
    out = tmp_path / "out.safetensors"
    bake(base, made[1], out, rounding=rounding, dtype=dtype)
    report = verify(base, made[1], out)
    assert report.ok, (verdicts(report), report.notes)
    assert len(report.tensors) == len(made[3]) - 1
    assert {tensor.dtype for tensor in report.tensors} == {"F8_E4M3" if dtype == "keep" else "BF16"}
    assert not verify(base, made[1], base).ok


def test_untouched_float8_may_be_stored_as_plain_numbers(made, tmp_path):
    base = sd15_checkpoints.safetensors(tmp_path / "base.safetensors", quantised(made[3]))
    out = tmp_path / "out.safetensors"
    bake(base, made[1], out, dtype="bfloat16", components=["text_encoder"])
    report = verify(base, made[1], out, components=["text_encoder"])
    assert report.ok, (verdicts(report), report.notes)
    assert report.untouched == len(made[3]) - 2


def test_a_wrong_scale_is_found(made, tmp_path):
    tensors = quantised(made[3])
    base = sd15_checkpoints.safetensors(tmp_path / "base.safetensors", tensors)
    out = tmp_path / "out.safetensors"
    bake(base, made[1], out)
    baked = load_file(out)
    baked[TO_K.removesuffix("weight") + "scale_weight"] *= 1.5
    report = verify(base, made[1], sd15_checkpoints.safetensors(tmp_path / "bad.safetensors", baked))
    assert set(verdicts(report)) == {TO_K}


def llama(folder, draw):
    """A sharded model with tied embeddings, and its tensors."""
    shapes = {
        "model.embed_tokens.weight": (40, 16),
        "model.layers.0.self_attn.q_proj.weight": (16, 16),
        "model.layers.0.input_layernorm.weight": (16,),
    }
    state = {key: torch.randn(shape, generator=draw) for key, shape in shapes.items()}
    model = sd15_checkpoints.sharded(folder / "model", state)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    (model / "config.json").write_text(json.dumps(config))
    return model, state


def test_an_untied_embedding_is_verified(tmp_path):
    draw = torch.Generator().manual_seed(0)
    model, state = llama(tmp_path, draw)
    whole = {"base_model.model.model.embed_tokens.weight": torch.randn(40, 16, generator=draw)}
    adapter = tmp_path / "replaced"
    adapter.mkdir()
    q_proj = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    factors = {
        q_proj.format("A"): torch.randn(2, 16, generator=draw),
        q_proj.format("B"): torch.randn(16, 2, generator=draw),
    }
    factories.write_safetensors(adapter / "adapter_model.safetensors", whole | factors, None)
    config = factories.lora_config(2, 2.0, ["q_proj"], modules_to_save=["embed_tokens"])
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    bake(model, [adapter], out)
    report = verify(model, [adapter], out)
    assert report.ok, (verdicts(report), report.notes)
    # Read whole, since the files are written again below.
    shards = {path.name: load(path.read_bytes()) for path in out.glob("*.safetensors")}
    name = next(name for name, own in shards.items() if "lm_head.weight" in own)
    assert torch.equal(shards[name]["lm_head.weight"], state["model.embed_tokens.weight"])
    shards[name]["lm_head.weight"] = whole["base_model.model.model.embed_tokens.weight"]
    factories.write_safetensors(out / name, shards[name], None)
    assert verdicts(verify(model, [adapter], out)) == {"lm_head.weight": "unexpected"}
    index = out / "model.safetensors.index.json"
    del shards[name]["lm_head.weight"]
    factories.write_safetensors(out / name, shards[name], None)
    said = json.loads(index.read_text())
    del said["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(said))
    assert verdicts(verify(model, [adapter], out)) == {"lm_head.weight": "absent"}


@pytest.mark.skipif(not CASES, reason="the reference results are not beside the repository")
@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_what_other_tools_have_baked_is_found(case):
    said = json.loads((case / "manifest.json").read_text("utf-8"))
    base = case / said["inputs"]["base"]["path"]
    adapters = [case / each["path"] for role, each in sorted(said["inputs"].items()) if role != "base"]
    role = next(role for role in ("fused_true", "merged", "fused") if role in said["expected"])
    report = verify(base, adapters, case / said["expected"][role]["path"])
    assert report.ok, verdicts(report)
    assert not verify(base, adapters, base).ok
