"""loralib's MergedLinear: one pair of matrices for several parts of a fused weight.

``lora_A`` is (rank · parts, in) and ``lora_B`` (out / all · parts, rank), where ``parts`` of ``all`` equal parts are
adapted; each part has its own block of rows in both. The file does not say how many parts there are, nor which of
them are adapted: names of fused attention tell the first, and for two of q, k and v we follow loralib's own examples,
which adapt q and v, and say so in a note. Source: microsoft/LoRA ``loralib/layers.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from loratools.errors import ShapeError
from loratools.formats import _slices
from loratools.formats._base import Facts, Group
from loratools.model import Module, Rows
from loratools.tensors import TensorRef

# How many parts a weight of this name is fused of.
_FUSED = {
    **dict.fromkeys(("c_attn", "qkv", "qkv_proj", "query_key_value", "in_proj", "Wqkv", "attn_qkv"), 3),
    **dict.fromkeys(("kv", "kv_proj", "key_value", "Wkv"), 2),
}
_Q_AND_V = (0, 2)


class Part(NamedTuple):
    """One part of a group.

    Attributes:
        group: Its own up and down.
        rows: Which rows of the weight it changes; None where the group is not one of several parts.
    """

    group: Group
    rows: Rows | None = None


def count(group: Group) -> int:
    """How many parts a group of bare factors adapts: 1 where it is an ordinary pair."""
    up, down = group.roles.get("up"), group.roles.get("down")
    if group.style != "loralib" or up is None or down is None or len(up.shape) != 2 or len(down.shape) != 2:
        return 1
    if down.shape[1] == up.shape[0] <= down.shape[0]:
        return 1  # an ordinary pair, stored transposed
    rank = up.shape[1]
    many, rest = divmod(down.shape[0], rank) if rank else (1, 0)
    return many if many > 1 and not rest and not up.shape[0] % many else 1


def is_grouped(facts: Facts) -> bool:
    """Whether any module of a file adapts several parts of its weight."""
    return facts.style == "loralib" and any(count(group) > 1 for group in facts.groups.values())


def parts(group: Group, path: str = "") -> list[Part]:
    """A group's parts: itself, where it is an ordinary pair.

    Raises:
        ShapeError: It has parts, and its name does not tell how many the weight has.
    """
    many = count(group)
    if many == 1:
        return [Part(group)]
    whole = _FUSED.get(group.name.rpartition(".")[2], 0)
    places = _places(many, whole)
    if not places:
        up, down = group.roles["up"], group.roles["down"]
        raise ShapeError(
            f"{group.stem}: up is {list(up.shape)}, down is {list(down.shape)}: "
            f"loralib's form for {many} parts of a fused weight",
            path=path or None,
            keys=[ref.name for ref in group.roles.values()],
            expected="All parts, or q and v of a fused qkv, under a name that tells how many there are",
            todo="Save it with one pair of matrices for each part",
        )
    return [
        Part(_part(group, number, many), Rows(((place, place + 1),), of=whole))
        for number, place in enumerate(places)
    ]


def _places(many: int, whole: int) -> Sequence[int]:
    """Which parts are adapted; none where that cannot be told."""
    if many == whole:
        return range(whole)
    return _Q_AND_V if (many, whole) == (2, 3) else ()


def notes(facts: Facts) -> list[str]:
    """What had to be assumed of a file's parts."""
    assumed = [
        group.stem
        for group in facts.groups.values()
        if count(group) == 2 and _FUSED.get(group.name.rpartition(".")[2]) == 3
    ]
    if not assumed:
        return []
    return [
        f"{len(assumed)} modules adapt two of three parts (first: {assumed[0]}); "
        "q and v are assumed, as in loralib's examples"
    ]


def _part(group: Group, number: int, many: int) -> Group:
    found = Group(group.stem)
    found.name, found.style = group.name, group.style
    for role, ref in group.roles.items():
        size = ref.shape[0] // many
        found.roles[role] = _slices.rows(ref, number * size, (number + 1) * size)
    return found


def stack(modules: Sequence[Module]) -> tuple[TensorRef, TensorRef] | None:
    """up and down of a weight's parts in loralib's form, in the order of their rows.

    Returns:
        None where they cannot lie in one: ranks, shares or dtypes differ, or a reader would take them for others.
    """
    ordered = sorted(modules, key=lambda module: module.target.rows.spans if module.target.rows else ())
    rows = [module.target.rows for module in ordered]
    places = [each.spans[0][0] for each in rows if each is not None and each.shares == len(each.spans) == 1]
    whole = {each.of for each in rows if each is not None}
    leaf = modules[0].target.path.rpartition(".")[2]
    if len(places) != len(modules) or whole != {_FUSED.get(leaf)}:
        return None
    alike = {(m.rank, m.factors["up"].shape, m.factors["up"].dtype, m.factors["down"].dtype) for m in ordered}
    if len(alike) > 1 or tuple(places) != tuple(_places(len(places), whole.pop())):
        return None
    up, down = ([module.factors[role] for module in ordered] for role in ("up", "down"))
    return _slices.stacked("", up), _slices.stacked("", down)


def by_weight(modules: Iterable[Module]) -> dict[str, list[Module]]:
    """The modules that are parts of a weight, by its path."""
    found: dict[str, list[Module]] = {}
    for module in modules:
        if module.target.rows is not None:
            found.setdefault(module.target.path, []).append(module)
    return found
