"""Fused weights whose parts were trained apart: what their factors show, and what they leave open."""

from __future__ import annotations

from collections.abc import Sequence

from loratools import archs
from loratools.model import Adapter, Module, Rows


def notes(adapter: Adapter) -> list[str]:
    """A note on fused weights whose parts seem to have been trained apart, under an alpha for one part's rank.

    sd-scripts' ``split_qkv`` saves q, k and v as one module of three times the rank and keeps their alpha, so that
    every reader applies a third of what was trained; the same tensors may also be meant as they are.
    """
    arch = archs.all_archs().get(adapter.arch)
    if arch is None or not arch.has_table:
        return []
    found: list[tuple[Module, int]] = []
    for module in adapter.modules.values():
        # An alpha that no number of parts of that rank could make spares the look into the table.
        if not module.alpha or not module.rank or module.rank <= module.alpha or module.rank % module.alpha:
            continue
        if module.kind != "lora" or module.target.rows is not None or "mid" in module.factors:
            continue
        parts = arch.pieces(module.target.component, module.target.path, "diffusers")
        if len(parts) * module.alpha == module.rank and _is_diagonal(module, parts):
            found.append((module, len(parts)))
    if not found:
        return []
    module, count = found[0]
    return [
        f"{len(found)} fused modules hold parts of rank {module.alpha:g} side by side, and state that rank as their "
        f"alpha (first: {module.target}): if the parts were trained apart, the strength is 1/{count} of what was "
        "trained; the file alone does not tell"
    ]


def _is_diagonal(module: Module, parts: Sequence[Rows | None]) -> bool:
    """Whether each part's rows of ``up`` use columns of their own: up (out, rank) is block-diagonal."""
    up = module.factors["up"].numpy()
    up = up.reshape(up.shape[0], -1)
    width = up.shape[1] // len(parts)
    for number, rows in enumerate(parts):
        if rows is None:
            return False
        unit = up.shape[0] // rows.of
        for start, stop in rows.spans:
            block = up[start * unit : stop * unit]
            if block[:, : number * width].any() or block[:, (number + 1) * width :].any():
                return False
    return True
