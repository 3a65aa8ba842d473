"""Factor suffixes: how the layouts spell a tensor's role, independently of prefix and module path.

``split("lora_unet_mid_block.lora_down.weight")`` is the stem ``lora_unet_mid_block``, the role ``down`` and the
style ``kohya``. Roles are meanings shared by all layouts; a style is the spelling family that was seen.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Suffix(NamedTuple):
    """One spelling of one role.

    Attributes:
        role: What the tensor is ("up", "down", "alpha", "hada_w1_a", …).
        style: The spelling family ("kohya", "peft", "updown", …).
    """

    role: str
    style: str


class Part(NamedTuple):
    """A key taken apart.

    Attributes:
        stem: The key without its suffix.
        suffix: Role and style.
        adapter: The adapter's name where a raw state dict left it inside the key, else empty.
    """

    stem: str
    suffix: Suffix
    adapter: str = ""


# What follows the last dot of the stem. Rows are (spelling, role, style).
_TAILS: tuple[tuple[str, str, str], ...] = (
    ("lora_down.weight", "down", "kohya"),
    ("lora_up.weight", "up", "kohya"),
    ("lora_mid.weight", "mid", "kohya"),
    ("dora_scale", "magnitude", "kohya"),
    ("alpha", "alpha", ""),
    ("scalar", "scalar", ""),
    ("lora_A.weight", "down", "peft"),
    ("lora_B.weight", "up", "peft"),
    ("lora_B.bias", "up_bias", "peft"),
    ("lora_embedding_A", "embedding_down", "peft"),
    ("lora_embedding_B", "embedding_up", "peft"),
    ("lora_embedding_A.weight", "embedding_down", "peft"),
    ("lora_embedding_B.weight", "embedding_up", "peft"),
    ("lora_magnitude_vector", "magnitude", "peft"),
    ("lora_magnitude_vector.weight", "magnitude", "peft"),
    ("magnitude", "magnitude", "peft"),
    ("lora_E", "lora_E", "peft"),
    ("ranknum", "ranknum", "peft"),
    ("lora_diag", "lora_diag", "peft"),
    ("lora.down.weight", "down", "updown"),
    ("lora.up.weight", "up", "updown"),
    ("lora_linear_layer.down.weight", "down", "updown"),
    ("lora_linear_layer.up.weight", "up", "updown"),
    ("lora.lora_A", "down", "loralib"),
    ("lora.lora_B", "up", "loralib"),
    ("lora_A", "down", "loralib"),
    ("lora_B", "up", "loralib"),
    ("lora_a", "down", "mlx"),
    ("lora_b", "up", "mlx"),
    ("m", "magnitude", "mlx"),
    ("lora_a.weight", "down", "torchtune"),
    ("lora_b.weight", "up", "torchtune"),
    ("hada_w1_a", "hada_w1_a", "lycoris"),
    ("hada_w1_b", "hada_w1_b", "lycoris"),
    ("hada_w2_a", "hada_w2_a", "lycoris"),
    ("hada_w2_b", "hada_w2_b", "lycoris"),
    ("hada_t1", "hada_t1", "lycoris"),
    ("hada_t2", "hada_t2", "lycoris"),
    ("lokr_w1", "lokr_w1", "lycoris"),
    ("lokr_w1_a", "lokr_w1_a", "lycoris"),
    ("lokr_w1_b", "lokr_w1_b", "lycoris"),
    ("lokr_w2", "lokr_w2", "lycoris"),
    ("lokr_w2_a", "lokr_w2_a", "lycoris"),
    ("lokr_w2_b", "lokr_w2_b", "lycoris"),
    ("lokr_t2", "lokr_t2", "lycoris"),
    ("oft_blocks", "oft_blocks", "lycoris"),
    ("oft_diag", "oft_diag", "lycoris"),
    ("rescale", "rescale", "lycoris"),
    ("oft_R.weight", "oft_r", "peft"),
    ("oft_r", "oft_r", "peft"),
    ("oft_s", "oft_s", "peft"),
    ("boft_R", "boft_r", "peft"),
    ("boft_s", "boft_s", "peft"),
    ("a1.weight", "glora_a1", "lycoris"),
    ("a2.weight", "glora_a2", "lycoris"),
    ("b1.weight", "glora_b1", "lycoris"),
    ("b2.weight", "glora_b2", "lycoris"),
    ("bm.weight", "glora_bm", "lycoris"),
    ("diff", "diff", "lycoris"),
    ("diff_b", "diff_b", "lycoris"),
    ("w_norm", "w_norm", "lycoris"),
    ("b_norm", "b_norm", "lycoris"),
    ("on_input", "on_input", "lycoris"),
    ("bias_indices", "bias_indices", "lycoris"),
    ("bias_values", "bias_values", "lycoris"),
    ("bias_size", "bias_size", "lycoris"),
    ("ia3_l", "ia3_l", "peft"),
    ("vera_lambda_b", "vera_lambda_b", "peft"),
    ("vera_lambda_d", "vera_lambda_d", "peft"),
    ("vera_A", "vera_a", "peft"),
    ("vera_B", "vera_b", "peft"),
    ("randlora_lambda", "randlora_lambda", "peft"),
    ("randlora_gamma", "randlora_gamma", "peft"),
    ("vblora_logits_A", "vblora_logits_a", "peft"),
    ("vblora_logits_B", "vblora_logits_b", "peft"),
    ("vblora_logits_A_topk_indices", "vblora_indices_a", "peft"),
    ("vblora_logits_A_topk_weights", "vblora_weights_a", "peft"),
    ("vblora_logits_B_topk_indices", "vblora_indices_b", "peft"),
    ("vblora_logits_B_topk_weights", "vblora_weights_b", "peft"),
    ("vblora_vector_bank", "vblora_bank", "peft"),
    ("fourierft_spectrum", "fourierft_spectrum", "peft"),
    ("waveft_spectrum", "waveft_spectrum", "peft"),
    ("c3a_kernel", "c3a_kernel", "peft"),
    ("shira_weight", "shira_weight", "peft"),
    ("hra_u", "hra_u", "peft"),
    ("miss_block", "miss_block", "peft"),
    ("bone_block", "miss_block", "peft"),
    ("delora_A", "delora_a", "peft"),
    ("delora_B", "delora_b", "peft"),
    ("delora_lambda", "delora_lambda", "peft"),
    ("road_theta", "road_theta", "peft"),
    ("road_alpha", "road_alpha", "peft"),
    ("unilora_theta_d", "unilora_theta", "peft"),
    ("unilora_indices_A", "unilora_indices_a", "peft"),
    ("unilora_indices_B", "unilora_indices_b", "peft"),
    ("unilora_scales_A", "unilora_scales_a", "peft"),
    ("unilora_scales_B", "unilora_scales_b", "peft"),
)

_SUFFIXES: dict[str, Suffix] = {tail: Suffix(role, style) for tail, role, style in _TAILS}

# Suffixes glued to the last word of the path, without a dot before them.
_GLUED: dict[str, Suffix] = {
    "_lora.down.weight": Suffix("down", "attn-procs"),
    "_lora.up.weight": Suffix("up", "attn-procs"),
    "_lora_down.weight": Suffix("down", "glued"),
    "_lora_up.weight": Suffix("up", "glued"),
    ":down": Suffix("down", "cloneofsimo"),
    ":up": Suffix("up", "cloneofsimo"),
}

_SAM = r"w_(a|b)_(\d+)"
# XLabs' processors number their adapters after the word: qkv_lora1 is the image's, qkv_lora2 the text's.
_XLABS = r"(.*\.processor\.(?:qkv|proj)_lora[12]?)\.(down|up)\.weight"

# A raw model.state_dict() leaves the adapter's name after the factor: lora_A.default.weight.
# Compiled when a key asks for it, which few do.
_NAMED = (
    r"^(?P<stem>.+)\.(?P<factor>lora_A|lora_B|lora_E|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    r"|ia3_l|ranknum|hada_w[12]_[ab]|lokr_w[12](?:_[ab])?|oft_R|vera_lambda_[bd]|vera_[AB]|miss_block"
    r"|vblora_logits_[AB]|vblora_vector_bank|unilora_(?:indices|scales)_[AB]|unilora_theta_d)"
    r"\.(?P<name>[^.]+)(?P<end>\.weight|\.bias)?$"
)


# The same, by what stands before ".weight", so that the usual key needs two look-ups.
_WEIGHTS: dict[str, Suffix] = {
    tail.removesuffix(".weight"): suffix for tail, suffix in _SUFFIXES.items() if tail.endswith(".weight")
}


def split(key: str) -> Part | None:
    """A key's stem and role, or None where no suffix of any layout is recognised."""
    head, _, last = key.rpartition(".")
    if not head:
        return _split_glued(key)
    if last != "weight":
        stem, _, before = head.rpartition(".")
        suffix = _SUFFIXES.get(f"{before}.{last}") if stem else None
        if suffix is not None:
            return Part(stem, suffix)
        suffix = _SUFFIXES.get(last)
        return Part(head, suffix) if suffix is not None else _split_glued(key) or _split_named(key)
    stem, _, before = head.rpartition(".")
    suffix = _WEIGHTS.get(before) if stem else None
    if suffix is not None:
        return Part(stem, suffix)
    first, _, middle = stem.rpartition(".")
    suffix = _WEIGHTS.get(f"{middle}.{before}") if first else None
    return Part(first, suffix) if suffix is not None else _split_glued(key) or _split_named(key)


def tail_of(key: str, stem: str) -> Suffix | None:
    """The suffix of a key that begins with this stem, or None where it does not, or is spelt unusually."""
    start = len(stem)
    return _SUFFIXES.get(key[start + 1 :]) if key.startswith(stem) and key[start : start + 1] == "." else None


def _split_glued(key: str) -> Part | None:
    found = re.fullmatch(_XLABS, key) if ".processor." in key else None
    if found:
        return Part(found[1], Suffix(found[2], "xlabs"))
    for tail, suffix in _GLUED.items():
        if key.endswith(tail) and len(key) > len(tail):
            return Part(key[: -len(tail)], suffix)
    found = re.fullmatch(_SAM, key)
    if found:
        return Part(f"w_{found[2]}", Suffix("down" if found[1] == "a" else "up", "sam"))
    return None


def _split_named(key: str) -> Part | None:
    found = re.match(_NAMED, key)
    if not found:
        return None
    suffix = _SUFFIXES.get(found["factor"] + (found["end"] or "")) or _SUFFIXES.get(found["factor"])
    return Part(found["stem"], suffix, found["name"]) if suffix else None
