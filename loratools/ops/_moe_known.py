"""Packed experts named and counted: which parameter each module is for, of how many experts, and with which scale.

PEFT packs the factors of all experts in two axes. How many experts there are follows from the rank that the
configuration states; which parameter a module is for, from the order in which PEFT wraps them and from the shapes.
Nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from loratools.archs import _experts as names
from loratools.errors import NameResolutionError, ShapeError
from loratools.formats import _peft_config
from loratools.kinds import experts
from loratools.model import Adapter, Module, Target
from loratools.ops._base_match import bare

_TELL = "Say how many experts there are with --experts-count, or give the model with --base"


def is_packed(module: Module) -> bool:
    """Whether a module holds all experts in two axes, and nothing has told yet how many they are."""
    return module.kind == experts.KIND.name and experts.count(module) is None


def known(adapter: Adapter, count: int | None = None) -> Adapter:
    """The adapter with its packed modules under their parameters' names, with rank, scale and shape.

    Their factors stay packed: up is (out, rank · experts), down (experts · rank, in).

    Args:
        adapter: From ``load``.
        count: How many experts there are; None: as the configuration's ranks say.

    Raises:
        NameResolutionError: Nothing tells which parameter a module is for.
        ShapeError: Ranks and shapes do not agree on the number of experts.
    """
    packed = [module for module in adapter.modules.values() if is_packed(module)]
    if not packed:
        return adapter
    levels: dict[tuple[str, str], list[Module]] = {}
    for module in packed:
        levels.setdefault((module.target.component, bare(module.target.path)), []).append(module)
    told: dict[Target, Module] = {}
    for (_, owner), members in levels.items():
        # The innermost wrapper has the longest path.
        members.sort(key=lambda each: -len(each.target.path))
        leaves = _leaves(adapter, owner, members)
        for module, leaf in zip(members, leaves, strict=True):
            told[module.target] = _told(adapter, module, f"{owner}.{leaf}", count)
    modules = [told.get(target, module) for target, module in adapter.modules.items()]
    return replace(adapter, modules={module.target: module for module in modules})


def _leaves(adapter: Adapter, owner: str, members: Sequence[Module]) -> list[str]:
    """The parameters of an owner's modules, the innermost first."""
    found: dict[str, int] = {}
    for name in map(str, adapter.config.get("target_parameters") or ()):
        above, _, leaf = name.rpartition(".")
        if not above or owner == above or owner.endswith("." + above):
            order = names.REGISTERED.index(leaf) if leaf in names.REGISTERED else len(names.REGISTERED)
            found.setdefault(leaf, order)
    leaves = sorted(found, key=lambda leaf: found[leaf])
    if len(leaves) != len(members):
        raise NameResolutionError(
            f"{owner} has {len(members)} packed modules, and target_parameters names {len(leaves)} of its parameters",
            path=adapter.path or None,
            keys=[ref.name for module in members for ref in module.factors.values()],
            expected="A parameter for each module was expected",
            todo="Give the model that the adapter is for with --base",
        )
    pairs = dict(zip(leaves, members, strict=True))
    turned = dict(zip(leaves[::-1], members, strict=True))
    # Releases of PEFT have wrapped parameters in other orders; the sides of gate and up against down tell.
    return leaves[::-1] if not _agree(pairs) and _agree(turned) else leaves


def _agree(pairs: Mapping[str, Module]) -> bool:
    """Whether a layer's two parameters have the sides of one MLP, or nothing can be said."""
    if pairs.keys() != {"gate_up_proj", "down_proj"}:
        return True
    return is_turned(pairs["gate_up_proj"], pairs["down_proj"]) is not None


def is_turned(gate_up: Module, down: Module) -> bool | None:
    """Whether the factors of a layer's experts are those of transposed weights; None where the sides fit neither way.

    gate_up has twice as many outputs as down has inputs, so that both readings never fit at once.

    Args:
        gate_up: Of gate_up_proj, packed or stacked.
        down: Of down_proj.
    """
    (out, inputs), (width, middle) = sides(gate_up), sides(down)
    if (out, inputs) == (2 * middle, width):
        return False
    return True if (inputs, out) == (2 * width, middle) else None


def sides(module: Module) -> tuple[int, int]:
    """The outputs and inputs that the factors of one expert have."""
    up, down = module.factors["up"].shape, module.factors["down"].shape
    return (up[1] if len(up) == 3 else up[0]), down[-1]


def _told(adapter: Adapter, module: Module, name: str, count: int | None) -> Module:
    """A packed module under its parameter's name."""
    total = module.factors["down"].shape[0]
    stated = _peft_config.pattern_value(adapter.config.get("rank_pattern"), name, adapter.config.get("r"))
    unit = count if count else stated
    if not isinstance(unit, int) or isinstance(unit, bool) or unit < 1 or total % unit:
        said = f"{count} experts were given" if count else f"adapter_config.json says rank {stated}"
        raise ShapeError(
            f"{name}: its factors have {total} directions for all experts together, and {said}",
            path=adapter.path or None,
            keys=[ref.name for ref in module.factors.values()],
            expected="The directions were expected to be the rank times the number of experts",
            todo=_TELL,
        )
    rank = total // count if count else unit
    scale = _peft_config.scale(adapter.config, name, rank)
    outputs, inputs = sides(module)
    return module._replace(
        target=module.target._replace(path=name),
        rank=rank,
        shape=(total // rank, outputs, inputs),
        scale=scale.value,
        alpha=scale.alpha,
    )
