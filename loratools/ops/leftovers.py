"""What interrupted runs have left beside an output: what it is, and removing it."""

from __future__ import annotations

import os

from loratools.io import work_folder
from loratools.io.work_folder import Cleaned


def remove(output: str | os.PathLike[str]) -> Cleaned:
    """Remove what interrupted runs have left beside an output; the output itself stays as it is.

    Args:
        output: The file or folder that they were to write.

    Raises:
        OutputExistsError: A run is still at work on it.
        WriteError: The system refuses.
    """
    return work_folder.clean(output)


def kept(output: str | os.PathLike[str]) -> bool:
    """Whether an interrupted run of this output has left what another one can go on with."""
    return work_folder.place_of(output).is_dir()


def place(output: str | os.PathLike[str]) -> str:
    """Where that is: a folder beside the output, or for one at a URL in the temporary folder."""
    return os.fspath(work_folder.place_of(output))
