"""Experts in another style: a module for each, two fused ones for all of a layer, or three stacked ones.

Every way there is exact. Gate and up as one weight have their directions side by side and block-diagonal rows, or share
them where both have the same down; taken apart, each gets its own back. Experts without a module are zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from loratools.archs import _experts as names
from loratools.archs._experts import FUSED, SPLIT, Place
from loratools.errors import LoraError, ShapeError, UnsupportedKindError
from loratools.formats import Format
from loratools.kinds import experts
from loratools.model import Module, Target
from loratools.ops import _bits, _moe_known, _moe_parts, _scale
from loratools.ops._moe_told import GIVE_BASE, About, family_of
from loratools.ops._regroup import Step
from loratools.ops._rows import a_name

# Modules of single experts by role, then by number.
_ByRole = dict[str, dict[int, Module]]


class Member(NamedTuple):
    """A module of experts among the steps of a conversion."""

    step: Step
    place: Place


def style_for(form: Format, asked: str, modules: Iterable[Module]) -> str:
    """The style that experts are written in; empty where they stay as they are.

    Args:
        form: The layout's description.
        asked: "split", "fused", or "keep".
        modules: The adapter's.

    Raises:
        UnsupportedKindError: The layout has no names for what was asked for.
    """
    if not form.experts:
        return ""
    if asked != "keep":
        if asked in form.experts:
            return asked
        raise UnsupportedKindError(
            f"the {form.name} layout has no names for experts that are {asked}",
            expected=f"It has them as {' or '.join(form.experts)}",
            todo="Leave --experts out",
        )
    if SPLIT not in form.experts:
        return form.experts[0]
    stacked = any(module.kind == experts.KIND.name for module in modules)
    return next((style for style in form.experts if style != SPLIT), "") if stacked else ""


def restyled(steps: Sequence[Step], style: str, told: About) -> list[Step]:
    """Steps with their modules of experts in a style; the others as they are.

    Args:
        steps: Of a conversion; packed modules are known by their parameters' names.
        style: "split", "fused", "switch" or "gguf"; empty: as they are.
        told: What is known of the model's experts.
    """
    groups = grouped(steps) if style else {}
    if not groups:
        return list(steps)
    told = told._replace(total=told.total or _counted(groups.values()))
    of_step = {id(member.step): key for key, members in groups.items() for member in members}
    found: list[Step] = []
    done: set[tuple[str, str]] = set()
    for step in steps:
        key = of_step.get(id(step))
        if key is None:
            found.append(step)
        elif key not in done:
            done.add(key)
            found += _block(groups[key], style, told)
    return found


def grouped(steps: Iterable[Step]) -> dict[tuple[str, str], list[Member]]:
    """The steps whose modules are experts', by component and by what stands before their names."""
    groups: dict[tuple[str, str], list[Member]] = {}
    for step in steps:
        place = names.place(step.module.target.path)
        if place is not None and step.problem is None and step.module.target.rows is None:
            groups.setdefault((step.module.target.component, place.block), []).append(Member(step, place))
    return groups


def _counted(groups: Iterable[Sequence[Member]]) -> int | None:
    """How many experts there are by the numbers in names, where some weight has a module for each."""
    numbers: list[set[int]] = []
    for members in groups:
        by_role: dict[str, set[int]] = {}
        for member in members:
            if member.place.number is not None:
                by_role.setdefault(member.place.role, set()).add(member.place.number)
        numbers += by_role.values()
    most = max((max(each) for each in numbers), default=-1) + 1
    return most if any(len(each) == most for each in numbers) else None


def _block(members: Sequence[Member], style: str, told: About) -> list[Step]:
    """The experts of one layer in a style."""
    if _is_written(members, style):
        return [member.step for member in members]
    try:
        return Block(members, style, told).steps()
    except LoraError as error:
        return [member.step._replace(problem=error) for member in members]


