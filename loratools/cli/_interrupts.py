"""Ctrl-C that always counts: one that comes during an import is raised when the import is over.

Importing a large library runs code that takes any exception for a missing part and goes on, so that an interrupt
raised in there is lost, and a run that somebody wanted to end writes its output.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType

_AGAIN = 0.002  # seconds until an interrupt during an import is tried again


def install() -> None:
    """Have SIGINT raise KeyboardInterrupt, but not within an import; where SIGINT is ignored it stays so.

    Windows has no timer to try again with, and keeps Python's own handler.
    """
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
        signal.signal(signal.SIGALRM, _interrupt)


def _interrupt(_number: int, frame: FrameType | None) -> None:
    if sys.platform != "win32" and _importing(frame):
        signal.setitimer(signal.ITIMER_REAL, _AGAIN)
        return
    raise KeyboardInterrupt


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
