"""Write a list of tensors as torch.save does: the container of the first LoRA trainers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from loratools.io.atomic import atomic_output
from loratools.tensors import TensorRef


def write_pickle_list(
    path: str | os.PathLike[str],
    tensors: Iterable[TensorRef],
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
    check: Callable[[str], None] | None = None,
) -> int:
    """Write tensors, without their names, as a list; all of them are in memory at a time.

    The file appears under its name when it is complete. It may be a file that the tensors are mapped from. The same
    tensors give the same bytes.

    Args:
        path: The output.
        tensors: What to write, in order.
        overwrite: Whether an existing file may be replaced.
        progress: Called after each tensor with its size in bytes.
        check: Called with the path of what was written, before it takes its name; an error keeps it from that.

    Returns:
        The file's size in bytes.

    Raises:
        OutputExistsError: The output is there, and ``overwrite`` is false.
        WriteError: The system refuses; nothing is left behind.
    """
    import torch

    refs = list(tensors)
    with atomic_output(path, overwrite, sum(ref.nbytes for ref in refs)) as temporary:
        loaded = []
        for ref in refs:
            # A view would take the whole of what it is a view of into the file.
            loaded.append(ref.load().clone(memory_format=torch.contiguous_format))
            if progress is not None:
                progress(ref.nbytes)
        # An open file rather than its name, which would become part of the archive.
        with open(temporary, "wb") as file:
            torch.save(loaded, file)
        if check is not None:
            check(os.fspath(temporary))
        return temporary.stat().st_size
