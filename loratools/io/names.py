"""Names that every system can give a file: packs go from one to another.

Source: Microsoft, "Naming Files, Paths, and Namespaces".
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable

_FORBIDDEN = frozenset('<>:"/\\|?*')
_PORTS = frozenset(f"{port}{digit}" for port in ("COM", "LPT") for digit in "0123456789¹²³")
_DEVICES = frozenset({"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"}) | _PORTS
_LONGEST = 180  # bytes: 255 have to do for a name with what is put before and behind it meanwhile
_DIGEST = 8  # hexadecimal digits of a digest, which tell long names that begin alike from each other


def refusal(name: str) -> str:
    """Why Windows cannot hold a file of this name, without its folder; empty where it can."""
    found = sorted({char for char in name if char in _FORBIDDEN or ord(char) < 32})
    if found:
        return f"a name cannot hold {' '.join(map(repr, found))}"
    if name.endswith((".", " ")) and name not in (".", ".."):
        return "the dot or the space at its end would be left out"
    stem = _stem(name)
    return f"{stem} is the name of a device, whatever stands behind it" if stem.upper() in _DEVICES else ""


def portable(name: str) -> str:
    """A name as like this one as can be that every system can hold, as one name in whatever folder."""
    text = unicodedata.normalize("NFC", name)
    text = "".join("_" if char in _FORBIDDEN or not char.isprintable() else char for char in text)
    text = text.strip(". ") or "_"
    stem = _stem(text)
    if stem.upper() in _DEVICES:
        text = f"{stem}_{text[len(stem) :]}"
    whole = text.encode()
    if len(whole) <= _LONGEST:
        return text
    start = whole[: _LONGEST - _DIGEST - 1].decode(errors="ignore").rstrip(". ")
    return f"{start}-{hashlib.sha256(whole).hexdigest()[:_DIGEST]}"


def distinct(names: Iterable[str]) -> list[str]:
    """The names made portable, with a number behind one that is taken, in whatever case."""
    taken: set[str] = set()
    found = []
    for wanted in map(portable, names):
        name, number = wanted, 1
        while name.casefold() in taken:
            number += 1
            name = f"{wanted}-{number}"
        taken.add(name.casefold())
        found.append(name)
    return found


def _stem(name: str) -> str:
    """What Windows looks at to tell a device: all before the first dot, without spaces."""
    return name.partition(".")[0].rstrip(" ")
