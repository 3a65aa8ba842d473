"""LoRA for vision transformers as Sam_LoRA saves it: ``w_a_000`` and ``w_b_000``, modules numbered, no names.

The numbers run over the blocks, q and v of each: rows of the block's fused qkv. A file with as many pairs as an image
encoder of Segment Anything has, and as wide, is read as that one's, and a note says so; any other keeps its numbers.
No file states alpha; the code multiplies by 1. A file holds all blocks, as a number left out would move the others.
Source: JamesQFreeman/LoRA-ViT ``lora.py``, MathieuNlp/Sam_LoRA ``src/lora.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from loratools.errors import LayoutError
from loratools.formats import _carried, _plain
from loratools.formats._base import Document, Facts, Format, cannot_hold
from loratools.model import Adapter, Layout, Module, Rows, Target
from loratools.tensors import TensorRef


def _claims(facts: Facts) -> float:
    return 1.0 if facts.style == "sam" else 0.0


@lru_cache(maxsize=1)
def _numbers() -> Mapping[Target, int]:
    """The number of q and v of every block, of the deepest encoder."""
    from loratools.archs._positions import SAM_ENCODERS  # few files need it
    from loratools.formats._positions import sam_place

    places = (sam_place(number) for number in range(2 * max(SAM_ENCODERS)))
    return {Target(place.component, place.path, place.rows): number for number, place in enumerate(places)}


def _split(path: str) -> tuple[Rows | None, ...]:
    """A block's fused qkv as its thirds; k has no number, but it may be zero."""
    return tuple(Rows(((third, third + 1),), 3) for third in range(3)) if path.endswith(".attn.qkv") else ()


def _speller(module: Module, adapter: Adapter, layout: Layout) -> list[TensorRef]:  # noqa: ARG001
    up, down = _plain.factors(module, layout)
    number = _numbers().get(module.target)
    if number is None:
        what = "weights other than q and v of an image encoder's attention"
        todo = "Choose a layout that names its modules with --to"
        raise cannot_hold(layout, what, [str(module.target)], todo)
    return [down.renamed(f"w_a_{number:03d}"), up.renamed(f"w_b_{number:03d}")]


def _finisher(adapter: Adapter, tensors: list[TensorRef], layout: Layout) -> Document:
    from loratools.archs._positions import SAM_ENCODERS

    given = {_numbers()[target] for target in adapter.modules}
    blocks = next(count for count in sorted(SAM_ENCODERS) if 2 * count > max(given, default=0))
    missing = [
        str(target) for target, number in _numbers().items() if number < 2 * blocks and number not in given
    ]
    if missing:
        raise LayoutError(
            f"the {layout.name} layout cannot leave out {len(missing)} of {2 * blocks} modules, whose places it counts",
            path=adapter.path or None,
            keys=missing,
            todo="Choose a layout that names its modules with --to",
        )
    return Document(tuple(tensors), _carried.metadata(adapter))


FORMAT = Format(
    name="sam",
    title="Sam_LoRA",
    claims=_claims,
    variant=lambda _: "w_a_b",
    speller=_speller,
    finisher=_finisher,
    roles=_plain.ROLES,
    dialect="native",
    alpha="none",
    parts=True,
    split=_split,
)
