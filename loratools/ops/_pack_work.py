"""The folder in which a pack comes into being, and the journal by which another run goes on with it.

It lies in the output's work folder, and takes the output's name when all is written. The journal has a record for every
finished adapter: what the index says of it, the state of the source, the digest of what was written, and the marks by
which later ones are compared with it. A record that is not as this module writes it counts for nothing: the adapter is
made again.
"""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy
import torch

from loratools.errors import MalformedFileError, OutputExistsError, WriteError
from loratools.io import atomic, unchanged
from loratools.io.base import keys_of
from loratools.io.work_folder import REPLACED, Identity, WorkFolder
from loratools.ops import _identity_of, _pack_fields, _pack_index, _pack_plan, _pack_twins, files
from loratools.ops._outputs import check_system

_MADE = "pack"  # in the work folder
_THREADS = 8  # that wait for the disk
_SHAPES, _ADAPTER = "shapes ", "adapter "  # how the names of the journal's records begin

Record = dict[str, Any]
Shapes = Mapping[str, Sequence[int]]


class Work:
    """One run's folder, a context.

    Attributes:
        folder: Where to write; None where nothing is to be written.
        finished: What the journal of an interrupted run of the same options says, by source.
        shapes: What it says of modules' shapes, by the "key" of its records.
    """

    def __init__(
        self,
        output: files.PathLike,
        identity: Callable[[], Identity],
        *,
        resume: bool,
        overwrite: bool,
        dry: bool,
    ) -> None:
        """Nothing is done before the context is entered.

        Args:
            output: The pack.
            identity: What decides what is written.
            resume: Go on with an interrupted run, and keep what is finished if this one is interrupted.
            overwrite: Whether an older pack may be replaced.
            dry: Write nothing.
        """
        self.target = Path(os.path.realpath(output))
        self.folder: Path | None = None
        self.finished: dict[str, Record] = {}
        self.shapes: dict[str, Shapes] = {}
        self._told: set[str] = set()
        self._dry = dry
        self._overwrite = overwrite
        self._work = WorkFolder(output, identity, resume=resume)
        self._stack = ExitStack()

    def __enter__(self) -> Work:
        """Lock the work folder, and read what an interrupted run has left there.

        Raises:
            OutputExistsError: Another process writes this output, or it is there and may not be replaced.
            OptionError: The interrupted run was of other inputs or options.
            WriteError: The system refuses.
        """
        if self._dry:
            return self
        with ExitStack() as stack:
            stack.enter_context(self._work)
            # Once more, now that nobody else is at work: a run that was killed may have given it back.
            check_output(self.target, overwrite=self._overwrite, resume=self._work.resume)
            self.finished, self.shapes = _read(self._work.done)
            self._told.update(self.shapes)
            self.folder = self._work.path / _MADE
            self.folder.mkdir(exist_ok=True)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove all of it, unless the run failed and is to be resumed."""
        self._stack.__exit__(kind, error, trace)

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
        said = dict(record)
        if marks is not None:
            said["marks"] = base64.b64encode(marks.numpy().tobytes()).decode("ascii")
        self._work.record(_ADAPTER + source, said)

    def _tell(self, key: str, shapes: Shapes) -> None:
        """Write shapes down once."""
        if key not in self._told:
            self._told.add(key)
            self._work.record(_SHAPES + key, dict(shapes))

    def holds(self, path: str, sha256: str) -> bool:
        """Whether a file that the journal tells of is there as it was written."""
        if self.folder is None:
            return False
        with suppress(OSError):
            return _pack_index.file_digest(self.folder / path) == sha256
        return False

    def discard(self, path: str) -> None:
        """Remove an adapter that is not to be in the pack; what stays, ``publish`` removes.

        Args:
            path: A file or a folder, relative to the output.
        """
        if self.folder is None or not path:
            return
        there = self.folder / path
        with suppress(OSError):
            shutil.rmtree(there) if there.is_dir() else there.unlink()

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
        try:
            self._clear(set(kept))
            (self.folder / _pack_index.NAME).write_text(index, "utf-8", newline="\n")
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

    def _clear(self, kept: set[str]) -> None:
        """Remove adapters that an interrupted run has written and this one does not have."""
        assert self.folder is not None
        for path in list((self.folder / _pack_index.ADAPTERS).glob("*")):
            if f"{_pack_index.ADAPTERS}/{path.name}" not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _rename(self) -> None:
        assert self.folder is not None
        unchanged.check()
        if self.target.exists():
            old = self._work.path / REPLACED
            shutil.rmtree(old, ignore_errors=True)  # of a run that was killed when it was done
            os.replace(self.target, old)
        unchanged.rename(self.folder, self.target)


def identity(options: Mapping[str, Any], base: str) -> Identity:
    """What tells a pack from another, but for its adapters, of which each is told by itself.

    Args:
        options: What was asked for and decides a byte of what is written.
        base: The base model's path, or empty.
    """
    inputs = {base: _identity_of.of_base(keys_of(base))} if base else {}
    return _identity_of.identity("pack", inputs, options)


def marks_of(record: Record) -> torch.Tensor:
    """The marks that a record of the journal keeps."""
    data = base64.b64decode(record["marks"])
    return torch.from_numpy(numpy.frombuffer(data, "<f8").copy())


def _read(done: Mapping[str, Any]) -> tuple[dict[str, Record], dict[str, Shapes]]:
    """The records of an interrupted run, and the shapes that they speak of, as far as they are what is written here."""
    shapes = {
        name.removeprefix(_SHAPES): said
        for name, said in done.items()
        if name.startswith(_SHAPES)
        and _pack_fields.are_shapes(said)
        and _pack_plan.key_of(said) == name.removeprefix(_SHAPES)
    }
    finished = {
        name.removeprefix(_ADAPTER): said
        for name, said in done.items()
        if name.startswith(_ADAPTER) and _is_sound(said, shapes)
    }
    return finished, shapes


def _is_sound(said: Any, shapes: Mapping[str, Shapes]) -> bool:
    """Whether a record is one that could be gone on with."""
    if not isinstance(said, dict) or not isinstance(said.get("key"), str) or said["key"] not in shapes:
        return False
    try:
        if "alias" in said:
            _pack_fields.alias(said["alias"], "")
            return True
        _pack_fields.packed(said.get("adapter"), "")
        found = marks_of(said)
    except (MalformedFileError, KeyError, TypeError, ValueError):
        return False
    whole = found.shape == (_pack_twins.MARKS,) and bool(found.isfinite().all())
    return whole and isinstance(said.get("arch"), str)


def check_output(output: files.PathLike, *, overwrite: bool, resume: bool) -> None:
    """Refuse an output that could not be replaced by a pack.

    Raises:
        OutputExistsError: It is there; or something is in it that is no pack, whatever may be overwritten.
        WriteError: Its folder does not exist.
    """
    target = os.fspath(output)
    check_system(target)
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
