"""The folder in which a pack comes into being, and the journal by which another run goes on with it.

It lies beside the output under a hidden name that follows from the output's, and takes its place when all is written.
The journal has a line for every finished adapter: what the index says of it, the state of the source, the digest of
what was written, and the marks by which later ones are compared with it. A line that was cut off ends it.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy
import torch

from loratools.errors import OutputExistsError, WriteError
from loratools.io import atomic
from loratools.io._lock import HeldError, Lock
from loratools.ops import _pack_index, files
from loratools.ops._pack_files import Prepared

_JOURNAL = "journal.jsonl"
_THREADS = 8  # that wait for the disk

Record = dict[str, Any]
Shapes = Mapping[str, Sequence[int]]


class Work:
    """One run's folder.

    Attributes:
        folder: Where to write; None where nothing is to be written.
        finished: What the journal of an interrupted run of the same options says, by source.
        shapes: What it says of modules' shapes, by the "key" of its records.
    """

    def __init__(
        self, output: files.PathLike, options: Mapping[str, Any], *, resume: bool, dry: bool
    ) -> None:
        """Take the folder, and read or begin its journal.

        Raises:
            WriteError: Another run is at work on this output, or the system refuses.
        """
        self.target = Path(os.path.realpath(output))
        self.folder: Path | None = None
        self.finished: dict[str, Record] = {}
        self.shapes: dict[str, Shapes] = {}
        self._told: set[str] = set()
        self._resume = resume
        self._published = False
        if dry:
            return
        self._lock = self._locked()
        self.folder = self.target.with_name(f".{self.target.name}.pack")
        try:
            self._begin(json.dumps(options, sort_keys=True), resume)
        except BaseException:
            self._lock.release()
            raise

    def _begin(self, stated: str, resume: bool) -> None:
        """Read the journal of an interrupted run, and begin one."""
        assert self.folder is not None
        if resume:
            self.finished, self.shapes = _read(self.folder / _JOURNAL, stated)
        if not self.finished:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(exist_ok=True)
        self._journal = open(self.folder / _JOURNAL, "w", encoding="utf-8")  # noqa: SIM115 - closed at the exit
        self._line({"options": stated})
        for record in self.finished.values():
            self._tell(record["key"], self.shapes[record["key"]])
            self._line(record)

    def _locked(self) -> Lock:
        try:
            return Lock(self.target.with_name(f".{self.target.name}.lock"))
        except HeldError as error:
            raise WriteError(
                "another run is writing this output",
                path=self.target,
                expected="One run at a time was expected",
                todo="Wait until it has ended",
            ) from error
        except OSError as error:
            raise WriteError(
                f"cannot be written: {error.strerror}",
                path=self.target,
                todo="Check the folder's permissions, or choose another one",
            ) from error

    def __enter__(self) -> Work:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.folder is None:
            return
        self._journal.close()
        if not self._published and not (self._resume and error is not None):
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()

    def note(self, source: str, record: Record, shapes: Shapes, marks: torch.Tensor | None = None) -> None:
        """Remember what is finished.

        Args:
            source: The input.
            record: What is known of it, JSON; its "key" is a hash of the shapes.
            shapes: Of its modules, which many adapters have in common.
            marks: Float64, by which others are compared with it; None where it is compared by another one's.
        """
        if self.folder is None:
            return
        self._tell(record["key"], shapes)
        said = {"source": source, **record}
        if marks is not None:
            said["marks"] = base64.b64encode(marks.numpy().tobytes()).decode("ascii")
        self._line(said)

    def _tell(self, key: str, shapes: Shapes) -> None:
        """Write shapes down once."""
        if key not in self._told:
            self._told.add(key)
            self._line({"shapes": dict(shapes), "key": key})

    def _line(self, record: Record) -> None:
        self._journal.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._journal.flush()

    def holds(self, path: str, sha256: str) -> bool:
        """Whether a file that the journal tells of is there as it was written."""
        if self.folder is None:
            return False
        with suppress(OSError):
            return _pack_index.file_digest(self.folder / path) == sha256
        return False

    def write(self, ready: Prepared, path: str) -> str:
        """Write one adapter.

        Args:
            ready: Its files.
            path: A file, or a folder where the layout wants one, relative to the output.

        Returns:
            The sha256 of the weights.
        """
        return "" if self.folder is None else ready.write(self.folder / path)

    def publish(self, index: str, kept: Iterable[str]) -> None:
        """Write the index, bring all to the disk, and give the folder its name.

        Args:
            index: Its text.
            kept: What the output consists of beside it, relative to it; what else an interrupted run has left goes.

        Raises:
            WriteError: The system refuses.
        """
        if self.folder is None:
            return
        self._journal.close()
        try:
            self._clear(set(kept))
            (self.folder / _pack_index.NAME).write_text(index, "utf-8", newline="\n")
            (self.folder / _JOURNAL).unlink()
            with ThreadPoolExecutor(_THREADS) as pool:
                list(pool.map(atomic.sync, [each for each in self.folder.rglob("*") if each.is_file()]))
            self._rename()
        except OSError as error:
            raise WriteError(
                f"cannot be written: {error.strerror or error}",
                path=self.target,
                todo="Make room, check the permissions, or choose another folder",
            ) from error
        atomic.sync_folder(self.target.parent)
        self._published = True

    def _clear(self, kept: set[str]) -> None:
        """Remove adapters that an interrupted run has written and this one does not have."""
        assert self.folder is not None
        for path in list((self.folder / _pack_index.ADAPTERS).glob("*")):
            if f"{_pack_index.ADAPTERS}/{path.name}" not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _rename(self) -> None:
        assert self.folder is not None
        old = self.target.with_name(f".{self.target.name}.old")
        if self.target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(self.target, old)
        os.replace(self.folder, self.target)
        shutil.rmtree(old, ignore_errors=True)


def marks_of(record: Record) -> torch.Tensor:
    """The marks that a record of the journal keeps."""
    data = base64.b64decode(record["marks"])
    return torch.from_numpy(numpy.frombuffer(data, "<f8").copy())


def _read(path: Path, options: str) -> tuple[dict[str, Record], dict[str, Shapes]]:
    """The records of an interrupted run of these options, and the shapes that they speak of; none of another."""
    found: dict[str, Record] = {}
    shapes: dict[str, Shapes] = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return found, shapes
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
        except ValueError:  # where the run was killed
            break
        if not isinstance(record, dict) or (number == 0 and record.get("options") != options):
            return {}, {}
        if "shapes" in record:
            shapes[record["key"]] = record["shapes"]
        elif number:
            found[str(record.get("source"))] = record
    return found, shapes


def check_output(output: files.PathLike, *, overwrite: bool, resume: bool) -> None:
    """Refuse an output that could not be replaced by a pack.

    Raises:
        OutputExistsError: It is there; or something is in it that is no pack, whatever may be overwritten.
        WriteError: Its folder does not exist.
    """
    target = os.fspath(output)
    parent = os.path.dirname(os.path.realpath(target))
    if not os.path.isdir(parent):
        raise WriteError(
            f"the folder {parent} does not exist", path=target, todo="Create it, or choose another name"
        )
    if not os.path.lexists(target) or (os.path.isdir(target) and not os.listdir(target)):
        return
    if not os.path.isdir(target) or not _pack_index.is_pack(target):
        raise OutputExistsError(
            "the output exists, and is no pack",
            path=target,
            expected="A new folder, an empty one or an older pack was expected",
            todo="Choose another name: only a pack is replaced, as a whole",
        )
    if not overwrite:
        raise OutputExistsError(
            "the output exists already" + (": the run that was to be resumed has ended" if resume else ""),
            path=target,
            todo="Pass --overwrite to replace it, or choose another name",
        )
