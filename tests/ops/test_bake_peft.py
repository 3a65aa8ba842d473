"""Baked weights against PEFT's own merge, for every method and every place that PEFT has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loratools.errors import UnsupportedKindError
from loratools.ops.bake import bake

peft = pytest.importorskip("peft", reason="PEFT is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.peers

QV = ["q_proj", "v_proj"]
CONV1D = ["c_attn", "c_proj"]


def llama(**options: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **heads, **options}))


def gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


def resnet() -> Any:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes))


def lora(targets: str | Sequence[str] = "all-linear", **options: Any) -> Callable[[], Any]:
    return lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, **options)


def oft(**options: Any) -> Callable[[], Any]:
    return lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=QV, **options)


CASES: Mapping[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "lora": (llama, lora()),
    "rslora": (llama, lora(use_rslora=True)),
    "dora": (llama, lora(use_dora=True)),
    "patterns": (llama, lora(rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.mlp.up_proj": 3})),
    "lora-bias": (llama, lora(["q_proj", "k_proj"], lora_bias=True)),
    "all-biases": (llama, lora(["q_proj"], bias="all")),
    "dora-biases": (llama, lora(["q_proj"], bias="lora_only", use_dora=True)),
    "some-layers": (llama, lora(["q_proj"], layers_to_transform=[1])),
    "embeddings": (llama, lora(["embed_tokens", "lm_head", "q_proj"])),
    "embedding-dora": (llama, lora(["embed_tokens"], use_dora=True)),
    "saved": (llama, lora(["q_proj"], modules_to_save=["lm_head", "norm", "embed_tokens"])),
    "tokens": (
        llama,
        lora(["q_proj"], trainable_token_indices={"embed_tokens": [3, 7], "lm_head": [1]}),
    ),
    "loha": (llama, lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=QV)),
    "lokr": (llama, lambda: peft.LoKrConfig(r=3, alpha=5, target_modules=QV)),
    "lokr-both": (
        llama,
        lambda: peft.LoKrConfig(r=1, decompose_both=True, decompose_factor=4, target_modules=QV),
    ),
    "oft": (llama, oft()),
    "oft-shared": (llama, oft(block_share=True)),
    "oft-exact": (llama, oft(use_cayley_neumann=False)),
    "oft-constrained": (llama, oft(coft=True, eps=1e-2)),
    "oft-terms": (llama, oft(num_cayley_neumann_terms=7)),
    "ia3": (
        llama,
        lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "adalora": (
        llama,
        lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=QV),
    ),
    "conv1d": (gpt2, lora(CONV1D, fan_in_fan_out=True)),
    "conv1d-unsaid": (gpt2, lora(CONV1D)),
    "conv1d-dora": (gpt2, lora(CONV1D, fan_in_fan_out=True, use_dora=True)),
    "conv1d-bias": (gpt2, lora(CONV1D, fan_in_fan_out=True, lora_bias=True)),
    "conv1d-ia3": (
        gpt2,
        lambda: peft.IA3Config(
            fan_in_fan_out=True, target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]
        ),
    ),
    "positions": (gpt2, lora(["wpe"])),
    "conv": (resnet, lora(["convolution"], modules_to_save=["classifier"])),
    "conv-dora": (resnet, lora(["convolution"], use_dora=True)),
    "conv-loha": (
        resnet,
        lambda: peft.LoHaConfig(r=3, use_effective_conv2d=True, target_modules=["convolution"]),
    ),
    "conv-lokr": (
        resnet,
        lambda: peft.LoKrConfig(r=2, use_effective_conv2d=True, target_modules=["convolution"]),
    ),
}


def trained(model: Any, config: Any, folder: Path, seed: int) -> Any:
    """A model with an adapter of no zeros, which is saved."""
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif parameter.requires_grad:
                # Rotations are a series that holds for small angles alone.
                parameter.add_(torch.randn_like(parameter), alpha=0.02 if "oft_" in name else 0.1)
    adapted.save_pretrained(folder)
    return adapted


def based(make: Callable[[], Any], folder: Path) -> Any:
    """A model whose biases are no zeros, which is saved."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(folder)
    return model


def assert_same(merged: Any, folder: Path, base: Path) -> None:
    wanted, found, before = (
        merged.state_dict(),
        load_file(folder / "model.safetensors"),
        load_file(base / "model.safetensors"),
    )
    changed = 0
    for key, old in before.items():
        assert found[key].dtype == old.dtype
        change = float((wanted[key].double() - old.double()).norm())
        error = float((found[key].double() - wanted[key].double()).norm())
        assert error <= 2e-5 * max(change, 1e-2), key
        changed += change > 0
    assert changed


@pytest.mark.parametrize("name", CASES)
def test_a_bake_is_what_peft_merges(name: str, tmp_path: Path) -> None:
    make, config = CASES[name]
    adapted = trained(based(make, tmp_path / "base"), config(), tmp_path / "adapter", 3)
    merged = adapted.merge_and_unload()

    bake(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "baked")

    assert_same(merged, tmp_path / "baked", tmp_path / "base")


@pytest.mark.parametrize(
    "kinds", [("lora", "dora"), ("dora", "rslora"), ("dora", "dora"), ("loha",), ("lokr",)]
)
@pytest.mark.parametrize("weights", [(0.5, 0.7), (1.0, -0.5)])
def test_weights_are_pefts_scales(kinds: Sequence[str], weights: Sequence[float], tmp_path: Path) -> None:
    base = tmp_path / "base"
    based(llama, base)
    folders = [tmp_path / f"adapter{i}" for i in range(len(kinds))]
    for i, kind in enumerate(kinds):
        trained(llama(), CASES[kind][1](), folders[i], i)
    model = peft.PeftModel.from_pretrained(type(llama()).from_pretrained(base), folders[0], adapter_name="0")
    for i, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, str(i))
    for module in model.modules():
        for i, weight in enumerate(weights[: len(kinds)]):
            if hasattr(module, "set_scale") and str(i) in module.scaling:
                module.set_scale(str(i), weight)
    merged = model.merge_and_unload(adapter_names=[str(i) for i in range(len(kinds))])

    bake(base, folders, tmp_path / "baked", weights=weights[: len(kinds)])

    assert_same(merged, tmp_path / "baked", base)


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_an_adapter_that_took_its_factors_from_the_base_is_refused(method: str, tmp_path: Path) -> None:
    model = based(llama, tmp_path / "base")
    trained(model, lora(["q_proj"], init_lora_weights=method)(), tmp_path / "adapter", 3)
    with pytest.raises(UnsupportedKindError, match=f"init_lora_weights is {method}"):
        bake(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "baked")
    assert not (tmp_path / "baked").exists()
