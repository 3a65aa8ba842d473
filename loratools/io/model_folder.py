"""A model folder that is written file by file, whole or not there; an interrupted one can be gone on with.

All is written in a hidden folder beside the output: ``.NAME.bake`` holds the new files under ``new``, the journal of
those that are finished, and a lock. The journal names a file only once the file is on the disk under its final name.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TypeGuard

from loratools.errors import LoraError, OutputExistsError, ReadError, WriteError
from loratools.io._journal import Journal
from loratools.io._lock import HeldError, Lock
from loratools.io._model_files import true_index
from loratools.io.atomic import check_folder, replace_files, sync, sync_folder
from loratools.io.base import Base
from loratools.io.regions import clone_file

__all__ = ["ModelFolder", "true_index"]

_SHOWN_NAME = (
    200  # characters of the output's name in that of the work folder: 255 bytes have to do for all of it
)


class ModelFolder:
    """The output folder of a bake; a context that gives it its name at the end, or leaves nothing behind.

    ``place`` and ``finished`` may be called by different threads.

    Attributes:
        done: Names of the files of tensors that an interrupted run finished; always empty without ``resume``.
        fresh_reason: Why a run that should have been resumed starts afresh; empty where it is resumed.
    """

    def __init__(
        self,
        output: str | os.PathLike[str],
        base: Base,
        *,
        overwrite: bool = False,
        resume: bool = False,
        digest: str = "",
        replaced: Collection[str] = (),
    ) -> None:
        """Nothing is done before the context is entered.

        Args:
            output: The folder to be written.
            base: The model that it is made from; what lies beside its weights is copied.
            overwrite: Whether files of an existing folder may be replaced; others stay in it.
            resume: Go on with an interrupted run, and keep finished files if this one is interrupted.
            digest: Of all that decides what is written; a run is resumed by one of the same digest alone.
            replaced: Names of files in an existing folder that go once the new ones are in place.
        """
        self.done: frozenset[str] = frozenset()
        self.fresh_reason = ""
        self._target = Path(os.path.realpath(output))
        self._work = self._target.with_name(f".{self._target.name[:_SHOWN_NAME]}.bake")
        self._new = self._work / "new"
        self._base = base
        self._overwrite = overwrite
        self._resume = resume
        self._journal = Journal(self._work, digest)
        self._replaced = replaced
        self._finished: dict[str, int] = {}
        self._written: set[str] = set()
        self._turn = threading.Lock()
        self._lock: Lock | None = None

    @property
    def beside(self) -> tuple[str, ...]:
        """What is copied from beside the base's weights: all of it that was not written anew."""
        if self._base.folder and os.path.realpath(self._base.folder) == os.fspath(self._target):
            return ()
        return tuple(name for name in self._base.beside if name not in self._written)

    def __enter__(self) -> ModelFolder:
        """Make the work folder, or take up the one of an interrupted run.

        Raises:
            OutputExistsError: The output holds files, and ``overwrite`` is false; or another process writes it.
            WriteError: The output is a file, its parent is missing, or the system refuses.
        """
        check_folder(self._target, self._overwrite)
        try:
            self._work.mkdir(exist_ok=True)
            self._lock = Lock(self._work / "lock")
            self._begin()
        except HeldError as error:
            raise OutputExistsError(
                "another process is writing this output",
                path=self._target,
                todo="Wait until it is done, or choose another name",
            ) from error
        except BaseException as error:
            self._leave()
            if _by_the_system(error):
                raise self._write_error(error) from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the output its name, or after an error keep no more than what can be resumed."""
        try:
            if error is None:
                self._publish()
            elif _by_the_system(error):
                raise self._write_error(error) from error
        finally:
            self._leave()

    def place(self, name: str) -> str:
        """Where to write a file of tensors, until :meth:`finished` is told.

        Args:
            name: Relative to the folder, with "/" between names.

        Raises:
            OSError: Its folder cannot be made.
        """
        path = self._unfinished(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        return os.fspath(path)

    def finished(self, name: str) -> None:
        """Bring a file that was placed to the disk, and record that it is done.

        Raises:
            OSError: The system refuses.
        """
        path = self._unfinished(name)
        sync(path)
        size = path.stat().st_size
        os.replace(path, self._new / name)
        sync_folder(path.parent)
        with self._turn:
            self._written.add(name)
            self._finished[name] = size
            self._journal.write(self._finished)

    def write_json(self, name: str, value: object) -> None:
        """Write a configuration or an index.

        Raises:
            OSError: The system refuses.
        """
        path = self._new / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        self._written.add(name)

    def _begin(self) -> None:
        if self._resume:
            found, self.fresh_reason = self._journal.read()
            self._finished = {name: size for name, size in found.items() if _size(self._new / name) == size}
        self._sweep()
        self._new.mkdir(exist_ok=True)
        self.done = frozenset(self._finished)
        self._written |= self.done
        self._journal.write(self._finished)

    def _publish(self) -> None:
        """Copy what lies beside, and give all of it the output's name."""
        try:
            for name in self.beside:
                _copy(Path(self._base.folder, name), self._new / name)
            files = sorted(file for file in self._new.rglob("*") if file.is_file())
            for file in files:
                if file.relative_to(self._new).as_posix() not in self._finished:
                    sync(file)
            self._take_name(files)
        except OSError as error:
            if _by_the_system(error):
                raise self._write_error(error) from error
            raise
        self._finished = {}

    def _take_name(self, files: list[Path]) -> None:
        check_folder(self._target, self._overwrite)
        with suppress(OSError):  # only an empty folder can be removed, and need not be kept
            self._target.rmdir()
        if self._target.exists():
            replace_files(files, self._new, self._target)
            for name in self._replaced:
                if self._new / name not in files:
                    (self._target / name).unlink(missing_ok=True)
        else:
            os.replace(self._new, self._target)
        sync_folder(self._target.parent)

    def _leave(self) -> None:
        """Remove the work folder, or where it can be resumed what is half-written in it; let go of the lock."""
        if self._lock is not None:
            if not self._resume:
                self._finished = {}
            with suppress(OSError):  # a full or read-only disk must not hide why
                self._sweep()
                if not self._finished:
                    self._journal.remove()
            self._lock.release()
            self._lock = None
        with suppress(OSError):  # not empty where it can be resumed, or another process is at work in it
            self._work.rmdir()

    def _sweep(self) -> None:
        """Remove everything but finished files."""
        if not self._finished:
            shutil.rmtree(self._new, ignore_errors=True)
            return
        for file in list(self._new.rglob("*")):
            if not file.is_dir() and file.relative_to(self._new).as_posix() not in self._finished:
                file.unlink()

    def _unfinished(self, name: str) -> Path:
        path = self._new / name
        return path.with_name(f".{path.name}.part")

    def _write_error(self, error: OSError) -> WriteError:
        """The error that names the output instead of the work folder, and says what is left of it."""
        if isinstance(error, WriteError):
            problem, path = (
                text.replace(os.fspath(self._new), os.fspath(self._target))
                for text in (error.problem, error.path or os.fspath(self._target))
            )
        else:
            problem, path = f"cannot be written: {error.strerror or error}", os.fspath(self._target)
            with suppress(OSError):
                room = shutil.disk_usage(self._target.parent).free
                problem += f" ({room:,} bytes are free in {self._target.parent})"
        kept = self._resume and self._finished
        return WriteError(
            problem,
            path=path,
            expected=f"{len(self._finished)} finished files are kept for --resume, and an old folder is untouched"
            if kept
            else "Nothing was left behind, and an old folder is untouched",
            todo="Make room, check the permissions, close files elsewhere, or choose another folder",
        )


def _by_the_system(error: BaseException) -> TypeGuard[OSError]:
    """Whether an error says that the system refused to write."""
    return isinstance(error, WriteError) or (isinstance(error, OSError) and not isinstance(error, LoraError))


def _size(path: Path) -> int:
    """Of a file, in bytes; -1 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _copy(source: Path, place: Path) -> None:
    """Copy a file's content, a link's as well, by the system.

    Raises:
        ReadError: The source cannot be read.
        OSError: The copy cannot be written.
    """
    try:
        source.open("rb").close()
    except OSError as error:
        raise ReadError(
            f"cannot be read: {error.strerror or error}",
            path=source,
            expected="It lies beside the weights and is copied",
            todo="Check that it is still there, and its permissions",
        ) from error
    place.parent.mkdir(parents=True, exist_ok=True)
    place.touch()
    if not clone_file(os.fspath(source), os.fspath(place)):
        shutil.copyfile(source, place)
