"""An open file into the common model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loratools import kinds
from loratools.archs import _experts
from loratools.errors import IncompleteModuleError, NotAnAdapterError
from loratools.formats import _classify, _own_names, _peft_checks, _peft_shared, _peft_special, _scaling
from loratools.formats._base import Facts, Format, Group
from loratools.formats._claimed import Claimed
from loratools.formats._group import group, magnitude_axis
from loratools.formats._resolve import resolve
from loratools.kinds import lora
from loratools.model import EMPTY, Adapter, Layout, Module, Rows, Target
from loratools.registry import scan
from loratools.tensors import TensorRef

if TYPE_CHECKING:
    from loratools.formats._positions import Placed

# Roles that stand beside a kind's factors.
_BESIDE = ("alpha", "magnitude")
_FACTORLESS = {"alpha", "magnitude", "scalar"}
# Components whose weights are never stored as (in, out), whatever a configuration says.
_IMAGE = ("denoiser", "text_encoder", "text_encoder_2")


def read(
    tensors: Mapping[str, TensorRef],
    *,
    metadata: Mapping[str, str] = EMPTY,
    config: Mapping[str, Any] = EMPTY,
    container: str = "safetensors",
    sequence: bool = False,
    arch: str | None = None,
    path: str = "",
    embedded: bool = False,
) -> Adapter:
    """Name every tensor of a file.

    Args:
        tensors: By key, in the file's order.
        metadata: The header's string metadata.
        config: The configuration beside the file, or empty.
        container: "safetensors", "pickle" or "npz".
        sequence: Whether a pickle held a bare list of tensors.
        arch: The architecture, overriding detection.
        path: For messages.
        embedded: Whether to read the LoRA that an IP-Adapter may hold beside its projections, too.

    Returns:
        The adapter; its ``type`` says what the file is instead where it is none, and then it has no modules but
        the ``embedded`` ones.

    Raises:
        LoraError: A module is incomplete, its shapes disagree, or two keys name one weight.
    """
    if sequence:
        from loratools.formats import _positions

        tensors = _positions.listed(tensors)
    groups, extras = group(tensors, path)
    _own_names.translate(groups, container, metadata)
    facts = Facts(
        groups,
        tuple(tensors),
        metadata=metadata,
        config=config,
        container=container,
        sequence=sequence,
        path=path,
    )
    kind = _classify.classify(facts, extras)
    if kind == "adapter":
        _peft_checks.refuse_malformed(config, path)
        return _Reader(facts, extras, arch, path).adapter()
    placed = _inside(facts) if kind == "ip-adapter" else None
    if placed is not None and embedded:
        return _embedded(facts, extras, placed, path)
    return _other(facts, tensors, kind, placed)


def _other(facts: Facts, tensors: Mapping[str, TensorRef], kind: str, placed: Placed | None) -> Adapter:
    """A file that is no adapter: all its tensors are extras."""
    notes = _classify.notes(facts, kind)
    if placed is not None:
        notes = (
            *notes,
            f"it holds {len(placed.resolved)} LoRA modules for {placed.arch}; "
            "`loratools convert FILE --to LAYOUT --drop extras` takes them out",
        )
    name = "peft" if "peft_type" in facts.config else _classify.LAYOUTS.get(kind, "unknown")
    return Adapter(
        modules={},
        extras=dict(tensors),
        metadata=facts.metadata,
        layout=Layout(name, "", facts.container),
        config=facts.config,
        path=facts.path,
        notes=notes,
        type=kind,
        order=facts.keys,
    )


def _inside(facts: Facts) -> Placed | None:
    """The LoRA that an IP-Adapter holds beside its projections; None where there is none."""
    from loratools.formats import _positions

    return _positions.ip_adapter(facts.groups)


def _embedded(facts: Facts, extras: dict[str, TensorRef], placed: Placed, path: str) -> Adapter:
    """An IP-Adapter with the LoRA in it as modules; all its other tensors are extras."""
    chosen = {stem: found for stem, found in facts.groups.items() if found.name in placed.resolved}
    rest = [ref for stem, found in facts.groups.items() if stem not in chosen for ref in found.roles.values()]
    inner = Facts(chosen, facts.keys, metadata=facts.metadata, container=facts.container, path=path)
    reader = _Reader(inner, extras | {ref.name: ref for ref in rest}, None, path, placed)
    layout = Layout("ip-adapter", "", facts.container)
    # Its layout has no writer, so that its keys' order says nothing.
    return replace(reader.adapter(), type="ip-adapter", layout=layout, order=())


class _Reader:
    """One pass over a file that is known to be an adapter."""

    def __init__(
        self,
        facts: Facts,
        extras: dict[str, TensorRef],
        arch: str | None,
        path: str,
        placed: Placed | None = None,
    ) -> None:
        self.extras = extras
        self.path = path
        self.notes: list[str] = []
        self.scales: list[str] = []
        self.facts = facts
        self.resolved, notes = resolve(facts, arch, path, placed)
        self.notes.extend(notes)
        self.format = self._format()
        self.flipped = self.format.flipped(self.facts)
        self.in_first = bool(facts.config.get("fan_in_fan_out"))
        self.variant = _peft_shared.variant(facts)
        named = [str(name) for name in facts.config.get("target_parameters") or ()]
        self.packed = {owner for name in named if (owner := name.rpartition(".")[0])}
        # A bare name is that of any module's parameter, of which those of experts have a place for more than one.
        self.bare_parameters = any("." not in name for name in named)

    def adapter(self) -> Adapter:
        """All groups as modules."""
        modules: dict[Target, Module] = {}
        claimed = Claimed(self.path)
        layout = Layout(self.format.name, self.format.variant(self.facts), self.facts.container)
        grouped = (layout.name, layout.variant) == ("loralib", "merged")
        for stem, found in self.facts.groups.items():
            if len(found.roles) < 3 and found.roles.keys() <= _FACTORLESS:
                self._orphan(found)
                continue
            for part, rows in self._parts(found) if grouped else ((found, None),):
                module = self._module(part, rows)
                claimed.add(module.target, stem)
                modules[module.target] = module
        claimed.refuse_overlaps()
        self._say(modules, grouped)
        facts = self.facts
        return Adapter(
            modules,
            self.extras,
            facts.metadata,
            facts.arch,
            layout,
            facts.config,
            self.path,
            tuple(self.notes),
            "ia3" if {module.kind for module in modules.values()} == {"ia3"} else "adapter",
            # Parts of one tensor have no keys of their own: the layout names them anew.
            () if grouped else facts.keys,
            facts.candidates,
        )

    def _say(self, modules: Mapping[Target, Module], grouped: bool) -> None:
        """Notes on what was assumed, and on what cannot be used."""
        self.notes.extend(_scaling.summary(self.scales))
        self.notes.extend(_peft_shared.notes(self.facts))
        self.notes.extend(_peft_special.notes(self.facts.config))
        self.notes.extend(_peft_checks.notes(self.facts, modules.values()))
        if grouped:
            from loratools.formats import _grouped

            self.notes.extend(_grouped.notes(self.facts))
        self.notes.extend(_scaling.nonfinite_notes(modules.values()))

    def _parts(self, found: Group) -> Sequence[tuple[Group, Rows | None]]:
        from loratools.formats import _grouped

        return _grouped.parts(found, self.path)

    def _format(self) -> Format:
        formats: Mapping[str, Format] = scan("loratools.formats", "FORMAT")
        claims = {name: found.claims(self.facts) for name, found in formats.items()}
        best = max(claims, key=lambda name: claims[name])
        return formats[best] if claims[best] > 0 else _UNKNOWN

    def _orphan(self, found: Group) -> None:
        keys = [ref.name for ref in found.roles.values()]
        if "magnitude" in found.roles:
            raise IncompleteModuleError(
                f"{found.stem} has a magnitude but no factors", path=self.path, keys=keys
            )
        for ref in found.roles.values():
            self.extras[ref.name] = ref
        self.notes.append(f"{found.stem} states an alpha but has no factors")

    def _module(self, found: Group, rows: Rows | None = None) -> Module:
        roles, op = found.roles, "linear"
        if "embedding_up" in roles:
            roles, op = {role.removeprefix("embedding_"): ref for role, ref in roles.items()}, "embedding"
        if self.flipped:
            # Stacked experts have their factors the usual way round, behind the axis of the experts.
            roles = {
                role: ref.flipped() if role in ("up", "down") and len(ref.shape) == 2 else ref
                for role, ref in roles.items()
            }
        roles = _peft_special.stored(self.facts.config, found.name, roles)
        factors = {role: ref for role, ref in roles.items() if role not in _BESIDE}
        kind = self._kind(found, roles, factors)
        rank, shape = kind.rank(factors), kind.shape(factors)
        target = self._target(found)
        if rows is not None:
            target = target._replace(rows=rows)
        scale = _scaling.scale_of(found, roles, target.component, kind, self.facts, self.format)
        if scale.note:
            self.scales.append(scale.note)
        magnitude = roles.get("magnitude")
        conv = shape is not None and len(shape) > 2 and kind.low_rank
        axis = magnitude_axis(magnitude) if magnitude is not None else None
        if axis is not None and op == "embedding":
            axis = self.format.embedding_axis
        in_first = op == "embedding" or found.in_first or (self.in_first and target.component not in _IMAGE)
        # Positions rather than names: this is done for every module of a file.
        module = Module(
            target,
            kind.name,
            factors,
            scale.value,
            scale.alpha,
            rank,
            shape,
            "conv" if conv else op,
            roles.get("alpha"),
            magnitude,
            axis,
            in_first,
            self.variant,
        )
        return module if kind.sized is None else module._replace(shape=kind.sized(module))

    def _kind(
        self, found: Group, roles: Mapping[str, TensorRef], factors: Mapping[str, TensorRef]
    ) -> kinds.Kind:
        kind = kinds.of_roles(roles)
        if kind is None:
            if {"up", "down"} & roles.keys():
                lora.check(factors, found.stem, self.path)
            raise IncompleteModuleError(
                f"{found.stem} has tensors that make no adapter kind",
                path=self.path,
                keys=[ref.name for ref in roles.values()],
                expected="A module needs all factors of one kind, such as up and down",
            )
        if kind.name == "lora":
            if self._experts(found, factors):
                return kinds.get("experts")
            lora.check(factors, found.stem, self.path)
        return kind

    def _experts(self, found: Group, factors: Mapping[str, TensorRef]) -> bool:
        up, down = factors["up"].shape, factors["down"].shape
        # Three axes are stacked experts, unless they are a one-dimensional convolution's.
        if len(up) == len(down) == 3 and (up[2] != 1 or up[1] != down[0]):
            return True
        if not self.packed and not self.bare_parameters:
            return False
        # PEFT wraps the parameters of one module in turn: the outer ones are named "<module>.base_layer".
        name = found.name
        while name.endswith(".base_layer"):
            name = name.removesuffix(".base_layer")
        if self.bare_parameters and (name != found.name or _experts.is_owner(name)):
            return True
        return any(name == owner or name.endswith("." + owner) for owner in self.packed)

    def _target(self, found: Group) -> Target:
        match = self.resolved.get(found.name)
        # Names that nobody has described keep the component that the layout's prefix gives them.
        if match is not None and self.facts.arch != "unknown":
            return Target(match.component, match.path, match.rows)
        return self.format.locate(found.name)


_UNKNOWN = Format(name="unknown", title="unknown", claims=lambda _: 0.0)


def refuse_other_types(adapter: Adapter) -> None:
    """Refuse what is not an adapter.

    Raises:
        NotAnAdapterError: The file is something else; the message says what.
    """
    if adapter.type == "adapter":
        return
    extract = "; `loratools extract BASE TUNED` makes an adapter of what a training has changed in one"
    raise NotAnAdapterError(
        f"this is {_classify.TITLES.get(adapter.type, adapter.type)}, not a LoRA adapter",
        path=adapter.path or None,
        expected="A LoRA adapter, or one of a kind related to it, was expected",
        todo="`loratools info` describes it" + extract * (adapter.type == "checkpoint"),
    )
