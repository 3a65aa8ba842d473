"""loratools/archs/_index.py from the architectures' files: ``python -m tests.archs.render_index`` writes it anew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pprint import pformat

from loratools.archs._entry import Ends, Entry, entry
from loratools.registry import scan

INDEX = Path(__file__).resolve().parents[2] / "loratools" / "archs" / "_index.py"

_INTRO = '''\
"""What detection knows of every architecture before it imports one.

Written by ``python -m tests.archs.render_index``; a test holds it to the architectures' files. Adding an
architecture is adding its file and running that.
"""

# fmt: off

from __future__ import annotations

from loratools.archs._entry import Ends, Entry, Reading

'''


def _tuple(name: str, values: tuple[str, ...], indent: int) -> str:
    """A tuple of strings, folded; a keyword's value, if there is a name."""
    head = " " * indent + (f"{name}=" if name else "")
    text = pformat(values, width=108 - len(head), compact=True).replace("'", '"')
    return head + text.replace("\n", "\n" + " " * len(head)) + ",\n"


def _ends(name: str, found: Ends) -> str:
    """How the names of a table begin and end, which several architectures may share."""
    heads, tails = (_tuple("", each, 4) for each in found)
    return f"{name}: Ends = (\n{heads}{tails})\n"


def _entry(found: Entry, names: Mapping[Ends, str]) -> str:
    """One architecture's line, which is many lines."""
    readings = "        readings=(),\n"
    if found.readings:
        each = (
            f"            Reading(\n{_tuple('prefixes', reading.prefixes, 16)}"
            f"                ends={names[reading.ends]},\n            ),\n"
            for reading in found.readings
        )
        readings = f"        readings=(\n{''.join(each)}        ),\n"
    rest = "".join(_tuple(field, getattr(found, field), 8) for field in found._fields[2:])
    return f'    "{found.name}": Entry(\n        name="{found.name}",\n{readings}{rest}    ),\n'


def page() -> str:
    """The whole file."""
    names: dict[Ends, str] = {}
    lines = []
    for arch in scan("loratools.archs", "ARCH").values():
        found = entry(arch)
        tabled = [component.name for component in arch.components if component.table is not None]
        for component, reading in zip(tabled, found.readings, strict=True):
            names.setdefault(reading.ends, f"_{arch.name}_{component}".upper())
        lines.append(_entry(found, names))
    shared = "".join(_ends(name, found) for found, name in names.items())
    return f"{_INTRO}{shared}\nINDEX: dict[str, Entry] = {{\n{''.join(lines)}}}\n"


if __name__ == "__main__":
    INDEX.write_text(page(), "utf-8", newline="\n")
