"""Tensors on disk and what adapters do to them, for tests of baking."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from loratools.io.base import Weight
from loratools.model import Module
from loratools.ops._bake_tensor import BakedData, BakeJob, bake_tensor
from loratools.ops._changes import Change, Span, Term
from loratools.tensors import dtype_of, torch_bytes
from tests.kinds import samples as make

Array = np.ndarray


class Disk:
    """Tensors in files of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    def put(self, values: torch.Tensor | Array, dtype: torch.dtype = torch.float32) -> Weight:
        tensor = torch.as_tensor(values).to(dtype).contiguous()
        self.count += 1
        path = self.folder / f"{self.count}.bin"
        path.write_bytes(b"head" + bytes(torch_bytes(tensor)))
        return Weight(f"w{self.count}", tuple(tensor.shape), dtype_of(tensor), str(path), 4)


def change_of(weight: Weight, *terms: Term, scale: Weight | None = None) -> Change:
    return Change("", weight, terms, "denoiser w", "denoiser", scale)


def bake(change: Change, **options: object) -> BakedData:
    return bake_tensor(BakeJob(change, **options))  # type: ignore[arg-type]


def term(module: Module, strength: float = 1.0, spans: tuple[Span, ...] = (), **fields: object) -> Term:
    return Term(0, strength, "weight", module, spans, **fields)  # type: ignore[arg-type]


def lora(out: int, width: int, rank: int = 3, seed: int = 0, scale: float = 0.5) -> tuple[Module, Array]:
    rng = np.random.default_rng(seed)
    up, down = rng.normal(size=(out, rank)), rng.normal(size=(rank, width))
    return make.module_of("lora", {"up": up, "down": down}, scale), scale * up @ down


def normal(*shape: int, seed: int = 9) -> Array:
    return np.random.default_rng(seed).normal(size=shape)


def close(found: torch.Tensor, wanted: Array, tolerance: float = 1e-6) -> None:
    assert tuple(found.shape) == wanted.shape
    assert np.linalg.norm(found.double().numpy() - wanted) <= tolerance * np.linalg.norm(wanted)
