"""Files ↔ lazy tensors: safetensors, the pickles of torch.save, numpy's npz."""

from loratools.io._entries import Entry
from loratools.io.atomic import atomic_folder, atomic_output
from loratools.io.header import Header, build, canonical_key, canonical_order, parse
from loratools.io.mapped import TensorFile
from loratools.io.reader import open_tensors, sniff
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
    "open_tensors",
    "parse",
    "sniff",
    "write_safetensors",
]
