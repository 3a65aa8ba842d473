"""A model folder that is written as a whole or not at all; an interrupted one can be gone on with."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from loratools.errors import ReadError, WriteError
from loratools.io import storage, unchanged
from loratools.io._model_files import true_index
from loratools.io.atomic import check_folder, replace_files, sync, sync_folder
from loratools.io.base import Base
from loratools.io.draft import Draft
from loratools.io.regions import clone_file, fetch
from loratools.io.work_folder import Identity

__all__ = ["ModelFolder", "true_index"]


class ModelFolder(Draft):
    """A draft of a model folder: files of tensors, configurations, and what lies beside the base's weights."""

    def __init__(
        self,
        output: str | os.PathLike[str],
        base: Base,
        identity: Identity | Callable[[], Identity],
        *,
        overwrite: bool = False,
        resume: bool = False,
        files: Collection[str] = (),
        needed: int | None = None,
        replaced: Collection[str] = (),
    ) -> None:
        """Nothing is done before the context is entered.

        Args:
            output: The folder to be written.
            base: The model that it is made from; what lies beside its weights is copied.
            identity: What decides what is written, or what tells: a run is resumed by one of the same alone.
            overwrite: Whether files of an existing folder may be replaced; others stay in it.
            resume: Go on with an interrupted run, and keep what is done if this one is interrupted.
            files: Names of the files of tensors.
            needed: Their size in bytes where it is known, for the message when the disk is full.
            replaced: Names of files in an existing folder that go once the new ones are in place.
        """
        super().__init__(output, identity, overwrite=overwrite, resume=resume, files=files, needed=needed)
        self._base = base
        self._replaced = replaced
        self._written = {*files}

    @property
    def beside(self) -> tuple[str, ...]:
        """What is copied from beside the base's weights: all of it that was not written anew."""
        if self._base.folder and os.path.realpath(self._base.folder) == os.fspath(self._target):
            return ()
        return tuple(name for name in self._base.beside if name not in self._written)

    def write_json(self, name: str, value: object) -> None:
        """Write a configuration or an index.

        Raises:
            OSError: The system refuses.
        """
        path = self._new / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        self._written.add(name)

    def _check(self) -> None:
        check_folder(self._target, self._overwrite)

    def _publish(self) -> None:
        for name in self.beside:
            _copy(storage.below(self._base.folder, name), self._new / name)
        self._refuse_lost()
        files = sorted(file for file in self._new.rglob("*") if file.is_file())
        for file in files:
            sync(file)
        self._take_name(files)

    def _refuse_lost(self) -> None:
        """Refuse to publish a part: somebody may have removed the work folder, of which the last files made another."""
        lost = sorted(name for name in {*self._written, *self.beside} if not (self._new / name).is_file())
        if lost:
            raise WriteError(
                f"cannot be written: {len(lost)} of its files were removed while others were written",
                path=self._target,
                keys=lost,
                expected=f"What is half-made lies in {self._work.path.name} until all of it is whole",
                todo="Leave that folder alone until the work is done, and start again",
            )

    def _take_name(self, files: list[Path]) -> None:
        check_folder(self._target, self._overwrite)
        unchanged.check()
        with suppress(OSError):  # only an empty folder can be removed, and need not be kept
            self._target.rmdir()
        if self._target.exists():
            replace_files(files, self._new, self._target)
            for name in self._replaced:
                if self._new / name not in files:
                    (self._target / name).unlink(missing_ok=True)
        else:
            unchanged.rename(self._new, self._target)
        sync_folder(self._target.parent)


def _copy(source: str, place: Path) -> None:
    """Copy a file's content, a link's as well, by the system.

    Raises:
        ReadError: The source cannot be read.
        OSError: The copy cannot be written.
    """
    try:
        if storage.is_url(source):
            unchanged.note_elsewhere(source, storage.tag(source))
        else:
            unchanged.note(source)
            open(source, "rb").close()
    except OSError as error:
        raise ReadError(
            f"cannot be read: {error.strerror or error}",
            path=source,
            expected="It lies beside the weights and is copied",
            todo="Check that it is still there, and its permissions",
        ) from error
    place.parent.mkdir(parents=True, exist_ok=True)
    place.touch()
    if storage.is_url(source):
        fetch(source, place)
    elif not clone_file(source, os.fspath(place)):
        shutil.copyfile(source, place)
