"""What lies beside the factors of adapters that are merged: modules saved in full, biases, and rows of vocabularies.

All of it replaces the base's own values. So it has no sum by itself; its differences from the base have one, as has an
average. What one input holds is carried, what all hold alike is carried once, and the rest is refused by name unless
the caller says which way it goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from loratools.errors import LayoutError, OptionError, ShapeError
from loratools.model import Adapter
from loratools.ops import _bits, _extras_config, _extras_rows, _extras_words, _replaced
from loratools.ops._extras_base import BaseModel
from loratools.ops._extras_rows import AVERAGE, FIRST, REFUSE, SUM, WAYS, Holding
from loratools.tensors import TensorRef

Key = tuple[str, str]


class Asked(NamedTuple):
    """What is merged, and how.

    Attributes:
        adapters: The inputs that count.
        numbers: The position of each among all inputs.
        weights: What each is multiplied by.
        layout: The result's, by name.
        way: One of ``WAYS``, or an input's number, counted from 1.
        base: The model that they were trained on, or None.
    """

    adapters: Sequence[Adapter]
    numbers: Sequence[int]
    weights: Sequence[float]
    layout: str
    way: str
    base: BaseModel | None


class Beside(NamedTuple):
    """What the result has beside its factors.

    Attributes:
        extras: By key.
        config: Fields of adapter_config.json that are other than in the inputs.
        whole: Keys that were taken over as they were.
        dropped: Keys that the caller left out.
        notes: What the caller should know.
    """

    extras: Mapping[str, TensorRef]
    config: Mapping[str, Any] = {}
    whole: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def beside(asked: Asked, *, drop: bool) -> Beside:
    """What the result holds in full.

    Args:
        asked: What is merged.
        drop: Whether it is left out.

    Raises:
        LayoutError: Inputs differ and nothing says what to do, or the layout has no names for it.
        ShapeError: They differ in shape.
        OptionError: Weights that cannot be averaged by, or an input that does not hold what it should give.
    """
    if drop:
        every = dict.fromkeys(key for adapter in asked.adapters for key in adapter.extras)
        return Beside({}, dropped=tuple(every))
    foreign = [
        key for adapter in asked.adapters if adapter.layout.name != asked.layout for key in adapter.extras
    ]
    if foreign:
        raise LayoutError(
            f"{_tensors(len(foreign))} to no module and the {asked.layout} layout has no name for them",
            keys=foreign,
            todo="Leave them out with --drop extras",
        )
    if not all(map(_replaced.is_peft, asked.adapters)):
        kept = _verbatim({}, asked.adapters, [list(adapter.extras.values()) for adapter in asked.adapters])
        return Beside(kept, whole=tuple(kept))
    return _Merge(asked).result()


class _Merge:
    """The tensors of PEFT's adapters, by the base's tensor that each stands for."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.held: dict[Key, list[tuple[int, _replaced.Saved]]] = {}
        self.rest: list[list[TensorRef]] = []
        for position, adapter in enumerate(asked.adapters):
            saved = _replaced.kept_whole(adapter)
            for each in saved:
                self.held.setdefault((each.key, each.role), []).append((position, each))
            meant = {each.ref.name for each in saved}
            self.rest.append([ref for name, ref in adapter.extras.items() if name not in meant])
        _extras_config.refuse_conflicts(asked.adapters, self.held)
        self.words = _extras_words.united(asked.adapters, self.held)
        self.places: dict[str, tuple[int, ...]] = {}

    def result(self) -> Beside:
        """Every tensor settled, under a name that PEFT finds it by."""
        extras: dict[str, TensorRef] = {}
        whole: list[str] = []
        adapted = {target.path for adapter in self.asked.adapters for target in adapter.modules}
        for (key, role), found in self.held.items():
            ref = self._settled(key, role, found)
            name = _extras_config.named(found[0][1], adapted, is_bias=self._is_bias(key, role))
            if any(ref.source is each.ref.source for _, each in found):
                whole.append(name)
            extras[name] = ref.renamed(name)
        kept = self._twins(extras)
        config = _extras_config.fields(self.asked.adapters, extras, self.held, self.places)
        return Beside(kept, config, tuple(whole), notes=tuple(self.words.notes))

    def _twins(self, extras: dict[str, TensorRef]) -> dict[str, TensorRef]:
        """With tensors that stand for nothing else; of second copies of the same, which a resized model has, none."""
        left = []
        for position, refs in enumerate(self.rest):
            own = [each.ref for found in self.held.values() for at, each in found if at == position]
            left.append([ref for ref in refs if not any(_bits.same_bits(ref, other) for other in own)])
        return _verbatim(extras, self.asked.adapters, left)

    def _is_bias(self, key: str, role: str) -> bool:
        """Whether a tensor is a bias by itself, and not that of a module that was saved."""
        stem = key.removesuffix("bias")
        return role == "replace" and stem != key and (stem + "weight", role) not in self.held

    def _settled(self, key: str, role: str, found: Sequence[tuple[int, _replaced.Saved]]) -> TensorRef:
        held = self._holdings(key, role, found)
        weight = self.asked.base.find(key) if self.asked.base is not None else None
        way = self.asked.way
        if role == "base":
            way = REFUSE
        elif self._is_bias(key, role) and way == REFUSE and weight is not None:
            way = SUM
        if way == SUM and weight is None:
            # The base does not have it (a new head): there is no difference to take.
            way = REFUSE
        if way != SUM and (len(held) == 1 or _extras_rows.alike(held)):
            return held[0].ref if held[0].rows is None else _extras_rows.made(held, FIRST).ref
        _refuse_shapes(key, held, self.asked.adapters)
        base = None
        if way == SUM and weight is not None and self.asked.base is not None:
            base = self.asked.base.tensor(weight).reshape(weight.shape or (1,))
            base = base[self._base_rows(key, role, len(base))]
        return self._made(key, role, held, way, base)

    def _made(self, key: str, role: str, held: Sequence[Holding], way: str, base: Any) -> TensorRef:
        """One tensor of several that differ."""
        if way.isdecimal():
            held = _chosen(key, held, int(way) - 1)
        result = _extras_rows.made(held, way if way in WAYS else FIRST, base)
        if result.differ:
            raise self._differing(key, role, held)
        if result.cancelled:
            raise OptionError(
                f"{key}: the weights of the inputs that hold it add up to 0",
                keys=[each.ref.name for each in held],
                expected="Weights were expected that can be averaged by",
                todo="Choose --full-modules first, or sum with --base",
            )
        return result.ref

    def _base_rows(self, key: str, role: str, height: int) -> list[int]:
        """Which of the base's rows are the first of the result's."""
        if role != "rows":
            return list(range(height))
        return [place for place in self.places[key] if place < height]

    def _holdings(self, key: str, role: str, found: Sequence[tuple[int, _replaced.Saved]]) -> list[Holding]:
        asked = self.asked
        maps: list[tuple[int, ...] | None] = [None] * len(found)
        if role == "rows":
            stated = [
                self.words.placed(at, _replaced.rows_of(asked.adapters[at], saved)) for at, saved in found
            ]
            # Ascending: those that the base has come first.
            self.places[key] = tuple(sorted({place for own in stated for place in own}))
            maps = [_positions(self.places[key], own) for own in stated]
        elif _replaced.is_vocabulary(key):
            maps = [self.words.rows(at) for at, _ in found]
        return [
            Holding(asked.numbers[at], asked.weights[at], saved.ref, rows)
            for (at, saved), rows in zip(found, maps, strict=True)
        ]

    def _differing(self, key: str, role: str, held: Sequence[Holding]) -> LayoutError:
        if role == "base":
            return LayoutError(
                f"{key}: the inputs hold different values of the base's own",
                keys=[each.ref.name for each in held],
                expected="Adapters of one base model were expected",
                todo="Merge adapters that were trained on the same model",
            )
        sums = "" if self.asked.base is not None else " (with --base)"
        return LayoutError(
            f"{len(held)} inputs replace {key} of the base model, and differ",
            keys=[each.ref.name for each in held],
            expected="Weights saved in full (modules_to_save, biases, tokens) have no sum of their own",
            todo=f"Choose --full-modules {AVERAGE}, {FIRST}, an input's number, or {SUM}{sums} for that of their "
            "differences from the base; or leave them out with --drop extras",
        )


