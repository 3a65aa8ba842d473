"""Errors on modules that a base has no place for: what the adapter looks like, what the base does, what is near."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, NoReturn

from loratools import archs
from loratools.errors import NameResolutionError, OptionError, ShapeError, UnsupportedKindError, shown
from loratools.io.base import Base
from loratools.model import Adapter, Target
from loratools.ops import _no_checkpoint
from loratools.ops._arch_of import UNKNOWN, looks_like
from loratools.ops._base_match import Paths, near_paths, regrouped
from loratools.ops._places import Places

_MADE_FOR = "Give the base that the adapter was trained on"
_INPAINTING = 9  # input channels: the image, its masked twin, the mask


class Lost(NamedTuple):
    """What of an adapter found no place.

    Attributes:
        arch: The architecture's name.
        missing: Modules, and tensors of none, that the base has nothing for.
        misfits: Sentences on modules of another shape.
        placed: How many terms found a place.
        left_out: How many modules --components left out.
    """

    arch: str
    missing: Sequence[str]
    misfits: Sequence[str]
    placed: int
    left_out: int


def refuse_components(components: Collection[str] | None, adapters: Sequence[Adapter], arch: str) -> None:
    """Refuse names of components that nobody has, and a choice that leaves nothing of the adapters.

    Raises:
        OptionError: With what there is.
    """
    if components is None:
        return
    table = archs.all_archs()
    known = [row.name for row in table[arch].components] if arch in table else []
    changed = list(dict.fromkeys(name for each in adapters for name in each.components()))
    known = list(dict.fromkeys([*changed, *known]))
    unknown = [name for name in components if name not in known]
    if unknown:
        import difflib  # only errors need it

        near = [match for name in unknown for match in difflib.get_close_matches(name, known)]
        raise OptionError(
            f"there is no component named {' or '.join(repr(name) for name in unknown)}",
            candidates=near,
            expected=f"Components of the adapters and of {arch} are {', '.join(known)}",
        )
    if changed and not {*changed} & {*components}:
        raise OptionError(
            f"no adapter changes {' or '.join(components)}",
            expected=f"The adapters change {', '.join(changed)}",
            todo="Leave --components out, or name one of these",
        )


def refuse_ambiguous(found: Mapping[Target, tuple[str, ...]], adapter: Adapter, base: Base) -> None:
    """Refuse names that may mean several modules of the base.

    Raises:
        NameResolutionError: With the first one's readings.
    """
    if not found:
        return
    target, paths = next(iter(found.items()))
    what = f"may each mean several modules of {base.path}: {target} may be {' or '.join(paths)}"
    if len(paths) == 1:
        what = f"are one module of {base.path}: {paths[0]}"
    raise NameResolutionError(
        f"{len(found)} names {what}",
        path=adapter.path or None,
        keys=[str(each) for each in found],
        expected="One module of the base was expected for each name",
        todo="Give as the base only the network that the adapter is for",
    )


def refuse(
    adapter: Adapter, base: Base, lost: Lost, places: Callable[[str], Places], *, skip_missing: bool
) -> None:
    """Refuse what found no place.

    Args:
        adapter: The adapter.
        base: The base.
        lost: What of it found none.
        places: The base's components.
        skip_missing: Whether some of its modules may be missing; never all.

    Raises:
        ShapeError: Modules have another shape in the base.
        UnsupportedKindError: The base has them quantised, under names of the scheme's own.
        OptionError: The base is no checkpoint.
        NameResolutionError: The base lacks modules.
    """
    if lost.misfits:
        _refuse_shapes(adapter, base, lost)
    _refuse_packed(adapter, base, lost, places)
    if lost.missing and (not lost.placed or not skip_missing):
        if not lost.placed:
            _no_checkpoint.refuse(base)
        _refuse_missing(adapter, base, lost, places)


def _refuse_shapes(adapter: Adapter, base: Base, lost: Lost) -> NoReturn:
    expected = ""
    if any(_is_inpainting(sentence) for sentence in lost.misfits):
        expected = (
            f"The base takes {_INPAINTING} channels, as inpainting models do, and the adapter was made for one that "
            "does not"
        )
    elif adapter.arch != UNKNOWN:
        title, other = _title(adapter), looks_like(base)
        same = f"Both look like {title}, of different widths"
        expected = same if title == other else f"The adapter looks like {title}; the base looks like {other}"
    raise ShapeError(
        f"{len(lost.misfits)} of {len(adapter.modules)} modules do not fit {base.path}",
        path=adapter.path or None,
        keys=lost.misfits,
        expected=expected,
        todo=_MADE_FOR,
    )


def _is_inpainting(sentence: str) -> bool:
    """Whether a misfit is that of the first convolution on an inpainting model."""
    stem, _, stored = sentence.partition(": ")
    return stem.endswith(("input_blocks.0.0", "conv_in")) and f", {_INPAINTING}, " in stored


def _refuse_packed(adapter: Adapter, base: Base, lost: Lost, places: Callable[[str], Places]) -> None:
    """Refuse modules that a base lacks only because their weights are packed: GPTQ's qweight, AWQ's."""
    from loratools.ops import _quantised

    missing = {*lost.missing}
    packed: dict[str, str] = {}
    for target in adapter.modules:
        if str(target) not in missing:
            continue
        here = places(target.component)
        owner = here.owner(target.path)
        if owner is None:
            continue
        part = here.network.part
        scheme = _quantised.scheme_of(base.parts[part], owner, base.configs.get(part))
        if scheme is not None:
            packed[owner] = scheme
    if packed:
        raise UnsupportedKindError(
            f"{len(packed)} weights that the adapter changes are quantised: "
            + ", ".join(dict.fromkeys(packed.values())),
            path=base.path,
            keys=list(packed),
            expected="Weights in float8 or wider were expected",
            todo="Bake into the model that was quantised, and quantise the result again",
        )


def _refuse_missing(adapter: Adapter, base: Base, lost: Lost, places: Callable[[str], Places]) -> NoReturn:
    count = len(adapter.modules) - lost.left_out
    first = next((target for target in adapter.modules if str(target) in lost.missing), None)
    here = places(first.component) if first is not None else None
    todo = _MADE_FOR
    what = f"none of the {count} modules is in {base.path}"
    if not count:
        what = f"none of the {len(lost.missing)} tensors is in {base.path}"
    if lost.placed:
        what = f"{len(lost.missing)} of {count} modules target weights that {base.path} does not have"
        todo += f", or pass --skip-missing to bake the other {max(0, count - len(lost.missing))}"
        lacking = _lacking(adapter, lost)
        if lacking:
            todo += f", or --components {','.join(lacking)} to leave out the component that it lacks"
    near = near_paths(first.path, list(here.paths)) if first is not None and here is not None else []
    raise NameResolutionError(
        what,
        path=adapter.path or None,
        keys=lost.missing,
        candidates=near,
        expected=_seen(adapter, base, first, here),
        todo=todo,
    )


def _lacking(adapter: Adapter, lost: Lost) -> list[str]:
    """The components that have a place, where those that lack one have none at all."""
    missing = {*lost.missing}
    without = {target.component for target in adapter.modules if str(target) in missing}
    having = dict.fromkeys(target.component for target in adapter.modules if str(target) not in missing)
    return [] if not without or without & having.keys() else list(having)


def _seen(adapter: Adapter, base: Base, first: Target | None, here: Places | None) -> str:
    """What the adapter and the base look like, where they differ."""
    if first is None or here is None:
        return ""
    if not here.paths:
        return f"The adapter changes {first.component}; the base has no {first.component}"
    blocks = _blocks(first, here)
    if blocks is not None:
        stem, needed, has = blocks
        return f"The adapter looks like {_title(adapter)} with {needed} {stem} or more; the base has {has}"
    other = regrouped(first.path, Paths(here.paths, flat="." not in first.path))
    if other:
        return f"The base has {other}: it is fused in one of them and split in the other"
    like = f"the adapter's names are like {first.path}; the base's are like {shown(list(here.paths), 2)}"
    title, other = _title(adapter), looks_like(base)
    both = (
        f"Both look like {title}"
        if title == other
        else f"The adapter looks like {title}, the base like {other}"
    )
    return f"{both}: {like}"


def _blocks(target: Target, here: Places) -> tuple[str, int, int] | None:
    """(stem, blocks that the target needs, blocks that the base has), where only its number is too high."""
    words = target.path.split(".")
    place = next((index for index, word in enumerate(words) if word.isdigit()), None)
    if place is None:
        return None
    for has in range(int(words[place]), 0, -1):
        if here.has(".".join([*words[:place], str(has - 1), *words[place + 1 :]])):
            return ".".join(words[:place]), int(words[place]) + 1, has
    return None


def _title(adapter: Adapter) -> str:
    table = archs.all_archs()
    if adapter.arch == UNKNOWN and adapter.candidates:
        return " or ".join(table[name].title for name in adapter.candidates)
    return table[adapter.arch].title if adapter.arch in table else adapter.arch
