"""What one module does to the stored tensors at its place: a term for each weight, and each bias that it changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from loratools import kinds
from loratools.io.base import Weight
from loratools.model import Adapter, Module
from loratools.ops._changes import Piece, Term
from loratools.ops._places import Place

# Layouts of PEFT's DoRA, in which the strength multiplies ΔW inside the norm.
INSIDE = ("peft", "diffusers")
# What a module adds to a bias.
_BIASES = ("up_bias", "diff_b", "b_norm")
# What makes up a weight's full difference.
_WEIGHTS = ("diff", "w_norm")


class Step(NamedTuple):
    """One adapter and its turn.

    Attributes:
        adapter: The adapter.
        number: Its position among all.
        strength: What its ΔW is multiplied by.
    """

    adapter: Adapter
    number: int
    strength: float


class Spot(NamedTuple):
    """A term, and the stored tensor that it changes.

    Attributes:
        part: The subfolder of a diffusers model, or empty.
        weight: The tensor.
        term: What is done to it.
        component: "denoiser", "text_encoder", …
        path: What it is called in reports.
    """

    part: str
    weight: Weight
    term: Term
    component: str
    path: str


def spots(
    module: Module, place: Place, step: Step, weights: Mapping[str, Weight]
) -> tuple[list[Spot], list[str]]:
    """The terms of a module.

    Args:
        module: Of any kind but experts.
        place: Where its rows lie.
        step: Its adapter.
        weights: All tensors of the part that it lies in, by key.

    Returns:
        The terms, and the biases that it changes and the base does not have.
    """
    component, path = module.target.component, module.target.path
    scaled = tuple([_with_scale(piece, weights) for piece in place.pieces])
    common = Term(
        step.number,
        step.strength,
        "weight",
        module,
        pieces=scaled if needs_base(module) else (),
        inside=module.magnitude is not None and step.adapter.layout.name in INSIDE,
    )
    found: list[Spot] = []
    if _changes_weight(module):
        for piece in place.pieces:
            term = common._replace(spans=piece.spans, turned=piece.turned)
            found.append(Spot(place.part, piece.weight, term, component, path))
    lacking: list[str] = []
    beside = common._replace(role="bias", pieces=(), inside=False)
    for piece, bias in zip(place.pieces, place.biases, strict=True):
        stated = any(role in module.factors for role in _BIASES)
        if bias is not None and (stated or _scales_outputs(module, piece)):
            term = beside._replace(spans=piece.spans)
            found.append(Spot(place.part, bias, term, component, f"{path}.bias"))
        elif stated:
            lacking.append(f"{path}.bias")
    return found, list(dict.fromkeys(lacking))


def needs_base(module: Module) -> bool:
    """Whether a module's ΔW depends on the base weight."""
    # Nearly all modules are LoRA: the other kinds need not be imported for it.
    return module.magnitude is not None or (module.kind != "lora" and kinds.get(module.kind).needs_base)


def _with_scale(piece: Piece, weights: Mapping[str, Weight]) -> Piece:
    return piece._replace(scale=scale_of(weights, piece.weight))


def scale_of(weights: Mapping[str, Weight], weight: Weight) -> Weight | None:
    """The tensor of a float8 weight's scales, or None."""
    if not weight.dtype.startswith("F8_"):
        return None
    from loratools.ops import _quantised

    return _quantised.scale_of(weights, weight)


def _changes_weight(module: Module) -> bool:
    """Whether a module has a ΔW at all, and is not a difference of a bias alone."""
    return module.kind != "full" or any(role in module.factors for role in _WEIGHTS)


def _scales_outputs(module: Module, piece: Piece) -> bool:
    """Whether a module is PEFT's (IA)³ along the outputs, which multiplies the bias too."""
    vector = module.factors.get("ia3_l")
    if module.kind != "ia3" or vector is None:
        return False
    shape = piece.weight.shape[::-1] if piece.turned else piece.weight.shape
    if len(vector.shape) == 2:
        return vector.shape[1] == 1
    return len(shape) > 1 and vector.numel == shape[0] != shape[1]
