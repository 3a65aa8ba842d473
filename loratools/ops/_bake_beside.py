"""What a bake into a folder does not write anew: other weights beside the model's, and those of an older model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

from loratools.errors import shown
from loratools.io._leftovers import superseded, unbaked
from loratools.io.base import Base


def replaced(base: Base, names: Iterable[str], output: str) -> tuple[str, ...]:
    """Files of another model in the output's folder, which go when the new one is in place.

    Args:
        base: The base, all of whose files stay where it is its own output.
        names: Of the new model's files of tensors.
        output: The folder.
    """
    if not base.folder or os.path.realpath(base.folder) == os.path.realpath(output):
        return ()
    return superseded(output, {*names, *base.indices.values(), *base.beside})


def notes(base: Base, gone: Sequence[str]) -> Iterator[str]:
    """What to tell about weights that the adapters are not in.

    Args:
        base: The base.
        gone: From :func:`replaced`.
    """
    other = unbaked(base.beside)
    if other:
        yield (
            f"the adapters are not in {_count(other)} of weights that lie beside those that are loaded by "
            f"default, and stay as they are: {shown(other)}"
        )
    if gone:
        yield f"{_count(gone)} of the model that the output's folder held give way to the new ones: {shown(gone)}"


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} file" + "s" * (len(names) != 1)
