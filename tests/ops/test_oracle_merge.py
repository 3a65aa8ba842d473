"""PEFT's merges as a reference: the weighted sum where its combination is one; what is right where it is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import loratools as lt
from loratools.errors import LoraError
from loratools.ops.merge import merge_files

ORACLE = Path(__file__).resolve().parents[2] / ".." / "shared" / "oracle"
pytestmark = pytest.mark.skipif(
    not ORACLE.is_dir(), reason="the reference results are not beside the repository"
)

SUMS = ("linear", "cat", "svd")
REFUSED = {"peft_merge__dora_cat": "DoRA", "peft_merge__modules_to_save_both": "lm_head"}


def manifest(case: str) -> dict[str, Any]:
    return json.loads((ORACLE / case / "manifest.json").read_text("utf-8"))


CASES = sorted(path.name for path in ORACLE.glob("peft_merge__*")) if ORACLE.is_dir() else []
EXACT = [
    case for case in CASES if manifest(case)["params"]["combination_type"] in SUMS and case not in REFUSED
]
OTHERS = [case for case in CASES if case not in EXACT and case not in REFUSED]


def inputs(case: str) -> list[Path]:
    stated = manifest(case)["inputs"]
    return [ORACLE / case / stated[name]["path"] for name in sorted(stated) if name.startswith("adapter")]


def merged(case: str, folder: Path, **options: Any) -> lt.Adapter:
    """Merged as the manifest says, written to a PEFT folder, and read again."""
    merge_files(inputs(case), folder, weights=manifest(case)["params"]["weights"], **options)
    return lt.load(folder)


def deltas(adapter: lt.Adapter) -> dict[str, np.ndarray]:
    """ΔW by path as the base stores the weight: an embedding is (tokens, width)."""
    found = {}
    for target, module in adapter.modules.items():
        delta = module.delta().double().numpy()
        found[target.path] = delta.T if module.op == "embedding" else delta
    return found


def assert_equal(case: str, found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    compare = manifest(case)["compare"]
    assert set(found) == set(expected)
    for key, want in expected.items():
        np.testing.assert_allclose(found[key], want, rtol=compare["rtol"], atol=compare["atol"], err_msg=key)


def nearest(dense: np.ndarray, rank: int) -> np.ndarray:
    flat = dense.reshape(dense.shape[0], -1).astype(np.float64)
    u, sigma, vh = np.linalg.svd(flat, full_matrices=False)
    return ((u[:, :rank] * sigma[:rank]) @ vh[:rank]).reshape(dense.shape)


def exact_sum(case: str) -> dict[str, np.ndarray]:
    return load_file(ORACLE / case / "expected" / "exact_sum.safetensors")


# bfloat16 and float16 inputs are compared in the dtype PEFT stored its own results in.
DTYPE = {"dtype": "float32"}


@pytest.mark.parametrize("method", ["linear", "concat"])
@pytest.mark.parametrize("case", EXACT)
def test_without_a_rank_the_merge_is_the_exact_sum(case: str, method: str, tmp_path: Path) -> None:
    adapter = merged(case, tmp_path / "m", method=method, **DTYPE)
    assert_equal(case, deltas(adapter), exact_sum(case))


@pytest.mark.parametrize("case", [case for case in EXACT if "svd_rank" in manifest(case)["params"]])
def test_with_a_rank_it_is_the_nearest_of_that_rank(case: str, tmp_path: Path) -> None:
    params = manifest(case)["params"]
    found = deltas(merged(case, tmp_path / "m", rank=params["svd_rank"], **DTYPE))
    assert_equal(
        case, found, {key: nearest(dense, params["svd_rank"]) for key, dense in exact_sum(case).items()}
    )
    if "svd_clamp" not in params:
        peft = load_file(ORACLE / case / "expected" / "delta.safetensors")
        assert_equal(case, found, peft)


@pytest.mark.parametrize("case", OTHERS)
def test_inputs_of_pefts_other_combinations_are_summed_too(case: str, tmp_path: Path) -> None:
    """What PEFT does to the factors there is another operation; the inputs and their exact sum hold all the same."""
    assert_equal(case, deltas(merged(case, tmp_path / "m", **DTYPE)), exact_sum(case))


@pytest.mark.parametrize("case", OTHERS)
def test_ties_of_them_is_lossless_enough_at_full_density(case: str, tmp_path: Path) -> None:
    """At density 1 with equal inputs every sign agrees: the mean of one adapter with itself is the adapter."""
    path = inputs(case)[0]
    merge_files([path, path], tmp_path / "m", method="ties", density=1.0, **DTYPE)
    assert_equal(case, deltas(lt.load(tmp_path / "m")), deltas(lt.load(path)))


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused_with_its_cause(case: str, tmp_path: Path) -> None:
    with pytest.raises(LoraError, match=REFUSED[case]):
        merged(case, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_lora_biases_are_summed(tmp_path: Path) -> None:
    case = "peft_merge__lora_bias_cat"
    params = manifest(case)["params"]
    adapter = merged(case, tmp_path / "m")
    assert len(adapter.modules) == 4
    sources = [load_file(path / "adapter_model.safetensors") for path in inputs(case)]
    for target, module in adapter.modules.items():
        want = sum(
            weight
            * params[f"adapter{number}_scaling"][target.path]
            * source[f"base_model.model.{target.path}.lora_B.bias"].astype(np.float64)
            for number, (weight, source) in enumerate(zip(params["weights"], sources, strict=True))
        )
        found = module.factors["up_bias"].numpy().astype(np.float64) * module.scale
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-6)


def test_a_module_saved_whole_by_one_input_is_carried(tmp_path: Path) -> None:
    case = "peft_merge__modules_to_save_one"
    adapter = merged(case, tmp_path / "m")
    source = lt.load(inputs(case)[0])
    assert list(adapter.extras) == list(source.extras) == ["base_model.model.lm_head.weight"]
    for key, ref in source.extras.items():
        assert bytes(adapter.extras[key].raw()) == bytes(ref.raw())
    assert adapter.config["modules_to_save"] == ["lm_head"]


def test_every_case_of_the_family_is_checked() -> None:
    assert set(EXACT) | set(OTHERS) | set(REFUSED) == {path.name for path in ORACLE.glob("peft_merge__*")}
    assert len(EXACT) >= 15


def _applied_by_peft(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """What PEFT adds to a tiny Llama, by path."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    width = shapes["model.layers.0.self_attn.q_proj"][1]
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=shapes.get("model.layers.0.mlp.down_proj", (0, 48))[1],
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4 * shapes.get("model.layers.0.self_attn.v_proj", (width,))[0] // width,
        vocab_size=shapes.get("model.embed_tokens", (56,))[0],
    )
    loaded = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM(config), folder)
    return {
        name: layer.get_delta_weight("default").detach().double().numpy()
        for name, layer in loaded.base_model.model.named_modules()
        if hasattr(layer, "get_delta_weight") and "default" in getattr(layer, "scaling", {})
    }


@pytest.mark.peers
@pytest.mark.parametrize(
    "case",
    [
        "peft_merge__cat_2",
        "peft_merge__rslora_plain_svd",
        "peft_merge__regex_targets",
        "peft_merge__embedding_svd",
    ],
)
def test_peft_applies_what_we_merged(case: str, tmp_path: Path) -> None:
    expected = exact_sum(case)
    merged(case, tmp_path / "m", **DTYPE)
    assert_equal(
        case,
        _applied_by_peft(tmp_path / "m", {key: dense.shape for key, dense in expected.items()}),
        expected,
    )
