"""Modules of fused experts against the base: which parameter each one changes, and with which scale.

PEFT wraps the parameters of one module in turn, those registered first innermost: the tensors of ``….experts`` belong
to the outermost wrapper, those of ``….experts.base_layer`` to the one inside it, and so on. Neither says which
parameter it is for, nor how many experts there are; the configuration's ``target_parameters`` and the base's shapes do.
Source: PEFT ``tuners/tuners_utils.py`` (``_inject_parameters``) and ``tuners/lora/layer.py`` (``ParamWrapper``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from typing import TYPE_CHECKING, Any

from loratools.archs._experts import REGISTERED
from loratools.errors import NameResolutionError, ShapeError
from loratools.formats import _peft_config
from loratools.io.base import Weight
from loratools.kinds import experts
from loratools.model import Adapter, Module
from loratools.ops._base_match import bare
from loratools.ops._replaced import wrapped
from loratools.tensors import TensorRef, torch_bytes

if TYPE_CHECKING:
    import torch

# Model types whose experts are stored as (experts, in, out) and say so to PEFT.
TURNED = frozenset({"aria", "aria_text", "gpt_oss", "openai_privacy_filter"})
# More parameters of one module than this are only tried in their registered order.
_MOST_TRIED = 6


class Unpacked:
    """Packed factors seen with an axis for the experts, in the order of kind "experts" when they are stacked.

    Args:
        ref: up, (out, rank · experts) with the expert running fastest.
        experts: A count.
    """

    __slots__ = ("experts", "ref")

    def __init__(self, ref: TensorRef, experts: int) -> None:
        self.ref = ref
        self.experts = experts

    def _stacked(self) -> torch.Tensor:
        up = self.ref.load()
        stacked: torch.Tensor = up.reshape(up.shape[0], -1, self.experts).permute(2, 0, 1).contiguous()
        return stacked

    def raw(self) -> memoryview:
        """The bytes of (experts, out, rank)."""
        return torch_bytes(self._stacked())

    def torch(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:  # noqa: ARG002 - the tensor knows
        """The tensor (experts, out, rank)."""
        return self._stacked()


def parameter_of(
    adapter: Adapter, module: Module, part: Mapping[str, Weight], owner: str | None = None
) -> str | None:
    """The key of the tensor that a module of fused experts changes.

    Args:
        adapter: Where the module is from; its siblings and its configuration tell the parameters apart.
        module: Of kind "experts".
        part: The base's tensors by key.
        owner: The path in the base of the module that owns the parameters; None where it is the adapter's, or
            stands under another wrapper.

    Returns:
        None where the base has no such parameter.

    Raises:
        NameResolutionError: Shapes, order and configuration leave several.
    """
    path = bare(module.target.path)
    levels = _levels(adapter, module)
    owners = wrapped(path) if owner is None else (owner,)
    names = next((found for each in owners if (found := _parameters(adapter, path, part, each))), [])
    if not names:
        return None
    if not adapter.config.get("target_parameters"):
        return _only(module, part, names)
    fitting = _assignments(levels, part, names)
    chosen = next(fitting, None)
    return None if chosen is None else chosen[levels.index(module)]


def _levels(adapter: Adapter, module: Module) -> list[Module]:
    """The modules that wrap the parameters of one owner, the innermost first."""
    path = bare(module.target.path)
    found = [
        each
        for target, each in adapter.modules.items()
        if target.component == module.target.component
        and bare(target.path) == path
        and each.kind == module.kind
    ]
    return sorted(found, key=lambda each: -len(each.target.path))


def _parameters(adapter: Adapter, path: str, part: Mapping[str, Weight], owner: str) -> list[str]:
    """The keys of an owner's parameters that a configuration targets, in the order in which PEFT wraps them."""
    said = adapter.config.get("target_parameters")
    if not said:
        plain = [key for key in (f"{owner}.weight", owner) if key in part]
        return plain or [key for key in part if key.rpartition(".")[0] == owner]
    found: dict[str, tuple[int, int]] = {}
    for place, name in enumerate(map(str, said)):
        above, _, leaf = name.rpartition(".")
        key = f"{owner}.{leaf}"
        if key in part and (not above or path == above or path.endswith("." + above)):
            registered = REGISTERED.index(leaf) if leaf in REGISTERED else len(REGISTERED)
            found.setdefault(key, (registered, place))
    return sorted(found, key=lambda key: found[key])


def _only(module: Module, part: Mapping[str, Weight], names: Sequence[str]) -> str | None:
    """The one parameter that a module's shapes fit, where no configuration names any."""
    weights = [name for name in names if name.endswith(".weight")]
    fitting = [name for name in weights or names if _orientations(module, part[name].shape)]
    if len(fitting) > 1:
        raise NameResolutionError(
            f"{module.target} may change {' or '.join(fitting)}",
            keys=[ref.name for _, ref in module.tensors() if ref.name],
            expected="target_parameters of adapter_config.json was expected to tell",
            todo="Give the adapter's folder, with the configuration it was saved with",
        )
    return fitting[0] if fitting else None


