"""adapter_config.json as written: PEFT accepts it and loads the adapter with the same ΔW."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import factories as make
import numpy as np
import pytest
import torch

import loratools as lt


def config_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "adapter_config.json").read_text("utf-8"))


def recast(made: make.Made, folder: Path) -> Path:
    """The adapter as a merge or a conversion leaves it: written anew, not copied."""
    adapter = lt.load(made.path)
    lt.save(lt.merge([adapter], weights=[2.0]), folder)
    return folder


def test_a_computed_adapter_states_rank_and_alpha_per_module(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "a", rank=4, alpha=8, ranks={"model.layers.0.mlp.down_proj": 2})
    adapter = lt.load(made.path)
    again = lt.load(recast(made, tmp_path / "b"))
    for target, module in adapter.modules.items():
        want, found = module.delta() * 2, again.modules[target].delta()
        assert torch.allclose(found, want, atol=1e-5)


def test_stale_fields_do_not_survive(tmp_path: Path) -> None:
    made = make.peft(
        tmp_path / "a",
        alphas={"model.layers.0.mlp.down_proj": 3},
        config={
            "use_rslora": True,
            "init_lora_weights": "gaussian",
            "layers_to_transform": [0],
            "lora_dropout": 0.1,
        },
    )
    config = config_of(recast(made, tmp_path / "b"))
    assert config["use_rslora"] is False
    assert config["init_lora_weights"] is True
    assert config["layers_to_transform"] is None
    assert config["lora_dropout"] == 0.1


def test_the_base_models_name_is_kept(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "a", config={"base_model_name_or_path": "org/base", "task_type": "CAUSAL_LM"})
    config = config_of(recast(made, tmp_path / "b"))
    assert config["base_model_name_or_path"] == "org/base"
    assert config["task_type"] == "CAUSAL_LM"


def _tiny(model: str) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if model == "llama":
        config = transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=20,
        )
        return transformers.LlamaForCausalLM(config)
    config = transformers.GPT2Config(n_embd=12, n_layer=2, n_head=2, n_inner=20, vocab_size=20, n_positions=8)
    return transformers.GPT2LMHeadModel(config)


def _peft_deltas(model: str, folder: Path) -> dict[str, np.ndarray]:
    """What PEFT's own layers add to each weight, (out, in)."""
    peft = pytest.importorskip("peft")
    loaded = peft.PeftModel.from_pretrained(_tiny(model), folder)
    found = {}
    for name, layer in loaded.base_model.model.named_modules():
        if hasattr(layer, "get_delta_weight") and "default" in getattr(layer, "scaling", {}):
            delta = layer.get_delta_weight("default").detach().double().numpy()
            conv1d = model == "gpt2"
            embedding = name.endswith("embed_tokens")
            found["language_model/" + name] = delta.T if conv1d or embedding else delta
    return found


PEERS = {
    "llama": ("llama", {}),
    "patterns": (
        "llama",
        {"ranks": {"model.layers.0.mlp.down_proj": 2}, "alphas": {"model.layers.1.self_attn.q_proj": 3}},
    ),
    "rslora": ("llama", {"config": {"use_rslora": True}}),
    "embedding": ("llama", {"embedding": True}),
    "gpt2": ("gpt2", {"model": make.GPT2, "config": {"fan_in_fan_out": True}}),
    "fsdp": ("llama", {"form": "fsdp"}),
}


@pytest.mark.peers
@pytest.mark.parametrize("name", PEERS)
def test_peft_loads_what_is_written(name: str, tmp_path: Path) -> None:
    model, options = PEERS[name]
    made = make.peft(tmp_path / "a", **options)
    folder = recast(made, tmp_path / "b")
    found = _peft_deltas(model, folder)
    make.assert_close(found, {key: 2 * delta for key, delta in made.deltas.items()})


@pytest.mark.peers
@pytest.mark.parametrize("name", ["llama", "patterns", "rslora", "embedding"])
def test_peft_and_loratools_read_the_same_delta(name: str, tmp_path: Path) -> None:
    model, options = PEERS[name]
    made = make.peft(tmp_path / "a", **options)
    make.assert_close(_peft_deltas(model, made.path), make.deltas_of(lt.load(made.path)))


