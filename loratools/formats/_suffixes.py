"""Roles as layouts spell them: what is written after a module's name. The inverse of ``_parse``.

Sources: kohya-ss/sd-scripts ``networks/lora.py``, LyCORIS ``lycoris/modules``, PEFT ``utils/save_and_load.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

KOHYA = {"up": "lora_up.weight", "down": "lora_down.weight", "mid": "lora_mid.weight"}

PEFT = {"up": "lora_B.weight", "down": "lora_A.weight", "up_bias": "lora_B.bias"}
PEFT_EMBEDDING = {"up": "lora_embedding_B", "down": "lora_embedding_A"}

LOKR = {
    "lokr_w1": "lokr_w1",
    "lokr_w1_a": "lokr_w1_a",
    "lokr_w1_b": "lokr_w1_b",
    "lokr_w2": "lokr_w2",
    "lokr_w2_a": "lokr_w2_a",
    "lokr_w2_b": "lokr_w2_b",
    "lokr_t2": "lokr_t2",
}

# What LyCORIS adds to up, down and mid, whichever way those are spelt.
LYCORIS: Mapping[str, str] = {
    **LOKR,
    "hada_w1_a": "hada_w1_a",
    "hada_w1_b": "hada_w1_b",
    "hada_w2_a": "hada_w2_a",
    "hada_w2_b": "hada_w2_b",
    "hada_t1": "hada_t1",
    "hada_t2": "hada_t2",
    "oft_blocks": "oft_blocks",
    "oft_diag": "oft_diag",
    "rescale": "rescale",
    "glora_a1": "a1.weight",
    "glora_a2": "a2.weight",
    "glora_b1": "b1.weight",
    "glora_b2": "b2.weight",
    "glora_bm": "bm.weight",
    "ia3_weight": "weight",
    "on_input": "on_input",
    "diff": "diff",
    "diff_b": "diff_b",
    "w_norm": "w_norm",
    "b_norm": "b_norm",
    "bias_indices": "bias_indices",
    "bias_values": "bias_values",
    "bias_size": "bias_size",
    "scalar": "scalar",
}

# The second generation of OFT, which OneTrainer saves beside names like Kohya's.
OFT_R = {"oft_r": "oft_R.weight"}

# Kinds that are made of these roles; stacked experts have an up and a down too, of another shape.
LYCORIS_KINDS = frozenset(("lora", "loha", "lokr", "oft", "glora", "ia3", "full"))

# PEFT's methods other than LoRA.
PEFT_METHODS: Mapping[str, str] = {
    **LOKR,
    **{role: role for role in LYCORIS if role.startswith("hada_")},
    **OFT_R,
    "ia3_l": "ia3_l",
    "miss_block": "miss_block",
    "vera_lambda_b": "vera_lambda_b",
    "vera_lambda_d": "vera_lambda_d",
    "vblora_logits_a": "vblora_logits_A",
    "vblora_logits_b": "vblora_logits_B",
    "vblora_indices_a": "vblora_logits_A_topk_indices",
    "vblora_weights_a": "vblora_logits_A_topk_weights",
    "vblora_indices_b": "vblora_logits_B_topk_indices",
    "vblora_weights_b": "vblora_logits_B_topk_weights",
    "unilora_indices_a": "unilora_indices_A",
    "unilora_indices_b": "unilora_indices_B",
    "unilora_scales_a": "unilora_scales_A",
    "unilora_scales_b": "unilora_scales_B",
}
# What all modules of a method share, which lies beside the model.
PEFT_SHARED: Mapping[str, str] = {
    "vera_a": "vera_A",
    "vera_b": "vera_B",
    "vblora_bank": "vblora_vector_bank",
    "unilora_theta": "unilora_theta_d",
}
