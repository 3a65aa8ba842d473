"""Signals that end a run in order: Ctrl-C, SIGTERM (schedulers, `timeout`, shutdown), SIGHUP (a closed terminal).

The first removes what is half-written: it raises KeyboardInterrupt where the program is. One that comes during an
import is raised when the import is over: importing a large library runs code that takes any exception for a missing
part and goes on, so that an interrupt raised in there is lost, and a run that somebody wanted to end writes its output.
Python loses an exception in a finaliser likewise.

Python runs handlers between two steps of the main thread, which may sit in one long call of a library. So a thread of
its own hears of every signal from the interpreter: it says at once that the first was heard, and ends the process at
the second.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # the last is Windows's, the one before it is not
_WORDS = {"SIGTERM": "Terminated", "SIGHUP": "Hung up"}
_AGAIN = 0.002  # seconds until a signal during an import is tried again
# Seconds in which two signals are one: `timeout` sends its own to the process, and at once to all of the group.
_ONE = 0.05
_STOPPING = "\nStopping, and removing what is half-written. Once more ends at once.\n"
_ENDED = "\nEnded at once."


class _State:
    """What is known of signals in this process.

    Attributes:
        raised: The signal that was turned into an exception; 0 before there is one.
        waiting: One that waits for the end of an import.
        repeated: How many signals are on their way that this module has sent again.
        over: Whether the work is done, and nothing is to be interrupted any more.
        left: What a process that ends at once may leave, in a sentence.
    """

    raised = 0
    waiting = 0
    repeated = 0
    over = False
    left = ""


def install() -> None:
    """Have the signals that ask for an end raise KeyboardInterrupt, but not within an import.

    What is ignored stays so (a run under `nohup`, or in the background), and so does a handler that somebody else has
    set.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    usual = (signal.SIG_DFL, signal.default_int_handler)
    for number in _ending():
        if signal.getsignal(number) in usual:
            signal.signal(number, _end)
    reading, writing = os.pipe()
    if hasattr(os, "set_blocking"):
        os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    if hasattr(os, "register_at_fork"):  # a child has the same pipe, and is somebody else's to end
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    # Not of the threading module, which waits for its threads, and whose locks a signal must not meet.
    _thread.start_new_thread(_watch, (reading, _terminal()))


def finish() -> None:
    """The work is done: signals raise nothing any more, and two of them still end a process that does not end."""
    _State.over = True


def leaves(sentence: str) -> None:
    """Have a process that ends at once say what it may leave."""
    _State.left = sentence


def status() -> int:
    """The exit status of a run that was interrupted."""
    return 128 + (_State.raised or signal.SIGINT)


def word() -> str:
    """What has happened to it, in a word or two."""
    return _WORDS.get(signal.Signals(status() - 128).name, "Interrupted")


def _ending() -> list[int]:
    return [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


def _end(number: int, frame: FrameType | None) -> None:
    if _State.raised or _State.over:
        return
    if _losing(frame):
        if not _State.waiting:
            _State.waiting = number
            _thread.start_new_thread(_send_again, (number,))
        return
    _State.raised = number
    raise KeyboardInterrupt


def _send_again(number: int) -> None:
    """Wait until an exception in the main thread is not lost, and send the signal once more."""
    main = threading.main_thread().ident
    assert main is not None
    time.sleep(_AGAIN)
    while _losing(sys._current_frames().get(main)):
        time.sleep(_AGAIN)
    _State.waiting = 0
    _State.repeated += 1
    if sys.platform == "win32":
        _thread.interrupt_main(number)
    else:
        signal.pthread_kill(main, number)  # a signal of the system, which ends a call that sleeps


def _losing(frame: FrameType | None) -> bool:
    """Whether an exception that is raised here gets lost."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith("<frozen importlib") or code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


def _watch(reading: int, terminal: int) -> None:
    """Hear of signals, each a byte: acknowledge the first one, end the process at the next."""
    first = 0.0
    while True:
        for number in os.read(reading, 64):
            if signal.getsignal(number) is not _end:
                continue
            if _State.repeated:
                _State.repeated -= 1
            elif not first:
                first = time.monotonic()
                if not _State.over and terminal >= 0 and os.isatty(terminal):
                    _write(terminal, _STOPPING)
            elif time.monotonic() - first > _ONE:
                _write(terminal, f"{_ENDED} {_State.left}\n" if _State.left else f"{_ENDED}\n")
                os._exit(128 + number)


def _terminal() -> int:
    """Where messages go: the number of stderr, or -1 where it is no file."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return -1


def _write(place: int, text: str) -> None:
    """Write without the stream's lock, which the main thread may hold."""
    with suppress(OSError):
        os.write(place, text.encode("ascii"))
