"""Factors that are picked out of a table which all modules of an adapter share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.errors import ShapeError
from loratools.kinds._base import wide
from loratools.model import Module
from loratools.tensors import TensorRef

if TYPE_CHECKING:
    import torch


def picked(module: Module, table: TensorRef, indices: torch.Tensor) -> torch.Tensor:
    """Entries of a shared table in float64.

    Args:
        module: For whom, for the message.
        table: (entries, …).
        indices: Of any shape, whole numbers.

    Returns:
        The entries, of the indices' shape and then an entry's own.

    Raises:
        ShapeError: An index is beyond the table.
    """
    entries = table.shape[0]
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < entries:
        raise ShapeError(
            f"{module.target}: indices from {int(indices.min())} to {int(indices.max())} into a table of {entries}",
            keys=[ref.name for ref in module.factors.values() if ref.name],
            expected=f"Indices from 0 to {entries - 1} were expected",
            todo="The file is damaged, or its tensors are of several adapters; get it again from where it was made",
        )
    return wide(table)[indices]
