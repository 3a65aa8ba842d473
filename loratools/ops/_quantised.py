"""Weights that are stored as something other than their numbers: float8 with scales, and what cannot be changed.

float8 weights are q · scale, by whatever name the scale has: ComfyUI's ``scale_weight`` (one number), ``weight_scale``
of compressed-tensors, ModelOpt and vLLM (one number or one per output), ``weight_scale_inv`` of DeepSeek and Qwen (one
per block, and multiplied like the others in spite of its name). float8 without a scale is a plain cast.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from loratools.errors import UnsupportedKindError
from loratools.io.base import Base, Weight
from loratools.ops._changes import Change

_WEIGHT = ".weight"
# What a module's scale is called beside its weight; of a parameter without a module, behind its own name.
_SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv")
_PARAMETER_SCALES = ("_scale", "_scale_inv")
# ComfyUI's sign that a file has scales, and what lies beside a float8 weight besides them.
_MARKER = "scaled_fp8"
_BESIDE = (".comfy_quant", ".input_scale", ".scale_input")
_PLAIN = frozenset({"F16", "BF16", "F32", "F64"})
_FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
# Tensors beside a module that tell how its weight is packed, in the order in which they are asked for.
_MARKS: tuple[tuple[tuple[str, ...], str], ...] = (
    ((".weight.quant_state.bitsandbytes__nf4",), "bitsandbytes NF4"),
    ((".weight.quant_state.bitsandbytes__fp4",), "bitsandbytes FP4"),
    ((".weight.absmax", ".weight.quant_map"), "bitsandbytes 4-bit"),
    ((".SCB", ".weight_format"), "bitsandbytes int8"),
    ((".g_idx",), "GPTQ"),
    ((".qweight",), "GPTQ or AWQ"),
    ((".weight._data", ".weight._scale"), "quanto"),
    ((".weight_packed",), "compressed-tensors"),
    ((".weight_scale_2",), "NVFP4"),
    (("_blocks", ".weight_blocks"), "MXFP4"),
    ((".W_q",), "HQQ"),
    ((".codebooks",), "AQLM"),
    ((".comfy_quant",), "ComfyUI's quantisation"),
)
# What configurations call the schemes.
_METHODS: Mapping[str, str] = {
    "aqlm": "AQLM",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "EETQ",
    "gptq": "GPTQ",
    "hqq": "HQQ",
    "modelopt": "ModelOpt",
    "mxfp4": "MXFP4",
    "quanto": "quanto",
    "torchao": "torchao",
}


def scale_of(part: Mapping[str, Weight], weight: Weight) -> Weight | None:
    """The tensor that multiplies a float8 weight; None where it is a plain cast, or no float8 at all.

    Args:
        part: All tensors beside it, by key.
        weight: Of a linear layer (out, in), or of anything else with one scale.

    Returns:
        One number, one per output ((out,) or (out, 1)), or one per block (see ``block_of``).
    """
    if weight.dtype not in _FLOAT8:
        return None
    stem = weight.key.removesuffix(_WEIGHT)
    names = [stem + end for end in _SCALES] if stem != weight.key else []
    names.extend(weight.key + end for end in _PARAMETER_SCALES)
    return next((part[name] for name in names if name in part), None)


def markers(part: Mapping[str, Weight]) -> set[str]:
    """The keys that only say how a part's float8 weights are stored and used: wrong once they are something else.

    ComfyUI's ``scaled_fp8`` and ``comfy_quant``, and the scales of activations (``input_scale``, ``scale_input``).

    Args:
        part: All tensors of a model, by key.
    """
    float8 = {key.removesuffix(_WEIGHT) for key, weight in part.items() if weight.dtype in _FLOAT8}
    found = {key for key in part if key.rpartition(".")[2] == _MARKER and float8}
    return found | {stem + end for stem in float8 for end in _BESIDE if stem + end in part}


def block_of(weight: Weight, scale: Weight) -> tuple[int, int] | None:
    """The rows and columns that one scale of a weight (out, in) is for; None where shapes tell no whole block.

    Blocks that a side does not fill are allowed, so that a side of several blocks is taken to have blocks of the
    smallest power of two that needs as many; a side of one block is one block.
    """
    if len(weight.shape) != 2:
        return (1, 1) if math.prod(scale.shape) == 1 else None
    rows, columns = weight.shape
    if math.prod(scale.shape) == 1:
        return rows, columns
    if scale.shape in ((rows,), (rows, 1)):
        return 1, columns
    if len(scale.shape) != 2:
        return None
    height, width = _side(rows, scale.shape[0]), _side(columns, scale.shape[1])
    return None if height is None or width is None else (height, width)


def _side(length: int, blocks: int) -> int | None:
    if not 1 <= blocks <= length:
        return None
    if blocks in (1, length):
        return length // blocks
    size = 1 << (max(1, -(-length // blocks)) - 1).bit_length()
    return size if -(-length // size) == blocks else None


def scheme_of(part: Mapping[str, Weight], path: str, config: Mapping[str, Any] | None = None) -> str | None:
    """How the weight of a module is packed, in words; None where nothing says that it is.

    Args:
        part: The tensors of a base by key.
        path: The module's path there, or the key of a parameter.
        config: The base's configuration, which tells schemes apart that look alike.
    """
    weight = part.get(path + _WEIGHT) or part.get(path)
    if weight is not None and weight.dtype in _PLAIN | _FLOAT8:
        return None
    marked = next((name for ends, name in _MARKS if any(path + end in part for end in ends)), None)
    if marked is None and weight is None:
        return None
    if marked in (None, "GPTQ or AWQ"):
        said = (config or {}).get("quantization_config")
        method = str(said.get("quant_method", "")).lower() if isinstance(said, Mapping) else ""
        marked = _METHODS.get(method, marked)
    return marked or (f"{weight.dtype} numbers" if weight is not None else None)


def refuse(base: Base, changes: Iterable[Change]) -> None:
    """Refuse to change weights that are packed, or scaled in a way that is not known.

    Raises:
        UnsupportedKindError: All of them are named, and how they are stored.
    """
    packed: dict[str, str] = {}
    for change in changes:
        weight, part = change.weight, base.parts[change.part]
        if weight.dtype not in _PLAIN | _FLOAT8:
            path = weight.key.removesuffix(_WEIGHT)
            config = base.configs.get(change.part, {})
            packed[weight.key] = scheme_of(part, path, config) or f"{weight.dtype} numbers"
            continue
        scale = scale_of(part, weight)
        if scale is not None and block_of(weight, scale) is None:
            packed[weight.key] = f"float8 with scales of shape {list(scale.shape)} for {list(weight.shape)}"
    if packed:
        raise UnsupportedKindError(
            f"{len(packed)} weights that the adapters change are quantised: "
            + ", ".join(dict.fromkeys(packed.values())),
            path=base.path,
            keys=list(packed),
            expected="Weights in float8 or wider were expected",
            todo="Bake into the model that was quantised, and quantise the result again",
        )
