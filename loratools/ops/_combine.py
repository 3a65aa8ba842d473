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
from loratools.ops._request import Request
from loratools.ops.align import Contribution
from loratools.tensors import DTYPES, TensorRef, from_torch

# float16 loses digits below 6e-5; factors of a usual adapter are far larger.
_SMALL = 1e-3
# A relative error that is worth a sentence: float16's own is 5e-4.
_NOTABLE = 5e-3


@dataclass(frozen=True, slots=True, eq=False)
class Combined:
    """What became of one target.

    Attributes:
        module: The merged module; None where ``nonfinite`` says why not.
        sources: Positions of the inputs that contributed.
        energy: The fraction retained of Σσ² of the method's own full-rank result; None where a module was carried.
        size: ‖ΔW‖_F² of the method's result.
        nonfinite: Keys of factors that hold NaN or Inf, each with the position of its input.
        note: What the caller should know of this target, or empty.
        remark: What the caller should know of how it was computed, which may hold for many targets; or empty.
    """

    module: Module | None
    sources: tuple[int, ...]
    energy: float | None = None
    size: float = 0.0
    nonfinite: tuple[tuple[int, str], ...] = ()
    note: str = ""
    remark: str = ""


def combine(asked: Request, target: Target, contributions: Sequence[Contribution]) -> Combined:
    """Merge one target.

    Args:
        asked: What was asked for.
        target: The weight.
        contributions: The inputs' modules there, and those of the protected adapters, whose positions come after all
            of the inputs'.

    Raises:
        NonFiniteError: The result does not fit the store dtype.
        LoraError: The method refuses.
    """
    given = [each for each in contributions if each.source < len(asked.adapters)]
    styles = [
        each for each in contributions if each.source >= len(asked.adapters) and each.module.scale != 0.0
    ]
    sources = tuple(sorted({each.source for each in given}))
    active = [each for each in given if _weight(asked, each) != 0.0]
    if not active:
        return Combined(None, sources)
    factors, guarded = ([_factors(each, asked.device) for each in some] for some in (active, styles))
    bad = tuple(
        (each.source, name)
        for each, pair in zip([*active, *styles], [*factors, *guarded], strict=True)
        for name in _nonfinite(each.module, pair)
    )
    if bad and not asked.allow_nonfinite:
        return Combined(None, sources, nonfinite=bad)
    if len(active) == 1 and _carries(asked, active[0], styles):
        size = active[0].module.scale ** 2 * _energy_of(factors[0].to(COMPUTE))
        return Combined(_carried(active[0].module, asked, target), sources, size=size)
    if bad:
        # Nothing can be decomposed that holds NaN: side by side, the factors keep it where it was.
        weights = [_weight(asked, each) * each.module.scale for each in active]
        merged = _for_scale(asked, stack(factors, weights))
        steps = ", neither protected nor boosted" if styles or asked.steps.boost is not None else ""
        note = f"{target} holds NaN or Inf and was stacked{steps}"
        return Combined(_module(asked, target, active, merged), sources, note=note)
    parts = _parts(active, factors, [_weight(asked, each) for each in active])
    outcome = _merged(asked, target, parts, _parts(styles, guarded, [1.0] * len(styles)))
    size = outcome.square if outcome.square is not None else _energy_of(outcome.factors.to(COMPUTE))
    wide = outcome.factors.to(COMPUTE)
    merged = _for_scale(asked, wide if asked.steps.boost is None else boosted(wide, asked.steps.boost))
    module = _module(asked, target, active, merged)
    return Combined(
        module, sources, outcome.energy, size, note=underflow(module, merged), remark=outcome.note
    )


def _merged(
    asked: Request, target: Target, parts: Sequence[methods.Part], styles: Sequence[methods.Part]
) -> methods.Outcome:
    """What the method makes of the parts, which are kept off the main directions of the protected adapters."""
    guarded = [style.factors for style in styles]
    steps = asked.steps
    kept = [
        replace(part, factors=protected(part.factors, guarded, steps.energy, steps.strength))
        if guarded and part.source not in steps.exempt
        else part
        for part in parts
    ]
    return asked.method.combine(kept, replace(asked.options, key=str(target)))


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


def _weight(asked: Request, each: Contribution) -> float:
    return asked.weigh(each.source, each.module.target)


