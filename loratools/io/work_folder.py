"""What a run leaves beside its output until it is done: ``.NAME.work``, with a lock, a journal and half-made files.

A run that ends in order removes it, or keeps it where it was told that it would be resumed; one that is killed leaves
it behind. The next run of the same inputs and options takes it up with ``resume``; without, it is swept.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from loratools.errors import LoraError, OptionError, WriteError
from loratools.io import _journal_file, staging, storage
from loratools.io._journal_file import Identity, Journal
from loratools.io._lock import HeldError, Lock
from loratools.io._lodging import LOCK, dislodge, entered, folder_of, held, lodge
from loratools.io.atomic import sync_folder

__all__ = ["REPLACED", "Cleaned", "Identity", "WorkFolder", "clean", "place_of"]

REPLACED = "replaced"
"""The name in a work folder under which an output that is a whole folder waits while another takes its place."""
_JOURNAL = "journal"
_EVERY = 1.0  # seconds between two times that the journal is brought to the disk
_FIRST = 1.0  # seconds of a run that need not be written down: doing them again is as quick


class Cleaned(NamedTuple):
    """What was removed.

    Attributes:
        paths: Files and folders beside the output.
        bytes: That they took on the disk.
    """

    paths: tuple[str, ...]
    bytes: int


class WorkFolder:
    """The folder of one run; a context. ``record`` and ``flush`` may be called by different threads.

    The journal begins with the first ``flush``: a run that is over before has none.

    Attributes:
        path: The folder.
        resume: Whether it goes on with an interrupted run, and is kept if it is interrupted itself.
        done: What the journal of the interrupted run says of each task that is done, by the task's name; empty without
            ``resume``. Whoever takes it up checks that it is so.
        fresh_reason: Why a run that should have been resumed starts afresh; empty where it is resumed.
        kept: Whether it was left there at the end, for another run to resume.
    """

    def __init__(
        self,
        output: str | os.PathLike[str],
        identity: Identity | Callable[[], Identity],
        *,
        resume: bool = False,
        sync: Callable[[], None] | None = None,
    ) -> None:
        """Nothing is done before the context is entered.

        Args:
            output: The file or folder that the run will write.
            identity: What decides what is written; or what tells, called once when it is needed.
            resume: Go on with an interrupted run, and keep what is done if this one is interrupted.
            sync: Called before records are brought to the disk: has what they speak of on the disk.
        """
        self.path = place_of(output)
        self.done: dict[str, Any] = {}
        self.fresh_reason = ""
        self.kept = False
        self.resume = resume
        self._output = os.fspath(output)
        self._target = Path(os.path.realpath(output))
        self._identity = identity
        self._sync = sync
        self._waiting: dict[str, Any] = {}
        self._begun = self._flushed = time.monotonic()
        self._turn = threading.Lock()  # to note something, which takes no time
        self._writing = threading.Lock()  # to bring it to the disk, which may take long
        self._ended = True
        self._lock: Lock | None = None
        self._journal: Journal | None = None

    @property
    def recording(self) -> bool:
        """Whether what is done now is worth a record: from the second second on, or where that was asked for."""
        return self.resume or time.monotonic() - self._begun >= _FIRST

    def __enter__(self) -> WorkFolder:
        """Make the folder, or take up the one of an interrupted run.

        Raises:
            OutputExistsError: Another process writes this output.
            OptionError: The interrupted run was of other inputs or options.
            WriteError: The system refuses.
        """
        try:
            self._begin()
        except BaseException as error:
            self._let_go()
            if isinstance(error, HeldError):
                raise held(self._output) from error
            if isinstance(error, OSError) and not isinstance(error, WriteError):
                raise _refused(self._output, error) from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove it, unless the run failed, something is done, and it is to be resumed."""
        if error is not None and self.resume:
            with suppress(OSError):  # a full or read-only disk must not hide why
                self.flush()
        self.kept = error is not None and self.resume and (self._journal is not None or bool(self.done))
        self._close_journal()
        self._remove(kept=self.kept)
        self._let_go()

    def record(self, task: str, value: object) -> None:
        """Note that a task is done; it is on the disk after the next :meth:`flush`, which comes every second.

        Other threads that record meanwhile are not kept waiting.

        Args:
            task: Its name.
            value: What is known of it, as JSON can hold it.

        Raises:
            WriteError: The system refuses.
        """
        with self._turn:
            self._waiting[task] = value
            due = time.monotonic() - self._flushed >= _EVERY
        if due and self._writing.acquire(blocking=False):
            try:
                self._flush()
            finally:
                self._writing.release()

    def flush(self) -> None:
        """Have all that was recorded on the disk, and before it what it speaks of.

        Raises:
            WriteError: The system refuses.
        """
        with self._writing:
            self._flush()

    def _flush(self) -> None:
        with self._turn:
            taken, self._waiting = self._waiting, {}
        try:
            if taken and not self._ended:
                if self._sync is not None:
                    self._sync()
                self._opened().append(taken)
        except BaseException as error:
            with self._turn:
                self._waiting = {**taken, **self._waiting}
            if isinstance(error, OSError) and not isinstance(error, LoraError):
                raise _refused(self._output, error) from error
            raise
        finally:
            self._flushed = time.monotonic()

    def _opened(self) -> Journal:
        """The journal, begun if it was not."""
        if self._journal is None:
            self._journal = Journal(self.path / _JOURNAL, self._own_identity(), self.done)
            sync_folder(self.path)
            sync_folder(self.path.parent)
        return self._journal

    def _own_identity(self) -> Identity:
        if not isinstance(self._identity, Identity):
            self._identity = self._identity()
        return self._identity

    def _begin(self) -> None:
        self._lock = entered(self.path)
        lodge(self._target, self.path)
        _give_back(self.path, self._target)
        if self.resume:
            self._take_up()
        if not self.done:
            _empty(self.path)
        self._ended = False
        self._begun = self._flushed = time.monotonic()

    def _take_up(self) -> None:
        found = _journal_file.read(self.path / _JOURNAL)
        self.fresh_reason = found.reason
        if found.identity is None:
            return
        other = self._own_identity().differences(found.identity)
        if other:
            self._kept_as_it_is()
            raise OptionError(
                "the interrupted run is another than this one",
                path=self._output,
                keys=other,
                expected="A run is resumed with the same inputs, unchanged, and the same options",
                todo="Give those, start anew without --resume, or remove what is left of it with --clean",
            )
        self.done = found.records

    def _kept_as_it_is(self) -> None:
        """Let go of the lock, and of nothing else."""
        if self._lock is not None:
            dislodge(self._target)
            self._lock.release()
            self._lock = None

    def _remove(self, *, kept: bool) -> None:
        with suppress(OSError):  # a read-only disk refuses even that, and must not hide why a run failed
            _give_back(self.path, self._target)
            if not kept:
                _empty(self.path)

    def _close_journal(self) -> None:
        with self._writing:  # threads that are late record nothing any more
            self._ended = True
            journal, self._journal = self._journal, None
        if journal is not None:
            journal.close()

    def _let_go(self) -> None:
        self._close_journal()
        self._kept_as_it_is()
        with suppress(OSError):  # not empty where it can be resumed, or another process is at work in it
            self.path.rmdir()