@pytest.mark.peers
def test_peft_accepts_the_configuration_and_names_the_same_keys(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    made = make.peft(tmp_path / "a")
    folder = recast(made, tmp_path / "b")
    config = peft.LoraConfig(**config_of(folder))
    model = peft.get_peft_model(_tiny("llama"), config)
    tensors, _ = make.read_safetensors(folder / "adapter_model.safetensors")
    assert set(peft.get_peft_model_state_dict(model)) == set(tensors)


@pytest.mark.peers
def test_peft_keeps_a_merged_lora_bias(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    targets = make.LLAMA[:2]
    made = make.peft(tmp_path / "a", targets, lora_bias=True, rank=4, alpha=8)
    folder = recast(made, tmp_path / "b")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=20,
        attention_bias=True,
    )
    loaded = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM(config), folder)
    for path, _ in targets:
        layer = loaded.base_model.model.get_submodule(path)
        bias = layer.lora_B["default"].bias * layer.scaling["default"]
        want = made.tensors[f"base_model.model.{path}.lora_B.bias"] * (8 / 4) * 2
        assert torch.allclose(bias, want, atol=1e-6)


def lycoris_folder(folder: Path, factors: Mapping[str, torch.Tensor], **fields: Any) -> Path:
    """A PEFT folder with one LoHa or LoKr module, of the first Flux block's image output."""
    folder.mkdir()
    stem = "base_model.model.transformer_blocks.0.attn.to_out.0"
    tensors = {f"{stem}.{role}": tensor for role, tensor in factors.items()}
    make.write_safetensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {"r": 4, "alpha": 6, "target_modules": ["to_out.0"], **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    return folder


@pytest.mark.parametrize(
    ("fields", "scale"),
    [({}, 1.5), ({"alpha_pattern": {"to_out.0": 8}}, 2.0), ({"rank_pattern": {"to_out.0": 12}}, 0.5)],
)
def test_a_whole_lokr_is_scaled_by_pefts_configuration_and_nowhere_else(
    fields: dict[str, Any], scale: float, tmp_path: Path
) -> None:
    """PEFT scales it whatever its factors are; LyCORIS' readers never do, so that the scale goes into the factors."""
    factors = {"lokr_w1": torch.randn(2, 2), "lokr_w2": torch.randn(4, 4)}
    adapter = lt.load(lycoris_folder(tmp_path / "a", factors, peft_type="LOKR", **fields), arch="flux")
    (module,) = adapter.modules.values()
    assert (module.kind, module.rank, module.scale) == ("lokr", None, scale)
    wanted = scale * torch.kron(*(factor.double() for factor in factors.values()))
    torch.testing.assert_close(module.delta().double(), wanted, rtol=1e-6, atol=0)
    lt.save(adapter, tmp_path / "b.safetensors", layout="kohya")
    again = lt.load(tmp_path / "b.safetensors", arch="flux")
    (module,) = again.modules.values()
    assert module.scale == 1.0
    torch.testing.assert_close(module.delta().double(), wanted, rtol=1e-6, atol=0)


def test_a_loha_keeps_its_scale_on_the_way_to_kohya(tmp_path: Path) -> None:
    factors = {
        f"hada_w{n}_{side}": torch.randn(*shape)
        for n in "12"
        for side, shape in (("a", (8, 4)), ("b", (4, 8)))
    }
    adapter = lt.load(lycoris_folder(tmp_path / "a", factors, peft_type="LOHA"), arch="flux")
    assert {module.scale for module in adapter.modules.values()} == {1.5}
    lt.save(adapter, tmp_path / "b.safetensors", layout="kohya")
    written, _ = make.read_safetensors(tmp_path / "b.safetensors")
    assert {key.rpartition(".")[2]: value[2] for key, value in written.items()} == {
        "alpha": torch.tensor(6.0).numpy().tobytes(),
        **{role: tensor.numpy().tobytes() for role, tensor in factors.items()},
    }
