"""Kohya files with modules of LyCORIS' kinds, and ΔW of each by its definition, written out naively in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import factories as make
import numpy as np
import torch

Array = np.ndarray
Shape = tuple[int, ...]
Tensors = dict[str, torch.Tensor]

RANK = 2


def _random(rng: np.random.Generator, *shape: int, size: float = 1.0) -> torch.Tensor:
    scaled = size * rng.standard_normal(shape) / math.sqrt(shape[-1])
    return torch.from_numpy(scaled).to(torch.float32)


def _lora(rng: np.random.Generator, shape: Shape) -> Tensors:
    ones = (1,) * len(shape[2:])
    return {
        "alpha": torch.tensor(1.0),
        "lora_down.weight": _random(rng, RANK, *shape[1:]),
        "lora_up.weight": _random(rng, shape[0], RANK, *ones),
    }


def _lokr(rng: np.random.Generator, shape: Shape, rows: int = 2, alpha: float = 1.0) -> Tensors:
    inner = math.prod(shape[1:]) // 2
    return {
        "alpha": torch.tensor(alpha),
        "lokr_w1": _random(rng, rows, 2),
        "lokr_w2_a": _random(rng, shape[0] // rows, RANK),
        "lokr_w2_b": _random(rng, RANK, inner),
    }


def _lokr_t2(rng: np.random.Generator, shape: Shape) -> Tensors:
    return {
        "alpha": torch.tensor(1.0),
        "lokr_w1": _random(rng, 2, 2),
        "lokr_t2": _random(rng, RANK, RANK, *shape[2:]),
        "lokr_w2_a": _random(rng, RANK, shape[0] // 2),
        "lokr_w2_b": _random(rng, RANK, shape[1] // 2),
    }


def _lokr_whole(rng: np.random.Generator, shape: Shape) -> Tensors:
    # Whatever alpha says: where neither side is a product, the scale is 1.
    return {
        "alpha": torch.tensor(9.0),
        "lokr_w1": _random(rng, 2, 2),
        "lokr_w2": _random(rng, shape[0] // 2, shape[1] // 2, *shape[2:]),
    }


def _loha(rng: np.random.Generator, shape: Shape) -> Tensors:
    inner = math.prod(shape[1:])
    return {
        "alpha": torch.tensor(3.0),
        "hada_w1_a": _random(rng, shape[0], RANK),
        "hada_w1_b": _random(rng, RANK, inner),
        "hada_w2_a": _random(rng, shape[0], RANK),
        "hada_w2_b": _random(rng, RANK, inner),
    }


def _loha_tucker(rng: np.random.Generator, shape: Shape) -> Tensors:
    found = {"alpha": torch.tensor(3.0)}
    for number in (1, 2):
        found[f"hada_t{number}"] = _random(rng, RANK, RANK, *shape[2:])
        found[f"hada_w{number}_a"] = _random(rng, RANK, shape[0])
        found[f"hada_w{number}_b"] = _random(rng, RANK, shape[1])
    return found


def _oft(rng: np.random.Generator, shape: Shape, alpha: float = 0.0) -> Tensors:
    size = shape[0] // 6
    return {"alpha": torch.tensor(alpha), "oft_blocks": _random(rng, 6, size, size, size=0.5)}


def _boft(rng: np.random.Generator, shape: Shape) -> Tensors:
    return {"alpha": torch.tensor(0.0), "oft_blocks": _random(rng, 2, shape[0] // 2, 2, 2, size=0.5)}


def _glora(rng: np.random.Generator, shape: Shape) -> Tensors:
    return {
        "alpha": torch.tensor(1.0),
        "a1.weight": _random(rng, shape[1], RANK),
        "a2.weight": _random(rng, RANK, shape[1]),
        "b1.weight": _random(rng, shape[0], RANK),
        "b2.weight": _random(rng, RANK, shape[1]),
    }


def _sparse(rng: np.random.Generator, shape: Shape) -> Tensors:
    places = torch.tensor([[0, 3, shape[0] - 1], [1, 2, 0]], dtype=torch.int16)
    size = torch.tensor([shape[0], math.prod(shape[1:])], dtype=torch.int16)
    beside = {"bias_indices": places, "bias_values": _random(rng, 3), "bias_size": size}
    return {**_lora(rng, shape), **beside}


def _dora(rng: np.random.Generator, shape: Shape, *, across: bool = False) -> Tensors:
    ones = (1,) * len(shape[2:])
    size = (1, shape[1], *ones) if across else (shape[0], 1, *ones)
    return {**_lora(rng, shape), "dora_scale": _random(rng, *size).abs() + 0.1}


MAKERS: Mapping[str, Callable[[np.random.Generator, Shape], Tensors]] = {
    "lora": _lora,
    "loha": _loha,
    "loha-tucker": _loha_tucker,
    "lokr": _lokr,
    "lokr-thirds": lambda rng, shape: _lokr(rng, shape, rows=3),
    "lokr-whole": _lokr_whole,
    "lokr-tucker": _lokr_t2,
    "oft": _oft,
    "oft-constrained": lambda rng, shape: _oft(rng, shape, alpha=0.01),
    "boft": _boft,
    "glora": _glora,
    "ia3": lambda rng, shape: {"weight": _random(rng, shape[0], 1), "on_input": torch.tensor(False)},
    "ia3-in": lambda rng, shape: {"weight": _random(rng, 1, shape[1]), "on_input": torch.tensor(True)},
    "full": lambda rng, shape: {"diff": _random(rng, *shape), "diff_b": _random(rng, shape[0])},
    "dora": _dora,
    "dora-in": lambda rng, shape: _dora(rng, shape, across=True),
    "sparse": _sparse,
}
TUCKER = ("loha-tucker", "lokr-tucker")
# Of a linear layer, and of a convolution.
LINEAR = tuple(kind for kind in MAKERS if kind not in TUCKER)
CONV = ("lora", "loha", "loha-tucker", "lokr", "lokr-whole", "lokr-tucker", "oft", "full", "dora", "dora-in")
# Whose ΔW depends on the base weight.
NEEDY = ("oft", "oft-constrained", "boft", "glora", "ia3", "ia3-in", "dora", "dora-in")
# Whose factors make an exact LoRA without ΔW being built, and its rank.
EXACT = {"loha": 4, "lokr": 4, "lokr-thirds": 4, "glora": 4}


def tensors(kind: str, shape: Shape, seed: int = 0) -> Tensors:
    """One module's tensors by suffix, as LyCORIS stores them."""
    return MAKERS[kind](np.random.default_rng(seed), shape)


