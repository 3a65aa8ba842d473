"""The networks of a base model: where each component's tensors lie, and which weight and bias are one module's.

A component is marked by a subfolder of a diffusers model, or in one file by a prefix: that of the original checkpoint,
of ComfyUI, or the name of diffusers' subfolder. A file of one network alone marks nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from loratools import archs, formats
from loratools.archs._names import parse
from loratools.io.base import Base, Weight

# Scales of float8 weights and of their inputs: they belong to a weight and are none themselves.
SCALES = ("scale_weight", "weight_scale", "weight_scale_inv", "scale_input", "input_scale")
# torch's attention keeps three weights in one parameter, and their biases in another.
_IN_PROJ = "in_proj_"


class Stored(NamedTuple):
    """One module of a base model.

    Attributes:
        weight: Its weight, or the parameter itself where it is none's; None where there is a bias alone.
        bias: Its bias, where it has one.
        bare: Whether the weight is a parameter without a module of its own.
    """

    weight: Weight | None = None
    bias: Weight | None = None
    bare: bool = False


class Network(NamedTuple):
    """What a base holds of one component.

    Attributes:
        part: The subfolder of a diffusers model that it lies in, or empty.
        prefix: What stands before its names.
        modules: By path, without the prefix.
    """

    part: str
    prefix: str
    modules: Mapping[str, Stored]


def networks(base: Base, arch: str, component: str) -> list[Network]:
    """Where a base may hold a component: several subfolders, or one file as a whole where nothing marks it.

    Args:
        base: From :func:`loratools.io.base.keys_of`.
        arch: The architecture's name.
        component: "denoiser", "text_encoder", …
    """
    if "" not in base.parts:
        wanted = {prefix.rstrip("."): None for prefix in folders(arch, component)}
        # Nobody says how the folders of a model without a description are called.
        names = [name for name in wanted if name in base.parts] if wanted else list(base.parts)
        return [Network(name, "", modules_of(base.parts[name])) for name in names]
    whole = base.parts[""]
    for prefix in prefixes(arch, component):
        if any(key.startswith(prefix) for key in whole):
            marked = Network("", prefix, modules_of(whole, prefix))
            # A network's own names may begin like a prefix (CogVideoX' "transformer.layers").
            if 2 * explained(arch, component, marked) >= len(marked.modules):
                return [marked]
    return [Network("", "", modules_of(whole))]


def chosen(found: Sequence[Network], keys: Iterable[str]) -> tuple[Network, tuple[str, ...]]:
    """The network that is meant, and the subfolders of the others.

    Of several the first is what diffusers loads an adapter into, unless its keys name another.
    """
    if not found:
        return Network("", "", {}), ()
    named = {key.partition(".")[0] for key in keys}
    own = found[0]
    if len(found) > 1:
        own = next((each for each in found if named == {each.part}), own)
    return own, tuple([each.part for each in found if each is not own])


def explained(arch: str, component: str, network: Network) -> int:
    """How many of a network's modules a component has names for: all, where paths are their own names."""
    row = archs.component(arch, component)
    if row is None or row.table is None:
        return len(network.modules)
    known = row.table.knows
    return sum(1 for path in network.modules if known(parse(path)[0]))


def folders(arch: str, component: str) -> tuple[str, ...]:
    """The prefixes that diffusers has for a component, which are its subfolders' names with a dot."""
    row = archs.component(arch, component)
    told = row.prefixes.get("diffusers", ()) if row is not None else ()
    return tuple(dict.fromkeys((*told, *_usual("diffusers", component))))


def prefixes(arch: str, component: str) -> tuple[str, ...]:
    """The prefixes that may mark a component in one file, the original checkpoint's first."""
    row = archs.component(arch, component)
    told: Mapping[str, tuple[str, ...]] = row.prefixes if row is not None else {}
    own = (*told.get("checkpoint", ()), *told.get("comfy", ()), *_usual("comfy", component))
    # Where no table tells, "transformer." may be a word of the network's own names.
    named = folders(arch, component) if row is not None and row.table is not None else ()
    return tuple(dict.fromkeys(prefix for prefix in (*own, *named) if prefix))


def _usual(layout: str, component: str) -> Iterator[str]:
    return (prefix for prefix, name in formats.get(layout).prefixes if name == component)


def modules_of(weights: Mapping[str, Weight], prefix: str = "") -> dict[str, Stored]:
    """The modules whose keys begin with a prefix, by path without it."""
    found: dict[str, Stored] = {}
    for key, weight in weights.items():
        if not key.startswith(prefix):
            continue
        path, leaf = split_key(key[len(prefix) :])
        if leaf in SCALES:
            continue
        had = found.get(path) or Stored()
        if leaf == "bias":
            found[path] = had._replace(bias=weight)
        elif leaf == "weight" or had.weight is None:
            found[path] = had._replace(weight=weight, bare=not leaf)
    return found


def split_key(key: str) -> tuple[str, str]:
    """A key's module and what it is there.

    Returns:
        The path, and "weight", "bias", "scale" (Flux calls the weights of its norms so), one of ``SCALES``, or nothing
        for a bare parameter, whose path is the key.
    """
    path, _, leaf = key.rpartition(".")
    if path and leaf in ("weight", "bias", "scale", *SCALES):
        return path, leaf
    if leaf in (_IN_PROJ + "weight", _IN_PROJ + "bias"):
        return key[: -len(leaf)] + _IN_PROJ[:-1], leaf[len(_IN_PROJ) :]
    return key, ""
