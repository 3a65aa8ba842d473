"""What is known of a model's experts: the family that has their names, and how many each layer has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

from loratools.archs import _experts as names
from loratools.archs._experts import FUSED, Experts, Place
from loratools.errors import NameResolutionError
from loratools.model import Adapter

_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
GIVE_BASE = "Give the model that the adapter is for with --base: a folder with its config.json is enough"


class About(NamedTuple):
    """What is known of a model's experts.

    Attributes:
        family: How it calls them; None where nothing says.
        total: How many each layer has; None where nothing says.
    """

    family: Experts | None = None
    total: int | None = None


def about(adapter: Adapter, config: Mapping[str, Any], count: int | None = None) -> About:
    """What a base's configuration, or the adapter's own, says of the model's experts.

    Args:
        adapter: Its configuration may name the model.
        config: The base's, or empty.
        count: How many experts there are, where the caller says so.
    """
    text = config.get("text_config")
    said = [config, *([text] if isinstance(text, Mapping) else [])]
    family = next(
        (found for each in said if (found := names.of_model_type(str(each.get("model_type"))))), None
    )
    if family is None and not config:
        family = names.of_model_name(str(adapter.config.get("base_model_name_or_path") or ""))
    stated = (each.get(name) for each in said for name in _COUNTS)
    counts = (each for each in stated if isinstance(each, int) and not isinstance(each, bool) and each > 0)
    return About(family, count or next(counts, None))


def settled(told: About, places: Sequence[Place]) -> About:
    """What is known, with the family that all names are of, or whose order of rows all that they may be of have."""
    if not places or told.family is not None:
        return told
    try:
        return told._replace(family=family_of(places, "", told))
    except NameResolutionError:
        return told


def family_of(places: Sequence[Place], style: str, told: About, keys: Sequence[str] = ()) -> Experts:
    """The family whose names and order of rows experts have.

    Args:
        places: What their paths say.
        style: In which they are to be called; empty where only the order of their rows matters.
        told: What is known of the model.
        keys: For the message.

    Raises:
        NameResolutionError: Several families have these names, and what they differ in matters.
    """
    sets: list[list[Experts]] = [list(place.families) for place in places]
    common: list[Experts] = reduce(lambda one, other: [each for each in one if each in other], sets)
    if told.family is not None and (told.family in common or not style):
        return told.family
    if any(place.number is not None for place in places):
        # Names of single experts are those of families that train them so.
        common = [family for family in common if family.usual] or common
    readings = {_reading(family, places, style): family for family in reversed(common)}
    if len(readings) == 1:
        return next(iter(readings.values()))
    raise NameResolutionError(
        f"{places[0].block}experts: these names are those of {' and '.join(each.name for each in common)} models, "
        "which have other names or another order of rows there",
        keys=list(keys),
        expected="The model's type was expected to be known",
        todo=GIVE_BASE,
    )


def _reading(family: Experts, places: Sequence[Place], style: str) -> tuple[Any, ...]:
    """What depends on the family where experts at these places are to be called in a style."""
    spell: Callable[[str], str] = lambda role: names.spell(family, style, "", role, 0)  # noqa: E731
    roles = ("gate_up", "down") if style == FUSED else ("gate", "up", "down")
    merged = style == FUSED or any(place.role == "gate_up" for place in places)
    return (*map(spell, roles if style else ()), family.interleaved and merged, family.turned and merged)
