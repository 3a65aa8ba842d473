"""What lies beside the modules of a conversion: tensors of none, metadata without a place, and what is to be said."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loratools import archs
from loratools.formats import Format, cloneofsimo
from loratools.model import Adapter, Layout
from loratools.ops import _fit
from loratools.tensors import TensorRef


def remarks(
    kept: Adapter, form: Format, dropped: Sequence[_fit.Misfit], drop: Iterable[str]
) -> Iterable[str]:
    """What somebody who uses the output should know of it, in sentences."""
    for name, modules in kept.components().items():
        if form.unread(kept.arch, name):
            yield (
                f"{form.title} reads no LoRA for the {name} of {archs.get(kept.arch).title}: "
                f"its {len(modules)} modules will have no effect there"
            )
    scales = {module.scale for module in kept.modules.values() if module.scale != 1.0}
    if form.name == "diffusers" and scales:
        shown = f"{min(scales):g}" if len(scales) == 1 else f"{min(scales):g} to {max(scales):g}"
        yield (
            f"scales ({shown}) are stated in the header alone, where diffusers reads them; for programs that do not, "
            "--fold puts them into the factors"
        )
    for tag in sorted(set(drop) - {misfit.tag for misfit in dropped}):
        yield f"--drop {tag}: there was nothing to drop, {form.title} holds all of that"


def untold(adapter: Adapter, goal: Layout) -> list[_fit.Misfit]:
    """The metadata of an input whose output has no header."""
    told = cloneofsimo.without_marks(adapter.metadata)
    told.pop("format", None)
    if goal.container != "pickle" or not told:
        return []
    return [_fit.Misfit("metadata", tuple(told), "a bare list has no header for metadata")]


def extras(adapter: Adapter, goal: Layout, form: Format) -> tuple[dict[str, TensorRef], list[_fit.Misfit]]:
    """The tensors of no module that the layout has a place for, and the others."""
    kept: dict[str, TensorRef] = {}
    strangers: list[_fit.Misfit] = []
    own = adapter.layout.name == goal.name
    for key, ref in adapter.extras.items():
        if own or form.adopt(ref, adapter) is not None:
            kept[key] = ref
        else:
            strangers.append(
                _fit.Misfit("extras", (key,), "it has no place for tensors that belong to no module")
            )
    return kept, strangers
