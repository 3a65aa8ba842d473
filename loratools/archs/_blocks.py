"""What people call the blocks of a model: IN04, MID, OUT11, D07; and the vectors of numbers that weigh them.

Source: the block weights that LoRA Block Weight for A1111 established and Kohya's scripts read.
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
