"""An open file into the common model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratools import archs, kinds
from loratools.errors import ArchitectureError, IncompleteModuleError, NameResolutionError, NotAnAdapterError
from loratools.formats import _classify
from loratools.formats._base import Facts, Format, Group, Scale
from loratools.formats._group import group
from loratools.kinds import lora
from loratools.model import EMPTY, Adapter, Layout, Module, Target
from loratools.registry import scan
from loratools.tensors import TensorRef

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

    Returns:
        The adapter; its ``type`` says what the file is instead where it is none, and then it has no modules.

    Raises:
        LoraError: A module is incomplete, its shapes disagree, or two keys name one weight.
    """
    if sequence:
        tensors = _listed(tensors)
    groups, extras = group(tensors, path)
    facts = Facts(
        groups, tuple(tensors), metadata=metadata, config=config, container=container, sequence=sequence
    )
    kind = _classify.classify(facts, extras)
    if kind != "adapter":
        notes = _classify.notes(facts, kind)
        layout = Layout(
            "peft" if "peft_type" in config else _classify.LAYOUTS.get(kind, "unknown"), "", container
        )
        return Adapter(
            {}, dict(tensors), metadata, "unknown", layout, config, path, notes, kind, tuple(tensors)
        )
    return _Reader(facts, extras, arch, path).adapter()


def _listed(tensors: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """Names for a bare list of matrices: up and down alternate."""
    refs = list(tensors.values())
    if len(refs) % 2 or any(len(ref.shape) not in (2, 4) for ref in refs):
        return dict(tensors)
    named: dict[str, TensorRef] = {}
    for number in range(0, len(refs), 2):
        for role, ref in (("up", refs[number]), ("down", refs[number + 1])):
            key = f"{number // 2}:{role}"
            named[key] = ref.renamed(key)
    return named


class _Reader:
    """One pass over a file that is known to be an adapter."""

    def __init__(self, facts: Facts, extras: dict[str, TensorRef], arch: str | None, path: str) -> None:
        self.extras = extras
        self.path = path
        self.notes: list[str] = []
        self.scales: list[str] = []
        self.facts = facts
        self.resolved = self._detect(facts, arch)
        self.format = self._format()
        self.flipped = self.format.flipped(self.facts)
        self.in_first = bool(facts.config.get("fan_in_fan_out"))
        owners = (str(name).rpartition(".")[0] for name in facts.config.get("target_parameters") or ())
        self.packed = {owner for owner in owners if owner}

    def adapter(self) -> Adapter:
        """All groups as modules."""
        modules: dict[Target, Module] = {}
        owners: dict[Target, str] = {}
        for stem, found in self.facts.groups.items():
            if len(found.roles) < 3 and found.roles.keys() <= _FACTORLESS:
                self._orphan(found)
                continue
            module = self._module(found)
            if module.target in modules:
                raise NameResolutionError(
                    f"two modules name {module.target}",
                    path=self.path,
                    keys=[owners[module.target], stem],
                    todo="Keep one of them",
                )
            modules[module.target] = module
            owners[module.target] = stem
        self._summarise_scales()
        facts = self.facts
        layout = Layout(self.format.name, self.format.variant(facts), facts.container)
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
            facts.keys,
        )

    def _detect(self, facts: Facts, arch: str | None) -> Mapping[str, archs.Resolved]:
        names = {found.name: _widths(found) for found in facts.groups.values()}
        base = str(facts.config.get("base_model_name_or_path") or facts.config.get("model") or "")
        if arch is not None:
            chosen = archs.get(arch)
            facts.arch = arch
            resolved = {name: match for name in names if (match := chosen.resolve(name)) is not None}
            if names and not resolved:
                raise ArchitectureError(
                    f"none of the {len(names)} modules has a name of {chosen.title}",
                    path=self.path or None,
                    keys=list(names),
                    todo="Leave --arch out, or give the architecture that the adapter was made for",
                )
            unknown = [name for name in names if name not in resolved]
            if unknown and chosen.has_table:
                self.notes.append(
                    f"{len(unknown)} of {len(names)} names are not those of {arch} (first: {unknown[0]})"
                )
            return resolved
        found = archs.detect(names, facts.metadata, base)
        self.notes.extend(found.notes)
        facts.arch = found.arch
        return found.resolved

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

    def _module(self, found: Group) -> Module:
        roles, op = found.roles, "linear"
        if "embedding_up" in roles:
            roles, op = {role.removeprefix("embedding_"): ref for role, ref in roles.items()}, "embedding"
        if self.flipped:
            roles = {role: ref.flipped() if role in ("up", "down") else ref for role, ref in roles.items()}
        factors = {role: ref for role, ref in roles.items() if role not in _BESIDE}
        kind = self._kind(found, roles, factors)
        rank, shape = kind.rank(factors), kind.shape(factors)
        target = self._target(found)
        scale = self._scale(found, roles, target, rank, kind.name)
        magnitude = roles.get("magnitude")
        conv = shape is not None and len(shape) > 2 and kind.low_rank
        axis = _axis(magnitude) if magnitude is not None else None
        in_first = op == "embedding" or (self.in_first and target.component not in _IMAGE)
        # Positions rather than names: this is done for every module of a file.
        return Module(
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
        )

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
        if not self.packed:
            return False
        # PEFT wraps the parameters of one module in turn: the outer ones are named "<module>.base_layer".
        name = found.name
        while name.endswith(".base_layer"):
            name = name.removesuffix(".base_layer")
        return any(name == owner or name.endswith("." + owner) for owner in self.packed)

    def _target(self, found: Group) -> Target:
        match = self.resolved.get(found.name)
        # Names that nobody has described keep the component that the layout's prefix gives them.
        if match is not None and self.facts.arch != "unknown":
            return Target(match.component, match.path, match.rows)
        return self.format.locate(found.name)

    def _scale(
        self, found: Group, roles: Mapping[str, TensorRef], target: Target, rank: int | None, kind: str
    ) -> Scale:
        if kind == "lokr" and {"lokr_w1", "lokr_w2"} <= roles.keys():
            return Scale(1.0, roles["alpha"].scalar() if "alpha" in roles else None)
        if not rank:
            return Scale(1.0)
        if kind == "adalora":
            return _pruned_scale(roles, self.facts.config, rank)
        # LyCORIS' trained factor; it is usually folded into the weights when they are saved.
        further = roles["scalar"].scalar() if "scalar" in roles else 1.0
        if "alpha" in roles:
            alpha = roles["alpha"].scalar()
            return Scale(further * alpha / rank, alpha)
        scale = self.format.scaler(found, target.component, rank, self.facts)
        scale = scale._replace(value=further * scale.value)
        if scale.note:
            self.scales.append(scale.note)
        return scale

    def _summarise_scales(self) -> None:
        """One note for each thing said of the scales, however many modules it was said of."""
        unique = list(dict.fromkeys(self.scales))
        if len(unique) > 3:
            unique = [*unique[:2], f"{len(unique) - 2} more modules like that"]
        self.notes.extend(unique)


