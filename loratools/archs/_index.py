"""What detection knows of every architecture before it imports one.

Written by ``python -m tests.archs.render_index``; a test holds it to the architectures' files. Adding an
architecture is adding its file and running that.
"""

# fmt: off

from __future__ import annotations

from loratools.archs._entry import Ends, Entry, Reading

_ANIMA_DENOISER: Ends = (
    ("blocks", "final_layer_adaln_modulation", "final_layer_linear", "norm_out_linear", "patch_embed_proj",
     "proj_out", "t_embedder", "t_embedding_norm", "time_embed_norm", "time_embed_t_embedder_linear",
     "transformer_blocks", "x_embedder_proj"),
    ("0", "k", "layer1", "layer2", "linear", "norm", "out", "proj", "q", "v"),
)
_ANIMA_TEXT_CONDITIONER: Ends = (
    ("blocks", "embed", "norm", "out_proj"),
    ("0", "attn", "embed", "mlp", "norm", "proj"),
)
_ANIMA_TEXT_ENCODER: Ends = (
    ("embed_tokens", "layers", "norm"),
    ("layernorm", "norm", "proj", "tokens"),
)
_AURAFLOW_DENOISER: Ends = (
    ("cond_seq_linear", "context_embedder", "double_layers", "final_linear", "init_x_linear",
     "joint_transformer_blocks", "modF", "norm_out_linear", "pos_embed_pos_embed", "pos_embed_proj",
     "positional_encoding", "proj_out", "register_tokens", "single_layers", "single_transformer_blocks",
     "t_embedder_mlp", "time_step_proj_linear"),
    ("0", "embed", "embedder", "encoding", "fc1", "fc2", "k", "linear", "out", "proj", "projection", "q",
     "tokens", "v", "w1k", "w1o", "w1q", "w1v", "w2k", "w2o", "w2q", "w2v"),
)
_CHROMA_DENOISER: Ends = (
    ("context_embedder", "distilled_guidance_layer_in_proj", "distilled_guidance_layer_layers",
     "distilled_guidance_layer_norms", "distilled_guidance_layer_out_proj", "double_blocks",
     "final_layer_linear", "img_in", "proj_out", "single_blocks", "single_transformer_blocks",
     "transformer_blocks", "txt_in", "x_embedder"),
    ("0", "embedder", "in", "k", "layer", "linear", "linear1", "linear2", "mlp", "norm", "out", "proj", "q",
     "qkv", "v"),
)
_CHROMA_TEXT_ENCODER: Ends = (
    ("encoder_block", "encoder_embed_tokens", "encoder_final_layer_norm", "shared"),
    ("0", "bias", "k", "norm", "o", "q", "shared", "tokens", "v", "wo"),
)
_COGVIDEOX_DENOISER: Ends = (
    ("mixins_adaln_layer_adaLN_modulations", "mixins_adaln_layer_key_layernorm_list",
     "mixins_adaln_layer_query_layernorm_list", "mixins_final_layer_adaLN_modulation",
     "mixins_final_layer_linear", "mixins_final_layer_norm_final", "mixins_patch_embed_proj",
     "mixins_patch_embed_text_proj", "mixins_pos_embed_pos_embedding", "norm_final", "norm_out_linear",
     "norm_out_norm", "ofs_embed", "ofs_embedding_linear", "patch_embed_pos_embedding", "patch_embed_proj",
     "patch_embed_text_proj", "proj_out", "time_embed", "time_embedding_linear", "transformer_blocks",
     "transformer_final_layernorm", "transformer_layers"),
    ("0", "4h", "dense", "embedding", "final", "h", "k", "layernorm", "linear", "norm", "out", "proj", "q",
     "v", "value"),
)
_FLUX_DENOISER: Ends = (
    ("context_embedder", "double_blocks", "final_layer_adaLN_modulation", "final_layer_linear",
     "guidance_in_in_layer", "guidance_in_out_layer", "img_in", "norm_out_linear", "proj_out",
     "single_blocks", "single_transformer_blocks", "time_in_in_layer", "time_in_out_layer",
     "time_text_embed_guidance_embedder_linear", "time_text_embed_text_embedder_linear",
     "time_text_embed_timestep_embedder_linear", "transformer_blocks", "txt_in", "vector_in_in_layer",
     "vector_in_out_layer", "x_embedder"),
    ("0", "embedder", "in", "k", "layer", "lin", "linear", "linear1", "linear2", "lora", "lora1", "lora2",
     "mlp", "norm", "out", "proj", "q", "qkv", "v"),
)
_FLUX_TEXT_ENCODER: Ends = (
    ("embeddings_position_embedding", "embeddings_token_embedding", "encoder_layers", "final_layer_norm",
     "text_model_embeddings_position_embedding", "text_model_embeddings_token_embedding",
     "text_model_encoder_layers", "text_model_final_layer_norm"),
    ("embedding", "fc1", "fc2", "norm", "norm1", "norm2", "proj"),
)
_FLUX2_DENOISER: Ends = (
    ("context_embedder", "double_blocks", "double_stream_modulation_img_lin",
     "double_stream_modulation_img_linear", "double_stream_modulation_txt_lin",
     "double_stream_modulation_txt_linear", "final_layer_adaLN_modulation", "final_layer_linear",
     "guidance_in_in_layer", "guidance_in_out_layer", "img_in", "norm_out_linear", "proj_out",
     "single_blocks", "single_stream_modulation_lin", "single_stream_modulation_linear",
     "single_transformer_blocks", "time_guidance_embed_guidance_embedder_linear",
     "time_guidance_embed_timestep_embedder_linear", "time_in_in_layer", "time_in_out_layer",
     "transformer_blocks", "txt_in", "x_embedder"),
    ("0", "embedder", "in", "k", "layer", "lin", "linear", "linear1", "linear2", "norm", "out", "proj", "q",
     "qkv", "v"),
)
_FLUX3_DENOISER: Ends = (
    ("content_mode_blocks", "content_mode_blocks_image", "content_mode_blocks_image_cond",
     "context_embedder", "early_stream_modulations_image_cond_lin",
     "early_stream_modulations_image_cond_linear", "early_stream_modulations_image_lin",
     "early_stream_modulations_image_linear", "early_stream_modulations_txt_lin",
     "early_stream_modulations_txt_linear", "emb_in_image", "emb_in_image_cond",
     "final_layer_image_adaLN_modulation", "final_layer_image_linear", "mode_blocks", "mode_blocks_image",
     "mode_blocks_image_cond", "norm_out_linear", "proj_out", "ref_time_in_in_layer",
     "ref_time_in_out_layer", "single_blocks", "single_stream_modulations_image_cond_lin",
     "single_stream_modulations_image_cond_linear", "single_stream_modulations_image_lin",
     "single_stream_modulations_image_linear", "single_stream_modulations_txt_lin",
     "single_stream_modulations_txt_linear", "single_transformer_blocks", "target_timestep_embedder_linear",
     "time_in_in_layer", "time_in_out_layer", "timestep_embedder_linear", "txt_in", "txt_mode_blocks",
     "x_embedders_image", "x_embedders_image_cond"),
    ("0", "cond", "embedder", "image", "in", "k", "layer", "lin", "linear", "norm", "out", "proj", "q", "v"),
)
_HIDREAM_DENOISER: Ends = (
    ("caption_projection", "double_stream_blocks", "final_layer_adaLN_modulation", "final_layer_linear",
     "p_embedder_pooled_embedder_linear", "single_stream_blocks", "t_embedder_timestep_embedder_linear",
     "x_embedder_proj"),
    ("0", "gate", "k", "linear", "norm", "out", "proj", "q", "t", "v", "w1", "w2", "w3"),
)
_HIDREAM_TEXT_ENCODER_4: Ends = (
    ("lm_head", "model_embed_tokens", "model_layers", "model_norm"),
    ("head", "layernorm", "norm", "proj", "tokens"),
)
_HUNYUAN_DIT_DENOISER: Ends = (
    ("blocks", "extra_embedder", "final_layer_adaLN_modulation", "final_layer_linear", "mlp_t5",
     "norm_out_linear", "pooler_c_proj", "pooler_k_proj", "pooler_positional_embedding", "pooler_q_proj",
     "pooler_v_proj", "pos_embed_proj", "proj_out", "t_embedder_mlp", "text_embedder_linear",
     "text_embedding_padding", "time_extra_emb_extra_embedder_linear", "time_extra_emb_pooler_c_proj",
     "time_extra_emb_pooler_k_proj", "time_extra_emb_pooler_positional_embedding",
     "time_extra_emb_pooler_q_proj", "time_extra_emb_pooler_v_proj",
     "time_extra_emb_timestep_embedder_linear", "x_embedder_proj"),
    ("0", "Wqkv", "embedding", "fc1", "fc2", "k", "linear", "norm", "norm1", "norm2", "norm3", "out",
     "padding", "proj", "q", "v"),
)
_HUNYUAN_DIT_TEXT_ENCODER: Ends = (
    ("embeddings_LayerNorm", "embeddings_position_embeddings", "embeddings_token_type_embeddings",
     "embeddings_word_embeddings", "encoder_layer"),
    ("LayerNorm", "dense", "embeddings", "key", "query", "value"),
)
_HUNYUAN_IMAGE_DENOISER: Ends = (
    ("byt5_in_fc1", "byt5_in_fc2", "byt5_in_fc3", "byt5_in_layernorm", "context_embedder",
     "context_embedder_proj_in", "context_embedder_time_text_embed_text_embedder_linear",
     "context_embedder_time_text_embed_timestep_embedder_linear",
     "context_embedder_token_refiner_refiner_blocks", "double_blocks", "final_layer_adaLN_modulation",
     "final_layer_linear", "guidance_in_in_layer", "guidance_in_mlp", "guidance_in_out_layer",
     "img_in_proj", "norm_out_linear", "proj_out", "single_blocks", "single_transformer_blocks",
     "time_guidance_embed_guidance_embedder_linear", "time_guidance_embed_timestep_embedder_linear",
     "time_guidance_embed_timestep_embedder_r_linear", "time_in_in_layer", "time_in_mlp",
     "time_in_out_layer", "time_r_in_in_layer", "time_r_in_mlp", "time_r_in_out_layer",
     "transformer_blocks", "txt_in_c_embedder_in_layer", "txt_in_c_embedder_linear",
     "txt_in_c_embedder_out_layer", "txt_in_individual_token_refiner_blocks", "txt_in_input_embedder",
     "txt_in_t_embedder_in_layer", "txt_in_t_embedder_mlp", "txt_in_t_embedder_out_layer",
     "x_embedder_proj"),
    ("0", "embedder", "fc1", "fc2", "fc3", "in", "k", "layer", "layernorm", "lin", "linear", "linear1",
     "linear2", "mlp", "norm", "norm1", "norm2", "out", "proj", "q", "qkv", "v"),
)
_HUNYUAN_VIDEO_DENOISER: Ends = (
    ("clean_x_embedder_proj", "clean_x_embedder_proj_2x", "clean_x_embedder_proj_4x",
     "context_embedder_proj_in", "context_embedder_time_text_embed_text_embedder_linear",
     "context_embedder_time_text_embed_timestep_embedder_linear",
     "context_embedder_token_refiner_refiner_blocks", "double_blocks", "final_layer_adaLN_modulation",
     "final_layer_linear", "guidance_in_mlp", "image_projection_down", "image_projection_up", "img_in_proj",
     "norm_out_linear", "proj_out", "single_blocks", "single_transformer_blocks", "time_in_mlp",
     "time_text_embed_guidance_embedder_linear", "time_text_embed_text_embedder_linear",
     "time_text_embed_timestep_embedder_linear", "transformer_blocks", "txt_in_c_embedder_linear",
     "txt_in_individual_token_refiner_blocks", "txt_in_input_embedder", "txt_in_t_embedder_mlp",
     "vector_in_in_layer", "vector_in_out_layer", "x_embedder_proj"),
    ("0", "2x", "4x", "down", "embedder", "fc1", "fc2", "in", "k", "layer", "linear", "linear1", "linear2",
     "mlp", "norm", "norm1", "norm2", "out", "proj", "q", "qkv", "up", "v"),
)
_HUNYUAN_VIDEO15_DENOISER: Ends = (
    ("byt5_in_fc1", "byt5_in_fc2", "byt5_in_fc3", "byt5_in_layernorm", "cond_type_embed",
     "cond_type_embedding", "context_embedder", "context_embedder_proj_in",
     "context_embedder_time_text_embed_text_embedder_linear",
     "context_embedder_time_text_embed_timestep_embedder_linear",
     "context_embedder_token_refiner_refiner_blocks", "double_blocks", "final_layer_adaLN_modulation",
     "final_layer_linear", "image_embedder_linear", "image_embedder_norm_in", "image_embedder_norm_out",
     "img_in_proj", "norm_out_linear", "proj_out", "time_embed_timestep_embedder_linear",
     "time_in_in_layer", "time_in_mlp", "time_in_out_layer", "transformer_blocks",
     "txt_in_c_embedder_in_layer", "txt_in_c_embedder_linear", "txt_in_c_embedder_out_layer",
     "txt_in_individual_token_refiner_blocks", "txt_in_input_embedder", "txt_in_t_embedder_in_layer",
     "txt_in_t_embedder_mlp", "txt_in_t_embedder_out_layer", "vision_in_proj", "x_embedder_proj"),
    ("0", "embed", "embedder", "embedding", "fc1", "fc2", "fc3", "in", "k", "layer", "layernorm", "lin",
     "linear", "norm", "norm1", "norm2", "out", "proj", "q", "qkv", "v"),
)
_IDEOGRAM4_DENOISER: Ends = (
    ("adaln_proj", "embed_image_indicator", "final_layer_adaln_modulation", "final_layer_linear",
     "input_proj", "layers", "llm_cond_norm", "llm_cond_proj", "t_embedding_mlp_in", "t_embedding_mlp_out"),
    ("0", "in", "indicator", "k", "linear", "modulation", "norm", "o", "out", "proj", "q", "qkv", "v", "w1",
     "w2", "w3"),
)
_LTX_VIDEO_DENOISER: Ends = (
    ("adaln_single_emb_timestep_embedder_linear", "adaln_single_linear", "caption_projection_linear",
     "patchify_proj", "proj_in", "proj_out", "scale_shift_table", "time_embed_emb_timestep_embedder_linear",
     "time_embed_linear", "transformer_blocks"),
    ("0", "in", "k", "linear", "norm", "out", "proj", "q", "table", "v"),
)
_LUMINA2_DENOISER: Ends = (
    ("cap_embedder", "context_refiner", "final_layer_adaLN_modulation", "final_layer_linear", "layers",
     "noise_refiner", "norm_out_linear", "t_embedder_mlp", "time_caption_embed_caption_embedder",
     "time_caption_embed_timestep_embedder_linear", "x_embedder"),
    ("0", "embedder", "k", "linear", "norm", "norm1", "norm2", "out", "q", "qkv", "v", "w1", "w2", "w3"),
)
_PIXART_DENOISER: Ends = (
    ("adaln_single_emb_aspect_ratio_embedder_linear", "adaln_single_emb_resolution_embedder_linear",
     "adaln_single_emb_timestep_embedder_linear", "adaln_single_linear", "ar_embedder_mlp", "blocks",
     "caption_projection_linear", "csize_embedder_mlp", "final_layer_linear",
     "final_layer_scale_shift_table", "pos_embed_proj", "proj_out", "scale_shift_table", "t_block",
     "t_embedder_mlp", "transformer_blocks", "x_embedder_proj", "y_embedder_y_proj_fc1",
     "y_embedder_y_proj_fc2"),
    ("0", "fc1", "fc2", "k", "linear", "out", "proj", "q", "qkv", "table", "v"),
)
_QWEN_IMAGE_DENOISER: Ends = (
    ("img_in", "norm_out_linear", "proj_out", "time_text_embed_timestep_embedder_linear",
     "transformer_blocks", "txt_in", "txt_norm"),
    ("0", "in", "k", "linear", "norm", "out", "proj", "q", "v"),
)
_QWEN_IMAGE_TEXT_ENCODER: Ends = (
    ("model_embed_tokens", "model_language_model_embed_tokens", "model_language_model_layers",
     "model_language_model_norm", "model_layers", "model_norm"),
    ("layernorm", "norm", "proj", "tokens"),
)
_SANA_DENOISER: Ends = (
    ("attention_y_norm", "blocks", "caption_norm", "caption_projection_linear", "final_layer_linear",
     "final_layer_scale_shift_table", "patch_embed_proj", "proj_out", "scale_shift_table", "t_block",
     "t_embedder_mlp", "time_embed_emb_timestep_embedder_linear", "time_embed_linear", "transformer_blocks",
     "x_embedder_proj", "y_embedder_y_proj_fc1", "y_embedder_y_proj_fc2"),
    ("0", "conv", "depth", "fc1", "fc2", "inverted", "k", "linear", "norm", "out", "point", "proj", "q",
     "qkv", "table", "v"),
)
_SD15_DENOISER: Ends = (
    ("conv_in", "conv_norm_out", "conv_out", "down_blocks", "input_blocks", "mid_block_attentions",
     "mid_block_resnets", "middle_block", "out", "output_blocks", "time_embed", "time_embedding_linear",
     "up_blocks"),
    ("0", "connection", "conv", "conv1", "conv2", "in", "k", "norm", "norm1", "norm2", "norm3", "op", "out",
     "proj", "q", "shortcut", "v"),
)
_SD2_TEXT_ENCODER: Ends = (
    ("embeddings_position_embedding", "embeddings_token_embedding", "encoder_layers", "final_layer_norm",
     "ln_final", "positional_embedding", "text_model_embeddings_position_embedding",
     "text_model_embeddings_token_embedding", "text_model_encoder_layers", "text_model_final_layer_norm",
     "text_projection", "token_embedding", "transformer_resblocks"),
    ("0", "embedding", "fc", "fc1", "fc2", "final", "norm", "norm1", "norm2", "proj", "projection"),
)
_SD3_DENOISER: Ends = (
    ("context_embedder", "final_layer_adaLN_modulation", "final_layer_linear", "joint_blocks",
     "norm_out_linear", "pos_embed", "pos_embed_pos_embed", "pos_embed_proj", "proj_out", "t_embedder_mlp",
     "time_text_embed_text_embedder_linear", "time_text_embed_timestep_embedder_linear",
     "transformer_blocks", "x_embedder_proj", "y_embedder_mlp"),
    ("0", "embed", "embedder", "fc1", "fc2", "k", "linear", "out", "proj", "q", "qkv", "v"),
)
_SD3_TEXT_ENCODER: Ends = (
    ("embeddings_position_embedding", "embeddings_token_embedding", "encoder_layers", "final_layer_norm",
     "text_model_embeddings_position_embedding", "text_model_embeddings_token_embedding",
     "text_model_encoder_layers", "text_model_final_layer_norm", "text_projection"),
    ("embedding", "fc1", "fc2", "norm", "norm1", "norm2", "proj", "projection"),
)
_SDXL_DENOISER: Ends = (
    ("add_embedding_linear", "conv_in", "conv_norm_out", "conv_out", "down_blocks", "input_blocks",
     "label_emb", "mid_block_attentions", "mid_block_resnets", "middle_block", "out", "output_blocks",
     "time_embed", "time_embedding_linear", "up_blocks"),
    ("0", "connection", "conv", "conv1", "conv2", "in", "k", "norm", "norm1", "norm2", "norm3", "op", "out",
     "proj", "q", "shortcut", "v"),
)
_STABLE_CASCADE_DENOISER: Ends = (
    ("clf", "clip_img_mapper", "clip_txt_mapper", "clip_txt_pooled_mapper", "down_blocks",
     "down_downscalers", "embedding", "up_blocks", "up_upscalers"),
    ("0", "beta", "crp", "depthwise", "gamma", "k", "mapper", "proj", "q", "sca", "v"),
)
_WAN_DENOISER: Ends = (
    ("blocks", "condition_embedder_image_embedder_ff_net", "condition_embedder_image_embedder_norm1",
     "condition_embedder_image_embedder_norm2", "condition_embedder_text_embedder_linear",
     "condition_embedder_time_embedder_linear", "condition_embedder_time_proj", "head_head",
     "head_modulation", "img_emb_proj", "patch_embedding", "proj_out", "scale_shift_table",
     "text_embedding", "time_embedding", "time_projection", "vace_blocks", "vace_patch_embedding"),
    ("0", "embedding", "head", "img", "in", "k", "modulation", "norm1", "norm2", "norm3", "o", "out",
     "proj", "q", "table", "v"),
)
_Z_IMAGE_DENOISER: Ends = (
    ("all_final_layer_2-1_adaLN_modulation", "all_final_layer_2-1_linear", "all_x_embedder_2-1",
     "cap_embedder", "cap_pad_token", "context_refiner", "final_layer_adaLN_modulation",
     "final_layer_linear", "layers", "noise_refiner", "t_embedder_mlp", "x_embedder", "x_pad_token"),
    ("0", "2-1", "embedder", "k", "linear", "norm", "norm1", "norm2", "out", "q", "qkv", "token", "v", "w1",
     "w2", "w3"),
)