def _assignments(
    levels: Sequence[Module], part: Mapping[str, Weight], names: Sequence[str]
) -> Iterator[Sequence[str]]:
    """The ways to give each module a parameter that its shapes fit, PEFT's own order first.

    All parameters of a model are stored alike: as they are, or all turned.
    """
    if len(levels) > len(names):
        return
    for turned in (False, True):
        several = len(names) <= _MOST_TRIED
        for order in permutations(names, len(levels)) if several else [tuple(names[: len(levels)])]:
            pairs = zip(levels, order, strict=True)
            if all(_fits(module, part[name].shape, turned=turned) for module, name in pairs):
                yield order


def _fits(module: Module, stored: tuple[int, ...], *, turned: bool) -> bool:
    # A single matrix is stored one way only, whatever its siblings are.
    return (turned and len(stored) == 3) in _orientations(module, stored)


def _orientations(module: Module, stored: tuple[int, ...]) -> tuple[bool, ...]:
    """Whether the factors fit a tensor as it is (False) and turned (True), by their outer sides and the experts."""
    up, down = module.factors["up"].shape, module.factors["down"].shape
    count, sides = (stored[0], stored[1:]) if len(stored) == 3 else (1, stored)
    if len(sides) != 2 or not count:
        return ()
    if experts.is_stacked(module.factors):
        if up[0] != count:
            return ()
        wanted = (up[1], down[2])
    else:
        if down[0] % count or up[1] != down[0]:
            return ()
        wanted = (up[0], down[1])
    # A tensor of two axes is a linear layer's, which PEFT never turns.
    ways = ((False, wanted), (True, wanted[::-1])) if len(stored) == 3 else ((False, wanted),)
    return tuple(turned for turned, shape in ways if shape == sides)


def fitted(
    adapter: Adapter,
    module: Module,
    weight: Weight,
    part: Mapping[str, Weight],
    config: Mapping[str, Any] | None = None,
) -> Module:
    """A module with an axis for the experts, the scale and the shape that the base's tensor gives it.

    Its ΔW is of the stored tensor's own shape, so that the tensor is never to be turned.

    Args:
        adapter: Where it is from; its configuration states alpha.
        module: Of kind "experts".
        weight: The tensor that it changes, from ``parameter_of``: (experts, out, in) or (experts, in, out), or a
            single matrix.
        part: The base's tensors by key.
        config: The base's configuration, which tells how square experts are stored.

    Raises:
        ShapeError: The factors do not fit.
    """
    ways = _orientations(module, weight.shape)
    if not ways:
        raise _misfit(adapter, module, weight)
    turned = ways[0] if len(ways) == 1 else _is_turned(adapter, module, weight, part, config or {})
    if experts.is_stacked(module.factors):
        return module._replace(shape=weight.shape, in_first=turned)
    count = weight.shape[0] if len(weight.shape) == 3 else 1
    rank = module.factors["down"].shape[0] // count
    # PEFT matches its patterns against the parameter's name.
    name = f"{bare(module.target.path)}.{weight.key.rpartition('.')[2]}"
    scale = _peft_config.scale(adapter.config, name, rank)
    up, down = module.factors["up"], module.factors["down"]
    if len(weight.shape) == 2:
        return module._replace(
            kind="lora", shape=weight.shape, rank=rank, scale=scale.value, alpha=scale.alpha
        )
    stacked = {
        "up": TensorRef(up.name, (count, up.shape[0], rank), up.dtype, Unpacked(up, count)),
        "down": down.reshaped((count, rank, down.shape[1])),
    }
    return module._replace(
        factors=stacked,
        shape=weight.shape,
        rank=rank,
        scale=scale.value,
        alpha=scale.alpha,
        in_first=turned,
    )


def _is_turned(
    adapter: Adapter, module: Module, weight: Weight, part: Mapping[str, Weight], config: Mapping[str, Any]
) -> bool:
    """Whether square experts are stored as (experts, in, out), by PEFT's reading of the model.

    What a sibling of other sides shows holds for the whole model: releases of PEFT that turned every parameter did so
    with all of them.
    """
    owner = weight.key.rpartition(".")[0]
    for sibling in _levels(adapter, module):
        key = parameter_of(adapter, sibling, part, owner)
        ways = _orientations(sibling, part[key].shape) if key is not None else ()
        if len(ways) == 1:
            return ways[0]
    text = config.get("text_config")
    types = {config.get("model_type"), text.get("model_type") if isinstance(text, Mapping) else None}
    # The biases of gpt-oss' experts tell it where no configuration does.
    return bool(types & TURNED) or (not config and f"{owner}.down_proj_bias" in part)


def _misfit(adapter: Adapter, module: Module, weight: Weight) -> ShapeError:
    up, down = (list(module.factors[role].shape) for role in ("up", "down"))
    return ShapeError(
        f"{module.target}: up is {up} and down {down}; {weight.key} is {list(weight.shape)}",
        path=adapter.path or None,
        keys=[ref.name for _, ref in module.tensors() if ref.name],
        expected="Sides of the experts' weights, and ranks that their number divides, were expected",
        todo="Give the base model that the adapter was trained on",
    )
