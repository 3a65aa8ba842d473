"""What a file is: an adapter, or one of the many things that lie in the same folders."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from loratools.formats._base import Facts, Group
from loratools.tensors import TensorRef

TITLES: dict[str, str] = {
    "adapter": "an adapter",
    "checkpoint": "a model checkpoint",
    "textual-inversion": "a textual inversion",
    "ip-adapter": "an IP-Adapter",
    "controlnet": "a ControlNet",
    "controlnet-lllite": "a ControlNet-LLLite",
    "t2i-adapter": "a T2I-Adapter",
    "vae": "a VAE",
    "ia3": "an (IA)³ adapter",
    "prefix-tuning": "a prefix-tuning adapter",
    "prompt-tuning": "a prompt-tuning adapter",
    "bottleneck-adapter": "a bottleneck adapter (AdapterHub)",
    "upscaler": "an upscaler",
    "optimizer": "an optimizer's state",
    "pack": "a pack of adapters",
    "empty": "an empty file",
    "unknown": "something unknown",
}

# Who writes files of a type, where that is one program's layout.
LAYOUTS: dict[str, str] = {"bottleneck-adapter": "adapterhub", "textual-inversion": "textual-inversion"}

_BASE = (
    "model.diffusion_model.",
    "cond_stage_model.",
    "first_stage_model.",
    "conditioner.embedders.",
    "down_blocks.",
    "double_blocks.",
    "transformer_blocks.",
    "joint_blocks.",
    "text_model.encoder.",
    "model.layers.",
    "model.embed_tokens.",
    "transformer.h.",
    "encoder.",
    "decoder.",
    "lm_head.",
)
_TOKEN = r"<[^<>]+>|\*"
_TOKEN_WIDTHS = {768, 1024, 1280, 2048, 4096}


def classify(facts: Facts, extras: Mapping[str, TensorRef]) -> str:
    """The file's type: a key of ``TITLES``."""
    if not facts.keys:
        return "empty"
    tuning = _TUNINGS.get(str(facts.config.get("peft_type", "")).upper())
    if tuning:
        return tuning
    for name, test in _TESTS:
        if test(facts, extras):
            return name
    if any(_is_factored(found) for found in facts.groups.values()):
        return "adapter"
    weights = sum(key.endswith((".weight", ".bias")) for key in facts.keys)
    known = any(key.startswith(_BASE) for key in facts.keys)
    return "checkpoint" if known or weights >= 0.9 * len(facts.keys) else "unknown"


def _is_factored(found: Group) -> bool:
    """Whether a group has factors, and not just parameters that happen to be called like some."""
    if found.roles.keys() <= {"alpha", "magnitude", "scalar", "rescale"}:
        return False
    plain = all(role.startswith("glora_") for role in found.roles)
    return not plain or found.stem.startswith(("lora_", "lycoris_"))


_TUNINGS = {
    "PROMPT_TUNING": "prompt-tuning",
    "MULTITASK_PROMPT_TUNING": "prompt-tuning",
    "PREFIX_TUNING": "prefix-tuning",
    "P_TUNING": "prompt-tuning",
    "CPT": "prompt-tuning",
    "ADAPTION_PROMPT": "prompt-tuning",
}


def _any(*parts: str) -> Callable[[Facts, Mapping[str, TensorRef]], bool]:
    return lambda _, extras: any(part in key for key in extras for part in parts)


def _starts(*parts: str) -> Callable[[Facts, Mapping[str, TensorRef]], bool]:
    return lambda _, extras: any(key.startswith(parts) for key in extras)


def _textual_inversion(facts: Facts, extras: Mapping[str, TensorRef]) -> bool:
    if facts.groups:
        return False
    if any(key == "emb_params" or key.startswith("string_to_param") for key in facts.keys):
        return True
    if len(facts.keys) > 64:
        return False
    if set(facts.keys) <= {"clip_l", "clip_g", "t5xxl"}:
        return True
    named = all(re.fullmatch(_TOKEN, key) or "." not in key for key in facts.keys)
    return named and all(
        1 <= len(ref.shape) <= 2 and ref.shape[-1] in _TOKEN_WIDTHS for ref in extras.values()
    )


def _vae(facts: Facts, _: Mapping[str, TensorRef]) -> bool:
    if facts.groups:
        return False
    tails = ("quant_conv.weight", "post_quant_conv.weight")
    whole = all(
        key.startswith(("encoder.", "decoder.", "quant_conv", "post_quant_conv")) for key in facts.keys
    )
    stages = all(key.startswith("first_stage_model.") for key in facts.keys)
    return stages or (whole and any(key.endswith(tails) for key in facts.keys))


def _ip_adapter(facts: Facts, extras: Mapping[str, TensorRef]) -> bool:
    projected = any(key.startswith(("image_proj.", "image_proj_model.")) for key in extras)
    parts = ("ip_adapter.", "adapter_modules.", "ip_layers.")
    return projected and any(key.startswith(parts) for key in facts.keys)


def _prompt(facts: Facts, _: Mapping[str, TensorRef]) -> bool:
    return len(facts.keys) <= 2 and set(facts.keys) <= {
        "prompt_embeddings",
        "prompt_encoder.embedding.weight",
    }


def _optimizer(facts: Facts, extras: Mapping[str, TensorRef]) -> bool:
    return not facts.groups and any(key.endswith((".exp_avg", ".momentum_buffer")) for key in extras)


def _gguf_model(facts: Facts, _: Mapping[str, TensorRef]) -> bool:
    return facts.container == "gguf" and facts.metadata.get("general.type", "model") != "adapter"


_TESTS: tuple[tuple[str, Callable[[Facts, Mapping[str, TensorRef]], bool]], ...] = (
    ("checkpoint", _gguf_model),
    ("ip-adapter", _ip_adapter),
    ("controlnet-lllite", _starts("lllite_unet_")),
    ("controlnet", _starts("control_model.", "controlnet_", "controlnet_blocks.", "input_hint_block.")),
    ("t2i-adapter", _starts("adapter.body.", "body.0.resnets.", "adapter.conv_in.")),
    ("bottleneck-adapter", _any(".adapter_down.", ".adapter_up.", ".phm_rule")),
    ("prompt-tuning", _prompt),
    ("optimizer", _optimizer),
    ("textual-inversion", _textual_inversion),
    ("vae", _vae),
)


def notes(facts: Facts, kind: str) -> tuple[str, ...]:
    """What to tell a reader about a file that is no adapter."""
    if kind == "empty":
        return ("the file is whole but holds no tensors",)
    alphas = sum("alpha" in found.roles for found in facts.groups.values())
    if kind == "unknown" and alphas:
        return (f"it states {alphas} alphas, but holds no LoRA matrices",)
    return ()
