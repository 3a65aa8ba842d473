"""An architecture as data, and the resolution of names by it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

from loratools.archs._blocks import Block
from loratools.archs._names import DIFFUSERS, NATIVE, Name, dotted, parse, spoken
from loratools.archs._rules import Proportion, Resolved, Width, denied_by_width
from loratools.archs._table import Component
from loratools.errors import ArchitectureError
from loratools.model import EMPTY, Rows

__all__ = ["Arch", "Proportion", "Resolved", "Width"]

# LyCORIS' wrapper puts it before the flattened names of whatever model it is given.
_WRAPPER = "lycoris_"


class _Spot(NamedTuple):
    """A reading of a skeleton: a prefix, the component and dialect that it implies, and the rest."""

    prefix: str
    component: Component
    dialect: str
    skeleton: str
    numbers_before: int


class Arch:
    """An architecture: its components, and what tells it from the others.

    Attributes:
        name: The identifier ("sdxl").
        title: The name in prose ("Stable Diffusion XL").
        components: The denoiser first; only its names may stand without a prefix.
        kohya_versions: Values of ss_base_model_version that mean it.
        modelspec: Values of modelspec.architecture that mean it, without the "/lora".
        base_models: Beginnings of words in base models' names that mean it, in lower case, "-" between words.
        widths: What tells it from architectures that spell their names alike.
        markers: Parts of paths, with "#" for numbers, that mean it where no table explains a file.
        proportions: What its denoiser's weights are shaped like, at any size.
        depths: How many blocks it has under a name, where relatives with more of them spell their names alike.
        foreign: Words in names of relatives that share most of its own; a file that has one is of a relative.
        blocks: What people call its blocks.
        vectors: Which blocks a vector of so many numbers weighs, by its length.
        derived_from: The architecture that its blocks were taken from, names and shapes: a file that nothing
            else tells is read as that one's, and a note says so.
        borrowed: The dialect in which its names are a relative's: a file in it is the relative's, unless a width
            says otherwise.
    """

    def __init__(
        self,
        name: str,
        title: str,
        components: tuple[Component, ...],
        *,
        kohya_versions: tuple[str, ...] = (),
        modelspec: tuple[str, ...] = (),
        base_models: tuple[str, ...] = (),
        widths: tuple[Width, ...] = (),
        markers: tuple[str, ...] = (),
        proportions: tuple[Proportion, ...] = (),
        depths: Mapping[str, int] = EMPTY,
        foreign: tuple[str, ...] = (),
        blocks: tuple[Block, ...] = (),
        vectors: Mapping[int, tuple[str, ...]] = MappingProxyType({}),
        derived_from: str = "",
        borrowed: str = "",
    ) -> None:
        self.name = name
        self.title = title
        self.components = components
        self.kohya_versions = kohya_versions
        self.modelspec = modelspec
        self.base_models = base_models
        self.widths = widths
        self.markers = markers
        self.proportions = proportions
        self.depths = depths
        self.foreign = foreign
        self.blocks = blocks
        self.vectors = vectors
        self.derived_from = derived_from
        self.borrowed = borrowed

    def block(self, component: str, path: str) -> str | None:
        """What people call the block that a weight lies in, or None where it lies in none."""
        labels = (block.of(path) for block in self.blocks if block.component == component)
        return next((label for label in labels if label), None)

    def denies(self, resolved: Resolved, shape: tuple[int, int] | None) -> bool:
        """Whether a weight of this name cannot be this architecture's: its place, its shape, or its width."""
        if resolved.component != self.components[0].name:
            return False
        if self.depths:
            stem, _, rest = resolved.path.partition(".")
            number = rest.split(".", 1)[0]
            if stem in self.depths and number.isdigit() and int(number) >= self.depths[stem]:
                return True
        # Most weights have names that no rule speaks of.
        if shape is None or resolved.path.rpartition(".")[2] not in self._judged:
            return False
        if denied_by_width(self.widths, resolved, shape[1]):
            return True
        return any(rule.denies(resolved, *shape) for rule in self.proportions)

    def borrows(self, resolved: Resolved) -> bool:
        """Whether a name is a relative's spelling, and not its own for this weight too."""
        if not self.borrowed or resolved.dialect != self.borrowed:
            return False
        component, path, rows = resolved[:3]
        own = self.spell(component, path, rows, self.component(component).kohya_dialect)
        return own != self.spell(component, path, rows, self.borrowed)

    @cached_property
    def _judged(self) -> frozenset[str]:
        """The last segments of the paths that a width or a proportion speaks of."""
        tails = [tail for rule in self.widths for tail in rule.tails]
        tails += [tail for rule in self.proportions for tail in rule.tails]
        return frozenset([tail.rpartition(".")[2] for tail in tails])

    @cached_property
    def has_table(self) -> bool:
        """Whether names are looked up; otherwise every path is its own name."""
        return any(component.table for component in self.components)

    def component(self, name: str) -> Component:
        """The component of this name.

        Raises:
            ArchitectureError: There is none.
        """
        for component in self.components:
            if component.name == name:
                return component
        raise ArchitectureError(
            f"{self.name} has no component named {name!r}",
            expected=f"Its components are {', '.join(component.name for component in self.components)}",
        )

    @property
    def prefixes(self) -> tuple[tuple[str, Component], ...]:
        """Every prefix and the component that it means, the longest first, and none at all last."""
        return tuple((spot.prefix, spot.component) for _, spot in self._prefixes)

    def resolve(self, stem: str, dialect: str = "") -> Resolved | None:
        """What a key without its factor suffix means, or None if this architecture has no such weight.

        Any layout's prefix is understood, or none; any separator; any dialect.

        Args:
            stem: The key without its factor suffix.
            dialect: Which dialect's meaning to take where a name means different weights in different ones;
                the one that the prefix implies unless given.
        """
        return self.resolve_parsed(stem, *parse(stem), dialect)

    def resolve_parsed(
        self, stem: str, skeleton: str, numbers: tuple[str, ...], dialect: str = ""
    ) -> Resolved | None:
        """As :meth:`resolve`, for a stem that has been through :func:`parse` already."""
        for spot in self._readings(skeleton):
            if not stem.startswith(spot.prefix):
                continue
            table = spot.component.table
            if table is None:
                return _as_spelt(spot, stem[len(spot.prefix) :])
            found = table.find(spot.skeleton, numbers[spot.numbers_before :])
            if found and (resolved := _resolved(spot, stem[len(spot.prefix) :], *found, dialect)):
                return resolved
        return None

    def resolve_all(self, stems: Iterable[str]) -> dict[str, Resolved]:
        """What the stems of one file mean; those that mean nothing are absent."""
        return self.settled({stem: found for stem in stems if (found := self.resolve(stem)) is not None})

    def settled(self, resolved: Mapping[str, Resolved]) -> dict[str, Resolved]:
        """One file's meanings, with names that mean different weights read in the dialect of its other names.

        A prefix implies a dialect, but trainers put the same one before either's names.
        """
        tables = {part.name: part.table for part in self.components if part.table and part.table.homonyms}
        if not tables:
            return dict(resolved)
        spoken: Counter[str] = Counter()
        open_stems = []
        for stem, meaning in resolved.items():
            table = tables.get(meaning.component)
            found = table.find(*parse(stem[len(meaning.prefix) :])) if table is not None else None
            if found is not None and found[0].homonyms:
                open_stems.append(stem)
            elif found is not None and found[0].dialect is not None:
                spoken[found[0].dialect] += 1
        first, second = (*spoken.most_common(2), ("", 0), ("", 0))[:2]
        dialect = first[0] if first[1] > second[1] else ""
        settled = {stem: self.resolve(stem, dialect) for stem in open_stems}
        return {stem: settled.get(stem) or meaning for stem, meaning in resolved.items()}

    def knows(self, skeleton: str) -> bool:
        """Whether names with this skeleton mean something, with the right numbers."""
        return any(
            spot.component.table is None or spot.component.table.knows(spot.skeleton)
            for spot in self._readings(skeleton)
        )

    def spell(
        self, component: str, path: str, rows: Rows | None, dialect: str = NATIVE, separator: str = "."
    ) -> str | None:
        """The name, without a prefix, that a dialect has for exactly these rows of a weight.

        Returns:
            None if the dialect has no such name, or the architecture no such weight.

        Raises:
            ArchitectureError: There is no such component.
        """
        table = self.component(component).table
        if table is not None:
            name = table.spell(path, rows, dialect)
        else:
            # Underscores in a flattened name cannot be told from dots without the base checkpoint.
            name = None if rows or (separator == "." and _is_flattened(path)) else path
        return name.replace(".", separator) if name is not None else None

    def pieces(self, component: str, path: str, dialect: str) -> tuple[Rows | None, ...]:
        """The pieces in which a dialect spells a weight: ``(None,)`` for one, q, k and v for Flux's qkv.

        Returns:
            Empty if the architecture has no such weight.

        Raises:
            ArchitectureError: There is no such component.
        """
        table = self.component(component).table
        return table.pieces(path, dialect) if table is not None else (None,)

    @cached_property
    def _spots(self) -> dict[str, tuple[_Spot, ...]]:
        """The readings of the skeletons met so far: a file has many more names than skeletons."""
        return {}

    @cached_property
    def _prefixes(self) -> tuple[tuple[str, _Spot], ...]:
        """Every prefix's skeleton, the longest first, and none at all last."""
        spots: dict[tuple[str, str], _Spot] = {}
        for component in self.components:
            for prefix in (each for group in component.prefixes.values() for each in group):
                skeleton, numbers = parse(prefix)
                implied = component.implied(prefix)
                spots[prefix, component.name] = _Spot(prefix, component, implied, skeleton, len(numbers))
        denoiser = self.components[0]
        if self.has_table:
            wrapped = _Spot(_WRAPPER, denoiser, DIFFUSERS, _WRAPPER, 0)
            spots.setdefault((_WRAPPER, denoiser.name), wrapped)
        spots["", ""] = _Spot("", denoiser, NATIVE, "", 0)
        ordered = sorted(spots.values(), key=lambda spot: -len(spot.prefix))
        return tuple((spot.skeleton, spot) for spot in ordered)

    def _readings(self, skeleton: str) -> tuple[_Spot, ...]:
        spots = self._spots.get(skeleton)
        if spots is None:
            spots = self._spots[skeleton] = tuple(
                spot._replace(skeleton=body)
                for start, spot in self._prefixes
                if skeleton.startswith(start) and (body := skeleton[len(start) :])
                if spot.component.table is None or spot.component.table.may_know(body)
            )
        return spots


def _is_flattened(path: str) -> bool:
    # A single number is a name of its own: that of a layer in a list.
    return "." not in path and "_" in path and any(part.isdigit() for part in path.split("_"))


def _as_spelt(spot: _Spot, body: str) -> Resolved:
    separator = "_" if _is_flattened(body) else "."
    return Resolved(spot.component.name, body, None, NATIVE, spot.prefix, separator)


def _resolved(spot: _Spot, body: str, name: Name, numbers: tuple[str, ...], dialect: str) -> Resolved | None:
    if name.homonyms:
        name = spoken(name, dialect or spot.dialect)
    if name.variants:
        name = dotted(name, body, numbers, dialect or spot.dialect)
    text = name.text % numbers
    if body == text:
        # A name of one segment looks the same with either separator: the prefix tells.
        separator = "_" if spot.prefix.endswith("_") and "." not in body else "."
    elif "." not in body:
        separator = "_"
    else:
        return None
    path = text if name.text == name.native else name.native % numbers
    dialect = name.dialect or spot.component.kohya_dialect
    return Resolved(spot.component.name, path, name.rows, dialect, spot.prefix, separator)
