"""Two readings of one adapter compared by what they do: ΔW · x on random x, module by module, in float64.

Where both readings hold the same bits at the same scale, no x could tell them apart, and none is tried: a conversion
that only renames is proven without torch.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from math import lcm, prod
from typing import TYPE_CHECKING, NamedTuple

from loratools import kinds
from loratools.kinds._base import StandIn, wide
from loratools.model import Module
from loratools.ops._bits import same_bits, taken, units
from loratools.ops._weights_of import weight_of
from loratools.tensors import TensorRef

if TYPE_CHECKING:
    import torch

_PROBES = 2  # vectors for each weight

# Relative error allowed where values were rounded to a store dtype: some eight units in its last place.
_ROUNDED = {"F64": 1e-12, "F32": 1e-6, "F16": 4e-3, "BF16": 3e-2}
_ROUNDED_BELOW = 0.16
# Where nothing was rounded but alpha, which most layouts state in float32.
_EXACT = 3e-7

# Weights that are worked on side by side: more would hold more memory, and wait for it.
_THREADS = 4

Key = tuple[str, str]


class Probed(NamedTuple):
    """What a comparison found.

    Attributes:
        weights: How many base weights were compared.
        error: The largest relative error of ΔW · x, of a bias or of a magnitude.
        worst: The weight that has it, or empty.
        failed: Weights whose error is more than rounding explains, the worst first.
    """

    weights: int
    error: float
    worst: str
    failed: tuple[str, ...]


def compare(
    arch: str, expected: Iterable[Module], found: Iterable[Module], rounded: Mapping[Key, str]
) -> Probed:
    """Compare what was to be written with what a file says.

    Args:
        arch: The architecture that the modules are of.
        expected: What was to be written.
        found: What was read back.
        rounded: By weight, the store dtype to which values were rounded; weights whose values are exact are absent.
    """
    mine = _by_weight(expected, arch)
    theirs = _by_weight(found, arch)
    errors = dict.fromkeys(mine, 0.0)
    unlike = [key for key, members in mine.items() if not _same_bits(members, theirs.get(key, []))]
    errors.update(zip(unlike, _probed(unlike, mine, theirs), strict=True))
    errors.update(dict.fromkeys(theirs.keys() - mine.keys(), float("inf")))
    failed = [key for key, error in errors.items() if not error <= _allowed(rounded.get(key))]
    failed.sort(key=lambda key: -errors[key])
    worst = max(errors, key=lambda key: errors[key], default=("", ""))
    return Probed(
        len(errors),
        errors.get(worst, 0.0),
        worst[1] if errors.get(worst) else "",
        tuple(f"{key[1]} ({errors[key]:.2g})" for key in failed),
    )


def _probed(
    keys: Sequence[Key], mine: Mapping[Key, Sequence[Module]], theirs: Mapping[Key, Sequence[Module]]
) -> Iterable[float]:
    """The errors of weights whose bits differ, in order."""
    if not keys:
        return ()
    from loratools.engine import local

    threads = min(local.default_threads(), _THREADS)
    return local.run(lambda key: _error(key, mine[key], theirs.get(key, [])), keys, threads=threads)


def _by_weight(modules: Iterable[Module], arch: str) -> dict[Key, list[Module]]:
    found: dict[Key, list[Module]] = {}
    for module in modules:
        found.setdefault(weight_of(module, arch), []).append(module)
    return found


def _allowed(dtype: str | None) -> float:
    return _EXACT if dtype is None else _ROUNDED.get(dtype, _ROUNDED_BELOW)


def _error(key: Key, mine: Sequence[Module], theirs: Sequence[Module]) -> float:
    """The relative difference of two sets of modules of one weight; infinite where they cannot be compared."""
    import torch

    of = reduce(lcm, [module.target.rows.of for module in (*mine, *theirs) if module.target.rows], 1)
    if any(module.shape is None or kinds.get(module.kind).apply is None for module in (*mine, *theirs)):
        return _factors_apart(mine, theirs, of)
    shapes = {(_height(module, of), prod((module.shape or ())[1:])) for module in (*mine, *theirs)}
    if len(shapes) != 1:
        return float("inf")
    height, width = shapes.pop()
    generator = torch.Generator().manual_seed(zlib.crc32("/".join(key).encode()))
    x = torch.randn(width, _PROBES, generator=generator, dtype=torch.float64)
    base = StandIn(
        torch.randn(height, generator=generator, dtype=torch.float64),
        torch.randn(width, generator=generator, dtype=torch.float64),
    )
    errors = _by_share(_outputs(mine, x, base, of), _outputs(theirs, x, base, of), of)
    for role in ("bias", "magnitude out"):
        errors += _by_share(_vector(mine, role, height, of), _vector(theirs, role, height, of), of)
    errors.append(_distance(_across(mine), _across(theirs)))
    return _largest(errors)


def _same_bits(mine: Sequence[Module], theirs: Sequence[Module]) -> bool:
    """Whether both are the same tensors at the same scales: then no probe could tell them apart."""
    one, other = ({module.target.rows: module for module in modules} for modules in (mine, theirs))
    return one.keys() == other.keys() and all(_twins(one[rows], other[rows]) for rows in one)


def _twins(one: Module, other: Module) -> bool:
    same = (one.kind, one.scale, one.magnitude_axis, one.factors.keys(), _constraint(one))
    if same != (
        other.kind,
        other.scale,
        other.magnitude_axis,
        other.factors.keys(),
        _constraint(other),
    ):
        return False
    pairs = [(ref, other.factors[role]) for role, ref in one.factors.items()]
    if one.magnitude is not None and other.magnitude is not None:
        pairs.append((_flat(one.magnitude), _flat(other.magnitude)))
    return all(same_bits(*pair) for pair in pairs)


def _flat(ref: TensorRef) -> TensorRef:
    return ref.reshaped((ref.numel,))


def _height(module: Module, of: int) -> int:
    rows = (module.shape or (0,))[0]
    return rows * of // len(units(module.target.rows, of))


def _largest(errors: Iterable[float]) -> float:
    """The largest error; one that is no number, which every comparison passes over, is infinite."""
    return max((math.inf if math.isnan(error) else error for error in errors), default=0.0)


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    size, away = float(one.norm()), float((one - other).norm())
    if size == 0.0:
        return 0.0 if away == 0.0 else float("inf")
    return away / size


def _by_share(one: torch.Tensor, other: torch.Tensor, of: int) -> list[float]:
    """The distances of each share of the rows: a small part of a fused weight is not lost beside a large one."""
    return [_distance(*pair) for pair in zip(one.chunk(of), other.chunk(of), strict=True)]


def _places(module: Module, height: int, of: int) -> torch.Tensor:
    """The whole weight's row numbers that the module's rows are, in order."""
    import torch

    share = height // of
    return torch.cat(
        [torch.arange(unit * share, (unit + 1) * share) for unit in units(module.target.rows, of)]
    )


def _outputs(modules: Sequence[Module], x: torch.Tensor, base: StandIn, of: int) -> torch.Tensor:
    import torch

    height = base.left.numel()
    found = torch.zeros(height, x.shape[1], dtype=torch.float64)
    for module in modules:
        apply = kinds.get(module.kind).apply
        if apply is not None:
            rows = _places(module, height, of)
            # The magnitude is compared apart: what it does to ΔW depends on the whole base weight.
            bare = module._replace(magnitude=None, magnitude_axis=None)
            found[rows] += apply(bare, x, base._replace(left=base.left[rows]))
    return found


def _vector(modules: Sequence[Module], role: str, height: int, of: int) -> torch.Tensor:
    """A bias or a magnitude per output, over the whole weight's rows."""
    import torch

    found = torch.zeros(height, dtype=torch.float64)
    for module in modules:
        rows = _places(module, height, of)
        if role == "bias":
            for name, scale in (("up_bias", module.scale), ("diff_b", 1.0), ("b_norm", 1.0)):
                if name in module.factors:
                    found[rows] += scale * wide(module.factors[name]).reshape(-1)
        elif module.magnitude is not None and module.magnitude_axis == "out":
            found[rows] += wide(module.magnitude).reshape(-1)
    return found


