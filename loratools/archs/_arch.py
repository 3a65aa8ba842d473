"""An architecture as data, and the resolution of names by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from loratools.archs._blocks import Block
from loratools.archs._table import NATIVE, Component, Name, parse
from loratools.errors import ArchitectureError
from loratools.model import Rows


class Resolved(NamedTuple):
    """What a key's stem means: which rows of which weight, and how it was spelt.

    Attributes:
        component: The component's name.
        path: The weight's canonical native path, without a checkpoint's prefix.
        rows: Which of its rows, or None for all.
        dialect: "native", "diffusers" or a further one; where they agree, the one that kohya files use.
        prefix: The prefix as spelt; empty for none.
        separator: "." or "_".
    """

    component: str
    path: str
    rows: Rows | None
    dialect: str
    prefix: str
    separator: str


_LEAST_REAL_WIDTH = 768


class Width(NamedTuple):
    """A width that tells an architecture from others that spell their names alike.

    Attributes:
        component: The component's name.
        tails: The last segments of the native paths that have it.
        size: Their input width, in columns.
    """

    component: str
    tails: tuple[str, ...]
    size: int

    def speaks_of(self, resolved: Resolved) -> bool:
        """Whether the rule says something about this weight."""
        if resolved.component != self.component:
            return False
        return any(resolved.path == tail or resolved.path.endswith("." + tail) for tail in self.tails)


class Proportion(NamedTuple):
    """Height to width of some weights, which holds at any size of the model.

    Attributes:
        tails: The last segments of the native paths that have it.
        height: Of the whole weight, in parts.
        width: In the same parts.
    """

    tails: tuple[str, ...]
    height: int
    width: int

    def denies(self, resolved: Resolved, out: int, into: int) -> bool:
        """Whether the rule says something about this weight, and something else than its shape (out, in)."""
        if not any(resolved.path.endswith("." + tail) for tail in self.tails):
            return False
        rows = resolved.rows
        whole = out * rows.of // rows.shares if rows is not None else out
        return whole * self.width != into * self.height


class _Spot(NamedTuple):
    """A reading of a skeleton: a prefix, the component it means, and the rest of the skeleton."""

    prefix: str
    component: Component
    skeleton: str
    numbers_before: int


@dataclass(frozen=True, eq=False, repr=False)
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
    """

    name: str
    title: str
    components: tuple[Component, ...]
    kohya_versions: tuple[str, ...] = ()
    modelspec: tuple[str, ...] = ()
    base_models: tuple[str, ...] = ()
    widths: tuple[Width, ...] = ()
    markers: tuple[str, ...] = ()
    proportions: tuple[Proportion, ...] = ()
    depths: Mapping[str, int] = field(default_factory=dict)
    foreign: tuple[str, ...] = ()
    blocks: tuple[Block, ...] = ()
    vectors: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

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
        # Tiny models, made for tests, have any width; those that people use are no narrower than this.
        foreign = shape[1] >= _LEAST_REAL_WIDTH and any(
            rule.size != shape[1] and rule.speaks_of(resolved) for rule in self.widths
        )
        return foreign or any(rule.denies(resolved, *shape) for rule in self.proportions)

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

    def resolve(self, stem: str) -> Resolved | None:
        """What a key without its factor suffix means, or None if this architecture has no such weight.

        Any layout's prefix is understood, or none; any separator; any dialect.
        """
        return self.resolve_parsed(stem, *parse(stem))

    def resolve_parsed(self, stem: str, skeleton: str, numbers: tuple[str, ...]) -> Resolved | None:
        """As :meth:`resolve`, for a stem that has been through :func:`parse` already."""
        for spot in self._readings(skeleton):
            if not stem.startswith(spot.prefix):
                continue
            table = spot.component.table
            if table is None:
                return _as_spelt(spot, stem[len(spot.prefix) :])
            found = table.find(spot.skeleton, numbers[spot.numbers_before :])
            if found and (resolved := _resolved(spot, stem[len(spot.prefix) :], *found)):
                return resolved
        return None

    def may_know(self, skeleton: str) -> bool:
        """Whether names with this skeleton may mean something: true too often, but needs no index."""
        return bool(self._readings(skeleton))

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
    def marks(self) -> tuple[str, ...]:
        """The markers, between dots so that they match whole segments."""
        return tuple(f".{marker}." for marker in self.markers)

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
                spots[prefix, component.name] = _Spot(prefix, component, skeleton, len(numbers))
        spots["", ""] = _Spot("", self.components[0], "", 0)
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
    return "." not in path and any(part.isdigit() for part in path.split("_"))


def _as_spelt(spot: _Spot, body: str) -> Resolved:
    separator = "_" if _is_flattened(body) else "."
    return Resolved(spot.component.name, body, None, NATIVE, spot.prefix, separator)


def _resolved(spot: _Spot, body: str, name: Name, numbers: tuple[str, ...]) -> Resolved | None:
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
