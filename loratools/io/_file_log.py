"""What a journal says of one file that is being made, and what it will say once the data is on the disk."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from loratools.io.work_folder import WorkFolder

_CLONE = "clone"


class FileLog:
    """The part of a run's journal that is about one file; its tasks are named within the file."""

    def __init__(self, work: WorkFolder, name: str, known: Mapping[str, Any]) -> None:
        """Nothing is written.

        Args:
            work: Has the journal.
            name: Of the file.
            known: What the interrupted run noted of it, by task.
        """
        self._work = work
        self._name = name
        self._known = known
        self._waiting: list[tuple[str, object]] = []
        self._turn = threading.Lock()

    @property
    def known(self) -> Mapping[str, Any]:
        """What the interrupted run noted, by task; whoever takes it up checks that it is so."""
        return self._known

    @property
    def cloned(self) -> bool:
        """Whether the interrupted run began with a clone of the source."""
        return _CLONE in self._known

    @property
    def kept(self) -> bool:
        """Whether what is done is to be kept where this run is interrupted."""
        return self._work.resume

    @property
    def recording(self) -> bool:
        """Whether what is done now is worth a record."""
        return self._work.recording

    @property
    def waits(self) -> bool:
        """Whether anything was noted that is not recorded yet."""
        return bool(self._waiting)

    def forget(self) -> None:
        """The file is not there any more as it was."""
        self._known = {}

    def note(self, task: str, value: object) -> None:
        """A task is done, and its data on the way to the disk."""
        with self._turn:
            self._waiting.append((task, value))

    def note_clone(self) -> None:
        """The file shares all blocks with its source."""
        self.note(_CLONE, None)

    def taken(self) -> list[tuple[str, object]]:
        """What was noted; its data is brought to the disk now, and then it is :meth:`record` ed."""
        with self._turn:
            found, self._waiting = self._waiting, []
        return found

    def record(self, noted: list[tuple[str, object]]) -> None:
        """Have it in the journal.

        Raises:
            OSError: The system refuses.
        """
        for task, value in noted:
            self._work.record(f"{self._name}\t{task}", value)


def by_file(done: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a journal says of each file, by task."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in done.items():
        file, _, task = name.partition("\t")
        found.setdefault(file, {})[task] = value
    return found
