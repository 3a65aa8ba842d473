"""One module's tensors under their keys: factors by a table of suffixes, alpha, and DoRA's magnitude."""

from __future__ import annotations

from collections.abc import Container, Mapping

from loratools.errors import LayoutError
from loratools.formats import _suffixes
from loratools.formats._base import Speller, cannot_hold
from loratools.formats._names import Naming
from loratools.model import Adapter, Layout, Module
from loratools.tensors import TensorRef, from_scalar

# What Kohya's layout and its relatives have names for.
FLATTENED: Mapping[str, str] = {**_suffixes.KOHYA, **_suffixes.LYCORIS}
# The same and what lies beside the factors, but for a trained multiplier: that is part of the scale already, and what
# is computed states it there. It is named only where a module is written as it was read.
ROLES = frozenset((*FLATTENED, "alpha", "magnitude", "magnitude_in")) - {"scalar"}


def flattened(naming: Naming, suffixes: Mapping[str, str] = FLATTENED) -> Speller:
    """A speller for Kohya's suffixes and LyCORIS' under a layout's names."""

    def speller(module: Module, adapter: Adapter, layout: Layout) -> list[TensorRef]:
        return lycoris(naming.stem(module, adapter, layout), module, suffixes, layout)

    return speller


def lycoris(stem: str, module: Module, suffixes: Mapping[str, str], layout: Layout) -> list[TensorRef]:
    """A module with its alpha and its ``dora_scale``.

    Args:
        stem: Its name.
        module: Of any kind that LyCORIS has.
        suffixes: By role.
        layout: For messages.

    Raises:
        LayoutError: A role without a suffix, a kind that only looks like one of LyCORIS', a scale without a place.
    """
    if module.op == "embedding":
        raise cannot_hold(layout, "an embedding's factors", _keys(module))
    refuse_kind(module, _suffixes.LYCORIS_KINDS, layout)
    stated = alpha(stem, module, layout)
    tensors = [] if stated is None else [stated]
    tensors += factors(stem, module, suffixes, layout)
    if module.magnitude is not None:
        tensors.append(_dora_scale(module.magnitude, module).renamed(f"{stem}.dora_scale"))
    return tensors


def refuse_kind(module: Module, known: Container[str], layout: Layout) -> None:
    """Refuse a module of a kind whose roles another one has too, or that the layout's readers do not know.

    Raises:
        LayoutError: It is not among the ``known`` kinds.
    """
    if module.kind not in known:
        raise cannot_hold(layout, f"modules of kind {module.kind}", _keys(module))


def _keys(module: Module) -> list[str]:
    return [ref.name or role for role, ref in module.factors.items()]


def factors(stem: str, module: Module, suffixes: Mapping[str, str], layout: Layout) -> list[TensorRef]:
    """The factors under their keys.

    Raises:
        LayoutError: Some of them have no suffix.
    """
    unknown = [ref.name or role for role, ref in module.factors.items() if role not in suffixes]
    if unknown:
        raise cannot_hold(layout, f"all tensors of modules of kind {module.kind}", unknown)
    # Built rather than replaced: this is done for every tensor of a file.
    return [
        TensorRef(f"{stem}.{suffixes[role]}", ref.shape, ref.dtype, ref.source, ref.transposed)
        for role, ref in module.factors.items()
    ]


def alpha(stem: str, module: Module, layout: Layout) -> TensorRef | None:
    """The tensor that states a module's scale: its own where that is true, else a new one; None for kinds without.

    Where the kind has no rank, and in a LoKr with both factors whole, no reader makes a scale of alpha; it is
    OFT's constraint, or a remnant, and stays as it is.

    Raises:
        LayoutError: A scale that no alpha can state.
    """
    own, rank = module.alpha_tensor, module.rank
    if not rank:
        if module.scale != 1.0:
            raise no_place_for_scale(module, layout)
        return own.renamed(f"{stem}.alpha") if own is not None else None
    # A trained multiplier that lies beside the factors is part of the scale already.
    further = module.factors["scalar"].scalar() if "scalar" in module.factors else 1.0
    if own is not None and further * own.scalar() / rank == module.scale:
        return TensorRef(f"{stem}.alpha", own.shape, own.dtype, own.source)
    return _new_alpha(f"{stem}.alpha", module, module.scale * rank / (further or 1.0))


def _new_alpha(name: str, module: Module, value: float) -> TensorRef:
    dtype = next(iter(module.factors.values())).dtype
    # An alpha that the factors' dtype would round is kept in float32.
    if dtype == "F16":
        stored = from_scalar(name, value, dtype) if abs(value) < _F16_LIMIT else None
        if stored is not None and stored.scalar() == value:
            return stored
    return from_scalar(name, value, "F64" if dtype == "F64" else "F32")


# Half precision ends a little above; packing a larger number is an error.
_F16_LIMIT = 65504.0


def no_place_for_scale(module: Module, layout: Layout) -> LayoutError:
    """The error for a scale that a layout, or the kind, has no place for."""
    return cannot_hold(
        layout,
        f"a scale of {module.scale:g} on a {module.kind} module",
        [str(module.target)],
        "`loratools convert` folds it into the factors",
    )


def _dora_scale(magnitude: TensorRef, module: Module) -> TensorRef:
    """A DoRA's vector as (out, 1[, 1, 1]) or (1, in[, 1, 1]): readers tell the axis by the shape."""
    place = 1 if module.magnitude_axis == "in" else 0
    if len(magnitude.shape) > 1 and magnitude.shape[place] == magnitude.numel:
        return magnitude
    ones = (1,) * (max(len(module.shape or ()), 2) - 1)
    return magnitude.reshaped((1, magnitude.numel, *ones[1:]) if place else (magnitude.numel, *ones))
