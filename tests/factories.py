"""Adapter files of any kind, architecture and layout at tiny widths, and what their ΔW must be.

Nothing here uses the package's tables or readers: names are written out, files are written with ``struct``, and the
expected ΔW are plain matrix products in float64 of the values as they are stored.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import loratools as lt
from loratools.model import Adapter

# The matrices here are so small that handing them to several threads takes longer than multiplying them.
torch.set_num_threads(1)

_NAMES = {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TOLERANCE = {"F64": 1e-6, "F32": 1e-5, "F16": 2e-3, "BF16": 2e-2}


class Weight(NamedTuple):
    """One weight of a base model.

    Attributes:
        component: As loratools calls it.
        target: Path and rows, as ``str(Target)`` has them.
        kohya: The module's name in Kohya's layout.
        diffusers: In diffusers' layout, prefix included.
        shape: (out, in[, kh, kw]).
    """

    component: str
    target: str
    kohya: str
    diffusers: str
    shape: tuple[int, ...]


def _flat(prefix: str, path: str) -> str:
    return prefix + path.replace(".", "_")


def _sd_unet(native: str, diffusers: str, shape: tuple[int, ...], *, kohya: str) -> Weight:
    name = _flat("lora_unet_", native if kohya == "native" else diffusers)
    return Weight("denoiser", native, name, "unet." + diffusers, shape)


def _clip(prefix: str, folder: str, path: str, shape: tuple[int, ...], native: str = "") -> Weight:
    return Weight(folder, native or path, _flat(prefix, path), f"{folder}.{path}", shape)


_BLOCK = "transformer_blocks.0."
_CLIP0 = "text_model.encoder.layers.0."
_OPENCLIP0 = "transformer.resblocks.0."

# Only the width of attn2.to_k tells Stable Diffusion 1, 2 and XL apart, so it is the true one.
SD15: tuple[Weight, ...] = (
    *(
        _sd_unet(f"input_blocks.1.1.{name}", f"down_blocks.0.attentions.0.{name}", shape, kohya="diffusers")
        for name, shape in (
            ("proj_in", (12, 12, 1, 1)),
            (_BLOCK + "attn1.to_q", (12, 12)),
            (_BLOCK + "attn1.to_out.0", (12, 12)),
            (_BLOCK + "attn2.to_k", (12, 768)),
            (_BLOCK + "attn2.to_v", (12, 768)),
            (_BLOCK + "ff.net.0.proj", (40, 12)),
        )
    ),
    _sd_unet(
        "middle_block.1.transformer_blocks.0.attn1.to_v",
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_v",
        (14, 14),
        kohya="diffusers",
    ),
    _sd_unet(
        "output_blocks.11.1.proj_out", "up_blocks.3.attentions.2.proj_out", (12, 12, 1, 1), kohya="diffusers"
    ),
    _sd_unet(
        "input_blocks.2.0.in_layers.2", "down_blocks.0.resnets.1.conv1", (12, 10, 3, 3), kohya="diffusers"
    ),
    _sd_unet("input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv", (12, 12, 3, 3), kohya="diffusers"),
    _clip("lora_te_", "text_encoder", _CLIP0 + "self_attn.q_proj", (16, 16)),
    _clip("lora_te_", "text_encoder", _CLIP0 + "mlp.fc1", (24, 16)),
)

SDXL: tuple[Weight, ...] = (
    *(
        _sd_unet(f"input_blocks.4.1.{name}", f"down_blocks.1.attentions.0.{name}", shape, kohya="native")
        for name, shape in (
            ("proj_in", (12, 12)),
            (_BLOCK + "attn1.to_q", (12, 12)),
            (_BLOCK + "attn2.to_k", (12, 2048)),
            (_BLOCK + "attn2.to_out.0", (12, 12)),
        )
    ),
    _sd_unet(
        "output_blocks.5.1.transformer_blocks.1.ff.net.2",
        "up_blocks.1.attentions.2.transformer_blocks.1.ff.net.2",
        (12, 20),
        kohya="native",
    ),
    _sd_unet("input_blocks.1.0.in_layers.2", "down_blocks.0.resnets.0.conv1", (8, 6, 3, 3), kohya="native"),
    _clip("lora_te1_", "text_encoder", _CLIP0 + "self_attn.q_proj", (16, 16)),
    _clip("lora_te2_", "text_encoder_2", _CLIP0 + "mlp.fc1", (24, 20), _OPENCLIP0 + "mlp.c_fc"),
    _clip(
        "lora_te2_",
        "text_encoder_2",
        _CLIP0 + "self_attn.k_proj",
        (20, 20),
        _OPENCLIP0 + "attn.in_proj[1:2/3]",
    ),
)

_WIDTH = 8
_FLUX_SHARED: tuple[tuple[str, str, tuple[int, ...]], ...] = (
    ("double_blocks.0.img_attn.proj", "transformer_blocks.0.attn.to_out.0", (_WIDTH, _WIDTH)),
    ("double_blocks.0.img_mlp.0", "transformer_blocks.0.ff.net.0.proj", (4 * _WIDTH, _WIDTH)),
    ("double_blocks.1.txt_mlp.2", "transformer_blocks.1.ff_context.net.2", (_WIDTH, 4 * _WIDTH)),
    ("single_blocks.0.linear2", "single_transformer_blocks.0.proj_out", (_WIDTH, 5 * _WIDTH)),
)
_FLUX_FUSED: tuple[tuple[str, int, tuple[tuple[str, str], ...]], ...] = (
    (
        "double_blocks.0.img_attn.qkv",
        3,
        (
            ("transformer_blocks.0.attn.to_q", "0:1/3"),
            ("transformer_blocks.0.attn.to_k", "1:2/3"),
            ("transformer_blocks.0.attn.to_v", "2:3/3"),
        ),
    ),
    (
        "double_blocks.1.txt_attn.qkv",
        3,
        (
            ("transformer_blocks.1.attn.add_q_proj", "0:1/3"),
            ("transformer_blocks.1.attn.add_k_proj", "1:2/3"),
            ("transformer_blocks.1.attn.add_v_proj", "2:3/3"),
        ),
    ),
    (
        "single_blocks.0.linear1",
        7,
        (
            ("single_transformer_blocks.0.attn.to_q", "0:1/7"),
            ("single_transformer_blocks.0.attn.to_k", "1:2/7"),
            ("single_transformer_blocks.0.attn.to_v", "2:3/7"),
            ("single_transformer_blocks.0.proj_mlp", "3:7/7"),
        ),
    ),
)


def _parts(rows: str) -> int:
    start, stop = rows.split("/")[0].split(":")
    return int(stop) - int(start)


# Kohya's files name Flux's weights as the checkpoint does: fused.
FLUX_FUSED: tuple[Weight, ...] = (
    *(
        Weight("denoiser", native, _flat("lora_unet_", native), "", (parts * _WIDTH, _WIDTH))
        for native, parts, _ in _FLUX_FUSED
    ),
    *(
        Weight("denoiser", native, _flat("lora_unet_", native), "transformer." + twin, shape)
        for native, twin, shape in _FLUX_SHARED
    ),
    Weight(
        "denoiser",
        "final_layer.adaLN_modulation.1",
        "lora_unet_final_layer_adaLN_modulation_1",
        "",
        (2 * _WIDTH, _WIDTH),
    ),
    _clip("lora_te1_", "text_encoder", _CLIP0 + "self_attn.q_proj", (16, 16)),
)
# diffusers has them apart, and norm_out's halves exchanged.
FLUX_SPLIT: tuple[Weight, ...] = (
    *(
        Weight("denoiser", f"{native}[{rows}]", "", "transformer." + twin, (_parts(rows) * _WIDTH, _WIDTH))
        for native, _, twins in _FLUX_FUSED
        for twin, rows in twins
    ),
    *(Weight("denoiser", native, "", "transformer." + twin, shape) for native, twin, shape in _FLUX_SHARED),
    Weight(
        "denoiser",
        "final_layer.adaLN_modulation.1[1:2+0:1/2]",
        "",
        "transformer.norm_out.linear",
        (2 * _WIDTH, _WIDTH),
    ),
    _clip("", "text_encoder", _CLIP0 + "self_attn.q_proj", (16, 16)),
)

KOHYA_WEIGHTS = {"sd15": SD15, "sdxl": SDXL, "flux": FLUX_FUSED}
DIFFUSERS_WEIGHTS = {"sd15": SD15, "sdxl": SDXL, "flux": FLUX_SPLIT}

LLAMA: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("model.layers.0.self_attn.q_proj", (16, 16)),
    ("model.layers.0.self_attn.v_proj", (8, 16)),
    ("model.layers.0.mlp.down_proj", (16, 24)),
    ("model.layers.1.self_attn.q_proj", (16, 16)),
    ("model.layers.1.self_attn.v_proj", (8, 16)),
)
GPT2: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("transformer.h.0.attn.c_attn", (36, 12)),
    ("transformer.h.0.mlp.c_fc", (20, 12)),
    ("transformer.h.1.attn.c_attn", (36, 12)),
)
STRANGE: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("tower.stage_a.gate", (10, 14)),
    ("tower.stage_b.gate", (10, 14)),
)


@dataclass(frozen=True)
class Made:
    """A file and what it must be read as.

    Attributes:
        path: What to load: a file, or a PEFT folder.
        file: The file of tensors.
        deltas: ΔW in float64, (out, in[, kh, kw]), by ``key_of`` its module.
        tensors: What was written, by key.
        scales: The module's scale, by the same keys as ``deltas``.
    """

    path: Path
    file: Path
    deltas: dict[str, np.ndarray]
    tensors: dict[str, torch.Tensor]
    scales: dict[str, float] = field(default_factory=dict)


def write_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None
) -> None:
    """A safetensors file with its keys in the order given."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata is not None else {}
    chunks, position = [], 0
    for name, tensor in tensors.items():
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + len(data)],
        }
        chunks.append(data)
        position += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(chunks))