INDEX: dict[str, Entry] = {
    "anima": Entry(
        name="anima",
        readings=(
            Reading(
                prefixes=("", "base_model_model_", "diffusion_model_", "lora_transformer_", "lora_unet_",
                          "lycoris_", "model_diffusion_model_", "net_", "transformer_"),
                ends=_ANIMA_DENOISER,
            ),
            Reading(
                prefixes=("base_model_model_llm_adapter_", "diffusion_model_llm_adapter_", "llm_adapter_",
                          "lora_transformer_llm_adapter_", "lora_unet_llm_adapter_", "lycoris_llm_adapter_",
                          "model_diffusion_model_llm_adapter_", "net_llm_adapter_", "text_conditioner_"),
                ends=_ANIMA_TEXT_CONDITIONER,
            ),
            Reading(
                prefixes=("lora_te_", "text_encoder_", "text_encoders_qwen3_06b_transformer_model_"),
                ends=_ANIMA_TEXT_ENCODER,
            ),
        ),
        kohya_versions=("anima",),
        modelspec=("anima-preview",),
        base_models=("circlestone-labs-anima", "anima-preview"),
        markers=(),
    ),
    "auraflow": Entry(
        name="auraflow",
        readings=(
            Reading(
                prefixes=("", "base_model_model_", "diffusion_model_", "lora_transformer_", "lora_unet_",
                          "lycoris_", "model_diffusion_model_", "transformer_"),
                ends=_AURAFLOW_DENOISER,
            ),
        ),
        kohya_versions=(),
        modelspec=(),
        base_models=("auraflow", "aura-flow"),
        markers=(),
    ),
    "chroma": Entry(
        name="chroma",
        readings=(
            Reading(
                prefixes=("", "base_model_model_", "diffusion_model_", "lora_transformer_", "lora_unet_",
                          "lycoris_", "model_diffusion_model_", "transformer_"),
                ends=_CHROMA_DENOISER,
            ),
            Reading(
                prefixes=("base_model_model_", "lora_te1_", "lora_te3_", "lora_te_", "text_encoder_",
                          "text_encoders_t5xxl_transformer_"),
                ends=_CHROMA_TEXT_ENCODER,
            ),
        ),
        kohya_versions=("chroma",),
        modelspec=("chroma",),
        base_models=("chroma",),
        markers=(),
    ),
    "cogvideox": Entry(
        name="cogvideox",
        readings=(
            Reading(
                prefixes=("", "base_model_model_", "diffusion_model_", "lora_transformer_", "lora_unet_",
                          "lycoris_", "model_diffusion_model_", "transformer_"),
                ends=_COGVIDEOX_DENOISER,
            ),
        ),
        kohya_versions=(),
        modelspec=(),
        base_models=("cogvideox", "cogvideo"),
        markers=(),
    ),
    "flux": Entry(
        name="flux",
        readings=(
            Reading(
                prefixes=("", "base_model_model_", "diffusion_model_", "lora_transformer_", "lora_unet_",
                          "lycoris_", "model_diffusion_model_", "transformer_"),
                ends=_FLUX_DENOISER,
            ),
            Reading(
                prefixes=("base_model_model_", "lora_te1_", "lora_te_", "text_encoder_",
                          "text_encoders_clip_l_transformer_"),
                ends=_FLUX_TEXT_ENCODER,
            ),
            Reading(
                prefixes=("lora_te2_", "lora_te3_", "text_encoder_0_", "text_encoders_t5xxl_transformer_"),
                ends=_CHROMA_TEXT_ENCODER,
            ),
        ),
        kohya_versions=("flux1", "flux.1", "flux1-dev", "flux1-schnell", "flux_kontext"),
        modelspec=("flux-1-dev", "flux-1-schnell", "flux.1-dev", "flux.1-schnell", "flux-1-dev-kontext"),
        base_models=("flux-1", "flux1", "flux"),
        markers=(),
    ),
    "flux2": Entry(
        name="flux2",
        readings=(
            Reading(
                prefixes=("", "base_model_model_", "diffusion_model_", "lora_transformer_", "lora_unet_",
                          "lycoris_", "model_diffusion_model_", "transformer_"),
                ends=_FLUX2_DENOISER,
            ),
        ),
        kohya_versions=("flux_2_dev", "flux_2_klein_9b", "flux_2_klein_4b", "flux2"),
        modelspec=("flux.2-dev", "flux.2-klein-9b", "flux.2-klein-4b"),
        base_models=("flux-2", "flux2"),
        markers=(),
    ),
    "flux3": Entry(
        name="flux3",
        readings=(
            Reading(
                prefixes=("", "base_model_model_", "diffusion_model_", "lora_transformer_", "lora_unet_",
                          "lycoris_", "model_diffusion_model_", "transformer_"),
                ends=_FLUX3_DENOISER,
            ),
        ),
        kohya_versions=(),
        modelspec=(),
        base_models=("flux-3", "flux3"),
        markers=(),
    ),
    "hidream": Entry(
        name="hidream",
        readings=(
            Reading(
                prefixes=("", "base_model_model_", "diffusion_model_", "lora_transformer_", "lora_unet_",
                          "lycoris_", "model_diffusion_model_", "transformer_"),
                ends=_HIDREAM_DENOISER,
            ),
            Reading(
                prefixes=("lora_te1_", "text_encoders_clip_l_transformer_"),
                ends=_FLUX_TEXT_ENCODER,
            ),
            Reading(
                prefixes=("lora_te2_", "text_encoders_clip_g_transformer_"),
                ends=_FLUX_TEXT_ENCODER,
            ),
            Reading(
                prefixes=("lora_te3_", "text_encoders_t5xxl_transformer_"),
                ends=_CHROMA_TEXT_ENCODER,
            ),
            Reading(
                prefixes=("lora_te4_", "text_encoders_llama_transformer_"),
                ends=_HIDREAM_TEXT_ENCODER_4,
            ),
        ),
        kohya_versions=(),
        modelspec=(),
        base_models=("hidream",),
        markers=(),
    ),
    "hunyuan_dit": Entry(
        name="hunyuan_dit",
        readings=(
            Reading(
                prefixes=("", "base_model_model_", "diffusion_model_", "lora_transformer_", "lora_unet_",
                          "lycoris_", "model_diffusion_model_", "transformer_"),
                ends=_HUNYUAN_DIT_DENOISER,
            ),
            Reading(
                prefixes=("lora_te1_", "text_encoder_", "text_encoders_hydit_clip_transformer_bert_"),
                ends=_HUNYUAN_DIT_TEXT_ENCODER,
            ),
        ),
        kohya_versions=(),
        modelspec=(),
        base_models=("hunyuandit", "hunyuan-dit"),
        markers=(),
    ),
    "hunyuan_image": Entry(
        name="hunyuan_image",
        readings=(
            Reading(
                prefixes=("", "base_model_model_", "diffusion_model_", "lora_transformer_", "lora_unet_",
                          "lycoris_", "model_diffusion_model_", "model_model_", "transformer_"),
                ends=_HUNYUAN_IMAGE_DENOISER,
            ),
        ),
        kohya_versions=("hunyuan-image-2.1",),
        modelspec=("hunyuan-image-2.1",),
        base_models=("hunyuanimage-2", "hunyuanimage2", "hunyuan-image-2"),
        markers=(),
    ),
    "hunyuan_video": Entry(
        name="hunyuan_video",
        readings=(
            Reading(
                prefixes=("", "base_model_model_", "diffusion_model_", "lora_transformer_", "lora_unet_",
                          "lycoris_", "model_diffusion_model_", "model_model_", "transformer_"),
                ends=_HUNYUAN_VIDEO_DENOISER,
            ),
            Reading(
                prefixes=("lora_te2_", "text_encoder_0_", "text_encoders_clip_l_transformer_"),
                ends=_FLUX_TEXT_ENCODER,
            ),
        ),
        kohya_versions=("hunyuan_video", "framepack"),
        modelspec=("hunyuan-video", "framepack"),
        base_models=("hunyuanvideo", "hunyuan-video", "framepack", "skyreels-v1"),
        markers=(),
    ),
    "hunyuan_video15": Entry(
        name="hunyuan_video15",
        readings=(
            Reading(
                prefixes=("", "base_model_model_", "diffusion_model_", "lora_transformer_", "lora_unet_",
                          "lycoris_", "model_diffusion_model_", "model_model_", "transformer_"),
                ends=_HUNYUAN_VIDEO15_DENOISER,
            ),
        ),
        kohya_versions=("hunyuan_video_1_5",),
        modelspec=("hunyuan-video-1.5",),
        base_models=("hunyuanvideo-1-5", "hunyuanvideo1-5", "hunyuanvideo15", "hunyuan-video-1-5"),
        markers=(),
    ),
    "ideogram4": Entry(
        name="ideogram4",
        readings=(
            Reading(
                prefixes=("", "base_model_model_", "conditional_transformer_", "diffusion_model_",
                          "lora_transformer_", "lora_unet_", "lycoris_", "model_diffusion_model_",
                          "transformer_"),
                ends=_IDEOGRAM4_DENOISER,
            ),
        ),
        kohya_versions=(),
        modelspec=(),
        base_models=("ideogram-4", "ideogram4"),
        markers=(),
    ),
    "llm": Entry(
        name="llm",
        readings=(),
        kohya_versions=(),
        modelspec=(),
        base_models=(),
        markers=("layers.#.self_attn", "layers.#.mlp", "layers.#.linear_attn", "layers.#.mamba",
                 "layers.#.mixer", "layers.#.block_sparse_moe", "layers.#.feed_forward.experts",
                 "layers.#.fc1", "layers.#.fc2", "decoder.layers.#.encoder_attn", "transformer.h.#",
                 "h.#.attn", "h.#.mlp", "transformer.blocks.#", "transformer.layer.#",
                 "transformer.encoder.layers.#", "gpt_neox.layers.#", "encoder.layer.#", "encoder.block.#",
                 "decoder.block.#", "attention.wqkv", "lm_head"),
    ),
    "ltx_video": Entry(
        name="ltx_video",
        readings=(
            Reading(
                prefixes=("", "base_model_model_", "diffusion_model_", "lora_transformer_", "lora_unet_",
                          "lycoris_", "model_diffusion_model_", "transformer_"),
                ends=_LTX_VIDEO_DENOISER,
            ),
        ),
        kohya_versions=(),
        modelspec=(),
        base_models=("ltx-video", "ltxv"),
        markers=(),
    ),
    "lumina2": Entry(
        name="lumina2",
        readings=(
            Reading(
                prefixes=("", "base_model_model_", "diffusion_model_", "lora_transformer_", "lora_unet_",
                          "lycoris_", "model_diffusion_model_", "transformer_"),
                ends=_LUMINA2_DENOISER,
            ),
            Reading(
                prefixes=("lora_te_", "text_encoder_", "text_encoders_gemma2_2b_transformer_model_"),
                ends=_ANIMA_TEXT_ENCODER,
            ),
        ),
        kohya_versions=("lumina2",),
        modelspec=("lumina-2",),
        base_models=("lumina-image-2", "lumina2", "lumina-2"),
        markers=(),
    ),
    "pixart": Entry(
        name="pixart",
        readings=(
            Reading(
                prefixes=("", "base_model_model_", "diffusion_model_", "lora_transformer_", "lora_unet_",
                          "lycoris_", "model_diffusion_model_", "transformer_"),
                ends=_PIXART_DENOISER,
            ),
            Reading(
                prefixes=("lora_te1_", "lora_te_", "text_encoder_", "text_encoders_t5xxl_transformer_"),
                ends=_CHROMA_TEXT_ENCODER,
            ),
        ),
        kohya_versions=(),
        modelspec=(),
        base_models=("pixart",),
        markers=(),
    ),
    "qwen_image": Entry(
        name="qwen_image",
        readings=(
            Reading(
                prefixes=("", "base_model_model_", "diffusion_model_", "lora_transformer_", "lora_unet_",
                          "lycoris_", "model_diffusion_model_", "transformer_"),
                ends=_QWEN_IMAGE_DENOISER,
            ),
            Reading(
                prefixes=("lora_te_", "text_encoder_", "text_encoders_qwen25_7b_transformer_"),
                ends=_QWEN_IMAGE_TEXT_ENCODER,
            ),
        ),
        kohya_versions=("qwen_image", "qwen_image_edit", "qwen_image_layered"),
        modelspec=(),
        base_models=("qwen-image",),
        markers=(),
    ),
    "sana": Entry(
        name="sana",
        readings=(
            Reading(
                prefixes=("", "base_model_model_", "diffusion_model_", "lora_transformer_", "lora_unet_",
                          "lycoris_", "model_diffusion_model_", "transformer_"),
                ends=_SANA_DENOISER,
            ),
            Reading(
                prefixes=("lora_te_", "text_encoder_"),
                ends=_ANIMA_TEXT_ENCODER,
            ),
        ),
        kohya_versions=(),
        modelspec=(),
        base_models=("sana-", "sana1-"),
        markers=(),
    ),
    "sd15": Entry(
        name="sd15",
        readings=(
            Reading(
                prefixes=("", "base_model_model_", "diffusion_model_", "lora_unet_", "lora_unet_unet_",
                          "lycoris_", "model_diffusion_model_", "unet_"),
                ends=_SD15_DENOISER,
            ),
            Reading(
                prefixes=("base_model_model_", "cond_stage_model_transformer_", "lora_te_", "text_encoder_",
                          "text_encoders_clip_l_transformer_"),
                ends=_FLUX_TEXT_ENCODER,
            ),
        ),
        kohya_versions=("sd_v1", "sd_1.5", "sd_v1.5"),
        modelspec=("stable-diffusion-v1",),
        base_models=("stable-diffusion-v1", "stable-diffusion-1", "sd-v1", "sd-1-5", "sd1-5", "sd15",
                     "v1-5-pruned"),
        markers=(),
    ),
    "sd2": Entry(
        name="sd2",
        readings=(
            Reading(
                prefixes=("", "base_model_model_", "diffusion_model_", "lora_unet_", "lora_unet_unet_",
                          "lycoris_", "model_diffusion_model_", "unet_"),
                ends=_SD15_DENOISER,
            ),
            Reading(
                prefixes=("base_model_model_", "cond_stage_model_model_", "lora_te_", "text_encoder_",
                          "text_encoders_clip_h_transformer_"),
                ends=_SD2_TEXT_ENCODER,
            ),
        ),
        kohya_versions=("sd_v2", "sd_v2_v", "sd_2.0", "sd_2.1"),
        modelspec=("stable-diffusion-v2-512", "stable-diffusion-v2-768-v"),
        base_models=("stable-diffusion-2", "stable-diffusion-v2", "sd-2-", "sd2-", "sd21", "v2-1-768",
                     "v2-1-512"),
        markers=(),
    ),
    "sd3": Entry(
        name="sd3",
        readings=(
            Reading(
                prefixes=("", "base_model_model_", "diffusion_model_", "lora_transformer_", "lora_unet_",
                          "lycoris_", "model_diffusion_model_", "transformer_"),
                ends=_SD3_DENOISER,
            ),
            Reading(
                prefixes=("base_model_model_", "lora_te1_", "text_encoder_",
                          "text_encoders_clip_l_transformer_"),
                ends=_SD3_TEXT_ENCODER,
            ),
            Reading(
                prefixes=("lora_te2_", "text_encoder_0_", "text_encoders_clip_g_transformer_"),
                ends=_SD3_TEXT_ENCODER,
            ),
            Reading(
                prefixes=("base_model_model_", "lora_te3_", "text_encoder_0_",
                          "text_encoders_t5xxl_transformer_"),
                ends=_CHROMA_TEXT_ENCODER,
            ),
        ),
        kohya_versions=("3-medium", "3-5-medium"),
        modelspec=("stable-diffusion-3-m", "stable-diffusion-3-medium", "stable-diffusion-3-5-medium"),
        base_models=("stable-diffusion-3", "sd3"),
        markers=(),
    ),
    "sd35_large": Entry(
        name="sd35_large",
        readings=(
            Reading(
                prefixes=("", "base_model_model_", "diffusion_model_", "lora_transformer_", "lora_unet_",
                          "lycoris_", "model_diffusion_model_", "transformer_"),
                ends=_SD3_DENOISER,
            ),
            Reading(
                prefixes=("base_model_model_", "lora_te1_", "text_encoder_",
                          "text_encoders_clip_l_transformer_"),
                ends=_SD3_TEXT_ENCODER,
            ),
            Reading(
                prefixes=("lora_te2_", "text_encoder_0_", "text_encoders_clip_g_transformer_"),
                ends=_SD3_TEXT_ENCODER,
            ),
            Reading(
                prefixes=("base_model_model_", "lora_te3_", "text_encoder_0_",
                          "text_encoders_t5xxl_transformer_"),
                ends=_CHROMA_TEXT_ENCODER,
            ),
        ),
        kohya_versions=("3-5-large",),
        modelspec=("stable-diffusion-3-5-large",),
        base_models=("stable-diffusion-3-5-large", "sd3-5-large"),
        markers=(),
    ),
    "sdxl": Entry(
        name="sdxl",
        readings=(
            Reading(
                prefixes=("", "base_model_model_", "diffusion_model_", "lora_unet_", "lora_unet_unet_",
                          "lycoris_", "model_diffusion_model_", "unet_"),
                ends=_SDXL_DENOISER,
            ),
            Reading(
                prefixes=("base_model_model_", "conditioner_embedders_0_transformer_", "lora_te1_",
                          "text_encoder_", "text_encoders_clip_l_transformer_"),
                ends=_FLUX_TEXT_ENCODER,
            ),
            Reading(
                prefixes=("conditioner_embedders_0_model_", "lora_te2_", "text_encoder_0_",
                          "text_encoders_clip_g_transformer_"),
                ends=_SD2_TEXT_ENCODER,
            ),
        ),
        kohya_versions=("sdxl_base_v1-0", "sdxl_base_v0-9", "sdxl_1.0", "sdxl"),
        modelspec=("stable-diffusion-xl-v1-base", "stable-diffusion-xl-v0-9-base"),
        base_models=("stable-diffusion-xl", "sdxl", "sd-xl"),
        markers=(),
    ),
    "speech": Entry(
        name="speech",
        readings=(),
        kohya_versions=(),
        modelspec=(),
        base_models=("whisper", "wav2vec2", "hubert", "wavlm", "mms-", "speecht5", "seamless", "s2t-"),
        markers=("decoder.layers.#.encoder_attn", "layers.#.self_attn", "layers.#.fc1", "layers.#.fc2",
                 "encoder.conv1", "encoder.conv2", "wav2vec2.encoder.layers.#",
                 "wav2vec2.feature_projection", "wav2vec2_bert.encoder.layers.#", "hubert.encoder.layers.#",
                 "wavlm.encoder.layers.#", "speech_encoder.encoder.layers.#"),
    ),
    "stable_cascade": Entry(
        name="stable_cascade",
        readings=(
            Reading(
                prefixes=("", "base_model_model_", "diffusion_model_", "lora_prior_unet_", "lora_unet_",
                          "lycoris_", "model_diffusion_model_", "prior_"),
                ends=_STABLE_CASCADE_DENOISER,
            ),
            Reading(
                prefixes=("lora_prior_te_", "text_encoder_", "text_encoders_clip_g_transformer_"),
                ends=_FLUX_TEXT_ENCODER,
            ),
        ),
        kohya_versions=(),
        modelspec=(),
        base_models=("stable-cascade", "stablecascade"),
        markers=(),
    ),
    "unknown": Entry(
        name="unknown",
        readings=(),
        kohya_versions=(),
        modelspec=(),
        base_models=(),
        markers=(),
    ),
    "vision": Entry(
        name="vision",
        readings=(),
        kohya_versions=(),
        modelspec=(),
        base_models=("vit-", "siglip", "clip-", "dinov2", "dinov3", "deit", "beit", "swin", "segformer"),
        markers=("vision_model.encoder.layers.#", "text_model.encoder.layers.#", "vision_model.embeddings",
                 "vit.encoder.layer.#", "vit.layers.#.attention", "vit.layers.#.mlp",
                 "deit.encoder.layer.#", "beit.encoder.layer.#", "dinov2.encoder.layer.#",
                 "swin.encoder.layers.#", "segformer.encoder.block.#", "convnext.encoder.stages.#",
                 "image_encoder.blocks.#", "patch_embed.proj"),
    ),
    "wan": Entry(
        name="wan",
        readings=(
            Reading(
                prefixes=("", "base_model_model_", "diffusion_model_", "lora_transformer_", "lora_unet_",
                          "lycoris_", "model_diffusion_model_", "transformer_", "transformer_0_"),
                ends=_WAN_DENOISER,
            ),
        ),
        kohya_versions=("wan",),
        modelspec=(),
        base_models=("wan-ai", "wan2", "wan-2"),
        markers=(),
    ),
    "z_image": Entry(
        name="z_image",
        readings=(
            Reading(
                prefixes=("", "base_model_model_", "diffusion_model_", "lora_transformer_", "lora_unet_",
                          "lycoris_", "model_diffusion_model_", "transformer_"),
                ends=_Z_IMAGE_DENOISER,
            ),
        ),
        kohya_versions=("z_image",),
        modelspec=(),
        base_models=("z-image", "zimage"),
        markers=(),
    ),
}
