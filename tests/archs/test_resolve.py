"""Names as files spell them, one by one, and the errors of look-ups."""

import pytest

from loratools import archs
from loratools.archs import Resolved
from loratools.archs._table import DIFFUSERS, NATIVE
from loratools.errors import ArchitectureError, LoraError
from loratools.model import Rows

THIRDS = [Rows(((place, place + 1),), of=3) for place in range(3)]
LINEAR1 = [*(Rows(((place, place + 1),), of=7) for place in range(3)), Rows(((3, 7),), of=7)]


@pytest.mark.parametrize(
    ("name", "stem", "resolved"),
    [
        (
            "sdxl",
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
            ("denoiser", "input_blocks.4.1.transformer_blocks.0.attn1.to_q", None, NATIVE, "lora_unet_", "_"),
        ),
        (
            "sdxl",
            "unet.up_blocks.0.attentions.2.transformer_blocks.9.ff.net.0.proj",
            (
                "denoiser",
                "output_blocks.2.1.transformer_blocks.9.ff.net.0.proj",
                None,
                DIFFUSERS,
                "unet.",
                ".",
            ),
        ),
        (
            "sd15",
            "lora_unet_down_blocks_1_attentions_0_proj_in",
            ("denoiser", "input_blocks.4.1.proj_in", None, DIFFUSERS, "lora_unet_", "_"),
        ),
        (
            "sd15",
            "down_blocks.0.resnets.0.conv1",
            ("denoiser", "input_blocks.1.0.in_layers.2", None, DIFFUSERS, "", "."),
        ),
        (
            "sd15",
            "unet.down_blocks_0_resnets_0_conv1",
            ("denoiser", "input_blocks.1.0.in_layers.2", None, DIFFUSERS, "unet.", "_"),
        ),
        ("sd15", "lora_unet_conv_in", ("denoiser", "input_blocks.0.0", None, DIFFUSERS, "lora_unet_", "_")),
        ("sd15", "unet.conv_in", ("denoiser", "input_blocks.0.0", None, DIFFUSERS, "unet.", ".")),
        (
            "sd15",
            "text_encoder.encoder.layers.3.mlp.fc1",
            (
                "text_encoder",
                "text_model.encoder.layers.3.mlp.fc1",
                None,
                "transformers5",
                "text_encoder.",
                ".",
            ),
        ),
        (
            "sd2",
            "lora_te_text_model_encoder_layers_3_self_attn_k_proj",
            ("text_encoder", "transformer.resblocks.3.attn.in_proj", THIRDS[1], DIFFUSERS, "lora_te_", "_"),
        ),
        (
            "flux",
            "transformer.single_transformer_blocks.0.proj_mlp",
            ("denoiser", "single_blocks.0.linear1", LINEAR1[3], DIFFUSERS, "transformer.", "."),
        ),
        (
            "flux",
            "diffusion_model.double_blocks.0.img_attn.qkv",
            ("denoiser", "double_blocks.0.img_attn.qkv", None, NATIVE, "diffusion_model.", "."),
        ),
        (
            "flux",
            "lora_transformer_transformer_blocks_5_attn_add_v_proj",
            ("denoiser", "double_blocks.5.txt_attn.qkv", THIRDS[2], DIFFUSERS, "lora_transformer_", "_"),
        ),
        (
            "flux",
            "model.diffusion_model.double_blocks.0.img_mlp.0",
            ("denoiser", "double_blocks.0.img_mlp.0", None, NATIVE, "model.diffusion_model.", "."),
        ),
        (
            "flux",
            "lora_te2_encoder_block_1_layer_0_SelfAttention_q",
            ("text_encoder_2", "encoder.block.1.layer.0.SelfAttention.q", None, DIFFUSERS, "lora_te2_", "_"),
        ),
        (
            "sdxl",
            "conditioner.embedders.1.model.transformer.resblocks.4.mlp.c_fc",
            (
                "text_encoder_2",
                "transformer.resblocks.4.mlp.c_fc",
                None,
                NATIVE,
                "conditioner.embedders.1.model.",
                ".",
            ),
        ),
    ],
)
def test_known_names(name, stem, resolved):
    assert archs.get(name).resolve(stem) == Resolved(*resolved)


def test_flux_splits_its_fused_weights_as_diffusers_does():
    flux = archs.get("flux")
    assert flux.pieces("denoiser", "double_blocks.7.img_attn.qkv", NATIVE) == (None,)
    assert flux.pieces("denoiser", "double_blocks.7.img_attn.qkv", DIFFUSERS) == tuple(THIRDS)
    assert flux.pieces("denoiser", "single_blocks.7.linear1", DIFFUSERS) == tuple(LINEAR1)
    assert flux.pieces("denoiser", "final_layer.adaLN_modulation.1", DIFFUSERS) == (
        Rows(((1, 2), (0, 1)), of=2),
    )
    assert flux.spell("denoiser", "double_blocks.7.img_attn.qkv", None, DIFFUSERS) is None
    assert flux.spell("denoiser", "double_blocks.7.img_attn.qkv", THIRDS[0], NATIVE) is None


def test_one_transformer_block_in_stable_diffusion_1_but_any_number_in_xl():
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_1_attn1_to_q"
    assert archs.get("sd15").resolve(stem) is None
    assert archs.get("sdxl").resolve(stem).path == "middle_block.1.transformer_blocks.1.attn1.to_q"


@pytest.mark.parametrize("name", ["llm", "speech", "vision", "unknown"])
@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
@pytest.mark.parametrize("path", ["model.layers.11.self_attn.q_proj", "lm_head", "h#.1", "a.0.b_1"])
def test_without_a_table_a_path_is_its_own_name(name, prefix, path):
    arch = archs.get(name)
    found = arch.resolve(prefix + path)
    assert (found.path, found.rows, found.prefix, found.separator) == (path, None, prefix, ".")
    assert arch.spell(found.component, found.path, None, found.dialect, found.separator) == path
    assert arch.pieces(found.component, path, DIFFUSERS) == (None,)


def test_a_flattened_name_of_an_unknown_architecture_has_no_dotted_spelling():
    unknown = archs.get("unknown")
    found = unknown.resolve("lora_unet_blocks_0_self_attn_q")
    assert (found.path, found.separator) == ("lora_unet_blocks_0_self_attn_q", "_")
    assert unknown.spell(found.component, found.path, None, NATIVE, "_") == found.path
    assert unknown.spell(found.component, found.path, None, NATIVE, ".") is None


def test_prefixes_that_are_written():
    assert archs.get("flux").component("text_encoder_2").prefix("kohya") == "lora_te3_"
    assert archs.get("sdxl").component("denoiser").prefix("diffusers") == "unet."
    assert archs.get("sdxl").component("text_encoder_2").prefix("peft") is None
    assert archs.get("llm").component("language_model").prefix("peft") == "base_model.model."
    assert archs.get("unknown").component("model").prefix("kohya") == ""


def test_an_unknown_architecture_is_an_error_with_near_misses():
    with pytest.raises(ArchitectureError, match=r"Did you mean: sdxl") as caught:
        archs.get("sdlx")
    assert "sdxl" in caught.value.candidates
    assert "sd15" in str(caught.value)


def test_an_unknown_component_is_an_error_that_lists_the_components():
    with pytest.raises(LoraError, match="denoiser, text_encoder, text_encoder_2"):
        archs.get("sdxl").component("text_encoder_3")
