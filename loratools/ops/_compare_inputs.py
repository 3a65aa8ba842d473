"""What a comparison was asked for, checked before any work is done."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

from loratools import kinds
from loratools.errors import ArchitectureError, OptionError, UnsupportedKindError
from loratools.io.base import Base
from loratools.model import Adapter, Module, Target
from loratools.ops import _experts, _moe_base, align, files
from loratools.ops._compare_target import is_experts, needs_base
from loratools.ops._outputs import PathLike

# Fused experts, the one kind whose targets are parameters rather than modules.
_EXPERTS = "experts"


class Inputs(NamedTuple):
    """The adapters of a comparison.

    Attributes:
        adapters: With the modules alone that change a matrix and were asked for, kernels flattened into the inputs.
        vectors: How many modules were left out since they change norms or biases alone, a count.
    """

    adapters: tuple[Adapter, ...]
    vectors: int


def inputs(
    adapters: Sequence[Adapter | PathLike], components: Collection[str] | None, arch: str | None
) -> Inputs:
    """The adapters, read, as one architecture's.

    Args:
        adapters: From ``load``, or paths.
        components: Only these; None for all.
        arch: The architecture, overriding detection.

    Raises:
        OptionError: There are fewer than two, or none has such a component.
        LoraError: One cannot be read.
    """
    if len(adapters) < 2:
        raise OptionError(
            f"{len(adapters)} adapters cannot be compared",
            expected="Two adapters at least were expected",
            todo="Give another one to compare with; loratools info describes a single one",
        )
    loaded = [each if isinstance(each, Adapter) else files.load(each, arch=arch) for each in adapters]
    found = align.clarified(loaded)
    if components is not None:
        found = [_narrowed(adapter, components) for adapter in _checked(found, components)]
    matrices = [
        replace(
            adapter,
            modules={target: _flat(each) for target, each in adapter.modules.items() if _has_matrix(each)},
        )
        for adapter in found
    ]
    vectors = sum(len(one.modules) - len(other.modules) for one, other in zip(found, matrices, strict=True))
    if not any(adapter.modules for adapter in matrices):
        raise OptionError("the adapters have no modules that change a matrix")
    return Inputs(tuple(matrices), vectors)


def _checked(adapters: Sequence[Adapter], components: Collection[str]) -> Sequence[Adapter]:
    """The adapters, if some of them have each of the components."""
    known = sorted({target.component for adapter in adapters for target in adapter.modules})
    unknown = [name for name in components if name not in known]
    if unknown:
        raise OptionError(
            f"no adapter has a component called {unknown[0]!r}",
            candidates=difflib.get_close_matches(unknown[0], known),
            expected=f"Their components are {', '.join(known)}",
        )
    return adapters


def _narrowed(adapter: Adapter, components: Collection[str]) -> Adapter:
    kept = {target: each for target, each in adapter.modules.items() if target.component in components}
    return replace(adapter, modules=kept)


def checked_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """One finite weight for each of ``count`` adapters; 1 each by default.

    Raises:
        OptionError: There are others.
    """
    given = tuple(float(weight) for weight in weights) if weights is not None else (1.0,) * count
    if len(given) != count:
        raise OptionError(
            f"{len(given)} weights for {count} adapters", expected="One weight for each was expected"
        )
    bad = [str(weight) for weight in given if not math.isfinite(weight)]
    if bad:
        raise OptionError("a weight is not a finite number", keys=bad)
    return given


def common_arch(adapters: Sequence[Adapter]) -> str:
    """The architecture that all share.

    Raises:
        ArchitectureError: They do not; the message names theirs.
    """
    try:
        return align.common_arch(adapters)
    except ArchitectureError as error:
        raise ArchitectureError(
            "adapters of different architectures have no weights in common",
            keys=error.keys,
            expected="Adapters of one base model were expected",
            todo="--arch NAME overrides what was detected",
        ) from None


def refuse(adapters: Sequence[Adapter], base: PathLike | None) -> None:
    """Refuse modules whose ΔW cannot be had, as far as headers tell, all of them named at once.

    Raises:
        UnsupportedKindError: There are some.
    """
    for adapter in adapters:
        modules = list(adapter.modules.values())
        unknown = [module for module in modules if not _computable(module)]
        if unknown:
            titles = " and ".join(sorted({kinds.get(module.kind).title for module in unknown}))
            raise UnsupportedKindError(
                f"{len(unknown)} of {len(modules)} modules are {titles}, whose ΔW cannot be computed",
                path=adapter.path or None,
                keys=[str(module.target) for module in unknown],
                expected="LoRA, LoHa, LoKr, OFT, GLoRA, (IA)³, AdaLoRA or a full difference was expected",
            )
        needing = [module for module in modules if needs_base(module)]
        if needing and base is None:
            titles = " and ".join(sorted({_title(module) for module in needing}))
            raise UnsupportedKindError(
                f"{len(needing)} of {len(modules)} modules are {titles}: their ΔW depends on the base weights",
                path=adapter.path or None,
                keys=[str(module.target) for module in needing],
                todo="Give the base model that the adapter was trained on with --base",
            )


def unpacked(adapters: Sequence[Adapter], base: Base) -> tuple[Adapter, ...]:
    """The adapters, their modules of fused experts with an axis for the experts and under their parameters' names.

    PEFT names them by how it nests parameters, so that one name may mean another parameter in another adapter.

    Args:
        adapters: Checked by ``refuse``.
        base: The base model, whose parameters tell how many experts there are and with which scale.

    Raises:
        UnsupportedKindError: The base lacks the parameters.
        ShapeError: They are of other shapes.
        NameResolutionError: Several fit.
    """
    found: list[Adapter] = []
    for given in adapters:
        adapter = _moe_base.for_base(given, base)
        modules = dict(_placed(adapter, module, base) for module in adapter.modules.values())
        found.append(replace(adapter, modules=modules))
    return tuple(found)


def _placed(adapter: Adapter, module: Module, base: Base) -> tuple[Target, Module]:
    """A module and its target, which for fused experts is the parameter that they change."""
    if module.kind != _EXPERTS:
        return module.target, module
    for name, part in base.parts.items():
        key = _experts.parameter_of(adapter, module, part)
        if key is not None:
            target = module.target._replace(path=key.removesuffix(".weight"))
            whole = _experts.fitted(adapter, module, part[key], part, base.configs.get(name))
            return target, whole._replace(target=target)
    raise UnsupportedKindError(
        f"{module.target}: {base.path} has no such experts",
        path=adapter.path or None,
        keys=[ref.name for ref in module.factors.values() if ref.name],
        todo="Give the base model that the adapter was trained on",
    )


def _computable(module: Module) -> bool:
    kind = kinds.get(module.kind)
    return kind.dense is not None or kind.factored is not None


def _title(module: Module) -> str:
    return "DoRA" if module.magnitude is not None else kinds.get(module.kind).title


def _flat(module: Module) -> Module:
    """The module as one of a matrix: some kinds keep a convolution's kernel flattened, and their ΔW is the same.

    Fused experts stay several matrices.
    """
    shape = module.shape
    if shape is None or len(shape) < 3 or is_experts(module):
        return module
    return module._replace(shape=(shape[0], math.prod(shape[1:])))


def _has_matrix(module: Module) -> bool:
    """Whether more than vectors change: not a norm layer's, nor a bias by itself."""
    if module.kind != "full":
        return True
    weight = module.factors.get("diff")
    return weight is not None and len(weight.shape) > 1
