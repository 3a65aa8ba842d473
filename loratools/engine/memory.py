"""How much memory this machine, or the container that the process is in, has for it."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

# Where Linux states the limit of a container: control groups of version 2, and of version 1.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def installed() -> int:
    """Bytes of memory, the least of the machine's and of what its container may have; 0 where nothing tells."""
    found = [_windows() if sys.platform == "win32" else _pages()]
    for name in _LIMITS:
        with suppress(OSError, ValueError):  # not there, or "max"
            found.append(int(Path(name).read_text("ascii")))
    return min((size for size in found if size > 0), default=0)


def _pages() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0


def _windows() -> int:
    """What GlobalMemoryStatusEx says (MEMORYSTATUSEX of the Windows API: two words, then seven of 64 bits)."""
    if sys.platform != "win32":
        return 0
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_uint32),
            ("load", ctypes.c_uint32),
            ("total", ctypes.c_uint64),
            ("others", ctypes.c_uint64 * 6),
        )

    status = Status(length=ctypes.sizeof(Status))
    said = ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return int(status.total) if said else 0