def _across(modules: Sequence[Module]) -> torch.Tensor:
    """Magnitudes per input."""
    import torch

    found = [
        wide(module.magnitude).reshape(-1)
        for module in modules
        if module.magnitude is not None and module.magnitude_axis == "in"
    ]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


def _factors_apart(mine: Sequence[Module], theirs: Sequence[Module], of: int) -> float:
    """The relative difference of the factors themselves, for kinds that are only carried."""
    one, other = _factors(mine, of), _factors(theirs, of)
    if one.keys() != other.keys() or _numbers(mine) != _numbers(theirs):
        return float("inf")
    return _largest(_distance(wide(one[name]), wide(other[name])) for name in one)


def _numbers(modules: Sequence[Module]) -> set[tuple[str, float, str | None, float | None]]:
    """What multiplies the factors, or bounds them (OFT's alpha)."""
    return {(each.kind, each.scale, each.magnitude_axis, _constraint(each)) for each in modules}


def _constraint(module: Module) -> float | None:
    return module.alpha if not module.rank else None


def _factors(modules: Sequence[Module], of: int) -> dict[tuple[str, str, int], TensorRef]:
    """The factors by kind, role and share of the weight's rows; those that serve all rows alike are of every share."""
    found: dict[tuple[str, str, int], TensorRef] = {}
    for module in modules:
        held = units(module.target.rows, of)
        if module.magnitude is not None:
            for place, unit in enumerate(held):
                whole = module.magnitude_axis == "in" or module.magnitude.numel % len(held)
                flat = _flat(module.magnitude)
                own = flat if whole else taken(flat, 0, [place], len(held))
                found[module.kind, "magnitude", unit] = own
        axes = kinds.get(module.kind).row_axes(module.factors) or {}
        for role, ref in module.factors.items():
            axis = axes.get(role)
            parted = axis is not None and ref.shape[axis] % len(held) == 0
            for place, unit in enumerate(held):
                own = taken(ref, axis, [place], len(held)) if parted and axis is not None else ref
                found[module.kind, role, unit] = own
    return found
