"""The user's multipliers: per input, per component, per block."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence

from loratools import archs
from loratools.errors import OptionError
from loratools.model import Adapter, Target

Weigh = Callable[[int, Target], float]
Spec = Mapping[str, float] | Sequence[float]


def weigher(
    adapters: Sequence[Adapter],
    arch: str,
    weights: Sequence[float],
    components: Sequence[Spec],
    blocks: Sequence[Spec],
) -> Weigh:
    """What the module of an input at a target is multiplied by.

    Args:
        adapters: The inputs.
        arch: Their common architecture.
        weights: One per input.
        components: Multipliers by component's name; none, one for all inputs, or one each.
        blocks: Multipliers by block: a mapping from a label (IN04, MID, D07), a component or the beginning of a path;
            or as many numbers as the architecture has a vector for. None, one for all inputs, or one each.
            What is not named keeps its weight.

    Raises:
        OptionError: A name that nothing answers to, a vector of another length, a wrong count of either.
    """
    table = archs.get(arch)
    by_block = _each([_named(spec, arch) for spec in blocks], len(adapters), "block weights")
    by_component = _each([_named(spec, arch) for spec in components], len(adapters), "component weights")
    _refuse_unknown(by_component, adapters, "component", lambda adapter: _component_names(adapter, table))
    _refuse_unknown(by_block, adapters, "block", lambda adapter: _block_names(adapter, table))

    def weigh(source: int, target: Target) -> float:
        factor = by_component[source].get(target.component, 1.0)
        return weights[source] * factor * _of_block(by_block[source], table, target)

    return weigh


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
    if len(spec) not in vectors:
        lengths = ", ".join(str(length) for length in vectors) or "none"
        raise OptionError(
            f"a vector of {len(spec)} block weights for {archs.get(arch).title}",
            expected=f"Lengths that it has: {lengths}",
            todo="Name the blocks instead: IN04=0.5,MID=0",
        )
    return dict(zip(vectors[len(spec)], spec, strict=True))


def _of_block(named: Mapping[str, float], table: archs.Arch, target: Target) -> float:
    """The most specific name counts: the longest beginning of the path, then the label, then the component."""
    if not named:
        return 1.0
    parts = target.path.split(".")
    for length in range(len(parts), 0, -1):
        found = named.get(".".join(parts[:length]))
        if found is not None:
            return found
    label = table.block(target.component, target.path)
    if label is not None and label in named:
        return named[label]
    return named.get(target.component, 1.0)


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
