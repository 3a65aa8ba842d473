"""loralib and hand-written modules in its manner: bare ``lora_A`` and ``lora_B`` parameters without ``.weight``.

No file of this kind states alpha. Some store the factors transposed: lora_A (in, rank), lora_B (rank, out). In some,
one pair serves several parts of a fused weight, which are read as modules of their own (see ``_grouped``). A name is
the weight's path in the model, so that a file is of one component. Source: microsoft/LoRA ``loralib/layers.py``.
"""

from __future__ import annotations

from loratools import archs
from loratools.formats import _carried, _names, _plain
from loratools.formats._base import Document, Facts, Format, Group, Scale, cannot_hold
from loratools.model import Adapter, Layout, Module
from loratools.tensors import TensorRef


def _claims(facts: Facts) -> float:
    return 0.5 if facts.style == "loralib" else 0.0


def _flipped(facts: Facts) -> bool:
    """Whether only the transposed reading makes the ranks agree in every module."""
    pairs = [
        (group.roles["down"].shape, group.roles["up"].shape)
        for group in facts.groups.values()
        if {"up", "down"} <= group.roles.keys()
    ]
    plain = all(len(down) == len(up) == 2 and down[0] == up[1] for down, up in pairs)
    turned = all(len(down) == len(up) == 2 and down[1] == up[0] for down, up in pairs)
    return turned and not plain


def _variant(facts: Facts) -> str:
    if _flipped(facts):
        return "transposed"
    from loratools.formats import _grouped  # few files need it

    return "merged" if _grouped.is_grouped(facts) else ""


def _scaler(group: Group, component: str, rank: int, facts: Facts) -> Scale:  # noqa: ARG001
    return Scale(1.0, None, "the file states no alpha; a scale of 1 is assumed")


def _keyed(stem: str, up: TensorRef, down: TensorRef, layout: Layout) -> list[TensorRef]:
    if layout.variant == "transposed":
        up, down = up.flipped(), down.flipped()
    return [down.renamed(f"{stem}.lora_A"), up.renamed(f"{stem}.lora_B")]


def _speller(module: Module, adapter: Adapter, layout: Layout) -> list[TensorRef]:
    up, down = _plain.factors(module, layout)
    _refuse_second_component(module, adapter, layout)
    if module.target.rows is not None:
        # Its weight is written as a whole at the end, from all its parts.
        return []
    return _keyed(_names.body(adapter.arch, module.target, "native", ".", layout), up, down, layout)


def _finisher(adapter: Adapter, tensors: list[TensorRef], layout: Layout) -> Document:
    from loratools.formats import _grouped

    for path, modules in _grouped.by_weight(adapter.modules.values()).items():
        stacked = _grouped.stack(modules) if layout.variant != "transposed" else None
        if stacked is None:
            todo = "`loratools convert` fuses them into one module"
            raise cannot_hold(layout, f"these parts of {path}", [str(each.target) for each in modules], todo)
        tensors += _keyed(path, *stacked, layout)
    return Document(tuple(tensors), _carried.metadata(adapter))


def _refuse_second_component(module: Module, adapter: Adapter, layout: Layout) -> None:
    """Refuse a module that a reader would take for the first component's: names have no prefix."""
    own, table = module.target.component, archs.get(adapter.arch)
    only = table.components[0].name if table.has_table else _names.main_component(adapter)
    if own != only:
        what = f"a {own}, which only a prefix would tell from a {only}"
        raise cannot_hold(layout, what, [str(module.target)])


FORMAT = Format(
    name="loralib",
    title="loralib",
    claims=_claims,
    variant=_variant,
    scaler=_scaler,
    flipped=_flipped,
    speller=_speller,
    finisher=_finisher,
    roles=_plain.ROLES,
    dialect="native",
    alpha="none",
    parts=True,
    single=True,
)