def _factors(each: Contribution, device: str) -> Factors:
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
    same = each.whole and _weight(asked, each) == 1.0 and each.module.factors.keys() <= _held(asked)
    return same and _is_identity(asked.method, asked.options) and asked.dtype is None


def _is_identity(method: methods.Method, options: methods.Options) -> bool:
    """Whether a method gives one change at weight 1 back: its laws say so of its options' defaults."""
    usual = all(getattr(options, option.field) == option.default for option in method.options)
    return method.lossless and "identity" in method.laws and usual


def _held(asked: Request) -> frozenset[str]:
    return formats.get(asked.layout.name).roles


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


def _scale(asked: Request, rank: int) -> float:
    return asked.alpha / rank if asked.alpha else 1.0


def _for_scale(asked: Request, factors: Factors) -> Factors:
    """The factors of the same ΔW for a module that is applied with this request's scale."""
    scale = _scale(asked, factors.rank)
    if scale == 1.0:
        return factors
    root = scale**-0.5
    return Factors(factors.up * root, factors.down * root)


def _module(asked: Request, target: Target, active: Sequence[Contribution], factors: Factors) -> Module:
    """Factors as a module in the store dtype; alpha is the rank, or what the file's modules have in common."""
    first = active[0].module
    dtype = asked.dtype or _store_dtype([each.module for each in active])
    shape = (factors.up.shape[0], *(first.shape or ())[1:])
    up, down = factors.up, factors.down
    if len(shape) > 2:
        up = up.reshape(*up.shape, *(1 for _ in shape[2:]))
        down = down.reshape(-1, *shape[1:])
    stored = {"up": _store(up, dtype, target, asked), "down": _store(down, dtype, target, asked)}
    for role in ("up_bias", "diff_b"):
        bias = _bias(asked, active, role)
        if bias is not None:
            stored[role] = _store(bias, dtype, target, asked)
    rank = factors.rank
    return Module(
        target=target,
        kind="lora",
        factors=stored,
        scale=_scale(asked, rank),
        alpha=asked.alpha or float(rank),
        rank=rank,
        shape=shape,
        op=first.op,
        in_first=first.in_first,
    )


def underflow(module: Module, factors: Factors) -> str:
    """What to say where the store dtype is too coarse for values this small; empty where it is not."""
    for role, wide in (("up", factors.up), ("down", factors.down)):
        ref = module.factors[role]
        largest = float(wide.abs().max())
        if ref.dtype != "F16" or not 0.0 < largest < _SMALL:
            continue
        lost = float((ref.load().flatten(1).to(wide) - wide).norm() / wide.norm())
        if lost > _NOTABLE:
            return (
                f"{module.target}: values no larger than {largest:.1g} lose {lost:.1%} to float16's rounding; "
                "choose --dtype float32 or bfloat16"
            )
    return ""


def _bias(asked: Request, active: Sequence[Contribution], role: str) -> torch.Tensor | None:
    """What the inputs add to the layer's bias: PEFT's lora_bias with the scale, a full difference without."""
    total: torch.Tensor | None = None
    for each in active:
        ref = each.module.factors.get(role)
        if ref is not None:
            scale = each.module.scale if role == "up_bias" else 1.0
            bias = each.place(ref.load().to(torch.float64)) * scale * _weight(asked, each)
            total = bias if total is None else total + bias
    return total


def _store_dtype(modules: Sequence[Module]) -> str:
    """The inputs' own dtype, or one that holds the values of all."""
    found = {module.factors[role].dtype for module in modules for role in ("up", "down")}
    if all(DTYPES[dtype].bits < 16 for dtype in found):
        return "F16"
    wide = {dtype for dtype in found if DTYPES[dtype].bits >= 16}
    if len(wide) == 1:
        return wide.pop()
    return "F64" if "F64" in wide else "F32"


def _store(tensor: torch.Tensor, dtype: str, target: Target, asked: Request) -> TensorRef:
    after = tensor.to("cpu", getattr(torch, DTYPES[dtype].torch)).contiguous()
    if not asked.allow_nonfinite and not torch.isfinite(after).all():
        raise NonFiniteError(
            f"{target}: merged values up to {tensor.abs().max().item():.3g} do not fit {dtype}",
            todo="Choose --dtype float32 or bfloat16",
        )
    return from_torch("", after)


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
            todo="Pass --allow-nonfinite to go on all the same",
        )
