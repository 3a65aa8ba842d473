"""What people call the blocks of a model: IN04, MID, OUT11, D07; and the vectors of numbers that weigh them.

Source: the block weights that LoRA Block Weight for A1111 established and Kohya's scripts read. Its presets are vectors
of 17 numbers; of those of 12, its manual has INS and OUTD, and the others here divide the blocks by depth as these do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Block(NamedTuple):
    """A label, and the weights that it means.

    Attributes:
        label: Followed by the block's number in two digits where ``path`` has a hole.
        component: The component's name.
        path: How native paths begin, with ``{}`` for a number; empty for the whole component.
    """

    label: str
    component: str
    path: str = ""

    def of(self, path: str) -> str | None:
        """The label of a weight of this component, or None if it lies elsewhere."""
        head, hole, _ = self.path.partition("{}")
        if not hole:
            return self.label if f"{path}.".startswith(f"{head}." if head else "") else None
        number = path[len(head) :].split(".", 1)[0] if path.startswith(head) else ""
        return f"{self.label}{int(number):02d}" if number.isdigit() else None


def _numbered(label: str, *numbers: int) -> tuple[str, ...]:
    return tuple(f"{label}{number:02d}" for number in numbers)


UNET_BLOCKS = (
    Block("IN", "denoiser", "input_blocks.{}"),
    Block("MID", "denoiser", "middle_block"),
    Block("OUT", "denoiser", "output_blocks.{}"),
    Block("BASE", "text_encoder"),
    Block("BASE", "text_encoder_2"),
)
_ALL_26 = ("BASE", *_numbered("IN", *range(12)), "MID", *_numbered("OUT", *range(12)))

SD_VECTORS: Mapping[int, tuple[str, ...]] = {
    17: ("BASE", *_numbered("IN", 1, 2, 4, 5, 7, 8), "MID", *_numbered("OUT", *range(3, 12))),
    26: _ALL_26,
}
SDXL_VECTORS: Mapping[int, tuple[str, ...]] = {
    12: ("BASE", *_numbered("IN", 4, 5, 7, 8), "MID", *_numbered("OUT", *range(6))),
    20: ("BASE", *_numbered("IN", *range(9)), "MID", *_numbered("OUT", *range(9))),
    26: _ALL_26,
}

_FLUX_ENTRIES = ("img_in", "txt_in", "time_in", "vector_in", "guidance_in")
FLUX_BLOCKS = (
    Block("D", "denoiser", "double_blocks.{}"),
    Block("S", "denoiser", "single_blocks.{}"),
    *(Block("IN", "denoiser", entry) for entry in _FLUX_ENTRIES),
    Block("OUT", "denoiser", "final_layer"),
    Block("CLIP", "text_encoder"),
    Block("T5", "text_encoder_2"),
)
FLUX_VECTORS: Mapping[int, tuple[str, ...]] = {
    61: ("CLIP", "T5", "IN", *_numbered("D", *range(19)), *_numbered("S", *range(38)), "OUT"),
}

_DEEP_17, _DEEP_12 = _numbered("IN", 5, 7, 8), _numbered("IN", 7, 8)
_IN_17, _IN_12 = _numbered("IN", 1, 2, 4, 5, 7, 8), _numbered("IN", 4, 5, 7, 8)

# The blocks that a preset keeps beside BASE, by the length of the vector that it stands for: S means the shallow
# ones, D the deep ones.
_KEPT: Mapping[int, Mapping[str, tuple[str, ...]]] = {
    17: {
        "INS": _numbered("IN", 1, 2, 4),
        "IND": _DEEP_17,
        "INALL": _IN_17,
        "MIDD": (*_DEEP_17, "MID", *_numbered("OUT", *range(3, 7))),
        "OUTD": _numbered("OUT", *range(3, 7)),
        "OUTS": _numbered("OUT", *range(7, 12)),
        "OUTALL": _numbered("OUT", *range(3, 12)),
    },
    12: {
        "INS": _numbered("IN", 4, 5),
        "IND": _DEEP_12,
        "INALL": _IN_12,
        "MIDD": (*_DEEP_12, "MID", *_numbered("OUT", *range(3))),
        "OUTD": _numbered("OUT", *range(3)),
        "OUTS": _numbered("OUT", *range(3, 6)),
        "OUTALL": _numbered("OUT", *range(6)),
    },
}
_EVERYWHERE = {"ALL": 1.0, "ALL0.5": 0.5, "NONE": 0.0}

PRESETS = (*_EVERYWHERE, *_KEPT[17])


def preset(name: str, vectors: Mapping[int, tuple[str, ...]]) -> dict[str, float] | None:
    """A preset as a weight for every block; those that its vector does not speak of get 0, as in the extension.

    Args:
        name: One of ``PRESETS``.
        vectors: The architecture's.

    Returns:
        Weights by label, or None where this architecture has no such preset.
    """
    labels = dict.fromkeys(label for named in vectors.values() for label in named)
    if name in _EVERYWHERE:
        return dict.fromkeys(labels, _EVERYWHERE[name]) or None
    kept = next((_KEPT[length].get(name) for length in vectors if length in _KEPT), None)
    if kept is None:
        return None
    return {label: 1.0 if label in kept or label == "BASE" else 0.0 for label in labels}
