"""What the names of a file mean: by the architecture given, by position, or by detection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from loratools import archs
from loratools.errors import ArchitectureError
from loratools.formats._base import Facts
from loratools.formats._group import PEFT, widths

if TYPE_CHECKING:
    from loratools.formats._positions import Placed

# Styles of files that may number their modules; few do, and what their numbers mean is looked up only for them.
_NUMBERED = ("cloneofsimo", "sam", "attn-procs")


def resolve(
    facts: Facts, arch: str | None, path: str = "", placed: Placed | None = None
) -> tuple[Mapping[str, archs.Resolved], tuple[str, ...]]:
    """What each module's name means, and what a reader should know of it; the facts' ``arch`` is set.

    Args:
        facts: The file.
        arch: The architecture, overriding detection, or None.
        path: For messages.
        placed: What its numbers mean, where the caller knows.

    Raises:
        ArchitectureError: The architecture given is unknown, or explains no name.
    """
    placed = placed or _placed(facts)
    if placed is not None and arch in (None, placed.arch):
        facts.arch = placed.arch
        return placed.resolved, placed.notes
    if arch is not None:
        return _as_given(facts, arch, path)
    names = {found.name: widths(found) for found in facts.groups.values()}
    base = str(facts.config.get("base_model_name_or_path") or facts.config.get("model") or "")
    detected = archs.detect(names, facts.metadata, base)
    facts.arch = detected.arch
    facts.candidates = detected.candidates if detected.arch == "unknown" else ()
    return detected.resolved, detected.notes


def _placed(facts: Facts) -> Placed | None:
    """What a file's numbers stand for, where it has no names."""
    if facts.style not in _NUMBERED:
        return None
    from loratools.formats import _positions

    return _positions.placed(facts)


def _as_given(facts: Facts, arch: str, path: str) -> tuple[Mapping[str, archs.Resolved], tuple[str, ...]]:
    """The names as those of the architecture that the caller gave."""
    chosen = archs.get(arch)
    facts.arch = arch
    names = [found.name for found in facts.groups.values()]
    resolved = chosen.resolve_all(names)
    # PEFT's folders of a text encoder have names that stand for it under their prefix alone.
    wrapped = (found.name for found in facts.groups.values() if found.stem.startswith(PEFT))
    for name in [name for name in wrapped if name not in resolved]:
        meaning = chosen.resolve(PEFT + name)
        if meaning is not None:
            resolved[name] = meaning
    if names and not resolved:
        raise ArchitectureError(
            f"none of the {len(names)} modules has a name of {chosen.title}",
            path=path or None,
            keys=names,
            todo="Leave --arch out, or give the architecture that the adapter was made for",
        )
    unknown = [name for name in names if name not in resolved]
    if not unknown or not chosen.has_table:
        return resolved, ()
    note = f"{len(unknown)} of {len(names)} names are not those of {arch} (first: {unknown[0]})"
    return resolved, (note,)
