"""A checkpoint of an extraction: its tensors, and what each of them is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from loratools.errors import UnsupportedKindError
from loratools.io.base import Base, Weight
from loratools.ops import _quantised
from loratools.ops._extract_pairs import MATRIX, Stored
from loratools.ops._identify import Identified, identify
from loratools.ops._network import SCALES
from loratools.tensors import DTYPES

_UNKNOWN = "unknown"
_WHOLE_BYTES = 8  # bits
# GPTQ's and AWQ's name of a weight.
_PACKED = ".qweight"


class Side(NamedTuple):
    """A checkpoint and what its tensors are.

    Attributes:
        base: Its files.
        arch: The architecture's name, or "unknown".
        stored: The tensors of known components, in its order.
        others: Tensors of none (a VAE's, buffers), by part and key.
    """

    base: Base
    arch: str
    stored: tuple[Stored, ...]
    others: Mapping[tuple[str, str], Weight]


def sides(base: Base, tuned: Base, arch: str | None) -> tuple[Side, Side]:
    """Both checkpoints, by the names of one architecture where one of them does not tell its own.

    Raises:
        ArchitectureError: Nobody has described ``arch``.
    """
    own, other = identify(base, arch), identify(tuned, arch)
    # Names that several architectures share are those of the one that the other checkpoint is.
    if own.arch in other.candidates or (other.arch == _UNKNOWN != own.arch):
        other = identify(tuned, own.arch)
    elif other.arch in own.candidates or (own.arch == _UNKNOWN != other.arch):
        own = identify(base, other.arch)
    return _side(base, own), _side(tuned, other)


def _side(base: Base, found: Identified) -> Side:
    stored: list[Stored] = []
    for target, each in found.targets.items():
        part = base.parts[each.part]
        if each.weight is not None:
            scale = _quantised.scale_of(part, each.weight)
            stored.append(Stored(target, "weight", each.role, each.weight, each.turned, scale))
        if each.bias is not None:
            # A bias alone is no norm's.
            role = MATRIX if each.weight is None else each.role
            stored.append(Stored(target, "bias", role, each.bias))
    others = {
        (part, key): base.parts[part][key]
        for part, key in found.others
        if key.rpartition(".")[2] not in SCALES
    }
    return Side(base, found.arch, tuple(stored), others)


def refuse_quantised(side: Side, wanted: Iterable[Stored]) -> None:
    """Refuse weights that are packed, so that no number stands for one of theirs.

    Args:
        side: The checkpoint.
        wanted: The tensors of it that are to be compared.

    Raises:
        UnsupportedKindError: All are named, and how they are stored.
    """
    found = {each.weight.key: each.weight for each in wanted if not is_number(each.weight)}
    found |= {weight.key: weight for weight in side.others.values() if weight.key.endswith(_PACKED)}
    if not found:
        return
    first = next(iter(found))
    part = next(part for part in side.base.parts.values() if first in part)
    path = first.removesuffix(".weight").removesuffix(_PACKED)
    scheme = (
        _quantised.scheme_of(part, path, side.base.configs.get("", {})) or f"{found[first].dtype} numbers"
    )
    raise UnsupportedKindError(
        f"{len(found)} weights are quantised ({scheme})",
        path=side.base.path,
        keys=found,
        expected="Weights in float8 or wider were expected",
        todo="Give the model as it was before it was quantised",
    )


def is_number(weight: Weight) -> bool:
    """Whether a tensor's elements are floating numbers of a byte or more."""
    row = DTYPES[weight.dtype]
    return row.floating and bool(row.torch) and row.bits >= _WHOLE_BYTES
