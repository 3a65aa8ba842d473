"""Modules of programs with names of their own for a model's weights, under the names that transformers has for them."""

from __future__ import annotations

from collections.abc import Mapping

from loratools.formats._base import Group


def translate(groups: Mapping[str, Group], container: str, metadata: Mapping[str, str]) -> None:
    """Give the groups of GGUF, MLX and torchtune files the names by which their modules are looked up.

    Args:
        groups: By stem; their names, their styles and, for embeddings, their roles change.
        container: Of the file.
        metadata: Of the file.
    """
    if container == "gguf":
        from loratools.formats import gguf

        gguf.translate(groups, metadata)
    elif any(found.style == "mlx" for found in groups.values()):
        from loratools.formats import mlx

        mlx.translate(groups)
    elif any(found.style == "torchtune" for found in groups.values()):
        from loratools.formats import torchtune

        torchtune.translate(groups)
