"""What layouts make names of: prefix, dialect and separator, by their architecture's tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from loratools import archs
from loratools.archs import component as component
from loratools.formats._base import cannot_hold
from loratools.model import EMPTY, Adapter, Layout, Module, Target
from loratools.tensors import TensorRef

# How Kohya's layout and its relatives begin a text encoder's names. Whether a model has one or several, only its
# architecture or its own keys tell.
TEXT_ENCODERS = (
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te3_", "text_encoder_3"),
    ("lora_te4_", "text_encoder_4"),
    ("lora_te_", "text_encoder"),
)


class Naming(NamedTuple):
    """How a layout names modules.

    Attributes:
        layout: Whose prefixes and dialects the architecture's components state.
        dialect: The usual one: "native", "diffusers", or "kohya" for what Kohya files use.
        separator: "." or "_".
        usual: Prefixes by component, for architectures that nobody has described.
        seen: Prefixes and their components, which such a module keeps where its own keys have one.
        stand_in: Another layout, whose prefix is written where a component states none for this one.
        default: The prefix of components that nobody has described and that are not among the usual ones.
        todo: What to do about a component that it has no prefix for, beside writing it in another layout.
    """

    layout: str
    dialect: str
    separator: str
    usual: Mapping[str, str] = EMPTY
    seen: tuple[tuple[str, str], ...] = ()
    stand_in: str = ""
    default: str = ""
    todo: str = ""

    def stem(self, module: Module, adapter: Adapter, layout: Layout) -> str:
        """A module's name without a suffix.

        Raises:
            LayoutError: The layout has no name for it.
        """
        return self.prefix(module, adapter, layout) + self.body(module, adapter, layout)

    def prefix(self, module: Module, adapter: Adapter, layout: Layout) -> str:
        """What stands before the path.

        Raises:
            LayoutError: The layout has no prefix for the component.
        """
        target = module.target
        found = self.stated(adapter.arch, target.component)
        row = component(adapter.arch, target.component)
        if found is None and (row is None or row.table is None):
            found = self._kept(module) or self._of_all(target, adapter, layout)
            if found is None:
                # An empty prefix is one, too: paths of nobody's model stand for themselves.
                found = self.usual.get(target.component, self.default or None)
        if found is None:
            raise cannot_hold(layout, _owner(adapter.arch, target.component), [str(target)], self.todo)
        return found

    def stated(self, arch: str, owner: str) -> str | None:
        """The prefix that an architecture's component states; None where it states none, or nobody described it."""
        layouts = (self.layout, self.stand_in) if self.stand_in else (self.layout,)
        row = component(arch, owner)
        return next((found for layout in layouts if row is not None and (found := row.prefix(layout))), None)

    def _of_all(self, target: Target, adapter: Adapter, layout: Layout) -> str | None:
        """The prefix of a text encoder that several architectures have alike; None for anything else.

        Raises:
            LayoutError: They state different ones, and nothing tells which of them it is.
        """
        if adapter.arch != "unknown" or not target.component.startswith("text_encoder"):
            return None
        # One module of each component stands for its others: this is asked for each module of a file.
        members = {each.component: each for each in adapter.modules}
        stated = {
            arch: prefix
            for arch in archs.all_archs()
            if (prefix := self.stated(arch, target.component)) is not None
            and all(self._explains(arch, each) for each in members.values())
        }
        if len(set(stated.values())) > 1:
            what = f"a {target.component} of an unknown architecture, on which its name depends"
            todo = f"Give the architecture that it was made for: --arch {'|'.join(stated)}"
            raise cannot_hold(layout, what, [str(target)], todo)
        return next(iter(stated.values()), None)

    def _explains(self, arch: str, target: Target) -> bool:
        """Whether an architecture has a weight of this name."""
        prefix = self.stated(arch, target.component)
        path = target.path.replace(".", "_") if self.separator == "_" else target.path
        return prefix is not None and archs.get(arch).resolve(prefix + path) is not None

    def _kept(self, module: Module) -> str | None:
        key = next((ref.name for ref in module.factors.values() if ref.name), "")
        owner = module.target.component
        return next((prefix for prefix, each in self.seen if each == owner and key.startswith(prefix)), None)

    def body(self, module: Module, adapter: Adapter, layout: Layout) -> str:
        """The path as this layout spells it.

        Raises:
            LayoutError: It is part of a fused weight that the layout does not spell in such parts.
        """
        row = component(adapter.arch, module.target.component)
        dialect = row.dialect(self.layout, self.dialect) if row is not None else self.dialect
        return body(adapter.arch, module.target, dialect, self.separator, layout)


def main_component(adapter: Adapter) -> str:
    """The component of a file whose names cannot tell several apart: the architecture's first, where it is there."""
    first = archs.get(adapter.arch).components[0].name
    there = any(target.component == first for target in adapter.modules)
    return first if there else next(iter(adapter.modules)).component


def _owner(arch: str, name: str) -> str:
    row = component(arch, name)
    described = row is not None and row.table is not None
    return f"the {name} of {archs.get(arch).title}" if described else f"a {name}"


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
        if archs.get(arch).has_table and archs.get(arch).pieces(target.component, target.path, "native"):
            if not archs.get(arch).pieces(target.component, target.path, dialect):
                raise cannot_hold(layout, "a weight that it has no name for", [str(target)])
            raise cannot_hold(
                layout,
                "a fused weight that it spells in parts (or the other way round)",
                [str(target)],
                "Converting regroups them: `loratools convert FILE --to LAYOUT`",
            )
    if target.rows is not None:
        raise cannot_hold(layout, "part of a fused weight", [str(target)])
    if separator == "." and _is_flattened(target.path):
        raise cannot_hold(
            layout,
            "names whose dots a flattened layout has replaced, as long as the architecture is unknown",
            [target.path],
            "Give the model that it was made for with --base, or its architecture with --arch",
        )
    return target.path.replace(".", "_") if separator == "_" else target.path


def _is_flattened(path: str) -> bool:
    return "." not in path and any(part.isdigit() for part in path.split("_"))


def mixed(modules: Iterable[Module]) -> frozenset[str]:
    """The components that have both DoRA and modules without a magnitude."""
    seen = {(module.target.component, module.magnitude is None) for module in modules}
    return frozenset([component for component, bare in seen if bare and (component, False) in seen])


def refuse_mixture(adapter: Adapter, layout: Layout) -> None:
    """Refuse DoRA beside plain LoRA in one model: PEFT makes all of them DoRA, with the base weight's norm.

    Raises:
        LayoutError: Some module of a component has a magnitude, and another has none.
    """
    both = mixed(adapter.modules.values())
    keys = [
        str(module.target)
        for module in adapter.modules.values()
        if module.magnitude is not None and module.target.component in both
    ]
    if keys:
        what = f"both DoRA and plain LoRA in one {min(both)}, which has one configuration"
        raise cannot_hold(
            layout, what, keys, "Leave the magnitudes out with --drop magnitude, or choose another --to"
        )


def peft_magnitude(magnitude: TensorRef, module: Module, layout: Layout) -> TensorRef:
    """A DoRA's vector as PEFT stores it: (out,), for convolutions (1, out, 1, …).

    Raises:
        LayoutError: It runs along the inputs, for which PEFT has no place.
    """
    if module.magnitude_axis == "in":
        raise cannot_hold(layout, "a DoRA magnitude per input", [str(module.target)])
    axes = len(module.shape or ())
    return magnitude.reshaped((1, magnitude.numel, *(1,) * (axes - 2)) if axes > 2 else (magnitude.numel,))