def write(path: Path, modules: Mapping[str, Tensors], **metadata: str) -> Path:
    """A file in Kohya's layout of these modules by stem."""
    named = {f"{stem}.{suffix}": tensor for stem, own in modules.items() for suffix, tensor in own.items()}
    make.write_safetensors(path, named, metadata or None)
    return path


def dense(kind: str, own: Tensors, shape: Shape, base: Array) -> Array:
    """ΔW in float64 of the values as they are stored.

    Args:
        kind: A key of ``MAKERS``.
        own: From ``tensors``.
        shape: Of the weight.
        base: The weight.
    """
    f = {suffix: make.f64(tensor) for suffix, tensor in own.items()}
    scale = float(f["alpha"]) / RANK if "alpha" in f else 1.0
    family = kind.split("-")[0]
    if family in ("lora", "dora", "sparse"):
        product = scale * f["lora_up.weight"].reshape(-1, RANK) @ f["lora_down.weight"].reshape(RANK, -1)
        if family == "sparse":
            rows, columns = f["bias_indices"].astype(int)
            product[rows, columns] += f["bias_values"]
        changed = base + product.reshape(shape)
        return _decomposed(f, changed) - base if family == "dora" else changed - base
    if family == "loha":
        one, two = (_hadamard(f, number, shape) for number in "12")
        return scale * one * two
    if family == "lokr":
        return (1.0 if kind == "lokr-whole" else scale) * _kronecker(f, shape)
    if family in ("oft", "boft"):
        return (_turned(f, base.reshape(shape[0], -1))).reshape(shape) - base
    if family == "glora":
        return scale * (f["b1.weight"] @ f["b2.weight"] + base @ f["a1.weight"] @ f["a2.weight"])
    return base * f["weight"] if family == "ia3" else f["diff"]


def _decomposed(f: Mapping[str, Array], changed: Array) -> Array:
    """m · V / ‖V‖, with the norm over all axes but the magnitude's."""
    size = f["dora_scale"].shape
    others = tuple(axis for axis in range(changed.ndim) if size[axis] == 1)
    return f["dora_scale"] * changed / np.sqrt((changed**2).sum(axis=others, keepdims=True))


def _hadamard(f: Mapping[str, Array], number: str, shape: Shape) -> Array:
    left, right = f[f"hada_w{number}_a"], f[f"hada_w{number}_b"]
    if f"hada_t{number}" in f:
        return np.einsum("pqyx,po,qi->oiyx", f[f"hada_t{number}"], left, right)
    return (left @ right).reshape(shape)


def _kronecker(f: Mapping[str, Array], shape: Shape) -> Array:
    one = f["lokr_w1"]
    if "lokr_t2" in f:
        two = np.einsum("pqyx,po,qi->oiyx", f["lokr_t2"], f["lokr_w2_a"], f["lokr_w2_b"])
    elif "lokr_w2" in f:
        two = f["lokr_w2"]
    else:
        two = f["lokr_w2_a"] @ f["lokr_w2_b"]
    two = two.reshape(shape[0] // one.shape[0], shape[1] // one.shape[1], *shape[2:])
    return np.kron(one.reshape(*one.shape, *(1,) * len(shape[2:])), two)


def _rotation(block: Array) -> Array:
    skew, one = block - block.T, np.eye(len(block))
    return (one + skew) @ np.linalg.inv(one - skew)


def _diagonal(blocks: list[Array]) -> Array:
    size = len(blocks[0])
    whole = np.zeros((size * len(blocks),) * 2)
    for number, block in enumerate(blocks):
        whole[number * size : (number + 1) * size, number * size : (number + 1) * size] = block
    return whole


def _turned(f: Mapping[str, Array], weight: Array) -> Array:
    """blockdiag(R)ᵀ W, or for a butterfly one step after the other."""
    blocks, out = f["oft_blocks"], len(weight)
    if blocks.ndim == 3:
        norm = np.sqrt(sum(((block - block.T) ** 2).sum() for block in blocks))
        limit = float(f["alpha"]) * out
        shortened = blocks * min(1.0, limit / norm) if limit > 0 else blocks
        return _diagonal([_rotation(block) for block in shortened]).T @ weight
    for step, own in enumerate(blocks):
        stride = 2**step * (own.shape[1] // 2)
        order = [
            2 * stride * chunk + stride * half + place
            for chunk in range(out // (2 * stride))
            for place in range(stride)
            for half in range(2)
        ]
        turned = _diagonal([_rotation(block) for block in own]) @ weight[order]
        weight = np.empty_like(weight)
        weight[order] = turned
    return weight
