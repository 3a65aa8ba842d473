"""Architectures that spell a file's names alike, told apart by what shapes and block numbers each can have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loratools.archs._arch import Arch
from loratools.archs._rules import Resolved

_Explained = Mapping[str, Mapping[str, Resolved]]
_Shapes = Mapping[str, "tuple[int, int] | None"]


def told_apart(
    archs: Mapping[str, Arch], explained: _Explained, stems: _Shapes
) -> tuple[list[str], str, dict[str, str]]:
    """The ones of these architectures that a file may be of.

    Args:
        archs: Those that explain its names equally well, by name.
        explained: What each says that the names mean.
        stems: The names, and the (out, in) widths of their weights where known.

    Returns:
        The names of those that are left; by what they were told from the others; and for each that was ruled
        out by a single weight, that weight's name.
    """
    owners = {name: arch for name, arch in archs.items() if not _is_borrowed(arch, explained[name], stems)}
    archs = owners or archs
    denied = {name: _denied(arch, explained[name], stems) for name, arch in archs.items()}
    left = [name for name, stem in denied.items() if not stem]
    told_by = "its names and widths" if len(left) < len(denied) else "its names"
    if len(left) > 1:
        fitting = _by_width([archs[name] for name in left], explained, stems)
        if len(fitting) < len(left):
            left, told_by = fitting, "its names and widths"
    if len(left) > 1:
        whole = {name for name in left if _is_whole(archs[name], explained[name])}
        # An architecture of several depths does not say how many blocks it has.
        fitting = [name for name in left if name in whole or not archs[name].depths]
        if whole and len(fitting) < len(left):
            left, told_by = fitting, "its names and blocks"
    return left, told_by, {name: stem for name, stem in denied.items() if stem}


def _denied(arch: Arch, explained: Mapping[str, Resolved], stems: _Shapes) -> str:
    """The first name, known or not, of a weight that this architecture cannot have; empty if there is none."""
    for stem, shape in stems.items():
        meaning = explained.get(stem)
        if arch.denies(meaning, shape) if meaning is not None else any(word in stem for word in arch.foreign):
            return stem
    return ""


def _is_borrowed(arch: Arch, explained: Mapping[str, Resolved], stems: _Shapes) -> bool:
    """Whether names are in the spelling that this architecture shares with a relative, and no width is its own."""
    if not any(arch.borrows(meaning) for meaning in explained.values()):
        return False
    sizes = {rule.size for rule in arch.widths}
    return not any(shape is not None and sizes.intersection(shape) for shape in stems.values())


def _by_width(archs: Sequence[Arch], explained: _Explained, stems: _Shapes) -> list[str]:
    """Those whose width rules the fewest weights contradict, of the weights whose width one of them knows.

    A width that no rule knows (a tiny model's) is no evidence against anything, nor is the silence of rules.
    """
    sizes = {rule.size for arch in archs for rule in arch.widths}
    against = dict.fromkeys([arch.name for arch in archs], 0)
    for stem, shape in stems.items():
        if shape is None or shape[1] not in sizes:
            continue
        said = {}
        for arch in archs:
            meaning = explained[arch.name].get(stem)
            spoken = [rule.size for rule in arch.widths if meaning is not None and rule.speaks_of(meaning)]
            if spoken:
                said[arch.name] = shape[1] in spoken
        if any(said.values()):
            for name, fits in said.items():
                against[name] += not fits
    least = min(against.values())
    return [name for name, count in against.items() if count == least]


def _is_whole(arch: Arch, explained: Mapping[str, Resolved]) -> bool:
    """Whether the file has every block of this architecture.

    Trainers adapt all blocks by default: 19 double and 38 single blocks are Flux.1's, and not the first ones of
    Hunyuan Video's 20 and 40.
    """
    seen: dict[str, set[str]] = {stem: set() for stem in arch.depths}
    for meaning in explained.values():
        if meaning.component == arch.components[0].name:
            stem, _, rest = meaning.path.partition(".")
            if stem in seen:
                seen[stem].add(rest.partition(".")[0])
    return bool(seen) and all(len(numbers) == arch.depths[stem] for stem, numbers in seen.items())
