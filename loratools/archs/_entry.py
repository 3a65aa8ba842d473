"""What detection knows of an architecture before its file has been imported."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from loratools.archs._names import DIFFUSERS, NATIVE, parse

if TYPE_CHECKING:
    from loratools.archs._arch import Arch
    from loratools.archs._table import Table


# How the names of a table begin, up to the first number, and their last words.
Ends: TypeAlias = "tuple[tuple[str, ...], tuple[str, ...]]"


class Reading(NamedTuple):
    """How the names of a component's weights look, as skeletons.

    Attributes:
        prefixes: What stands before them; empty where nothing has to.
        ends: How they begin after that, and end.
    """

    prefixes: tuple[str, ...]
    ends: Ends


class Entry(NamedTuple):
    """An architecture's line in the index.

    Attributes:
        name: The identifier, which is also its file's name.
        readings: How its names look, by component; empty where it has no table.
        kohya_versions: Values of ss_base_model_version that mean it.
        modelspec: Values of modelspec.architecture that mean it, without the "/lora".
        base_models: Beginnings of words in base models' names that mean it.
        markers: Parts of paths that mean it where no table explains a file.
    """

    name: str
    readings: tuple[Reading, ...]
    kohya_versions: tuple[str, ...]
    modelspec: tuple[str, ...]
    base_models: tuple[str, ...]
    markers: tuple[str, ...]


def entry(arch: Arch) -> Entry:
    """The line that an architecture's file amounts to."""
    readings = tuple(
        Reading(
            tuple(sorted({parse(prefix)[0] for prefix, meant in arch.prefixes if meant is component})),
            _ends(component.table),
        )
        for component in arch.components
        if component.table is not None
    )
    return Entry(
        arch.name, readings, arch.kohya_versions, arch.modelspec, arch.base_models, tuple(arch.markers)
    )


def ends(skeleton: str) -> tuple[str, str]:
    """How a skeleton begins, up to its first number, and its last word."""
    return skeleton.partition("_0")[0], skeleton.rpartition("_")[2]


def _ends(table: Table) -> Ends:
    pairs = {ends(skeleton) for skeleton in _skeletons(table)}
    return tuple(sorted({head for head, _ in pairs})), tuple(sorted({tail for _, tail in pairs}))


def _skeletons(table: Table) -> Iterator[str]:
    for dialect in (NATIVE, DIFFUSERS, *table.further):
        for names in table.spellings(dialect).values():
            for name in names:
                yield parse(name.text.replace("%s", "0"))[0]
