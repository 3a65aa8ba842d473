"""A module's scale moved between the number that states it and the factors.

The power of two goes first, half of it into each factor, which rounds nothing short of the dtype's limits; what is
left, between 1/√2 and √2 in size and with the sign, goes into the left factor. Computed in float64, then rounded once
to the store dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from loratools import kinds
from loratools.errors import UnsupportedKindError
from loratools.model import Module
from loratools.ops import files
from loratools.tensors import DTYPES, TensorRef

# Dtypes with float32's range of exponents or more.
_WIDE = ("F64", "F32", "BF16")


def folded(module: Module, dtype: str = "") -> tuple[Module, bool]:
    """The module with a scale of 1, its factors making up for it.

    Args:
        module: Its kind multiplies factors.
        dtype: The store dtype of the factors that change, rounded to once; default: their own.

    Returns:
        The module, and whether values may have been rounded: not where the scale is a power of two.

    Raises:
        UnsupportedKindError: The kind has no pair of factors to fold a scale into.
    """
    if module.scale == 1.0:
        return module._replace(alpha=None, alpha_tensor=None), False
    scaled = _into(module, module.scale, dtype)
    rounded = not is_power_of_two(module.scale) or _is_narrow(module, dtype)
    return scaled._replace(scale=1.0, alpha=None, alpha_tensor=None), rounded


def alike(parts: Sequence[Module]) -> tuple[list[Module], bool]:
    """The modules with one scale and one dtype: those of the first that is not scaled by zero, and of the widest.

    Returns:
        The modules, and whether values may have been rounded.
    """
    dtype = widest(
        {ref.dtype for part in parts for ref in part.factors.values() if DTYPES[ref.dtype].floating}
    )
    scale = next((part.scale for part in parts if part.scale), parts[0].scale)
    found: list[Module] = []
    rounded = False
    for part in parts:
        one = part
        if part.scale != scale:
            one = _into(part, part.scale / scale, dtype)._replace(scale=scale, alpha=None, alpha_tensor=None)
            rounded = rounded or not is_power_of_two(part.scale / scale) or _is_narrow(part, dtype)
        factors = {role: files.cast(ref, dtype) for role, ref in one.factors.items()}
        found.append(one._replace(factors=factors))
    return found, rounded


def restated(module: Module, scale: float, dtype: str = "") -> tuple[Module, bool]:
    """The module with another scale, its factors making up for it.

    Args:
        module: Its kind multiplies factors.
        scale: What it is to have, not 0.
        dtype: The store dtype of the factors that change, rounded to once; default: their own.

    Returns:
        The module, and whether values may have been rounded: not where the ratio is a power of two.

    Raises:
        UnsupportedKindError: The kind has no pair of factors to fold a scale into.
    """
    if module.scale == scale:
        return module, False
    ratio = module.scale / scale
    found = _into(module, ratio, dtype)._replace(scale=scale, alpha=None, alpha_tensor=None)
    return found, not is_power_of_two(ratio) or _is_narrow(module, dtype)


def times(ref: TensorRef, factor: float, dtype: str = "") -> TensorRef:
    """A tensor multiplied in float64, and rounded once to a store dtype (default: its own)."""
    return files.cast(ref, dtype or ref.dtype, factor).renamed("")


def is_power_of_two(number: float) -> bool:
    """Whether multiplying by it rounds nothing: a power of two, of either sign, or zero."""
    return number == 0.0 or math.frexp(abs(number))[0] == 0.5


def _into(module: Module, scale: float, dtype: str = "") -> Module:
    """The module with a number multiplied into its first pair of factors, and into what its scale multiplies beside."""
    kind = kinds.get(module.kind)
    left = next((role for role in kind.linear if role in module.factors), None)
    if left is not None and not DTYPES[module.factors[left].dtype].floating:
        raise UnsupportedKindError(
            f"{module.target}: its factors are {module.factors[left].dtype}, which no scale can be folded into",
            keys=[ref.name for ref in module.factors.values()],
            todo="Choose a layout that states alpha",
        )
    if left is None:
        raise UnsupportedKindError(
            f"{module.target}: the scale of a {kind.title} module cannot be folded into its factors",
            keys=[ref.name for ref in module.factors.values()],
            todo="Turn it into LoRA with --as lora, or choose a layout that states alpha",
        )
    right = dict(kind.products).get(left)
    half = int(round(math.log2(abs(scale))) / 2) if scale and right else 0
    factors = dict(module.factors)
    factors[left] = times(factors[left], scale / 2.0**half, dtype)
    if half and right:
        factors[right] = times(factors[right], 2.0**half, dtype)
    if "up_bias" in factors:
        factors["up_bias"] = times(factors["up_bias"], scale, dtype)
    return module._replace(factors=factors)


def _is_narrow(module: Module, dtype: str) -> bool:
    """Whether small values lose digits in the store dtype even by a power of two: float16's range ends at 6e-5."""
    return any((dtype or ref.dtype) not in _WIDE for ref in module.factors.values())


def widest(dtypes: set[str]) -> str:
    """The dtype that holds the values of all: float32 for float16 and bfloat16 together."""
    found = max(dtypes, key=lambda dtype: DTYPES[dtype].bits)
    several = len([dtype for dtype in dtypes if DTYPES[dtype].bits == DTYPES[found].bits]) > 1
    return "F32" if several and DTYPES[found].bits < 32 else found
