"""One target of a merge: its contributions as factors, the method applied, the result as a module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from loratools import formats, methods
from loratools.errors import NonFiniteError
from loratools.kinds import lora
from loratools.maths.boost import boosted
from loratools.maths.lowrank import COMPUTE, Factors, stack
from loratools.maths.protect import protected
from loratools.model import Module, Target
from loratools.ops._combine_store import for_scale, module_of, underflow, weight_of
from loratools.ops._request import Request
from loratools.ops.align import Contribution
from loratools.tensors import TensorRef, from_torch


@dataclass(frozen=True, slots=True, eq=False)
class Combined:
    """What became of one target.

    Attributes:
        module: The merged module; None where ``nonfinite`` says why not, or it is to be carried.
        sources: Positions of the inputs that contributed.
        energy: The fraction retained of Σσ² of the method's own full-rank result; None where a module was carried.
        size: ‖ΔW‖_F² of the method's result.
        nonfinite: Keys of factors that hold NaN or Inf, each with the position of its input.
        note: What the caller should know of this target, or empty.
        remark: What the caller should know of how it was computed, which may hold for many targets; or empty.
        carried: Whether the one module that contributes goes over as it is; ``completed`` puts it in.
    """

    module: Module | None
    sources: tuple[int, ...]
    energy: float | None = None
    size: float = 0.0
    nonfinite: tuple[tuple[int, str], ...] = ()
    note: str = ""
    remark: str = ""
    carried: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Begun:
    """One target to merge, nothing of it read yet.

    Attributes:
        target: The weight.
        sources: Positions of the inputs that contribute.
        active: Contributions of weight other than 0.
        styles: Those of the protected adapters.
    """

    target: Target
    sources: tuple[int, ...]
    active: tuple[Contribution, ...]
    styles: tuple[Contribution, ...]

    @property
    def needed(self) -> tuple[Contribution, ...]:
        """The contributions whose factors are needed."""
        return (*self.active, *self.styles) if self.active else ()


@dataclass(frozen=True, slots=True, eq=False)
class Ready:
    """One target that a method is to be applied to.

    Attributes:
        begun: The target.
        parts: The method's input, kept off the main directions of the protected adapters.
    """

    begun: Begun
    parts: tuple[methods.Part, ...]


def combine(asked: Request, target: Target, contributions: Sequence[Contribution]) -> Combined:
    """Merge one target.

    Args:
        asked: What was asked for.
        target: The weight.
        contributions: The inputs' modules there, and those of the protected adapters, whose positions come after all
            of the inputs'.

    Returns:
        The result; of a module that is carried, without it.

    Raises:
        NonFiniteError: The result does not fit the store dtype.
        LoraError: The method refuses.
    """
    begun = begin(asked, target, contributions)
    ready = prepared(asked, begun, [factors_of(each, asked.device) for each in begun.needed])
    if isinstance(ready, Combined):
        return ready
    return finished(asked, ready, settled(asked, applied(asked, ready)))


def begin(asked: Request, target: Target, contributions: Sequence[Contribution]) -> Begun:
    """What merging a target takes; see ``combine``."""
    given = [each for each in contributions if each.source < len(asked.adapters)]
    styles = [
        each for each in contributions if each.source >= len(asked.adapters) and each.module.scale != 0.0
    ]
    sources = tuple(sorted({each.source for each in given}))
    active = [each for each in given if weight_of(asked, each) != 0.0]
    return Begun(target, sources, tuple(active), tuple(styles))


def prepared(asked: Request, begun: Begun, factors: Sequence[Factors]) -> Combined | Ready:
    """The input of the method, or the result where it needs none.

    Args:
        asked: What was asked for.
        begun: The target.
        factors: Of every contribution that is needed, in that order.
    """
    target, sources, active, styles = begun.target, begun.sources, begun.active, begun.styles
    if not active:
        return Combined(None, sources)
    bad = tuple(
        (each.source, name)
        for each, pair in zip(begun.needed, factors, strict=True)
        for name in _nonfinite(each.module, pair)
    )
    if bad and not asked.allow_nonfinite:
        return Combined(None, sources, nonfinite=bad)
    own, guarded = factors[: len(active)], factors[len(active) :]
    if len(active) == 1 and _carries(asked, active[0], styles):
        size = active[0].module.scale ** 2 * _energy_of(own[0].to(COMPUTE))
        return Combined(None, sources, size=size, carried=True)
    if bad:
        # Nothing can be decomposed that holds NaN: side by side, the factors keep it where it was.
        weights = [weight_of(asked, each) * each.module.scale for each in active]
        merged = for_scale(asked, stack(own, weights))
        steps = ", neither protected nor boosted" if styles or asked.steps.boost is not None else ""
        note = f"{target} holds NaN or Inf and was stacked{steps}"
        return Combined(module_of(asked, target, active, merged), sources, note=note)
    parts = _parts(active, own, [weight_of(asked, each) for each in active])
    return Ready(begun, tuple(_kept_off(asked, parts, _parts(styles, guarded, [1.0] * len(styles)))))


def applied(asked: Request, ready: Ready) -> methods.Outcome:
    """What the method makes of a target."""
    return asked.method.combine(ready.parts, replace(asked.options, key=str(ready.begun.target)))


def settled(asked: Request, outcome: methods.Outcome) -> methods.Outcome:
    """The outcome in float64, after the steps that follow a method, at the scale of a module; its size is known."""
    size = outcome.square if outcome.square is not None else _energy_of(outcome.factors.to(COMPUTE))
    wide = outcome.factors.to(COMPUTE)
    merged = for_scale(asked, wide if asked.steps.boost is None else boosted(wide, asked.steps.boost))
    return replace(outcome, factors=merged, square=size)


def finished(asked: Request, ready: Ready, outcome: methods.Outcome) -> Combined:
    """The merged module.

    Args:
        asked: What was asked for.
        ready: The target.
        outcome: From ``settled``, on any device.

    Raises:
        NonFiniteError: The result does not fit the store dtype.
    """
    begun = ready.begun
    module = module_of(asked, begun.target, begun.active, outcome.factors)
    return Combined(
        module,
        begun.sources,
        outcome.energy,
        outcome.square or 0.0,
        note=underflow(module, outcome.factors),
        remark=outcome.note,
    )


def _kept_off(
    asked: Request, parts: Sequence[methods.Part], styles: Sequence[methods.Part]
) -> list[methods.Part]:
    """The parts, off the main directions of the protected adapters."""
    guarded = [style.factors for style in styles]
    steps = asked.steps
    return [
        replace(part, factors=protected(part.factors, guarded, steps.energy, steps.strength))
        if guarded and part.source not in steps.exempt
        else part
        for part in parts
    ]


def _parts(
    contributions: Sequence[Contribution], factors: Sequence[Factors], weights: Sequence[float]
) -> list[methods.Part]:
    """One part for each adapter: the pieces of a weight that it has split are one change, not several."""
    pieces: dict[int, list[tuple[Contribution, Factors, float]]] = {}
    for each, pair, weight in zip(contributions, factors, weights, strict=True):
        pieces.setdefault(each.source, []).append((each, pair, weight))
    parts = []
    for source, found in pieces.items():
        # All pieces are of one path, and so of one weight.
        weight = found[0][2]
        if len(found) == 1:
            parts.append(methods.Part(found[0][1], weight, found[0][0].module.scale, source))
        else:
            whole = stack([pair for _, pair, _ in found], [each.module.scale for each, _, _ in found])
            parts.append(methods.Part(whole, weight, 1.0, source))
    return parts


def factors_of(each: Contribution, device: str) -> Factors:
    """The contribution's factors where the target has its rows, in their own dtype; the scale is not in them."""
    up, down = lora.matrices(each.module, wide=False)
    return Factors(each.place(up).to(device), down.to(device))


