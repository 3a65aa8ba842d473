"""Which files of an output are finished, kept where the next run finds it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

_VERSION = 1


class Journal:
    """The journal of one run, a file in its work folder.

    Attributes:
        digest: Of all that decides what the run writes.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        self.digest = digest
        self._path = folder / "journal.json"
        self._draft = folder / "journal.new"

    def read(self) -> tuple[dict[str, int], str]:
        """The finished files of an interrupted run of the same digest, with their sizes in bytes; or none, and why."""
        try:
            said = json.loads(self._path.read_text(encoding="utf-8"))
            version, digest = said["version"], said["digest"]
            sizes = {str(name): int(size) for name, size in said["finished"].items()}
        except FileNotFoundError:
            return {}, "no interrupted run left anything here"
        except (ValueError, TypeError, KeyError, AttributeError):
            return {}, "the journal of the interrupted run is damaged"
        if version != _VERSION:
            return {}, "the interrupted run was one of another version"
        if digest != self.digest:
            return {}, "the interrupted run had another base, other adapters or other options"
        return sizes, ""

    def write(self, finished: Mapping[str, int]) -> None:
        """Write it as a whole, to the disk: a killed process leaves the old one or the new one.

        Raises:
            OSError: The system refuses.
        """
        said = {"version": _VERSION, "digest": self.digest, "finished": dict(finished)}
        with open(self._draft, "w", encoding="utf-8") as file:
            json.dump(said, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(self._draft, self._path)

    def remove(self) -> None:
        """Remove it."""
        for path in (self._path, self._draft):
            path.unlink(missing_ok=True)