def _is_written(members: Sequence[Member], style: str) -> bool:
    """Whether the modules are in a style already, as a layout has them."""
    single = all(member.place.number is not None for member in members)
    if style == SPLIT:
        return single
    two_axes = all(not experts.is_stacked(member.step.module.factors) for member in members)
    return style == FUSED and two_axes and all(member.place.number is None for member in members)


class Block:
    """The experts of one layer, taken apart and put together."""

    def __init__(self, members: Sequence[Member], style: str, told: About) -> None:
        self.members = members
        self.style = style
        self.component = members[0].step.module.target.component
        self.name = members[0].place.block
        self.family = family_of([member.place for member in members], style, told, self._keys())
        self.count = self._count(told)
        self.sources: dict[str, list[Module]] = {}
        self.rounded = any(member.step.rounded for member in members)

    def steps(self) -> list[Step]:
        """The layer's steps in the style."""
        roles = self.apart(whole=self.style == FUSED)
        if self.style == SPLIT:
            return self._single(roles)
        return self._fused(roles) if self.style == FUSED else self._stacked(roles)

    def _keys(self) -> list[str]:
        return [a_name(member.step.module) for member in self.members]

    def _count(self, told: About) -> int:
        """How many experts the layer has."""
        held = {experts.count(member.step.module) for member in self.members if member.place.number is None}
        counts = {count for count in held if count}
        highest = max((member.place.number or 0 for member in self.members), default=0)
        if len(counts) > 1 or (counts and told.total and told.total not in counts):
            said = sorted({*counts, *([told.total] if told.total else [])})
            raise ShapeError(
                f"{self.name}experts: the modules are of {' and of '.join(map(str, said))} experts",
                keys=self._keys(),
                expected="One number of experts was expected for all modules of a layer",
                todo="Say how many there are with --experts-count",
            )
        count = next(iter(counts), None) or told.total
        if not self.style:
            return max(count or 0, highest + 1)
        if count is None or count <= highest:
            known = f"there are {count}" if count else "no weight has a module for every expert"
            raise ShapeError(
                f"{self.name}experts: the highest number of an expert is {highest}, and {known}",
                keys=self._keys(),
                expected="The number of all experts was expected, of which those without a module are zeros",
                todo=f"Say how many there are with --experts-count. {GIVE_BASE}",
            )
        return count

    def apart(self, *, whole: bool) -> _ByRole:
        """Single experts by role; gate and up stay one where ``whole``."""
        turned = self._is_turned()
        roles: _ByRole = {}
        for step, place in self.members:
            _refuse_others(step.module)
            if place.number is not None:
                parts = {place.number: step.module}
            else:
                target = step.module.target
                parts = {n: _moe_parts.expert(step.module, n, target) for n in range(self.count)}
                parts = {n: _moe_parts.turned(part) if turned else part for n, part in parts.items()}
            pieces = {place.role: parts}
            if place.role == "gate_up" and not (whole and self._all_whole()):
                pieces = _moe_parts.halves(parts, 2 if self.family.interleaved else 1)
            for role, found in pieces.items():
                roles.setdefault(role, {}).update(found)
                self.sources.setdefault(role, []).extend(step.sources)
        return roles

    def _all_whole(self) -> bool:
        """Whether no gate or up of this layer is apart from the other."""
        return all(member.place.role in ("gate_up", "down") for member in self.members)

    def _is_turned(self) -> bool:
        """Whether the factors for all experts are those of transposed weights."""
        by_role = {place.role: step.module for step, place in self.members if place.number is None}
        if not all(not experts.is_stacked(module.factors) for module in by_role.values()):
            return False
        if {"gate_up", "down"} <= by_role.keys():
            shown = _moe_known.is_turned(by_role["gate_up"], by_role["down"])
            if shown is not None:
                return shown
        return self.family.turned

    def _target(self, style: str, role: str, number: int | None = None) -> Target:
        return Target(self.component, names.spell(self.family, style, self.name, role, number))

    def _single(self, roles: _ByRole) -> list[Step]:
        """A step for each expert that has a module, in the order of their numbers."""
        found: list[Step] = []
        for number in range(self.count):
            for role in ("gate", "up", "down"):
                part = roles.get(role, {}).get(number)
                left = _moe_parts.unpadded(part) if part is not None else None
                if left is not None:
                    module = left._replace(target=self._target(SPLIT, role, number))
                    found.append(Step(module, tuple(self.sources[role]), "split", self.rounded))
        return found

    def _stacked(self, roles: _ByRole) -> list[Step]:
        """A step for each of gate, up and down."""
        found: list[Step] = []
        for role in ("gate", "up", "down"):
            if roles.get(role):
                found.append(self._together(role, roles[role], self.sources[role]))
        return found

    def _fused(self, roles: _ByRole) -> list[Step]:
        """A step for gate and up together, and one for down."""
        found: list[Step] = []
        if "gate_up" in roles:
            found.append(self._together("gate_up", roles["gate_up"], self.sources["gate_up"]))
        elif {"gate", "up"} & roles.keys():
            sources = [*self.sources.get("gate", []), *self.sources.get("up", [])]
            gates, rounded = self._gate_up(roles)
            step = self._together("gate_up", gates, sources)
            found.append(step._replace(rounded=step.rounded or rounded))
        if "down" in roles:
            found.append(self._together("down", roles["down"], self.sources["down"]))
        return found

    def _gate_up(self, roles: _ByRole) -> tuple[dict[int, Module], bool]:
        """gate and up of each expert as one, and whether values were computed to bring them to one scale."""
        given = [(role, n, part) for role in ("gate", "up") for n, part in roles.get(role, {}).items()]
        alike, rounded = _scale.alike([part for _, _, part in given])
        by_role: _ByRole = {"gate": {}, "up": {}}
        for (role, number, _), part in zip(given, alike, strict=True):
            by_role[role][number] = part
        gates, others = by_role["gate"], by_role["up"]
        shared = gates.keys() == others.keys() and all(
            _bits.same_bits(gates[n].factors["down"], others[n].factors["down"]) for n in gates
        )
        rank = max(part.rank or 0 for part in alike)
        target = self._target(FUSED, "gate_up")
        step = 2 if self.family.interleaved else 1
        whole = {
            n: _moe_parts.joined(gates.get(n), others.get(n), target, rank, step, shared=shared)
            for n in sorted(gates.keys() | others.keys())
        }
        return whole, rounded

    def _together(self, role: str, parts: Mapping[int, Module], sources: Sequence[Module]) -> Step:
        """Single experts as one module."""
        numbers = sorted(parts)
        alike, rounded = _scale.alike([parts[number] for number in numbers])
        if self.style == FUSED and self.family.turned:
            alike = [_moe_parts.turned(part) for part in alike]
        target = self._target(self.style, role)
        module = _moe_parts.stacked(dict(zip(numbers, alike, strict=True)), self.count, target)
        once = tuple({source.target: source for source in sources}.values())
        return Step(module, once, "fused" if len(once) > 1 else "split", self.rounded or rounded)


def _refuse_others(module: Module) -> None:
    """Refuse modules of experts that are more than two factors.

    Raises:
        UnsupportedKindError: It is one.
    """
    plain = module.kind in ("lora", experts.KIND.name) and module.factors.keys() == {"up", "down"}
    if plain and module.magnitude is None:
        return
    said = "DoRA" if module.magnitude is not None else f"{module.kind} with {', '.join(module.factors)}"
    raise UnsupportedKindError(
        f"{module.target}: experts are put together or taken apart as LoRA alone, and this is {said}",
        keys=[ref.name for _, ref in module.tensors() if ref.name],
        expected="Two factors, up and down, were expected",
        todo="Turn it into LoRA with --as lora --base",
    )
