"""Files that number their modules instead of naming them: what the numbers stand for, where shapes confirm it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from loratools import archs
from loratools.archs import _positions
from loratools.formats._base import Facts, Group
from loratools.model import Rows
from loratools.tensors import TensorRef

# The saved "ip_adapter" part of such a file is without the prefix.
_PROCESSOR = r"(ip_adapter\.)?(\d+)\.(to_.+)"
_NUMBERED = r"(?:(unet|text_encoder):)?(\d+)"

# Sam_LoRA adapts the q and the v rows of each block's qkv, in this order.
SAM_ROWS = (Rows(((0, 1),), of=3), Rows(((2, 3),), of=3))
SAM_PATH = "image_encoder.blocks.{}.attn.qkv"


class Placed(NamedTuple):
    """What the numbers of a file stand for.

    Attributes:
        arch: The architecture's name.
        resolved: What each module's name means.
        notes: What a reader should know, in sentences.
    """

    arch: str
    resolved: Mapping[str, archs.Resolved]
    notes: tuple[str, ...] = ()


def placed(facts: Facts) -> Placed | None:
    """The meaning of a file's numbers; None where it has names, or its numbers fit no known order."""
    if facts.styles.keys() == {"cloneofsimo"}:
        return _cloneofsimo(facts.groups.values())
    if facts.styles.keys() == {"sam"}:
        return _sam(facts)
    if facts.styles.keys() == {"attn-procs"}:
        found = ip_adapter(facts.groups)
        return found if found is not None and len(found.resolved) == len(facts.groups) else None
    return None


def listed(tensors: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """Names for a bare list of matrices: up and down alternate."""
    refs = list(tensors.values())
    if len(refs) % 2 or any(len(ref.shape) not in (2, 4) for ref in refs):
        return dict(tensors)
    named: dict[str, TensorRef] = {}
    for number in range(0, len(refs), 2):
        for role, ref in (("up", refs[number]), ("down", refs[number + 1])):
            key = f"{number // 2}:{role}"
            named[key] = ref.renamed(key)
    return named


def _cloneofsimo(groups: Iterable[Group]) -> Placed | None:
    numbered: dict[str, dict[int, Group]] = {}
    for group in groups:
        found = re.fullmatch(_NUMBERED, group.name)
        if found:
            numbered.setdefault(found[1] or "", {})[int(found[2])] = group
    orders: dict[str, _positions.Order] = {}
    for component, members in numbered.items():
        shapes = _shapes(members)
        order = None if component == "text_encoder" else _positions.find_unet(shapes)
        if order is None and component != "unet":
            order = _positions.find_text_encoder(shapes)
        if order is not None:
            orders[component] = order
    # Both halves of one file are of one model; a half that fits none keeps its numbers.
    if len({order.arch for order in orders.values()}) != 1:
        return None
    arch = next(iter(orders.values())).arch
    resolved = {
        numbered[component][number].name: meaning
        for component, order in orders.items()
        for number, name in enumerate(order.names)
        if (meaning := archs.get(arch).resolve(name)) is not None
    }
    rest = sum(map(len, numbered.values())) - len(resolved)
    return Placed(arch, resolved, (f"{rest} modules have numbers that fit no known order",) if rest else ())


def _shapes(members: Mapping[int, Group]) -> list[tuple[int, int]]:
    """(out, in) by number; empty where numbers are missing or factors are not matrices."""
    shapes = []
    for number in range(len(members)):
        roles = members[number].roles if number in members else {}
        if roles.keys() != {"up", "down"} or any(len(ref.shape) != 2 for ref in roles.values()):
            return []
        shapes.append((roles["up"].shape[0], roles["down"].shape[1]))
    return shapes


def _sam(facts: Facts) -> Placed | None:
    numbered = {int(group.name.removeprefix("w_")): group for group in facts.groups.values()}
    shapes = _shapes(numbered)
    blocks, odd = divmod(len(shapes), 2)
    width = _positions.SAM_ENCODERS.get(blocks)
    # LoRA for other vision transformers is saved alike, with a classifier beside it.
    classifies = any(key.startswith("fc_") for key in facts.keys)
    if odd or classifies or set(shapes) != {(width, width)}:
        return None
    resolved = {group.name: sam_place(number) for number, group in numbered.items()}
    note = f"numbers 0 to {len(shapes) - 1} are read as q and v of each block of Segment Anything's image encoder"
    return Placed("vision", resolved, (note,))


def sam_place(number: int) -> archs.Resolved:
    """What a number of Sam_LoRA stands for."""
    block, which = divmod(number, 2)
    return archs.Resolved("vision_model", SAM_PATH.format(block), SAM_ROWS[which], "native", "", ".")


def ip_adapter(groups: Mapping[str, Group]) -> Placed | None:
    """The LoRA in an IP-Adapter: what its processors' numbers stand for; None where there is none that fits.

    Args:
        groups: All modules of the file, by stem. Those that are not numbered processors are left out.
    """
    found = {name: match for name in groups if (match := re.fullmatch(_PROCESSOR, groups[name].name))}
    prompts = _prompts(groups, found)
    if len(prompts) != 1:
        return None
    numbers = max(int(match[2]) for match in found.values()) + 1
    order = _positions.find_processors(prompts.pop(), numbers)
    # Bare numbers mean something only where they are as many as the UNet has processors.
    bare = any(not match[1] for match in found.values())
    if order is None or (bare and numbers != len(order.names)):
        return None
    resolved = {
        groups[name].name: meaning
        for name, match in found.items()
        if (meaning := archs.get(order.arch).resolve(f"{order.names[int(match[2])]}.{match[3]}")) is not None
    }
    return Placed(order.arch, resolved)


def _prompts(groups: Mapping[str, Group], found: Mapping[str, re.Match[str]]) -> set[int]:
    """The input widths of the cross-attentions' keys and values: those of odd numbers."""
    cross: Sequence[str] = [
        name for name, match in found.items() if int(match[2]) % 2 and match[3] in ("to_k", "to_v")
    ]
    downs = [groups[name].roles["down"] for name in cross if "down" in groups[name].roles]
    return {ref.shape[-1] for ref in downs if len(ref.shape) == 2}