def _nonfinite(module: Module, factors: Factors) -> list[str]:
    # A sum is NaN or Inf if any term is; only then is each tensor looked at.
    sums = factors.up.sum(dtype=COMPUTE) + factors.down.sum(dtype=COMPUTE)
    biased = "up_bias" in module.factors or "diff_b" in module.factors
    found = [] if math.isfinite(module.scale) else [f"the scale of {module.target}"]
    if not bool(torch.isfinite(sums)) or biased:
        refs = module.factors.values()
        found += [ref.name for ref in refs if not torch.isfinite(ref.load().float()).all()]
    return found


def _carries(asked: Request, each: Contribution, styles: Sequence[Contribution]) -> bool:
    """Whether a module goes over as it is: alone, whole, at weight 1, and nothing asks for a change."""
    if asked.steps.boost is not None or (styles and each.source not in asked.steps.exempt):
        return False
    same = each.whole and weight_of(asked, each) == 1.0 and each.module.factors.keys() <= _held(asked)
    return same and _is_identity(asked.method, asked.options) and asked.dtype is None


def _is_identity(method: methods.Method, options: methods.Options) -> bool:
    """Whether a method gives one change at weight 1 back: its laws say so of its options' defaults."""
    usual = all(getattr(options, option.field) == option.default for option in method.options)
    return method.lossless and "identity" in method.laws and usual


def _held(asked: Request) -> frozenset[str]:
    return formats.get(asked.layout.name).roles


def completed(
    asked: Request, target: Target, contributions: Sequence[Contribution], result: Combined
) -> Combined:
    """A result with the module that it carries, where it is no new one; whoever merged it may be elsewhere.

    Args:
        asked: What was asked for, with its inputs.
        target: The weight.
        contributions: As for ``combine``.
        result: From ``combine``.
    """
    if not result.carried:
        return result
    (active,) = begin(asked, target, contributions).active
    return replace(result, module=_carried(active.module, asked, target), carried=False)


def _carried(module: Module, asked: Request, target: Target) -> Module:
    """A module that goes over as it is; keys of another layout are forgotten."""
    owner = next(adapter for adapter in asked.adapters if adapter.modules.get(target) is module)
    if owner.layout[:2] == asked.layout[:2]:
        return module
    factors = {role: _settled(ref).renamed("") for role, ref in module.factors.items()}
    return module._replace(factors=factors, alpha_tensor=None)


def _settled(ref: TensorRef) -> TensorRef:
    """A tensor that lies as its shape says."""
    return from_torch(ref.name, ref.load().contiguous()) if ref.transposed else ref


def _energy_of(factors: Factors) -> float:
    gram = (factors.up.T @ factors.up) * (factors.down @ factors.down.T)
    return max(0.0, float(gram.sum()))


def refuse_nonfinite(results: Sequence[Combined], paths: Sequence[str]) -> None:
    """Name every factor that holds NaN or Inf.

    Raises:
        NonFiniteError: There is one.
    """
    bad = [each for result in results for each in result.nonfinite]
    if bad:
        files = {source for source, _ in bad}
        count = f"{len(bad)} tensors" if len(bad) > 1 else "a tensor"
        raise NonFiniteError(
            f"{count} with NaN or Inf" + (f" in {len(files)} inputs" if len(files) > 1 else ""),
            path=paths[bad[0][0]] or None,
            keys=[key for _, key in bad],
            expected="Finite factors and scales were expected",
            todo="Pass --allow-nonfinite to go on all the same",
        )
