"""Files ↔ lazy tensors: safetensors, the pickles of torch.save, numpy's npz, GGUF."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from loratools.io._entries import Entry
from loratools.io.header import Header, build, canonical_key, canonical_order, parse
from loratools.io.mapped import TensorFile
from loratools.io.reader import open_tensors, sniff

if TYPE_CHECKING:
    from loratools.io.atomic import atomic_folder, atomic_output
    from loratools.io.gguf_writer import gguf_size, write_gguf
    from loratools.io.writer import write_safetensors

__all__ = [
    "Entry",
    "Header",
    "TensorFile",
    "atomic_folder",
    "atomic_output",
    "build",
    "canonical_key",
    "canonical_order",
    "gguf_size",
    "open_tensors",
    "parse",
    "sniff",
    "write_gguf",
    "write_pickle_list",
    "write_safetensors",
]


_LATER = {
    "atomic_folder": "loratools.io.atomic",
    "atomic_output": "loratools.io.atomic",
    "gguf_size": "loratools.io.gguf_writer",
    "write_gguf": "loratools.io.gguf_writer",
    "write_pickle_list": "loratools.io.pickle_writer",
    "write_safetensors": "loratools.io.writer",
}


def __getattr__(name: str) -> Any:
    """Writing needs more of the standard library than reading, which has to begin quickly."""
    home = _LATER.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