def place_of(output: str | os.PathLike[str]) -> Path:
    """The work folder of an output; of one at a URL, where it is made before it is uploaded."""
    return folder_of(_made_at(output))


def _made_at(output: str | os.PathLike[str]) -> Path:
    """The path of an output on this machine, without links."""
    here = staging.place(os.fspath(output)) if storage.is_url(output) else output
    return Path(os.path.realpath(here))


def clean(output: str | os.PathLike[str]) -> Cleaned:
    """Remove what interrupted runs have left beside an output; the output itself stays as it is.

    Raises:
        OutputExistsError: A run is still at work on it.
        WriteError: The system refuses.
    """
    folder = place_of(output)
    if folder.is_symlink() or not folder.is_dir():
        return Cleaned((), 0)
    try:
        lock = entered(folder)
        try:
            _give_back(folder, _made_at(output))
            size = sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir())
            _empty(folder)
        finally:
            lock.release()
        folder.rmdir()
    except HeldError as error:
        raise held(os.fspath(output)) from error
    except OSError as error:
        raise _refused(output, error) from error
    return Cleaned((os.fspath(folder),), size)


def _give_back(folder: Path, target: Path) -> None:
    """Give an output its name again whose successor was killed before it could take it."""
    old = folder / REPLACED
    if old.is_dir() and not os.path.lexists(target):
        os.replace(old, target)


def _empty(folder: Path) -> None:
    """Remove everything but the lock."""
    for entry in os.scandir(folder):
        if entry.name == LOCK:
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def _refused(output: str | os.PathLike[str], error: OSError) -> WriteError:
    return WriteError(
        f"its work folder {place_of(output).name} cannot be written: {error.strerror or error}",
        path=output,
        expected="A run keeps there, beside its output, what it has done so far",
        todo="Make room, check the permissions, or choose another folder for the output",
    )