def _widths(found: Group) -> tuple[int, int] | None:
    """The weight's height and width, as far as the factors tell."""
    roles = {role.removeprefix("embedding_"): ref for role, ref in found.roles.items()}
    if "up" in roles and "down" in roles:
        up, down = roles["up"].shape, roles["down"].shape
        return (up[0], down[1]) if len(up) > 1 and len(down) > 1 else None
    kind = kinds.of_roles(roles)
    shape = kind.shape(roles) if kind is not None else None
    return (shape[0], shape[1]) if shape is not None and len(shape) > 1 else None


def _pruned_scale(roles: Mapping[str, TensorRef], config: Mapping[str, Any], rank: int) -> Scale:
    """AdaLoRA's scale: alpha over the rank that pruning left, as PEFT's SVDLinear has it."""
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int | float):
        return Scale(1.0, None, "the configuration states no lora_alpha; a scale of 1 is assumed")
    left = roles["ranknum"].scalar() if "ranknum" in roles else rank
    return Scale(alpha / (left + 1e-5), float(alpha))


def _axis(magnitude: TensorRef) -> str:
    """Which axis of the weight DoRA's magnitude runs along.

    LyCORIS and OneTrainer store one value per input as (1, in, …), PEFT a convolution's as (1, out, 1, 1) under its
    own name; one-dimensional ones are per output.
    """
    several = len(magnitude.shape) > 1 and magnitude.shape[0] == 1 and magnitude.shape[1] > 1
    return "in" if several and magnitude.name.endswith("dora_scale") else "out"


_UNKNOWN = Format(name="unknown", title="unknown", claims=lambda _: 0.0)


def refuse_other_types(adapter: Adapter) -> None:
    """Refuse what is not an adapter.

    Raises:
        NotAnAdapterError: The file is something else; the message says what.
    """
    if adapter.type == "adapter":
        return
    raise NotAnAdapterError(
        f"this is {_classify.TITLES.get(adapter.type, adapter.type)}, not a LoRA adapter",
        path=adapter.path or None,
        todo="`loratools info` describes it",
    )
