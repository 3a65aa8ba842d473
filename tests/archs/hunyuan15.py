"""Hunyuan Video 1.5 in ComfyUI's names, which fuse q, k and v: the shared data has only the original's names."""

from __future__ import annotations

from typing import Any

# In this order, as ComfyUI renames a checkpoint when it loads it.
_RENAMED = (
    ("txt_in.t_embedder.mlp.0", "txt_in.t_embedder.in_layer"),
    ("txt_in.t_embedder.mlp.2", "txt_in.t_embedder.out_layer"),
    ("txt_in.c_embedder.linear_1", "txt_in.c_embedder.in_layer"),
    ("txt_in.c_embedder.linear_2", "txt_in.c_embedder.out_layer"),
    ("_mod.linear", "_mod.lin"),
    ("_attn_qkv", "_attn.qkv"),
    ("mlp.fc1", "mlp.0"),
    ("mlp.fc2", "mlp.2"),
    ("_attn_q_norm", "_attn.norm.query_norm"),
    ("_attn_k_norm", "_attn.norm.key_norm"),
    ("_attn_proj", "_attn.proj"),
    ("_in.mlp.2", "_in.out_layer"),
    ("_in.mlp.0", "_in.in_layer"),
)


def comfy(original: str) -> str:
    """ComfyUI's name of the weight that an original name means, or means a third of."""
    for old, new in _RENAMED:
        original = original.replace(old, new)
    return f"{original[:-2]}.qkv" if is_apart(original) else original


def is_apart(original: str) -> bool:
    """Whether an original name means a third of the weight that ComfyUI has: not in the text's refiner."""
    head, _, part = original.rpartition("_attn_")
    return bool(head) and part in ("q", "k", "v")


def in_comfy_names(data: dict[str, Any]) -> dict[str, Any]:
    """The shared data as if its native column were ComfyUI's; "original" holds what it was."""
    (part,) = data["components"].values()
    for kind in ("modules", "others"):
        for entry in part.get(kind, ()):
            entry["original"] = entry["native"]
            path, dot, leaf = entry["native"], "", ""
            if kind == "others":
                path, dot, leaf = entry["native"].rpartition(".")
            entry["native"] = comfy(path) + dot + leaf
            if is_apart(path):
                height, place = entry["shape"][0], "qkv".index(path[-1])
                entry["rows"] = [place * height, (place + 1) * height, 3 * height]
    return data
