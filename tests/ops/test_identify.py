"""What a checkpoint is: its architecture, and what each of its tensors is called there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loratools import archs
from loratools.errors import ArchitectureError
from loratools.io.base import Base, Weight
from loratools.model import Rows, Target
from loratools.ops._identify import BARE, EMBEDDING, MATRIX, NORM, Identified, identify
from tests.ops import bases as make

NAMES = Path(__file__).resolve().parents[2] / ".." / "shared" / "names"
# Published models, by the file that lists their modules, and the architecture that each is of.
_PUBLISHED = {
    "auraflow": "auraflow",
    "bert": "llm",
    "chroma": "chroma",
    "clip": "vision",
    "cogvideox_5b": "cogvideox",
    "flux2_dev": "flux2",
    "flux_dev": "flux",
    "flux_schnell": "flux",
    "gemma2": "llm",
    "gpt2": "llm",
    "hunyuan_dit_v1.2": "hunyuan_dit",
    "hunyuan_video": "hunyuan_video",
    "hunyuan_video15": "hunyuan_video15",
    "llama": "llm",
    "ltx_video": "ltx_video",
    "lumina2": "lumina2",
    "mixtral": "llm",
    "pixart_sigma": "pixart",
    "qwen_image": "qwen_image",
    "sana": "sana",
    "sd15": "sd15",
    "sd21": "sd2",
    "sd35_large": "sd35_large",
    "sd35_medium": "sd3",
    "sd3_medium": "sd3",
    "sdxl": "sdxl",
    "stable_cascade_stage_c": "stable_cascade",
    "t5": "llm",
    "wan21_t2v_14b": "wan",
    "whisper": "speech",
    "z_image": "z_image",
}


@pytest.mark.skipif(not NAMES.is_dir(), reason="the lists of published models are not beside this checkout")
@pytest.mark.parametrize("side", ["native", "diffusers"])
@pytest.mark.parametrize("model", sorted(_PUBLISHED))
def test_published_models_are_told_by_names_and_widths(model: str, side: str) -> None:
    said = json.loads((NAMES / f"{model}.json").read_text("utf-8"))
    listed = list(_listed(said, side))
    found = identify(make.base({key: shape for key, shape, _, _ in listed}))
    assert found.arch == _PUBLISHED[model]
    assert found.others == ()
    # The list of Hunyuan Video 1.5 has the original names, and our own ones are ComfyUI's.
    if not archs.get(found.arch).has_table or found.arch == "hunyuan_video15":
        return
    # Every module that the list names is found under its native path, with as many rows as it stores.
    for key, shape, native, _ in listed:
        assert _at(found, key)[0].path == native
        assert _at(found, key)[1].weight.shape == shape


def _listed(said: dict[str, Any], side: str) -> Iterator[tuple[str, tuple[int, ...], str, Any]]:
    """(key, shape, native path, rows) of every module of a model, as a checkpoint of that side stores it."""
    for part in said["components"].values():
        # Networks that come in files of their own have no prefix; together they have ComfyUI's.
        single = len(said["components"]) == 1
        prefix = part["prefixes"].get(side) or ("" if single else part["prefixes"].get("comfy_native", ""))
        for module in part["modules"]:
            if not module.get(side):
                continue
            shape = tuple(module["shape"])
            if side == "native" and module.get("rows"):
                shape = (module["rows"][2], *shape[1:])
            # torch's attention has its three weights in one parameter.
            end = "" if module[side].endswith("in_proj_weight") else ".weight"
            native = module["native"].replace("in_proj_weight", "in_proj")
            yield f"{prefix}{module[side]}{end}", shape, native, module.get("rows")


def _at(found: Identified, key: str) -> tuple[Target, Any]:
    return next(
        (target, at)
        for target, at in found.targets.items()
        if key in [each.key for each in (at.weight, at.bias) if each is not None]
    )


@pytest.mark.parametrize(("arch", "component"), make.tabled())
def test_every_stored_tensor_gets_its_native_path_and_rows(arch: str, component: str) -> None:
    row = archs.get(arch).component(component)
    prefix = next(iter(row.prefixes.get("checkpoint", row.prefixes.get("comfy", ("",)))), "")
    for dialect in make.dialects(row):
        stored = make.spelt(row, dialect)
        shapes = {
            f"{prefix}{name}.weight": (len(make.rows_of(*held)), make.WIDTH) for name, held in stored.items()
        }
        if not stored:
            continue
        found = identify(make.base(shapes), arch)
        for name, (named, rows) in stored.items():
            located = found.targets[Target(component, named.path, rows)]
            assert located.weight is not None
            assert located.weight.key == f"{prefix}{name}.weight"
        assert len(found.targets) == len(stored)


def test_a_fused_weight_stored_in_parts_is_found_as_rows_of_it() -> None:
    prefix = "transformer.transformer_blocks.0.attn"
    base = make.base({f"{prefix}.{name}.weight": (8, 8) for name in ("to_q", "to_k", "to_v")})
    found = identify(base, "flux")
    path = "double_blocks.0.img_attn.qkv"
    assert [*found.targets] == [Target("denoiser", path, Rows(((n, n + 1),), 3)) for n in range(3)]


def test_roles_and_biases_by_names_and_shapes() -> None:
    found = identify(
        make.base(
            {
                "model.embed_tokens.weight": (20, 8),
                "model.layers.0.self_attn.q_proj.weight": (8, 8),
                "model.layers.0.self_attn.q_proj.bias": (8,),
                "model.layers.0.input_layernorm.weight": (8,),
                "model.layers.0.mlp.experts.gate_up_proj": (2, 8, 8),
            }
        )
    )
    assert found.arch == "llm"
    assert [(target.path, at.role) for target, at in found.targets.items()] == [
        ("model.embed_tokens", EMBEDDING),
        ("model.layers.0.self_attn.q_proj", MATRIX),
        ("model.layers.0.input_layernorm", NORM),
        ("model.layers.0.mlp.experts.gate_up_proj", BARE),
    ]
    bias = found.targets[Target("language_model", "model.layers.0.self_attn.q_proj")].bias
    assert bias is not None
    assert bias.key == "model.layers.0.self_attn.q_proj.bias"


@pytest.mark.parametrize("bias", [24, 8])
def test_conv1d_is_told_by_its_bias(bias: int) -> None:
    base = make.base(
        {
            "transformer.h.0.attn.c_attn.weight": (8, 24),
            "transformer.h.0.attn.c_attn.bias": (bias,),
            "transformer.h.0.attn.c_proj.weight": (8, 8),
        }
    )
    turned = [at.turned for at in identify(base).targets.values()]
    assert turned == [bias == 24] * 2


def test_openclips_attention_is_one_parameter_with_its_bias() -> None:
    stem = "cond_stage_model.model.transformer.resblocks.0.attn."
    base = make.base({f"{stem}in_proj_weight": (24, 8), f"{stem}in_proj_bias": (24,)})
    ((target, at),) = identify(base, "sd2").targets.items()
    assert target == Target("text_encoder", "transformer.resblocks.0.attn.in_proj")
    assert at.weight is not None
    assert at.bias is not None
    assert (at.weight.key, at.bias.key) == (f"{stem}in_proj_weight", f"{stem}in_proj_bias")


def test_what_no_adapter_changes_is_told_apart() -> None:
    stem = "model.diffusion_model.input_blocks.1.0.in_layers.2"
    base = make.base(
        {f"{stem}.weight": (8, 4, 3, 3), "alphas_cumprod": (1000,), "first_stage_model.x.weight": (2, 2)}
    )
    clip = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    base.parts[""][clip] = Weight(clip, (1, 77), "I64", "x")  # type: ignore[index]
    found = identify(base, "sd15")
    assert [str(target) for target in found.targets] == ["input_blocks.1.0.in_layers.2"]
    assert {key for _, key in found.others} == {"alphas_cumprod", "first_stage_model.x.weight", clip}


def test_scales_of_float8_are_no_weights() -> None:
    base = make.base(
        {"model.layers.0.mlp.up_proj.weight": (8, 8), "model.layers.0.mlp.up_proj.weight_scale": (1,)}
    )
    found = identify(base, "llm")
    assert [target.path for target in found.targets] == ["model.layers.0.mlp.up_proj"]
    assert found.others == (("", "model.layers.0.mlp.up_proj.weight_scale"),)


def test_a_diffusers_folder_is_read_by_its_subfolders() -> None:
    unet = {"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, 768)}
    clip = {"text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768)}
    vae = {"decoder.conv_in.weight": (4, 4, 3, 3)}
    parts = {
        name: make.base(keys, name).parts[name]
        for name, keys in (("unet", unet), ("text_encoder", clip), ("vae", vae))
    }
    found = identify(Base("folder", parts))
    assert found.arch == "sd15"
    assert [(target.component, at.part) for target, at in found.targets.items()] == [
        ("denoiser", "unet"),
        ("text_encoder", "text_encoder"),
    ]
    assert found.others == (("vae", "decoder.conv_in.weight"),)


def test_an_adapter_settles_what_nothing_else_tells() -> None:
    # Too narrow for any published model: Stable Diffusion 1 and 2 spell their UNets alike.
    base = make.base({"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (16, 32)})
    assert identify(base).candidates == ("sd15", "sd2")
    assert identify(base).arch == "sd15"
    assert identify(base, hint=make.adapter([], "sd2")).arch == "sd2"


def test_an_unknown_checkpoint_keeps_its_own_names() -> None:
    found = identify(make.base({"tower.fc.weight": (4, 4), "tower.norm.weight": (4,)}))
    assert found.arch == "unknown"
    assert [*found.targets] == [Target("model", "tower.fc"), Target("model", "tower.norm")]


def test_an_architecture_that_nobody_described_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="no architecture named"):
        identify(make.base({"x.weight": (2, 2)}), "sd9")
