"""How the results of a merge survive an interruption, where computing them again would take long."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from loratools import methods
from loratools.engine import Engine
from loratools.engine.kept import Kept
from loratools.engine.local import Local
from loratools.io import storage
from loratools.io.base import keys_of
from loratools.io.work_folder import Identity
from loratools.model import Adapter
from loratools.ops import _identity_of, _request, files
from loratools.ops._merge_run import RESULTS

_AGAIN = "nothing to resume: this merge decomposes nothing, and was done again"


class Keeping:
    """The engine of a merge that is written to a file.

    Attributes:
        engine: What runs the tasks; None for this machine.
        resume: Whether an interrupted merge is to be gone on with.
    """

    def __init__(self, engine: Engine | None, *, resume: bool) -> None:
        self.engine = engine
        self.resume = resume

    @property
    def notes(self) -> tuple[str, ...]:
        """What became of an interrupted merge, in sentences."""
        if isinstance(self.engine, Kept):
            return self.engine.notes
        return (_AGAIN,) if self.resume else ()

    @property
    def taken(self) -> int:
        """How many targets' results are those of an interrupted merge."""
        return self.engine.taken if isinstance(self.engine, Kept) else 0


@contextmanager
def keeping(
    merge: Callable[..., Any],
    output: files.PathLike,
    adapters: Sequence[Adapter],
    styles: Sequence[Adapter],
    options: Mapping[str, Any],
    *,
    engine: Engine | None,
    resume: bool,
) -> Iterator[Keeping]:
    """An engine that keeps results beside an output until it is written.

    Args:
        merge: The operation, whose defaults stand for options that were not given.
        output: What will be written.
        adapters: The inputs.
        styles: The protected adapters.
        options: As for ``merge``.
        engine: What runs the tasks; None for this machine.
        resume: Whether an interrupted merge is to be gone on with.
    """
    if _copies(options, styles) and not (engine is not None and engine.remote):
        yield Keeping(engine, resume=resume)
        return
    inner = engine or Local(options.get("threads"))
    identity = partial(_identity, merge, adapters, styles, options, inner)
    with Kept(inner, output, identity, RESULTS, resume=resume) as kept:
        yield Keeping(kept, resume=resume)


def _copies(options: Mapping[str, Any], styles: Sequence[Adapter]) -> bool:
    """Whether factors are put side by side and nothing is decomposed."""
    method = methods.methods().get(options.get("method") or "linear")
    computed = options.get("rank") is not None or options.get("boost") is not None or styles
    return method is not None and method.lossless and not computed


def _identity(
    merge: Callable[..., Any],
    adapters: Sequence[Adapter],
    styles: Sequence[Adapter],
    options: Mapping[str, Any],
    engine: Engine,
) -> Identity:
    inputs = {adapter.path: _identity_of.of_adapter(adapter) for adapter in (*adapters, *styles)}
    if options.get("base") is not None:
        inputs[os.fspath(options["base"])] = _identity_of.of_base(keys_of(options["base"]))
    order = [[storage.whole(adapter.path) for adapter in each] for each in (adapters, styles)]
    told = _identity_of.asked(merge, options)
    method = methods.methods().get(told["method"])
    auto = "cpu" if method is None else _request.fastest(method)
    told["device"] = _identity_of.computed_on(told["device"], engine, auto=auto)
    return _identity_of.identity("merge", inputs, {**told, "order": order})
