"""Programs that run adapters, one file each: what they load, refuse and pass over. Data only.

A file that defines ``RUNTIME`` is found by its presence.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from loratools.errors import OptionError
from loratools.registry import scan
from loratools.runtimes._base import FEATURES, Pair, Runtime

__all__ = ["FEATURES", "Pair", "Runtime", "get", "runtimes"]


def runtimes() -> Mapping[str, Runtime]:
    """Every runtime by name."""
    return scan("loratools.runtimes", "RUNTIME")


def get(name: str) -> Runtime:
    """The runtime of a name.

    Raises:
        OptionError: There is none; near misses are offered.
    """
    known = runtimes()
    if name not in known:
        raise OptionError(
            f"there is no runtime {name!r}",
            candidates=difflib.get_close_matches(name.lower(), known),
            expected=f"Known: {', '.join(known)}",
        )
    return known[name]
