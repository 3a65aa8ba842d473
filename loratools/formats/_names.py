"""What several layouts spell alike: targets by their architecture's tables, PEFT's magnitude vectors."""

from __future__ import annotations

from loratools import archs
from loratools.formats._base import cannot_hold
from loratools.model import Layout, Module, Target
from loratools.tensors import TensorRef


def component(arch: str, name: str) -> archs.Component | None:
    """The component's row in the architecture's table, or None where it has none."""
    table = archs.all_archs().get(arch)
    return next((row for row in table.components if row.name == name), None) if table is not None else None


def body(arch: str, target: Target, dialect: str, separator: str, layout: Layout) -> str:
    """A target's name without prefix or suffix.

    Args:
        arch: The architecture's name, or "unknown".
        target: The weight.
        dialect: "native" or "diffusers".
        separator: "." or "_".
        layout: For the message.

    Raises:
        LayoutError: It is part of a fused weight that the dialect does not spell in such parts.
    """
    if component(arch, target.component) is not None:
        spelt = archs.get(arch).spell(target.component, target.path, target.rows, dialect, separator)
        if spelt is not None:
            return spelt
        if archs.get(arch).pieces(target.component, target.path, dialect):
            raise cannot_hold(
                layout,
                "a fused weight that it spells in parts (or the other way round)",
                [str(target)],
                "Merging regroups them: `loratools merge FILE --to LAYOUT`",
            )
    if target.rows is not None:
        raise cannot_hold(layout, "part of a fused weight", [str(target)])
    if separator == "." and _is_flattened(target.path):
        raise cannot_hold(
            layout,
            "names whose dots a flattened layout has replaced, as long as the architecture is unknown",
            [target.path],
            "Say which it is with --arch",
        )
    return target.path.replace(".", "_") if separator == "_" else target.path


def _is_flattened(path: str) -> bool:
    return "." not in path and any(part.isdigit() for part in path.split("_"))


def peft_magnitude(magnitude: TensorRef, module: Module, layout: Layout) -> TensorRef:
    """A DoRA's vector as PEFT stores it: (out,), for convolutions (1, out, 1, …).

    Raises:
        LayoutError: It runs along the inputs, for which PEFT has no place.
    """
    if module.magnitude_axis == "in":
        raise cannot_hold(layout, "a DoRA magnitude per input", [str(module.target)], "Keep Kohya's layout")
    axes = len(module.shape or ())
    return magnitude.reshaped((1, magnitude.numel, *(1,) * (axes - 2)) if axes > 2 else (magnitude.numel,))
