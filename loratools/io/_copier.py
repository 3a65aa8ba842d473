"""Work behind the caller's back: ranges copied by a thread, and what was written brought to the disk by another."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence

from loratools.errors import WriteError
from loratools.io import pieces
from loratools.io._file_log import FileLog
from loratools.io.pieces import Piece

_SYNCED = 64 << 20  # bytes that are worth a call to bring them to the disk
_SECONDS = 1.0  # after which what was noted is brought there, however little it is
# On Linux; elsewhere a call brings more to the disk than the data, and is made for the journal alone.
_SYNC: Callable[[int], None] | None = getattr(os, "fdatasync", None)


def sync_data(file: int) -> None:
    """Have the data of an open file on the disk; its size was there before.

    Raises:
        OSError: The system refuses.
    """
    (_SYNC or os.fsync)(file)


class Syncer:
    """Brings a growing file to the disk while it is written, so that little is left for the end.

    The kernel itself begins only after seconds, or at gigabytes. What was noted of the file is recorded behind it.
    """

    def __init__(self, target: int, log: FileLog | None = None) -> None:
        # Its own descriptor, for a call may outlast the output's. Errors are told once to both: they are kept here.
        self._target = os.dup(target)
        self._log = log
        self._waiting = 0
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="loratools-sync", daemon=True)
        self.error: Exception | None = None
        self._thread.start()

    def wrote(self, count: int) -> None:
        """So many bytes more were written."""
        with self._changed:
            self._waiting += count
            if self._waiting >= _SYNCED:
                self._changed.notify()

    def stop(self, *, wait: bool) -> None:
        """End it; without waiting, a call that is under way ends by itself."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if wait:
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._some():
                noted = [] if self._log is None else self._log.taken()
                if noted or _SYNC is not None:
                    sync_data(self._target)
                if self._log is not None:
                    self._log.record(noted)
        except Exception as error:
            self.error = error
        finally:
            os.close(self._target)

    def _some(self) -> bool:
        """Wait for enough bytes, or for what was noted to grow old; false once there is nothing more to do."""
        with self._changed:
            while not self._stopped and self._waiting < _SYNCED:
                told = self._changed.wait(_SECONDS)
                if not told and self._log is not None and self._log.waits:
                    break
            self._waiting = 0
            return not self._stopped


class Copier:
    """Copies pieces of files into an open one, in a thread."""

    def __init__(
        self,
        target: int,
        chosen: Sequence[Piece],
        wrote: Callable[[int], None],
        log: FileLog | None = None,
    ) -> None:
        """Begin.

        Args:
            target: The output's descriptor.
            chosen: What to copy.
            wrote: Called from the thread after each chunk, with its size in bytes.
            log: Of the output: what it knows of is compared, and what is copied is noted there.
        """
        self._target = target
        self._pieces = chosen
        self._wrote = wrote
        self._log = log
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="loratools-copy", daemon=True)
        self.error: Exception | None = None
        self.taken: list[int] = []  # the sizes of pieces that were there, in bytes
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, after so many seconds at most."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """End it, at the next chunk."""
        self._stopped = True
        self._thread.join()

    def _run(self) -> None:
        try:
            for piece in self._pieces:
                self._bring(piece)
        except _StoppedError:
            self.error = WriteError("the writing was given up", expected="What was written is not whole")
        except Exception as error:
            self.error = error  # raised to whoever writes next, or waits

    def _bring(self, piece: Piece) -> None:
        log = self._log
        if log is not None and (log.cloned or piece.name in log.known):
            if not pieces.restore(piece, self._target, self._step):
                self.taken.append(piece.size)
        else:
            pieces.copy(piece, self._target, self._step)
        if log is not None and log.recording:
            log.note(piece.name, None)

    def _step(self, count: int) -> None:
        self._wrote(count)
        if self._stopped:
            raise _StoppedError


class _StoppedError(Exception):
    """The caller wants no more."""
