"""The user's multipliers: per input, per component, per block, per pattern; and what each of them hit."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loratools import archs
from loratools.archs._blocks import PRESETS, preset
from loratools.errors import OptionError
from loratools.model import EMPTY, Adapter, Target
from loratools.ops import _weight_patterns

Spec = Mapping[str, float] | Sequence[float] | str
_Hit = tuple[str, str]
"""What kind of multiplier it is ("component", "block", "pattern"), and the name that it goes by."""


class Weights:
    """What every module of every input is multiplied by.

    Args:
        adapters: The inputs.
        arch: Their common architecture.
        weights: One per input.
        components: Multipliers by component's name; none, one for all inputs, or one each.
        blocks: Multipliers by block: a mapping from a label (IN04, MID, D07), a component or the beginning of a path;
            as many numbers as the architecture has a vector for; or a preset's name. None, one for all inputs, or one
            each. What is not named keeps its weight.
        patterns: Weights by pattern, as ``_weight_patterns`` has them.

    Raises:
        OptionError: A name that nothing answers to, a vector of another length, a wrong count of sets, a pattern that
            matches nothing.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        arch: str,
        weights: Sequence[float],
        *,
        components: Sequence[Spec] = (),
        blocks: Sequence[Spec] = (),
        patterns: Mapping[str, float | str] = EMPTY,
    ) -> None:
        self._table = archs.get(arch)
        self._explicit = [isinstance(spec, Mapping) for spec in blocks]
        self._blocks = _each([_named(spec, arch) for spec in blocks], len(adapters), "block weights")
        self._components = _each(
            [_named(spec, arch) for spec in components], len(adapters), "component weights"
        )
        self._rules = _weight_patterns.rules(patterns, len(adapters))
        table = self._table
        _refuse_unknown(
            self._components, adapters, "component", lambda adapter: _component_names(adapter, table)
        )
        _refuse_unknown(self._blocks, adapters, "block", lambda adapter: _block_names(adapter, table))
        self._hits: list[Counter[_Hit]] = [Counter() for _ in adapters]
        self._missed: list[list[Target]] = [[] for _ in adapters]
        self._found: list[dict[Target, float]] = [
            {target: self._multiplied(source, target, weight) for target in adapter.modules}
            for source, (adapter, weight) in enumerate(zip(adapters, weights, strict=True))
        ]
        self._refuse_idle(adapters)

    def __call__(self, source: int, target: Target) -> float:
        """What the module of an input at a target is multiplied by."""
        return self._found[source][target]

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent elsewhere, it knows what modules are multiplied by, and nothing else."""
        return _only, (self._found,)

    def hits(self, source: int) -> list[dict[str, Any]]:
        """What each multiplier hit in an input: "by", "name", "weight" and "modules", a count.

        A vector or a preset names many blocks; those of which the input has none are left out.
        """
        counts = self._hits[source]
        rows = [("component", name, weight) for name, weight in self._components[source].items()]
        for name, weight in self._blocks[source].items():
            if self._is_explicit(source) or counts["block", name]:
                rows.append(("block", name, weight))
        patterns = [
            ("pattern", rule.name, rule.said) for rule in self._rules if rule.source in (None, source)
        ]
        return [
            {"by": by, "name": name, "weight": weight, "modules": counts[by, name]}
            for by, name, weight in (*rows, *patterns)
        ]

    def missed(self, source: int) -> list[Target]:
        """The modules of an input that a vector or a preset of block weights names no block of: they keep their weight.

        Weights for blocks that the user named one by one leave the rest alone, and miss nothing.
        """
        return self._missed[source]

    def _is_explicit(self, source: int) -> bool:
        """Whether an input's block weights were named one by one, if it has any."""
        return bool(self._explicit) and self._explicit[source if len(self._explicit) > 1 else 0]

    def _multiplied(self, source: int, target: Target, weight: float) -> float:
        """An input's weight times the component's, the block's and the pattern's."""
        hits = self._hits[source]
        components = self._components[source]
        if target.component in components:
            hits["component", target.component] += 1
            weight *= components[target.component]
        block = _block(self._blocks[source], self._table, target)
        if block is not None:
            hits["block", block] += 1
            weight *= self._blocks[source][block]
        elif self._blocks[source] and not self._is_explicit(source):
            self._missed[source].append(target)
        found = _weight_patterns.weight_at(self._rules, source, target.path)
        if found is not None:
            hits["pattern", found[0].name] += 1
            weight *= found[1]
        return weight

    def _refuse_idle(self, adapters: Sequence[Adapter]) -> None:
        """Refuse patterns that match no module of any input they are for."""
        paths = [
            (source, target.path) for source, adapter in enumerate(adapters) for target in adapter.modules
        ]
        idle = [
            rule.name
            for rule in self._rules
            if not any(hits["pattern", rule.name] for hits in self._hits)
            and all(rule.weight(source, path) is None for source, path in paths)
        ]
        if idle:
            first = paths[0][1] if paths else "none"
            raise OptionError(
                f"{len(idle)} of {len(self._rules)} weight patterns match no module",
                keys=idle,
                expected=f"A part of a module's path was expected; the first is {first}",
                todo="Correct the patterns, or leave them out",
            )


