"""Signals that end a run in order: Ctrl-C, and SIGTERM, which schedulers, `timeout` and a shutdown send.

Both remove what is half-written. One that comes during an import is raised when the import is over: importing a large
library runs code that takes any exception for a missing part and goes on, so that an interrupt raised in there is lost,
and a run that somebody wanted to end writes its output.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType

_AGAIN = 0.002  # seconds until a signal during an import is tried again
_wanted: list[int] = []  # signals that came during one


def install() -> None:
    """Have SIGINT raise KeyboardInterrupt and SIGTERM SystemExit, but not within an import.

    What is ignored stays so, and so does a handler that somebody else has set. Windows has no timer to try again with,
    and keeps Python's own handlers.
    """
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        return
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is usual:
            signal.signal(number, _end)
            signal.signal(signal.SIGALRM, _end)


def _end(number: int, frame: FrameType | None) -> None:
    if sys.platform == "win32":
        return
    if number == signal.SIGALRM:
        number = _wanted.pop() if _wanted else signal.SIGINT
    if _importing(frame):
        _wanted[:] = [number]
        signal.setitimer(signal.ITIMER_REAL, _AGAIN)
        return
    if number == signal.SIGTERM:
        raise SystemExit(128 + number)  # what shells give a process that a signal has ended
    raise KeyboardInterrupt


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