def _positions(places: Sequence[int], own: Sequence[int]) -> tuple[int, ...] | None:
    """For each place the row in which an input has it, or -1; None where that is the same for all."""
    at = {place: number for number, place in enumerate(own)}
    found = tuple(at.get(place, -1) for place in places)
    return None if found == tuple(range(len(own))) else found


def _chosen(key: str, held: Sequence[Holding], number: int) -> list[Holding]:
    own = [each for each in held if each.number == number]
    if not own:
        raise OptionError(
            f"input {number + 1} has no {key}, and {len(held)} others differ on it",
            keys=[each.ref.name for each in held],
            expected="An input was expected that holds it",
            todo=f"Choose another with --full-modules: {', '.join(str(each.number + 1) for each in held)}",
        )
    # Rows that it lacks, of words that it does not know, come from the others.
    return own + [each for each in held if each.number != number]


def _refuse_shapes(key: str, held: Sequence[Holding], adapters: Sequence[Adapter]) -> None:
    shapes = [each.ref.shape if each.rows is None else each.ref.shape[1:] for each in held]
    if len({*shapes}) > 1:
        raise ShapeError(
            f"{key} is {' against '.join(str(list(each.ref.shape)) for each in held)}",
            path=adapters[0].path or None,
            keys=[each.ref.name for each in held],
            expected="One shape was expected, with the same words where it is a vocabulary",
            todo="Leave them out with --drop extras, or merge adapters of one base model",
        )


def _verbatim(
    kept: Mapping[str, TensorRef], adapters: Sequence[Adapter], refs: Sequence[Sequence[TensorRef]]
) -> dict[str, TensorRef]:
    """With tensors taken over where one input has them or all that do agree.

    Raises:
        LayoutError: Two inputs differ on one.
    """
    result = dict(kept)
    differing: list[str] = []
    for ref in [ref for own in refs for ref in own]:
        had = result.setdefault(ref.name, ref)
        if not _extras_rows.alike([Holding(0, 1.0, had), Holding(1, 1.0, ref)]):
            differing.append(ref.name)
    if differing:
        raise LayoutError(
            f"{_tensors(len(differing))} to no module, with values that differ between the inputs",
            path=adapters[0].path or None,
            keys=list(dict.fromkeys(differing)),
            expected="Tensors were expected that are the same in all inputs",
            todo="Leave them out with --drop extras, or take them from one input only",
        )
    return result


def _tensors(count: int) -> str:
    return f"{count} tensors belong" if count > 1 else "1 tensor belongs"
