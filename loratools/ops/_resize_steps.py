"""The two passes of a resize over its modules: looking at spectra, and cutting to ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from loratools.engine.kept import Results, table
from loratools.model import Module, Rows, Target
from loratools.ops import _resize_batch, _resize_ranks
from loratools.ops._resize_batch import Piece
from loratools.ops._resize_each import Task
from loratools.ops._resize_module import Resized, Spectrum, has_kernel, resized, spectrum
from loratools.ops._resize_norms import norm_of
from loratools.ops._resize_options import Options
from loratools.ops._resize_store import Form


class Seen(NamedTuple):
    """What the first pass finds out of a module.

    Attributes:
        spectrum: Of its ΔW.
        norm: Of the base weight; None where directions are not scored against it.
    """

    spectrum: Spectrum
    norm: float | None = None


class Made(NamedTuple):
    """What the second pass makes of a module: ``Resized``, without what was there before.

    Attributes:
        module: The result; None where the input's own stays.
        spectrum: Of the input's ΔW.
        energy: The fraction of Σσ² that is kept.
        error: ‖ΔW − ΔW'‖_F / ‖ΔW‖_F of what is stored.
        note: What the caller should know, or empty.
    """

    module: Module | None
    spectrum: Spectrum
    energy: float
    error: float
    note: str

    def whole(self, own: Module) -> Resized:
        """As it is, with the input's own module where that stays."""
        return Resized(self.module or own, self.spectrum, self.energy, self.error, self.note)


SEEING, CUTTING = "spectrum", "cut"
# What survives an interrupted run. Keys of tensors that hold NaN or Inf stand for a result.
RESULTS = Results(
    table(Seen, Made, Spectrum, Module, Target, Rows),
    {SEEING: Seen | list[str], CUTTING: Made | list[str]},
)


@dataclass(frozen=True)
class Seeing:
    """The first pass.

    Attributes:
        asked: What was asked for.
        place: The device to compute on.
    """

    asked: Options
    place: str

    def single(self, task: Task, base: torch.Tensor | None, place: str) -> Seen:
        """The spectrum of a module, and the norm that it is scored against."""
        return self._seen(task, spectrum(task.module, base, self._limit(task), place))

    def batch(self, tasks: Sequence[Task], bases: Sequence[torch.Tensor | None], place: str) -> list[Seen]:
        """Those of several modules."""
        pieces = [
            Piece(task.module, base, self._limit(task)) for task, base in zip(tasks, bases, strict=True)
        ]
        return list(map(self._seen, tasks, _resize_batch.spectra(pieces, place)))

    def _limit(self, task: Task) -> int | None:
        return self.asked.limit(wide=has_kernel(task.module))

    def _seen(self, task: Task, found: Spectrum) -> Seen:
        if task.against is None:
            return Seen(found)
        return Seen(found, norm_of(task.against.load(task.module), self.asked.norm))


@dataclass(frozen=True)
class Cutting:
    """The second pass.

    Attributes:
        asked: What was asked for.
        form: How results are stored.
    """

    asked: Options
    form: Form

    @property
    def place(self) -> str:
        """The device to compute on."""
        return self.form.place

    def single(self, task: Task, base: torch.Tensor | None, place: str) -> Made:
        """A module at its rank."""
        module, weight, limit, choose = self._piece(task, base)
        return _made(task, resized(module, weight, limit, self.form._replace(place=place), choose))

    def batch(self, tasks: Sequence[Task], bases: Sequence[torch.Tensor | None], place: str) -> list[Made]:
        """Several modules, each at its rank."""
        pieces = list(map(self._piece, tasks, bases))
        found = _resize_batch.resized_batch(pieces, self.form._replace(place=place))
        return list(map(_made, tasks, found))

    def _piece(self, task: Task, base: torch.Tensor | None) -> Piece:
        """How far a module is cut: to a rank that was planned, or the one that it needs by itself."""
        wide = has_kernel(task.module)
        fixed = task.rank or self.asked.fixed(wide=wide)
        own = partial(_resize_ranks.own, self.asked, task.module)
        choose = own if fixed is None else partial(_always, fixed)
        return Piece(task.module, base, fixed or self.asked.limit(wide=wide), choose)


def _always(rank: int, _: Spectrum) -> int:
    return rank


def _made(task: Task, found: Resized) -> Made:
    return Made(None, *found[1:]) if found.module is task.module else Made(*found)
