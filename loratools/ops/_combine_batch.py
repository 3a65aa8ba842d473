"""Targets of a merge in batches, for an accelerator: see ``_batching``.

Targets share a batch to which the same inputs contribute factors of the same shapes and dtypes. What is decided, stored
and measured is what ``_combine`` does with each; transfers are shared, and the arithmetic of methods that have it for
several weights at once.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

from loratools import methods
from loratools.maths.lowrank import Factors
from loratools.ops import _batching, _combine
from loratools.ops._combine import Begun, Combined, Ready
from loratools.ops._request import Request


def alike(begun: Begun) -> Hashable:
    """What targets have in common that can share a batch; None of one whose rows have to be taken or padded."""
    if not all(each.whole for each in begun.needed):
        return None
    return (
        len(begun.active),
        *((each.source, _batching.alike(each.module)) for each in begun.needed),
    )


def combined(asked: Request, batch: Sequence[Begun]) -> list[Combined]:
    """``_combine.combine`` of targets that share a batch.

    Args:
        asked: What was asked for; its device computes.
        batch: Of one make-up, see ``alike``.

    Raises:
        NonFiniteError: A result does not fit the store dtype.
        LoraError: The method refuses.
    """
    found = [
        _combine.prepared(asked, begun, pairs)
        for begun, pairs in zip(batch, _sent(batch, asked.device), strict=True)
    ]
    ready = [each for each in found if isinstance(each, Ready)]
    outcomes = [_combine.settled(asked, outcome) for outcome in _outcomes(asked, ready)]
    done = iter([_combine.finished(asked, *each) for each in zip(ready, _home(outcomes), strict=True)])
    return [next(done) if isinstance(each, Ready) else each for each in found]


def _sent(batch: Sequence[Begun], device: str) -> list[list[Factors]]:
    """The factors of every contribution to every target, on the device."""
    columns = []
    for contributions in zip(*(begun.needed for begun in batch), strict=True):
        here = [_combine.factors_of(each, "cpu") for each in contributions]
        ups, downs = ([getattr(pair, side) for pair in here] for side in ("up", "down"))
        there = zip(_batching.sent(ups, device), _batching.sent(downs, device), strict=True)
        columns.append([Factors(up, down) for up, down in there])
    return [list(pairs) for pairs in zip(*columns, strict=True)] if columns else [[] for _ in batch]


def _outcomes(asked: Request, ready: Sequence[Ready]) -> list[methods.Outcome]:
    """What the method makes of every target, all at once where it can."""
    # Parts that were kept off protected directions may have other ranks than before.
    alike = {tuple((part.factors.shape, part.factors.rank) for part in each.parts) for each in ready}
    if asked.method.batched is None or len(alike) != 1:
        return [_combine.applied(asked, each) for each in ready]
    return asked.method.combine_batch([each.parts for each in ready], asked.options)


def _home(outcomes: Sequence[methods.Outcome]) -> list[methods.Outcome]:
    """The outcomes with their factors in the CPU's memory."""
    pairs = [outcome.factors for outcome in outcomes]
    tensors = iter(_batching.fetched([tensor for pair in pairs for tensor in (pair.up, pair.down)]))
    return [replace(outcome, factors=Factors(next(tensors), next(tensors))) for outcome in outcomes]