def _only(found: list[dict[Target, float]]) -> Weights:
    """Weights that know what modules are multiplied by, and nothing else."""
    made = Weights.__new__(Weights)
    made.__dict__["_found"] = found
    return made


def _each(specs: Sequence[Mapping[str, float]], count: int, what: str) -> list[Mapping[str, float]]:
    if len(specs) < 2:
        return [specs[0] if specs else {}] * count
    if len(specs) != count:
        raise OptionError(
            f"{len(specs)} sets of {what} for {count} inputs",
            expected="One for all inputs, or one for each, was expected",
        )
    return list(specs)


def _named(spec: Spec, arch: str) -> Mapping[str, float]:
    if isinstance(spec, Mapping):
        return spec
    vectors = archs.get(arch).vectors
    if isinstance(spec, str):
        found = preset(spec, vectors)
        if found is None:
            raise OptionError(
                f"{archs.get(arch).title} has no preset of block weights called {spec!r}",
                candidates=difflib.get_close_matches(spec, PRESETS),
                expected=f"The presets are {', '.join(PRESETS)}, for architectures with vectors of 12 or 17",
                todo="Name the blocks instead: IN04=0.5,MID=0",
            )
        return found
    if len(spec) not in vectors:
        lengths = ", ".join(str(length) for length in vectors) or "none"
        raise OptionError(
            f"a vector of {len(spec)} block weights for {archs.get(arch).title}",
            expected=f"Lengths that it has: {lengths}",
            todo="Name the blocks instead: IN04=0.5,MID=0",
        )
    return dict(zip(vectors[len(spec)], spec, strict=True))


def _block(named: Mapping[str, float], table: archs.Arch, target: Target) -> str | None:
    """The most specific name counts: the longest beginning of the path, then the label, then the component."""
    if not named:
        return None
    parts = target.path.split(".")
    for length in range(len(parts), 0, -1):
        path = ".".join(parts[:length])
        if path in named:
            return path
    label = table.block(target.component, target.path)
    if label is not None and label in named:
        return label
    return target.component if target.component in named else None


def _component_names(adapter: Adapter, table: archs.Arch) -> set[str]:
    return set(adapter.components()) | {component.name for component in table.components}


def _block_names(adapter: Adapter, table: archs.Arch) -> set[str]:
    names = _component_names(adapter, table) | {
        label for labels in table.vectors.values() for label in labels
    }
    for target in adapter.modules:
        label = table.block(target.component, target.path)
        if label is not None:
            names.add(label)
        parts = target.path.split(".")
        names.update(".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return names


def _refuse_unknown(
    specs: Sequence[Mapping[str, float]],
    adapters: Sequence[Adapter],
    what: str,
    names: Callable[[Adapter], set[str]],
) -> None:
    """A name must mean something in the input it is for; one for all inputs, in any of them."""
    if not any(specs):
        return
    known = [names(adapter) for adapter in adapters]
    shared = set().union(*known)
    for spec, adapter, own in zip(specs, adapters, known, strict=True):
        answering = shared if all(other is specs[0] for other in specs) else own
        unknown = [name for name in spec if name not in answering]
        if unknown:
            raise OptionError(
                f"no {what} is called {unknown[0]!r}",
                path=adapter.path or None,
                candidates=difflib.get_close_matches(unknown[0], sorted(answering)),
                expected=f"The components are {', '.join(adapter.components())}",
            )
