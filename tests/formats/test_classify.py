"""What a file is, from its keys: nothing that is no LoRA is called one."""

from __future__ import annotations

import json
from pathlib import Path

import factories as make
import pytest
import torch

import loratools as lt
from loratools.errors import NotAnAdapterError
from loratools.ops import files

ONE = torch.ones

OTHERS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "sd checkpoint": (
        {
            "model.diffusion_model.input_blocks.0.0.weight": ONE(4, 4, 3, 3),
            "first_stage_model.encoder.x.weight": ONE(2),
        },
        "checkpoint",
    ),
    "llm checkpoint": (
        {"model.layers.0.self_attn.q_proj.weight": ONE(4, 4), "lm_head.weight": ONE(4, 4)},
        "checkpoint",
    ),
    "flux checkpoint": (
        {"double_blocks.0.img_attn.qkv.weight": ONE(6, 2), "img_in.weight": ONE(2, 2)},
        "checkpoint",
    ),
    "plain weights": (
        {"conv1.weight": ONE(2, 2, 3, 3), "fc.bias": ONE(3), "fc.weight": ONE(3, 2)},
        "checkpoint",
    ),
    "textual inversion": ({"<style>": ONE(768)}, "textual-inversion"),
    "textual inversion of A1111": (
        {"string_to_param.*": ONE(2, 768), "string_to_token.*": ONE(1)},
        "textual-inversion",
    ),
    "textual inversion of SDXL": ({"clip_l": ONE(4, 768), "clip_g": ONE(4, 1280)}, "textual-inversion"),
    "textual inversion of InvokeAI": ({"emb_params": ONE(2, 768)}, "textual-inversion"),
    "ip-adapter": (
        {"image_proj.proj.weight": ONE(4, 4), "ip_adapter.1.to_k_ip.weight": ONE(4, 4)},
        "ip-adapter",
    ),
    "controlnet": ({"control_model.zero_convs.0.0.weight": ONE(2, 2, 1, 1)}, "controlnet"),
    "controlnet of diffusers": (
        {
            "controlnet_cond_embedding.conv_in.weight": ONE(2, 2),
            "down_blocks.0.resnets.0.conv1.weight": ONE(2, 2),
        },
        "controlnet",
    ),
    "controlnet-lllite": ({"lllite_unet_x.down.0.weight": ONE(2, 2)}, "controlnet-lllite"),
    "t2i-adapter": ({"adapter.body.0.block1.weight": ONE(2, 2)}, "t2i-adapter"),
    "vae": (
        {"encoder.conv_in.weight": ONE(2, 2), "decoder.x.weight": ONE(2), "quant_conv.weight": ONE(2, 2)},
        "vae",
    ),
    "bottleneck": ({"bert.x.adapters.a.adapter_down.0.weight": ONE(2, 4)}, "bottleneck-adapter"),
    "prompt": ({"prompt_embeddings": ONE(8, 16)}, "prompt-tuning"),
    "empty": ({}, "empty"),
    "alphas only": ({"a.alpha": ONE(()), "b.alpha": ONE(())}, "unknown"),
    "noise": ({"x": ONE(3), "y.z": ONE(2, 5)}, "unknown"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_adapter_is_named_and_refused(name: str, tmp_path: Path) -> None:
    tensors, expected = OTHERS[name]
    path = tmp_path / "lora_adapter.safetensors"
    make.write_safetensors(path, tensors, None)
    found = files.read(path)
    assert found.type == expected
    assert not found.modules
    assert set(found.extras) == set(tensors)
    with pytest.raises(NotAnAdapterError, match="not a LoRA adapter"):
        lt.load(path)


@pytest.mark.parametrize(
    ("peft_type", "expected"),
    [("PREFIX_TUNING", "prefix-tuning"), ("PROMPT_TUNING", "prompt-tuning"), ("P_TUNING", "prompt-tuning")],
)
def test_tunings_are_named_by_their_configuration(peft_type: str, expected: str, tmp_path: Path) -> None:
    make.write_safetensors(tmp_path / "adapter_model.safetensors", {"prompt_embeddings": ONE(8, 16)}, None)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": peft_type}))
    assert files.read(tmp_path).type == expected


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "lokr_full", "oft", "glora", "full"])
def test_every_lycoris_kind_is_an_adapter(kind: str, tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", kind=kind)
    assert files.read(made.path).type == "adapter"


def test_ia3_is_its_own_type(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", kind="ia3")
    found = files.read(made.path)
    assert found.type == "ia3"
    assert found.kinds == {"ia3": len(make.SD15)}


def test_an_ia3_of_peft(tmp_path: Path) -> None:
    tensors = {"base_model.model.h.0.attn.k.ia3_l": ONE(8, 1), "base_model.model.h.0.mlp.wo.ia3_l": ONE(1, 8)}
    make.write_safetensors(tmp_path / "adapter_model.safetensors", tensors, None)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    assert files.read(tmp_path).type == "ia3"


def test_a_lora_with_a_packed_embedding_is_still_a_lora(tmp_path: Path) -> None:
    extra = {"bundle_emb.style.string_to_param.*": torch.ones(2, 768)}
    made = make.kohya(tmp_path / "a.safetensors", extra=extra)
    found = files.read(made.path)
    assert (found.type, len(found.modules)) == ("adapter", len(make.SD15))
    assert set(found.extras) == set(extra)


@pytest.mark.parametrize(
    ("spelling", "layout", "variant"),
    [
        ("lora_unet_unet_{}_lora_{}.weight", "kohya", "malformed"),
        ("lycoris_{}.lora_{}.weight", "kohya", "lycoris"),
        ("lora_unet_{}.lora_{}.weight", "kohya", ""),
    ],
)
def test_kohyas_variants(spelling: str, layout: str, variant: str, tmp_path: Path) -> None:
    tensors = {}
    for weight in make.SD15:
        if weight.component == "denoiser":
            made, _ = make.lora_factors(weight.shape, 2, torch.float32, make.np.random.default_rng(0))
            name = weight.kohya.removeprefix("lora_unet_")
            tensors |= {spelling.format(name, role): tensor for role, tensor in made.items()}
    make.write_safetensors(tmp_path / "a.safetensors", tensors, None)
    adapter = lt.load(tmp_path / "a.safetensors")
    assert (adapter.layout.name, adapter.layout.variant, adapter.arch) == (layout, variant, "sd15")
    assert {str(target) for target in adapter.modules} == {
        w.target for w in make.SD15 if w.component == "denoiser"
    }


def test_comfys_native_names(tmp_path: Path) -> None:
    tensors = {}
    for weight in make.FLUX_FUSED:
        if weight.component == "denoiser":
            made, _ = make.lora_factors(weight.shape, 2, torch.float32, make.np.random.default_rng(0))
            tensors |= {
                f"diffusion_model.{weight.target}.lora_A.weight": made["down"],
                f"diffusion_model.{weight.target}.lora_B.weight": made["up"],
            }
    make.write_safetensors(tmp_path / "a.safetensors", tensors, None)
    adapter = lt.load(tmp_path / "a.safetensors")
    assert (adapter.layout.name, adapter.arch) == ("comfy", "flux")
    assert {str(target) for target in adapter.modules} == {
        weight.target for weight in make.FLUX_FUSED if weight.component == "denoiser"
    }


def test_onetrainers_mixture(tmp_path: Path) -> None:
    tensors = {}
    for weight in make.FLUX_SPLIT:
        if weight.component == "denoiser":
            made, _ = make.lora_factors(weight.shape, 2, torch.float32, make.np.random.default_rng(0))
            stem = "lora_" + weight.diffusers.replace(".", "_")
            tensors |= {f"{stem}.lora_{role}.weight": tensor for role, tensor in made.items()}
            tensors[f"{stem}.alpha"] = torch.tensor(1.0)
    make.write_safetensors(tmp_path / "a.safetensors", tensors, None)
    adapter = lt.load(tmp_path / "a.safetensors")
    assert (adapter.layout.name, adapter.arch) == ("onetrainer", "flux")
    assert {str(target) for target in adapter.modules} == {
        weight.target for weight in make.FLUX_SPLIT if weight.component == "denoiser"
    }
    assert {module.scale for module in adapter.modules.values()} == {0.5}


def test_parameters_that_are_called_like_factors_make_no_adapter(tmp_path: Path) -> None:
    network = {f"encoder.{name}.weight": torch.ones(4, 4) for name in ("a1", "a2", "b1", "b2")}
    make.write_safetensors(tmp_path / "a.safetensors", network, None)
    assert lt.info(tmp_path / "a.safetensors").type == "checkpoint"
    make.write_safetensors(
        tmp_path / "b.safetensors", {"net.scalar": torch.ones(1), "net.weight": torch.ones(2, 2)}, None
    )
    assert lt.info(tmp_path / "b.safetensors").type != "adapter"


def test_an_optimizers_state_is_called_one(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    assert lt.info(tmp_path / "optimizer.pt").type == "optimizer"
