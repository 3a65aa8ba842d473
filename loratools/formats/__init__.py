"""Layouts: how a file spells its keys. Reading is naming; nothing here computes.

``read`` turns the tensors of an open file into an ``Adapter``; ``write`` turns an ``Adapter`` into a ``Document``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loratools.errors import LayoutError
from loratools.formats._base import Document, Format
from loratools.formats._read import read
from loratools.formats._write import document
from loratools.registry import scan

__all__ = ["Document", "Format", "document", "get", "read", "writable"]


# What people call a layout after the programs that read it. They are offered, not taken: several may be meant.
CALLED: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(
        ("a1111", "automatic1111", "webui", "forge", "sd-scripts", "kohya-ss", "kohya_ss"), ("kohya",)
    ),
    "comfyui": ("comfy",),
    **dict.fromkeys(("hf", "huggingface", "hugging-face"), ("diffusers", "peft")),
    "musubi-tuner": ("musubi",),
}


def get(name: str) -> Format:
    """The layout of this name.

    Raises:
        LayoutError: No such layout; near misses are named.
    """
    import difflib

    known: Mapping[str, Any] = scan("loratools.formats", "FORMAT")
    if name not in known:
        word = name.lower()
        near = CALLED.get(word) or difflib.get_close_matches(word, known)
        written = writable()
        read_only = ", ".join(each for each in known if each not in written)
        raise LayoutError(
            f"there is no layout {name!r}",
            candidates=near,
            expected=f"Known are {', '.join(written)}"
            + f", and for reading alone {read_only}" * bool(read_only),
        )
    found: Format = known[name]
    return found


def writable() -> Sequence[str]:
    """The layouts that can be written."""
    return [name for name, found in scan("loratools.formats", "FORMAT").items() if found.speller is not None]
