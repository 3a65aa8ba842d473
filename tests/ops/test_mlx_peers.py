"""mlx-lm itself: a converted adapter of PEFT's gives PEFT's logits there, and one trained there its own in PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import factories as make
import numpy as np
import pytest
import torch

from loratools.ops.convert import convert_file

pytestmark = pytest.mark.peers
mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TOKENS = [[3, 17, 5, 40, 2, 9]]
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "o_proj"],
        "use_rslora": True,
        "rank_pattern": {"k_proj": 2, "layers.1.self_attn.q_proj": 7},
        "alpha_pattern": {"o_proj": 3},
    },
    "last layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
    "dora": {"target_modules": ["q_proj", "gate_proj"], "use_dora": True},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("mlx") / "base"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def model_of(base: Path) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = model(torch.tensor(TOKENS)).logits.double().numpy()
    return found


def mlx_model(base: Path) -> Any:
    from mlx_lm.utils import load_model

    return load_model(base)[0]


def mlx_logits(base: Path, adapter: Path) -> np.ndarray:
    from mlx_lm.tuner.utils import load_adapters

    model = load_adapters(mlx_model(base), str(adapter))
    model.eval()
    return np.array(model(mx.array(TOKENS)).astype(mx.float32)).astype(np.float64)


@pytest.mark.parametrize("name", CONFIGS)
def test_mlx_lm_gives_the_logits_of_peft(name: str, base: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM", **CONFIGS[name]
    )
    model = peft.get_peft_model(model_of(base), config).eval()
    model.save_pretrained(tmp_path / "peft")
    want, plain = logits(model), logits(model_of(base))
    report = convert_file(tmp_path / "peft", tmp_path / "mlx", to="mlx", base=base)
    assert not report.dropped
    found = mlx_logits(base, tmp_path / "mlx")
    assert np.abs(want - plain).max() > 1e-2
    assert np.abs(found - want).max() <= 2e-5 * np.abs(want).max()


def test_without_a_base_all_layers_are_named(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"], layers_to_transform=[0])
    model = peft.get_peft_model(model_of(base), config).eval()
    model.save_pretrained(tmp_path / "peft")
    convert_file(tmp_path / "peft", tmp_path / "mlx", to="mlx")
    assert np.abs(mlx_logits(base, tmp_path / "mlx") - logits(model)).max() <= 1e-4


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_mlx_lm_made_does_the_same_in_peft(kind: str, base: Path, tmp_path: Path) -> None:
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    parameters = {"rank": 3, "scale": 5.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.up_proj"]}
    model = mlx_model(base)
    linear_to_lora_layers(model, 1, parameters, use_dora=kind == "dora")
    rng = np.random.default_rng(3)
    leaves = ("lora_a", "lora_b")
    weights = {
        key: mx.array(rng.standard_normal(value.shape).astype(np.float32) * 0.1)
        if key.endswith(leaves)
        else value
        for key, value in tree_flatten(model.parameters())
        if key.endswith((*leaves, ".m"))
    }
    folder = tmp_path / "mlx"
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    said = {"fine_tune_type": kind, "num_layers": 1, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(said), "utf-8")
    convert_file(folder, tmp_path / "peft", to="peft")
    want = mlx_logits(base, folder)
    plain = model_of(base)
    found = logits(peft.PeftModel.from_pretrained(plain, tmp_path / "peft").eval())
    assert np.abs(want - logits(model_of(base))).max() > 1e-2
    assert np.abs(found - want).max() <= 2e-5 * np.abs(want).max()


def test_an_npz_of_older_releases_has_its_scale_in_the_configuration(tmp_path: Path) -> None:
    made = make.mlx(tmp_path / "in", scale=2.5)
    arrays = {key: tensor.numpy() for key, tensor in made.tensors.items()}
    made.file.unlink()
    mx.savez(str(tmp_path / "in" / "adapters.npz"), **{key: mx.array(value) for key, value in arrays.items()})
    report = convert_file(tmp_path / "in", tmp_path / "out", to="peft")
    assert report.error == 0.0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text("utf-8"))
    assert config["lora_alpha"] / config["r"] == 2.5
