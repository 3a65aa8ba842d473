"""The base model of a merge: the weights that modules change, and the tensors that others replace."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch

from loratools.errors import ShapeError, UnsupportedKindError
from loratools.io import base as io_base
from loratools.io.base import Weight, keys_of
from loratools.model import Adapter, Module, Target
from loratools.ops import _replaced, base_names
from loratools.ops._assemble import assemble
from loratools.ops._locate import Atlas
from loratools.ops._places import Place
from loratools.tensors import DTYPES

_TODO = "Give the base model that the adapters were trained on"


class BaseModel:
    """A base model in the names of adapters.

    Attributes:
        path: As it was given.
        config: Its configuration, empty where it has none.
    """

    def __init__(self, path: str | os.PathLike[str], arch: str, adapters: Sequence[Adapter]) -> None:
        """Read its headers.

        Args:
            path: A checkpoint: a file, or a folder.
            arch: The adapters' architecture.
            adapters: Those that are merged.

        Raises:
            LoraError: It cannot be read, or has nothing of one of them.
        """
        self.path = os.fspath(path)
        base = keys_of(path)
        for each in adapters:
            # What lies beside modules is looked up by itself, in a base that may hold no more than that.
            if not each.extras:
                base_names.refuse_foreign(each, base)
        components = dict.fromkeys(target.component for each in adapters for target in each.modules)
        self._atlas = Atlas(base, arch, components)
        self.config = base.configs.get("", {})

    def find(self, key: str) -> Weight | None:
        """The tensor that a key of PEFT's means, whatever its wrappers are called in the base."""
        for name in _replaced.wrapped(key):
            found = self._atlas.find("", name)
            if found is not None:
                return found[1]
        return None

    def tensor(self, weight: Weight) -> torch.Tensor:
        """A tensor as it is stored.

        Raises:
            UnsupportedKindError: It holds a quantisation's codes.
        """
        kind = DTYPES[weight.dtype]
        if not kind.floating or kind.bits < 16:
            raise UnsupportedKindError(
                f"{self.path} holds it as {weight.dtype}, quantised",
                keys=[weight.key],
                expected="Numbers were expected, to take differences from",
                todo="Give the base model in float32, float16 or bfloat16",
            )
        return io_base.load(weight)

    def places(self, modules: Sequence[Module]) -> dict[Target, Place]:
        """Where each module lies.

        Raises:
            UnsupportedKindError: The base lacks some of them.
            ShapeError: They are of another shape there.
        """
        found: dict[Target, Place] = {}
        missing: list[str] = []
        misfits: list[str] = []
        for component, own in _by_component(modules).items():
            keys = [ref.name for each in own for _, ref in each.tensors()]
            looked = self._atlas.of(component, keys).find(own)
            found |= looked.places
            missing += [str(target) for target in (*looked.missing, *looked.ambiguous)]
            misfits += looked.misfits
        if missing:
            raise UnsupportedKindError(
                f"{self.path} has no weight, or several, for {len(missing)} modules",
                keys=missing,
                expected="The weights that they were trained on were expected",
                todo=_TODO,
            )
        if misfits:
            raise ShapeError(
                f"{len(misfits)} modules have another shape than in {self.path}", keys=misfits, todo=_TODO
            )
        return found

    def weight(self, place: Place) -> torch.Tensor:
        """The rows of the base that lie at a place, (out, in[, kh, kw]), in float64.

        Raises:
            UnsupportedKindError: They are quantised.
        """
        for piece in place.pieces:
            kind = DTYPES[piece.weight.dtype]
            if piece.scale is None and (not kind.floating or kind.bits < 16):
                self.tensor(piece.weight)
        return assemble(place.pieces, torch.float64).to(torch.float64)


def _by_component(modules: Sequence[Module]) -> Mapping[str, list[Module]]:
    groups: dict[str, list[Module]] = {}
    for module in modules:
        groups.setdefault(module.target.component, []).append(module)
    return groups
