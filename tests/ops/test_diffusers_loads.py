"""What we write in Kohya's layout, diffusers' own loader takes whole, and applies with the same ΔW."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import loratools as lt

pytestmark = pytest.mark.peers
FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
# Stable Diffusion 1.5's UNet at an eighth of its widths: what the fixtures were made for.
TINY_UNET = {
    "block_out_channels": (40, 80, 160, 160),
    "cross_attention_dim": 768,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
}


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize("weights", [(0.8, -0.6), (1.0, 0.0)])
def test_a_merge_of_kohya_and_diffusers_files_loads_in_diffusers(
    layout: str, weights: tuple[float, float], tmp_path: Path
) -> None:
    """At weights 1 and 0 the first adapter's modules go over with an alpha that is not their rank."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    one = lt.load(FIXTURES / "style-kohya.safetensors")
    two = lt.load(FIXTURES / "character-diffusers.safetensors")
    output = tmp_path / "merged.safetensors"
    lt.save(lt.merge([one, two], weights=weights, layout=layout), output)
    state, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
        str(tmp_path), weight_name=output.name, return_lora_metadata=True
    )
    assert {key.split(".")[0] for key in state} == {"unet", "text_encoder"}

    unet = diffusers.UNet2DConditionModel(**TINY_UNET)
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(
        state, network_alphas=alphas, unet=unet, metadata=metadata
    )
    merged = {str(target): module for target, module in lt.load(output).modules.items()}
    found = 0
    for name, layer in unet.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        (adapter,) = layer.lora_A
        there = layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight * layer.scaling[adapter]
        here = merged[_native(name)].delta()
        assert torch.allclose(there.flatten(1), here.flatten(1), rtol=1e-3, atol=1e-5), name
        found += 1
    assert found == 128


def _native(name: str) -> str:
    from loratools import archs

    resolved = archs.get("sd15").resolve(f"unet.{name}")
    assert resolved is not None, name
    return resolved.path


def test_a_text_encoder_of_a_merged_diffusers_file_loads_in_diffusers(tmp_path: Path) -> None:
    """The header's configuration must fit CLIP with and without its text_model level."""
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    one = lt.load(FIXTURES / "style-kohya.safetensors")
    output = tmp_path / "merged.safetensors"
    lt.save(lt.merge([one, one], weights=[0.5, 0.25], layout="diffusers"), output)
    state, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
        str(tmp_path), weight_name=output.name, return_lora_metadata=True
    )
    config = transformers.CLIPTextConfig(hidden_size=96, intermediate_size=64, num_attention_heads=4)
    encoder = transformers.CLIPTextModel(config)
    StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(
        state, network_alphas=alphas, text_encoder=encoder, prefix="text_encoder", metadata=metadata
    )
    merged = {target.path: module for target, module in lt.load(output).modules.items()}
    found = 0
    for name, layer in encoder.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        (adapter,) = layer.lora_A
        there = layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight * layer.scaling[adapter]
        here = merged["text_model." + name.removeprefix("text_model.")].delta()
        assert torch.allclose(there, here, rtol=1e-3, atol=1e-5), name
        found += 1
    assert found == 24
