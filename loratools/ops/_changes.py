"""What adapters do to the tensors of a base model: plain values, so that work on one tensor can be done anywhere.

Rows are counted along the outputs: a tensor that the base stores as (in, out) is turned first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from loratools.io.base import Weight
from loratools.model import EMPTY, Module
from loratools.tensors import TensorRef

# Rows ``start`` to ``stop`` of what a module changes are the rows from ``at`` on of a stored tensor.
Span = tuple[int, int, int]


class Piece(NamedTuple):
    """One stored tensor that holds rows of what a module changes.

    Attributes:
        weight: The tensor.
        spans: Which of the module's rows are which of its own.
        turned: Whether it is stored as (in, out).
        scale: The tensor of its float8 scales, where it has one.
    """

    weight: Weight
    spans: tuple[Span, ...]
    turned: bool = False
    scale: Weight | None = None


class Term(NamedTuple):
    """What one adapter does to one stored tensor.

    Attributes:
        adapter: Its position among the adapters.
        strength: What the user multiplies its ΔW by.
        role: "weight" (the module's ΔW), "bias" (what the module adds to a bias), "replace" (the tensor becomes
            another) or "rows" (some of its rows do).
        module: For "weight" and "bias".
        spans: Which rows of the module's ΔW go to which rows of the stored tensor.
        turned: Whether the tensor is stored as (in, out).
        pieces: All stored tensors that the module changes, in any order, where its ΔW depends on the base.
        inside: Whether the strength multiplies ΔW inside DoRA's norm (PEFT), instead of the whole change.
        tensor: For "replace" and "rows": the new values.
        places: For "rows": which rows they are.
    """

    adapter: int
    strength: float
    role: str
    module: Module | None = None
    spans: tuple[Span, ...] = ()
    turned: bool = False
    pieces: tuple[Piece, ...] = ()
    inside: bool = False
    tensor: TensorRef | None = None
    places: tuple[int, ...] = ()


class Change(NamedTuple):
    """A tensor of the base that changes.

    Attributes:
        part: The subfolder of a diffusers model that it lies in, or empty.
        weight: The tensor.
        terms: What is done to it, in the order of the adapters.
        target: What it is called in reports: component and path.
        component: "denoiser", "text_encoder", …
        scale: The tensor of its float8 scales, where it has one.
    """

    part: str
    weight: Weight
    terms: tuple[Term, ...]
    target: str
    component: str
    scale: Weight | None = None


class Added(NamedTuple):
    """A tensor that the base does not have and the result does.

    Attributes:
        part: As in ``Change``.
        key: Its name.
        copied: The tensor whose bytes it gets (an output embedding that was tied until now).
        change: What then happens to it, or None.
    """

    part: str
    key: str
    copied: Weight
    change: Change | None = None


class Plan(NamedTuple):
    """All that a bake does to a base.

    Attributes:
        arch: The architecture's name.
        changes: The tensors that change, in the base's order.
        added: Tensors that are new.
        missing: Modules (or tensors that belong to none) of adapters that the base has no place for, by adapter.
        matched: How many modules of each adapter found their place.
        config: What changes in the config.json of a part: {"": {"tie_word_embeddings": False}}.
        notes: What the caller should know.
        left_out: How many modules of each adapter are of components that were not asked for.
    """

    arch: str
    changes: tuple[Change, ...]
    added: tuple[Added, ...] = ()
    missing: tuple[tuple[str, ...], ...] = ()
    matched: tuple[int, ...] = ()
    config: Mapping[str, Mapping[str, Any]] = EMPTY
    notes: tuple[str, ...] = ()
    left_out: tuple[int, ...] = ()
