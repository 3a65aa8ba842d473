"""Modules of one make-up resized together: gathered, decomposed in one stack, and brought home at their ranks.

What is chosen, stored and measured is what ``_resize_module`` does with each; only transfers and decompositions are
shared, so that a module's result does not depend on the others in its batch, but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from loratools.kinds import lora
from loratools.maths.lowrank import Factors
from loratools.maths.lowrank_batch import Stack, compress_batch, singular_values_batch
from loratools.model import Module
from loratools.ops._batching import fetched, sent
from loratools.ops._resize_module import (
    Cut,
    Resized,
    Source,
    Spectrum,
    check_beside,
    decided,
    finished,
    source_of,
    spectrum_of,
)
from loratools.ops._resize_store import Form


def _all(known: Spectrum) -> int:
    """As many directions as there are."""
    return known.sigma.size


class Piece(NamedTuple):
    """A module, and how far it is cut; see ``_resize_module.resized``."""

    module: Module
    base: torch.Tensor | None
    limit: int | None
    choose: Callable[[Spectrum], int] = _all


def spectra(pieces: Sequence[Piece], place: str) -> list[Spectrum]:
    """The singular values of modules that share a batch; see ``_resize_module.spectrum``.

    Raises:
        NonFiniteError: A factor of any of them holds NaN or Inf.
    """
    sources, stack = _sources(pieces, place)
    values = singular_values_batch(stack)
    return [spectrum_of(source, *each) for source, each in zip(sources, values, strict=True)]


def resized_batch(pieces: Sequence[Piece], form: Form) -> list[Resized]:
    """Modules that share a batch, each cut to its rank; see ``_resize_module.resized``.

    Raises:
        NonFiniteError: A factor of any of them holds NaN or Inf, or a result does not fit the store dtype.
    """
    sources, stack = _sources(pieces, form.place)
    whole = compress_batch(stack, [piece.limit for piece in pieces])
    cuts = [
        decided(source, each, piece.limit, piece.choose)
        for piece, source, each in zip(pieces, sources, whole, strict=True)
    ]
    return [finished(piece.module, cut, form) for piece, cut in zip(pieces, _home(cuts), strict=True)]


def _sources(pieces: Sequence[Piece], place: str) -> tuple[list[Source], Stack]:
    """The modules as LoRA on a device, and their products as a stack."""
    if not all(lora.is_product(piece.module) for piece in pieces):
        sources = [source_of(piece.module, piece.base, piece.limit, place) for piece in pieces]
        factors = [source.factors for source in sources]
        ups, downs = ([getattr(each, side) for each in factors] for side in ("up", "down"))
        return sources, Stack(torch.stack(ups), torch.stack(downs))
    ups, downs = [], []
    for piece in pieces:
        check_beside(piece.module)
        up, down = lora.matrices(piece.module, wide=False)
        ups.append(up)
        downs.append(down)
    # They travel in the file's dtype, and are widened there.
    stack = Stack(sent(ups, place), sent(downs, place))
    return [
        Source(piece.module, Factors(up, down), 1.0)
        for piece, up, down in zip(pieces, stack.up, stack.down, strict=True)
    ], stack


def _home(cuts: Sequence[Cut]) -> list[Cut]:
    """The cuts with their factors in the CPU's memory."""
    tensors = fetched([each for cut in cuts for each in (cut.factors.up, cut.factors.down)])
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    return [cut._replace(factors=Factors(*pair)) for cut, pair in zip(cuts, pairs, strict=True)]