def read_safetensors(path: Path) -> tuple[dict[str, tuple[str, tuple[int, ...], bytes]], dict[str, str]]:
    """Every tensor as (dtype, shape, bytes), in the order of the header, and the metadata."""
    data = Path(path).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    metadata = header.pop("__metadata__", None) or {}
    payload = data[8 + size :]
    found = {
        name: (row["dtype"], tuple(row["shape"]), payload[slice(*row["data_offsets"])])
        for name, row in header.items()
    }
    return found, metadata


def digest(path: Path) -> str:
    """SHA-256 over a file, or over the files of a folder."""
    files = sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else [path]
    return hashlib.sha256(b"".join(entry.name.encode() + entry.read_bytes() for entry in files)).hexdigest()


def _random(rng: np.random.Generator, shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
    shape = tuple(shape)
    fan = math.prod(shape[1:]) or 1
    return torch.from_numpy(rng.standard_normal(shape) / math.sqrt(fan)).to(dtype)


def f64(tensor: torch.Tensor) -> np.ndarray:
    """The values as stored, in float64."""
    return tensor.to(torch.float64).numpy()


def lora_factors(
    shape: tuple[int, ...], rank: int, dtype: torch.dtype, rng: np.random.Generator, *, mid: bool = False
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """up, down and perhaps mid, and their product of the weight's shape, without any scale."""
    out, inner, kernel = shape[0], shape[1], shape[2:]
    ones = (1,) * len(kernel)
    up = _random(rng, (out, rank, *ones), dtype)
    if mid and kernel:
        core = _random(rng, (rank, rank, *kernel), dtype)
        down = _random(rng, (rank, inner, *ones), dtype)
        product = np.zeros(shape)
        for y in range(kernel[0]):
            for x in range(kernel[1]):
                product[:, :, y, x] = f64(up)[:, :, 0, 0] @ f64(core)[:, :, y, x] @ f64(down)[:, :, 0, 0]
        return {"up": up, "down": down, "mid": core}, product
    down = _random(rng, (rank, inner, *kernel), dtype)
    product = f64(up).reshape(out, rank) @ f64(down).reshape(rank, -1)
    return {"up": up, "down": down}, product.reshape(shape)


def foreign_factors(
    kind: str, shape: tuple[int, ...], rank: int, dtype: torch.dtype, rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    """The tensors of a LyCORIS kind, by suffix."""
    out, inner = shape[0], math.prod(shape[1:])
    sizes: dict[str, dict[str, tuple[int, ...]]] = {
        "loha": {
            "hada_w1_a": (out, rank),
            "hada_w1_b": (rank, inner),
            "hada_w2_a": (out, rank),
            "hada_w2_b": (rank, inner),
        },
        "lokr": {"lokr_w1": (2, 2), "lokr_w2_a": (out // 2, rank), "lokr_w2_b": (rank, inner // 2)},
        "lokr_full": {"lokr_w1": (2, 2), "lokr_w2": (out // 2, inner // 2)},
        "oft": {"oft_blocks": (2, out // 2, out // 2)},
        "glora": {
            "a1.weight": (inner, rank),
            "a2.weight": (rank, inner),
            "b1.weight": (out, rank),
            "b2.weight": (rank, inner),
        },
        "ia3": {"weight": (out, 1)},
        "full": {"diff": shape},
    }
    made = {suffix: _random(rng, size, dtype) for suffix, size in sizes[kind].items()}
    if kind == "ia3":
        made["on_input"] = torch.tensor(False)
    return made


def key_of(component: str, target: str) -> str:
    """How expectations are keyed."""
    return f"{component}/{target}"


def kohya(
    path: Path,
    arch: str = "sd15",
    *,
    kind: str = "lora",
    seed: int = 0,
    rank: int = 4,
    alpha: float | None = 2.0,
    alpha_like: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    mid: bool = False,
    dora: str = "",
    only: Iterable[str] | None = None,
    ranks: Mapping[str, int] | None = None,
    alphas: Mapping[str, float] | None = None,
    metadata: Mapping[str, str] | None = None,
    extra: Mapping[str, torch.Tensor] | None = None,
) -> Made:
    """A file in Kohya's layout.

    Args:
        path: The file.
        arch: "sd15", "sdxl" or "flux".
        kind: "lora", or a kind of ``foreign_factors``.
        seed: Of the values.
        rank: Of every module.
        alpha: Of every module; None for no alpha tensors.
        alpha_like: A tensor whose dtype and shape alpha takes; default 0-d in the factors' dtype.
        dtype: Of the factors.
        mid: Whether 3x3 convolutions have the Tucker form.
        dora: "out" or "in": add a ``dora_scale`` along that axis.
        only: Parts of names; modules that contain none of them are left out.
        ranks: Other ranks, by parts of names.
        alphas: Other alphas, by parts of names.
        metadata: String metadata.
        extra: Further tensors.
    """
    rng = np.random.default_rng(seed)
    tensors: dict[str, torch.Tensor] = {}
    deltas: dict[str, np.ndarray] = {}
    scales: dict[str, float] = {}
    for weight in KOHYA_WEIGHTS[arch]:
        name, shape = weight.kohya, weight.shape
        if only is not None and not any(part in name for part in only):
            continue
        own = next((value for part, value in (ranks or {}).items() if part in name), rank)
        stated = next((value for part, value in (alphas or {}).items() if part in name), alpha)
        if stated is not None and kind not in ("ia3", "full"):
            like = alpha_like if alpha_like is not None else torch.zeros((), dtype=dtype)
            tensors[f"{name}.alpha"] = torch.full_like(like, stated)
            stated = float(tensors[f"{name}.alpha"].item())
        if kind != "lora":
            made = foreign_factors(kind, shape, own, dtype, rng)
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in made.items()}
            continue
        factors, product = lora_factors(shape, own, dtype, rng, mid=mid and shape[2:] == (3, 3))
        tensors |= {f"{name}.lora_{role}.weight": tensor for role, tensor in factors.items()}
        if dora:
            ones = (1,) * len(shape[2:])
            size = (shape[0], 1, *ones) if dora == "out" else (1, shape[1], *ones)
            tensors[f"{name}.dora_scale"] = _random(rng, size, dtype).abs()
        key = key_of(weight.component, weight.target)
        scales[key] = stated / own if stated is not None else 1.0
        deltas[key] = scales[key] * product
    tensors |= dict(extra or {})
    write_safetensors(path, tensors, metadata)
    return Made(path, path, deltas, tensors, scales)


_DIFFUSERS_SUFFIX = {
    "peft-keys": {"up": "lora_B.weight", "down": "lora_A.weight"},
    "lora-updown": {"up": "lora.up.weight", "down": "lora.down.weight"},
    "attn-procs": {"up": "up.weight", "down": "down.weight"},
}


def _attn_procs(name: str) -> str:
    """The oldest generation's name of an attention projection, ready for ``.up.weight``."""
    head, _, tail = name.rpartition(".attn")
    number, _, projection = tail.partition(".")
    return f"{head}.attn{number}.processor.{projection.removesuffix('.0')}_lora"


def diffusers(
    path: Path,
    arch: str = "sd15",
    *,
    generation: str = "peft-keys",
    prefix: bool = True,
    seed: int = 0,
    rank: int = 4,
    header: Mapping[str, Mapping[str, Any]] | None = None,
    network_alpha: float | None = None,
    scales: Mapping[str, float] | None = None,
    dtype: torch.dtype = torch.float32,
    only: Iterable[str] | None = None,
    ranks: Mapping[str, int] | None = None,
    dora: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> Made:
    """A file in diffusers' layout.

    Args:
        path: The file.
        arch: "sd15", "sdxl" or "flux".
        generation: "peft-keys", "lora-updown" or "attn-procs" (whose files have attention projections only).
        prefix: Whether names begin with the component (then only the denoiser's modules are written).
        seed: Of the values.
        rank: Of every module.
        header: ``lora_adapter_metadata``: a LoraConfig per prefix ("unet", "" for none).
        network_alpha: Alpha tensors beside the factors.
        scales: The scale that a module must be read with, by parts of names; default 1 (or that of the alpha).
        dtype: Of the factors.
        only: Parts of names; modules that contain none of them are left out.
        ranks: Other ranks, by parts of names.
        dora: Whether modules have a ``lora_magnitude_vector``.
        metadata: Further string metadata.
    """
    rng = np.random.default_rng(seed)
    tensors: dict[str, torch.Tensor] = {}
    deltas: dict[str, np.ndarray] = {}
    read: dict[str, float] = {}
    for weight in DIFFUSERS_WEIGHTS[arch]:
        name, shape = weight.diffusers, weight.shape
        if only is not None and not any(part in name for part in only):
            continue
        if (generation == "attn-procs" and ".attn" not in name) or (
            not prefix and weight.component != "denoiser"
        ):
            continue
        own = next((value for part, value in (ranks or {}).items() if part in name), rank)
        stem = name if prefix else name.partition(".")[2]
        factors, product = lora_factors(shape, own, dtype, rng)
        spelt = _attn_procs(stem) if generation == "attn-procs" else stem
        for role, tensor in factors.items():
            tensors[f"{spelt}.{_DIFFUSERS_SUFFIX[generation][role]}"] = tensor
        scale = next((value for part, value in (scales or {}).items() if part in name), 1.0)
        if network_alpha is not None:
            tensors[f"{spelt}.alpha"] = torch.tensor(network_alpha, dtype=dtype)
            scale = network_alpha / own
        if dora:
            tensors[f"{stem}.lora_magnitude_vector"] = _random(rng, (shape[0],), dtype).abs()
        key = key_of(weight.component, weight.target)
        read[key], deltas[key] = scale, scale * product
    said = {"format": "pt", **(metadata or {})}
    if header is not None:
        flat = {f"{part}.{k}" if part else k: v for part, fields in header.items() for k, v in fields.items()}
        said["lora_adapter_metadata"] = json.dumps(flat, indent=2, sort_keys=True)
    write_safetensors(path, tensors, said)
    return Made(path, path, deltas, tensors, read)


_KEY_FORMS = {
    "canonical": "base_model.model.{path}.{factor}{end}",
    "named": "base_model.model.{path}.{factor}.default{end}",
    "no_prefix": "{path}.{factor}{end}",
    "double": "base_model.model.base_model.model.{path}.{factor}{end}",
    "fsdp": "base_model.model._fsdp_wrapped_module.{path}.{factor}{end}",
    "compiled": "_orig_mod.base_model.model.{path}.{factor}{end}",
}


def lora_config(rank: int, alpha: float, targets: Iterable[str], **fields: Any) -> dict[str, Any]:
    """A minimal LoraConfig as PEFT writes it."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(targets),
        "bias": "none",
        **fields,
    }


def peft(
    folder: Path,
    model: tuple[tuple[str, tuple[int, ...]], ...] = LLAMA,
    *,
    component: str = "language_model",
    kind: str = "lora",
    seed: int = 0,
    rank: int = 4,
    alpha: float = 8.0,
    form: str = "canonical",
    container: str = "safetensors",
    ranks: Mapping[str, int] | None = None,
    alphas: Mapping[str, float] | None = None,
    dtype: torch.dtype = torch.float32,
    embedding: bool = False,
    lora_bias: bool = False,
    dora: bool = False,
    extra: Mapping[str, torch.Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Made:
    """A PEFT folder.

    Args:
        folder: Made where it is missing.
        model: Paths and shapes of the adapted weights.
        component: As loratools calls it.
        kind: "lora", "adalora" or "vera".
        seed: Of the values.
        rank: Of every module, ``r``.
        alpha: ``lora_alpha``.
        form: The spelling of the keys: "canonical", "named", "no_prefix", "double", "fsdp" or "compiled".
        container: "safetensors" or "bin".
        ranks: Other ranks by exact path, written as ``rank_pattern``.
        alphas: Other alphas by exact path, written as ``alpha_pattern``.
        dtype: Of the factors.
        embedding: Whether the embedding (20 tokens, 16 wide) is adapted too.
        lora_bias: Whether every module has a ``lora_B.bias``.
        dora: Whether every module has a ``lora_magnitude_vector``.
        extra: Further tensors by key.
        config: Further fields of adapter_config.json.
    """
    rng = np.random.default_rng(seed)
    fields = dict(config or {})
    rslora = bool(fields.get("use_rslora"))
    tensors: dict[str, torch.Tensor] = {}
    deltas: dict[str, np.ndarray] = {}
    scales: dict[str, float] = {}

    def put(path: str, factor: str, end: str, tensor: torch.Tensor) -> None:
        tensors[_KEY_FORMS[form].format(path=path, factor=factor, end=end)] = tensor

    for path, shape in model:
        own, stated = (ranks or {}).get(path, rank), (alphas or {}).get(path, alpha)
        factors, product = lora_factors(shape, own, dtype, rng)
        scale = stated / (math.sqrt(own) if rslora else own)
        if kind == "adalora":
            put(path, "lora_A", "", factors["down"])
            put(path, "lora_B", "", factors["up"])
            put(path, "lora_E", "", _random(rng, (own, 1), dtype))
            put(path, "ranknum", "", torch.tensor(float(own)))
            continue
        if kind == "vera":
            put(path, "vera_lambda_b", "", _random(rng, (shape[0],), dtype))
            put(path, "vera_lambda_d", "", _random(rng, (own,), dtype))
            continue
        put(path, "lora_A", ".weight", factors["down"])
        put(path, "lora_B", ".weight", factors["up"])
        if lora_bias:
            put(path, "lora_B", ".bias", _random(rng, (shape[0],), dtype))
        if dora:
            put(path, "lora_magnitude_vector", "", _random(rng, (shape[0],), dtype).abs())
        key = key_of(component, path)
        scales[key], deltas[key] = scale, scale * product
    if embedding:
        path = "model.embed_tokens"
        factors, product = lora_factors((16, 20), rank, dtype, rng)
        put(path, "lora_embedding_A", "", factors["down"])
        put(path, "lora_embedding_B", "", factors["up"])
        key = key_of(component, path)
        scales[key] = alpha / (math.sqrt(rank) if rslora else rank)
        deltas[key] = scales[key] * product
    if kind == "vera":
        tensors["base_model.vera_A"] = _random(rng, (rank, 24), dtype)
        tensors["base_model.vera_B"] = _random(rng, (24, rank), dtype)
    tensors |= dict(extra or {})
    targets = [path for path, _ in model] + (["model.embed_tokens"] if embedding else [])
    stated_config = lora_config(rank, alpha, targets, **fields)
    stated_config["peft_type"] = {"lora": "LORA", "adalora": "ADALORA", "vera": "VERA"}[kind]
    if ranks:
        stated_config["rank_pattern"] = dict(ranks)
    if alphas:
        stated_config["alpha_pattern"] = dict(alphas)
    if lora_bias:
        stated_config["lora_bias"] = True
    if dora:
        stated_config["use_dora"] = True
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(stated_config, indent=2), "utf-8")
    file = folder / ("adapter_model.safetensors" if container == "safetensors" else "adapter_model.bin")
    if container == "safetensors":
        write_safetensors(file, tensors, {"format": "pt"})
    else:
        torch.save(tensors, file)
    return Made(folder, file, deltas, tensors, scales)


def mlx(folder: Path, *, seed: int = 0, rank: int = 4, scale: float = 20.0, config: bool = True) -> Made:
    """An MLX folder: factors transposed, the scale in the configuration."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, torch.Tensor] = {}
    deltas: dict[str, np.ndarray] = {}
    for path, shape in LLAMA:
        factors, product = lora_factors(shape, rank, torch.float32, rng)
        tensors[f"{path}.lora_a"] = factors["down"].t().contiguous()
        tensors[f"{path}.lora_b"] = factors["up"].t().contiguous()
        deltas[key_of("language_model", path)] = scale * product
    file = folder / "adapters.safetensors"
    write_safetensors(file, tensors, None)
    if config:
        said = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": rank, "scale": scale}}
        (folder / "adapter_config.json").write_text(json.dumps(said), "utf-8")
    return Made(folder, file, deltas, tensors)


def deltas_of(adapter: Adapter) -> dict[str, np.ndarray]:
    """ΔW of every module, keyed as ``Made.deltas``."""
    return {
        key_of(target.component, str(target)): module.delta().to(torch.float64).numpy()
        for target, module in adapter.modules.items()
    }


def whole(adapter: Adapter) -> dict[str, np.ndarray]:
    """ΔW of every base weight, fused: the modules' rows put where they belong, kernels of one flattened away."""
    found: dict[str, np.ndarray] = {}
    for target, module in adapter.modules.items():
        delta = module.delta().to(torch.float64).numpy()
        if delta.shape[2:] == (1, 1):
            delta = delta.reshape(delta.shape[:2])
        key = key_of(target.component, target.path)
        if target.rows is None:
            found[key] = found.get(key, 0.0) + delta
            continue
        shares = sum(stop - start for start, stop in target.rows.spans)
        unit, rest = divmod(delta.shape[0], shares)
        assert rest == 0
        full = found.setdefault(key, np.zeros((unit * target.rows.of, *delta.shape[1:])))
        taken = 0
        for start, stop in target.rows.spans:
            height = (stop - start) * unit
            full[start * unit : stop * unit] += delta[taken : taken + height]
            taken += height
    return found


def assert_close(
    found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], rtol: float = 1e-5
) -> None:
    """The same modules, each as near as ``rtol`` in the Frobenius norm."""
    assert set(found) == set(expected)
    for key, want in expected.items():
        assert found[key].shape == want.shape, key
        error = np.linalg.norm(found[key] - want)
        assert error <= rtol * max(np.linalg.norm(want), 1e-12), f"{key}: off by {error:.3g}"


def assert_round_trip(made: Made, output: Path) -> None:
    """Loading and saving in the same layout gives the same tensors, names, order, metadata and configuration."""
    before = digest(made.path)
    adapter = lt.load(made.path)
    lt.save(adapter, output)
    assert digest(made.path) == before, "the input was changed"
    written = output / "adapter_model.safetensors" if output.is_dir() else output
    if made.file.suffix == ".safetensors":
        old, new = read_safetensors(made.file), read_safetensors(written)
        assert list(new[0]) == list(old[0])
        assert new == old
        assert list(new[1]) == list(old[1])
    else:
        new = read_safetensors(written)
        assert list(new[0]) == list(made.tensors)
        for key, tensor in made.tensors.items():
            assert new[0][key] == (_NAMES[tensor.dtype], tuple(tensor.shape), tensor.numpy().tobytes())
    config = made.path / "adapter_config.json"
    if made.path.is_dir() and config.is_file():
        assert json.loads((output / "adapter_config.json").read_text("utf-8")) == json.loads(
            config.read_text("utf-8")
        )
    again = lt.load(output)
    assert again.layout.name == adapter.layout.name
    assert list(again.modules) == list(adapter.modules)
    assert [module.scale for module in again.modules.values()] == [m.scale for m in adapter.modules.values()]


def saved(adapter: Adapter, path: Path) -> Adapter:
    """Written and read again."""
    lt.save(adapter, path)
    return lt.load(path)


def total(*terms: tuple[float, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The exact weighted sum of what each input does to each weight."""
    found: dict[str, np.ndarray] = {}
    for weight, deltas in terms:
        for key, delta in deltas.items():
            found[key] = found.get(key, 0.0) + weight * delta
    return found
