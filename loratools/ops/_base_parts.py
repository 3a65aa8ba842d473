"""The part of a base model that one component of an adapter changes: its modules' paths and shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

from loratools import archs
from loratools.io.base import Base, Weight
from loratools.model import Module
from loratools.ops._network import networks
from loratools.tensors import DTYPES

Shape: TypeAlias = tuple[int, ...]
Modules: TypeAlias = "Mapping[str, Shape | None]"


def dialects(arch: archs.Arch, component: str) -> tuple[str, ...]:
    """The dialects besides the native one in which a base may name a component's weights; diffusers' first."""
    table = next((each.table for each in arch.components if each.name == component), None)
    return ("diffusers", *table.further) if table is not None else ()


def part_of(arch: str, component: str, base: Base) -> Modules:
    """The base's modules that may be this component's, without the prefix that marks it."""
    return _joined(_networks(arch, component, base))


def weights_of(arch: str, component: str, base: Base) -> dict[str, Weight]:
    """The weights of the base's modules that may be this component's, by the modules' paths."""
    found: dict[str, Weight] = {}
    for network in _networks(arch, component, base):
        for key, weight in network.items():
            path, _, leaf = key.rpartition(".")
            if leaf == "weight":
                found[path] = weight
            elif leaf != "bias":
                found.setdefault(key.removesuffix("_weight"), weight)
    return found


def _networks(arch: str, component: str, base: Base) -> list[Mapping[str, Weight]]:
    """The networks of a base that may be a component, keys without the prefix that marks it."""
    return [
        {key[len(prefix) :]: weight for key, weight in base.parts[part].items() if key.startswith(prefix)}
        for part, prefix, _ in networks(base, arch, component)
    ]


def _joined(networks: list[Mapping[str, Weight]]) -> dict[str, Shape | None]:
    """The modules of several networks; no shape is known where they have a path in common."""
    if len(networks) == 1:
        return _modules(networks[0])
    found: dict[str, Shape | None] = {}
    for network in networks:
        for path, shape in _modules(network).items():
            found[path] = None if path in found else shape
    return found


def _modules(weights: Mapping[str, Weight]) -> dict[str, Shape | None]:
    """The shapes of a base's modules by path; None where no weight says it (quantised, or no matrix)."""
    found: dict[str, Shape | None] = {}
    for key, weight in weights.items():
        path, _, leaf = key.rpartition(".")
        shape = weight.shape if DTYPES[weight.dtype].floating else None
        if leaf == "weight":
            found[path] = shape
            continue
        found.setdefault(path, None)
        if leaf != "bias":
            # A parameter without a module of its own; torch's attention has in_proj_weight.
            found[key.removesuffix("_weight")] = shape
    found.pop("", None)
    return found


def fits(module: Module, has: Shape) -> bool:
    """Whether the base's weight is of the module's shape, as far as both tell.

    Kernels of one may be left away or flattened, and GPT-2's Conv1D and embeddings are stored as (in, out).
    """
    if module.shape is None or not has:
        return True
    wanted, stored = _plain(module.shape), _plain(has)
    if wanted in (stored, stored[::-1]):
        return True
    return wanted[:1] == stored[:1] and math.prod(wanted) == math.prod(stored)


def _plain(shape: Shape) -> Shape:
    while shape[-1:] == (1,):
        shape = shape[:-1]
    return shape
