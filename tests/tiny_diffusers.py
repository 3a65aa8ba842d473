"""diffusers' models at tiny widths, and the weights that trainers' files call by other names.

Names of native checkpoints are written out. Which rows of which native weight each of diffusers' weights is, is asked
of diffusers' own checkpoint converters, with numbered rows instead of values: nothing here reads the package's tables.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

# Rows of a probe: of Flux.1's linear1, whose parts its converter cuts at the one width that it knows. The tiny weights
# that are cut divide it.
PROBE_ROWS = 7 * 3072
CHECKPOINT = "model.diffusion_model."
_NONE = torch.full((PROBE_ROWS,), -1)
Models = dict[str, torch.nn.Module]


class Weight(NamedTuple):
    """One weight of the model that a trainer adapts.

    Attributes:
        component: The pipeline's name of the model that it belongs to.
        name: Its dotted path there, in the trainer's names.
        shape: (out, in[, kh, kw]).
        pieces: The weights of diffusers' model that are made of it, and which of its rows each has.
    """

    component: str
    name: str
    shape: tuple[int, ...]
    pieces: Mapping[str, torch.Tensor]


class Case(NamedTuple):
    """One architecture.

    Attributes:
        mixin: The name of its pipeline's loader.
        models: Makes the tiny models by component, the denoiser first.
        native: The denoiser's weights in the checkpoint's names; some that the tiny model lacks may be among them.
        converter: The name of diffusers' converter of such checkpoints; empty where both call them alike.
        encoders: By text encoder, its prefixes in Kohya's and in ComfyUI's layout.
        flattened: The names that Kohya flattens: "native" or "diffusers".
    """

    mixin: str
    models: Callable[[], Models]
    native: tuple[str, ...]
    converter: str = ""
    encoders: Mapping[str, tuple[str, str]] = {}
    flattened: str = "native"


class Probe(dict[str, Any]):
    """A checkpoint of numbered rows; what it lacks (biases, norms) has none of them."""

    def pop(self, key: str, *default: Any) -> Any:
        return super().pop(key, _NONE)


def weights(case: Case, models: Models) -> list[Weight]:
    """Every weight to be adapted, in the checkpoint's names."""
    (component, denoiser), *encoders = models.items()
    found = []
    for name, rows in _cut(case, denoiser).items():
        shapes = {twin: shape(denoiser, twin) for twin in rows}
        if None in shapes.values():
            continue
        out = sum(each[0] for each in shapes.values())
        _, *rest = next(iter(shapes.values()))
        pieces = {twin: where[:: PROBE_ROWS // out] * out // PROBE_ROWS for twin, where in rows.items()}
        if len(pieces) == 1 and torch.equal(next(iter(rows.values())), torch.arange(PROBE_ROWS)):
            pieces = dict.fromkeys(pieces, torch.arange(out))
        found.append(Weight(component, name, (out, *rest), pieces))
    for component, encoder in encoders:
        for twin in adaptable(encoder):
            size = shape(encoder, twin)
            name = twin if twin.startswith("text_") else "text_model." + twin
            found.append(Weight(component, name, size, {twin: torch.arange(size[0])}))
    return found


def _cut(case: Case, denoiser: torch.nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """By native name, the names of diffusers' weights that are made of it, and their rows of a probe's."""
    if not case.converter:
        return {name: {name: torch.arange(PROBE_ROWS)} for name in case.native}
    rows = torch.arange(PROBE_ROWS)
    probe = Probe()
    for i, name in enumerate(case.native):
        probe[f"{CHECKPOINT}{name}.weight"] = rows + i * PROBE_ROWS
        probe[f"{CHECKPOINT}{name}.bias"] = _NONE
    convert = getattr(importlib.import_module("diffusers.loaders.single_file_utils"), case.converter)
    converted = convert(checkpoint=probe, config=dict(denoiser.config))
    found: dict[str, dict[str, torch.Tensor]] = {name: {} for name in case.native}
    for key, numbers in converted.items():
        if key.endswith(".weight") and numbers is not None and numbers[0] >= 0:
            name = case.native[int(numbers[0]) // PROBE_ROWS]
            found[name][key.removesuffix(".weight")] = numbers % PROBE_ROWS
    return found


def shape(model: torch.nn.Module, path: str) -> tuple[int, ...] | None:
    """The shape of a module's weight; None where the model has no such module."""
    try:
        return tuple(model.get_submodule(path).weight.shape)
    except AttributeError:
        return None


def adaptable(model: torch.nn.Module) -> list[str]:
    """The paths of all linear layers and 2-D convolutions."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def skeletons(paths: Any) -> set[str]:
    """The paths without their numbers."""
    return {re.sub(r"\d+", "#", path) for path in paths}


def _clip(cls: str = "CLIPTextModel") -> torch.nn.Module:
    transformers = importlib.import_module("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=64,
        bos_token_id=0,
        eos_token_id=1,
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return getattr(transformers, cls)(config)


def _diffusers(cls: str, **config: Any) -> torch.nn.Module:
    return getattr(importlib.import_module("diffusers"), cls)(**config)


def _sd15() -> Models:
    unet = _diffusers(
        "UNet2DConditionModel",
        block_out_channels=(16, 32, 64, 64),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    return {"unet": unet, "text_encoder": _clip()}


def _sdxl() -> Models:
    unet = _diffusers(
        "UNet2DConditionModel",
        block_out_channels=(16, 32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=48,
        attention_head_dim=8,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
    )
    second = _clip("CLIPTextModelWithProjection")
    return {"unet": unet, "text_encoder": _clip(), "text_encoder_2": second}


def _sd3() -> Models:
    transformer = _diffusers(
        "SD3Transformer2DModel",
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=24,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        pos_embed_max_size=8,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )
    encoders = {name: _clip("CLIPTextModelWithProjection") for name in ("text_encoder", "text_encoder_2")}
    return {"transformer": transformer, **encoders}


def _flux() -> Models:
    transformer = _diffusers(
        "FluxTransformer2DModel",
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return {"transformer": transformer, "text_encoder": _clip()}


def _wan() -> Models:
    transformer = _diffusers(
        "WanTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=16,
        ffn_dim=48,
        num_layers=2,
        image_dim=20,
        added_kv_proj_dim=32,
    )
    return {"transformer": transformer}


def _qwen_image() -> Models:
    transformer = _diffusers(
        "QwenImageTransformer2DModel",
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 4, 8),
    )
    return {"transformer": transformer}


def _names(heads: str, leaves: str) -> tuple[str, ...]:
    return tuple(f"{head}.{leaf}" for head in heads.split() for leaf in leaves.split())


def _unet(attended: tuple[bool, ...], depth: int, ends: str) -> tuple[str, ...]:
    """The first release's names of a UNet with two resnets to a stage, each as though it changed the width.

    Args:
        attended: Of each stage, whether it has attention.
        depth: Transformer blocks of an attention, at most.
        ends: Names outside of the stages.
    """
    last = len(attended) - 1
    into = {f"input_blocks.{3 * i + j}": has for i, has in enumerate(attended) for j in (1, 2)}
    out = {f"output_blocks.{3 * (last - i) + j}": has for i, has in enumerate(attended) for j in range(3)}
    levels = {**into, **out}
    resnets = " ".join([*(f"{level}.0" for level in levels), "middle_block.0", "middle_block.2"])
    attention = " ".join([*(f"{level}.1" for level, has in levels.items() if has), "middle_block.1"])
    blocks = " ".join(_names(attention, " ".join(f"transformer_blocks.{i}" for i in range(depth))))
    return (
        *ends.split(),
        *_names(resnets, "in_layers.2 emb_layers.1 out_layers.3 skip_connection"),
        *_names(attention, "proj_in proj_out"),
        *_names(blocks, "attn1.to_q attn1.to_k attn1.to_v attn1.to_out.0 ff.net.0.proj ff.net.2"),
        *_names(blocks, "attn2.to_q attn2.to_k attn2.to_v attn2.to_out.0"),
        *(f"input_blocks.{3 * i}.0.op" for i in range(1, last + 1)),
        # The upsampler comes after the attention, where there is one.
        *(f"output_blocks.{3 * i + 2}.{1 + attended[last - i]}.conv" for i in range(last)),
    )


_UNET_ENDS = "time_embed.0 time_embed.2 input_blocks.0.0 out.2"
_STREAM = "attn.qkv attn.proj mlp.fc1 mlp.fc2 adaLN_modulation.1"
# The first block, the last with a second attention, and the last, where the text's stream ends.
_SD3 = (
    *_names("joint_blocks.0.x_block joint_blocks.12.x_block", f"{_STREAM} attn2.qkv attn2.proj"),
    *_names("joint_blocks.23.x_block joint_blocks.0.context_block", _STREAM),
    *_names("joint_blocks.23.context_block", "attn.qkv adaLN_modulation.1"),
    *_names("t_embedder y_embedder", "mlp.0 mlp.2"),
    *_names("final_layer", "linear adaLN_modulation.1"),
    *("x_embedder.proj", "context_embedder"),
)
_DOUBLE = "img_attn.qkv img_attn.proj img_mlp.0 img_mlp.2 img_mod.lin"
_FLUX = (
    *_names("double_blocks.0 double_blocks.1", f"{_DOUBLE} {_DOUBLE.replace('img', 'txt')}"),
    *_names("single_blocks.0 single_blocks.1 single_blocks.2", "linear1 linear2 modulation.lin"),
    *_names("time_in vector_in guidance_in", "in_layer out_layer"),
    *_names("final_layer", "linear adaLN_modulation.1"),
    *("img_in", "txt_in"),
)
_WAN = (
    *_names("blocks.0.self_attn blocks.1.self_attn", "q k v o"),
    *_names("blocks.0.cross_attn blocks.1.cross_attn", "q k v o k_img v_img"),
    *_names("blocks.0 blocks.1", "ffn.0 ffn.2"),
    *_names("time_embedding text_embedding", "0 2"),
    *("time_projection.1", "img_emb.proj.1", "img_emb.proj.3", "head.head"),
)
_QKV = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out"
_QWEN_IMAGE = (
    *_names("transformer_blocks.0.attn transformer_blocks.1.attn", _QKV),
    *_names("transformer_blocks.0 transformer_blocks.1", "img_mod.1 txt_mod.1"),
    *_names("transformer_blocks.0.img_mlp transformer_blocks.1.txt_mlp", "net.0.proj net.2"),
    *_names("time_text_embed.timestep_embedder", "linear_1 linear_2"),
    *("img_in", "txt_in", "norm_out.linear", "proj_out"),
)

_CLIP_L = "text_encoders.clip_l.transformer."
_CLIP_G = "text_encoders.clip_g.transformer."
_TWO_CLIPS = {"text_encoder": ("lora_te1_", _CLIP_L), "text_encoder_2": ("lora_te2_", _CLIP_G)}
CASES: Mapping[str, Case] = {
    "sd15": Case(
        "StableDiffusionLoraLoaderMixin",
        _sd15,
        _unet((True, True, True, False), 1, _UNET_ENDS),
        "convert_ldm_unet_checkpoint",
        {"text_encoder": ("lora_te_", _CLIP_L)},
        flattened="diffusers",
    ),
    "sdxl": Case(
        "StableDiffusionXLLoraLoaderMixin",
        _sdxl,
        _unet((False, True, True), 2, f"{_UNET_ENDS} label_emb.0.0 label_emb.0.2"),
        "convert_ldm_unet_checkpoint",
        _TWO_CLIPS,
    ),
    "sd3": Case(
        "SD3LoraLoaderMixin", _sd3, _SD3, "convert_sd3_transformer_checkpoint_to_diffusers", _TWO_CLIPS
    ),
    "flux": Case(
        "FluxLoraLoaderMixin",
        _flux,
        _FLUX,
        "convert_flux_transformer_checkpoint_to_diffusers",
        {"text_encoder": ("lora_te1_", _CLIP_L)},
    ),
    "wan": Case("WanLoraLoaderMixin", _wan, _WAN, "convert_wan_transformer_to_diffusers"),
    "qwen_image": Case("QwenImageLoraLoaderMixin", _qwen_image, _QWEN_IMAGE),
}
