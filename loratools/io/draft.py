"""An output that is made in its work folder, and gets its name when all of it is on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeGuard

from loratools.errors import LoraError, WriteError
from loratools.io import unchanged
from loratools.io._file_log import FileLog, by_file
from loratools.io.atomic import check_file, sync, sync_folder
from loratools.io.work_folder import Identity, WorkFolder

_NEW = "new"  # in the work folder: the output's own files


class Draft:
    """The output of one run; a context that gives it its name at the end, or leaves nothing under it.

    What is half-made lies in the work folder beside the output, with the journal of what is done: that is kept where
    the run is interrupted and was to be resumed, or where it is killed. Different threads may ask for places.
    """

    def __init__(
        self,
        output: str | os.PathLike[str],
        identity: Identity | Callable[[], Identity],
        *,
        overwrite: bool = False,
        resume: bool = False,
        files: Collection[str] = (),
        needed: int | None = None,
    ) -> None:
        """Nothing is done before the context is entered.

        Args:
            output: The file or folder to be written.
            identity: What decides what is written, or what tells: a run is resumed by one of the same alone.
            overwrite: Whether existing files may be replaced.
            resume: Go on with an interrupted run, and keep what is done if this one is interrupted.
            files: Names of the files that are journalled, with "/" between names: of others nothing is taken over.
            needed: The output's size in bytes where it is known, for the message when the disk is full.
        """
        self._target = Path(os.path.realpath(output))
        self._overwrite = overwrite
        self._needed = needed
        self._files = frozenset(files)
        self._work = WorkFolder(self._target, identity, resume=resume)
        self._new = self._work.path / _NEW
        self._known: Mapping[str, Mapping[str, Any]] = {}

    @property
    def fresh_reason(self) -> str:
        """Why a run that should have been resumed starts afresh; empty where it is resumed."""
        return self._work.fresh_reason

    def __enter__(self) -> Draft:
        """Make the work folder, or take up the one of an interrupted run.

        Raises:
            OutputExistsError: The output exists, and ``overwrite`` is false; or another process writes it.
            OptionError: The interrupted run was of other inputs or options.
            WriteError: The output cannot be of this name, or the system refuses.
        """
        self._check()
        self._work.__enter__()
        try:
            self._known = by_file(self._work.done)
            self._new.mkdir(exist_ok=True)
            self._sweep()
        except BaseException as error:
            self._work.__exit__(type(error), error, None)
            if by_the_system(error):
                raise self._write_error(error) from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the output its name, or after an error keep no more than what can be resumed."""
        found = error
        try:
            if found is None:
                self._publish()
        except BaseException as failed:
            found = failed
        self._work.__exit__(None if found is None else type(found), found, None)
        if found is not None and by_the_system(found):
            raise self._write_error(found) from found
        if found is not None and error is None:
            raise found

    def place(self, name: str) -> str:
        """Where a file of the output lies until it is published.

        Args:
            name: Relative to the output, with "/" between names; of a single file any.

        Raises:
            OSError: Its folder cannot be made.
        """
        path = self._new / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.fspath(path)

    def log(self, name: str) -> FileLog:
        """What is done of one of the journalled files already, and where it is noted."""
        return FileLog(self._work, name, self._known.get(name, {}))

    def _check(self) -> None:
        """Refuse a name that the output cannot have."""
        raise NotImplementedError

    def _publish(self) -> None:
        """Give the output its name; what it was made of has to be as it was until then."""
        raise NotImplementedError

    def _sweep(self) -> None:
        """Remove what the interrupted run left and nothing can be said of."""
        for file in list(self._new.rglob("*")):
            name = file.relative_to(self._new).as_posix()
            if file.is_symlink() or (not file.is_dir() and not (name in self._files and name in self._known)):
                file.unlink()

    def _write_error(self, error: OSError) -> WriteError:
        """The error that names the output instead of the work folder, and says what is left of it."""
        if isinstance(error, WriteError):
            problem, path = (
                text.replace(os.fspath(self._new), os.fspath(self._target))
                for text in (error.problem, error.path or os.fspath(self._target))
            )
            keys = error.keys
        else:
            keys = ()
            problem, path = f"cannot be written: {error.strerror or error}", os.fspath(self._target)
            with suppress(OSError):
                room = shutil.disk_usage(self._target.parent).free
                needed = "" if self._needed is None else f"{self._needed:,} bytes needed, "
                problem += f" ({needed}{room:,} bytes are free in {self._target.parent})"
        left = "What is done is kept for --resume" if self._work.kept else "Nothing was left behind"
        return WriteError(
            problem,
            path=path,
            keys=keys,
            expected=f"{left}, and an old output is untouched",
            todo="Make room, check the permissions, close files elsewhere, or choose another folder",
        )


class ModelFile(Draft):
    """A draft of one file."""

    def place(self, name: str) -> str:  # noqa: ARG002 - there is one alone
        """Where the file lies until it is published."""
        return os.fspath(self._new / self._target.name)

    def _check(self) -> None:
        check_file(self._target, self._overwrite)

    def _publish(self) -> None:
        made = self._new / self._target.name
        sync(made)
        check_file(self._target, self._overwrite)
        unchanged.check()
        unchanged.rename(made, self._target)
        sync_folder(self._target.parent)


def by_the_system(error: BaseException) -> TypeGuard[OSError]:
    """Whether an error says that the system refused to write."""
    return isinstance(error, WriteError) or (isinstance(error, OSError) and not isinstance(error, LoraError))
