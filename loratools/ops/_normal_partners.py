"""Modules of zeros beside those that a program wants together: q with v, gate with up, a target in every layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from loratools.errors import LayoutError
from loratools.io.base import Base
from loratools.model import Module, Target
from loratools.ops._base_parts import part_of
from loratools.ops._host import Host
from loratools.ops._regroup import Step
from loratools.runtimes import Runtime
from loratools.tensors import DTYPES, BytesSource, TensorRef

_NUMBER = re.compile(r"(?<=\.)(\d+)(?=\.)")

Shape = tuple[int, ...]


def added(steps: Sequence[Step], runtime: Runtime, host: Host, base: Base | None, arch: str) -> list[Step]:
    """The modules of zeros that the program needs beside an adapter's own.

    Args:
        steps: The adapter's, at their final rank.
        runtime: What needs them.
        host: What the base's configuration says.
        base: The base model, whose shapes tell what no sibling does; or None.
        arch: The adapter's architecture.

    Raises:
        LayoutError: Nothing tells the shape of one; all such are named.
    """
    there = {
        step.module.target: step.module
        for step in steps
        if step.problem is None and step.module.kind == "lora" and step.module.target.rows is None
    }
    wanted = dict(_partners(there, runtime))
    if runtime.every_layer:
        wanted |= dict(_in_every_layer({**there, **wanted}, _count(host, there)))
    if not wanted:
        return []
    shapes = _Shapes(there, base, arch)
    unknown = [target for target, like in wanted.items() if shapes.of(target, like) is None]
    if unknown:
        raise LayoutError(
            f"{runtime.title} needs {len(unknown)} modules beside the adapter's, whose shapes nothing tells",
            keys=[str(target) for target in unknown],
            expected="Zeros are added for them, of the base's shapes",
            todo="Give the model that the adapter is for with --base",
        )
    return [_zeros(target, like, shapes.of(target, like) or ()) for target, like in wanted.items()]


def _partners(there: Mapping[Target, Module], runtime: Runtime) -> Iterator[tuple[Target, Module]]:
    """Targets that pairs lack, each with the module that wants it."""
    for pair in runtime.pairs:
        for target, module in there.items():
            stem, _, last = target.path.rpartition(".")
            wanted = target._replace(path=f"{stem}.{pair.needed}" if stem else pair.needed)
            if last == pair.there and wanted not in there:
                yield wanted, module


def _in_every_layer(there: Mapping[Target, Module], count: int) -> Iterator[tuple[Target, Module]]:
    """Targets that some layer lacks, each with the same one of another layer."""
    for target, module in there.items():
        number = _NUMBER.search(target.path)
        if number is None:
            continue
        for layer in range(count):
            path = target.path[: number.start()] + str(layer) + target.path[number.end() :]
            if target._replace(path=path) not in there:
                yield target._replace(path=path), module


def _count(host: Host, there: Mapping[Target, Module]) -> int:
    """How many layers the model has, as far as anything tells."""
    numbers = [int(found[1]) for target in there if (found := _NUMBER.search(target.path))]
    return max([host.layers, *(number + 1 for number in numbers)])


class _Shapes:
    """The shapes of weights that have no module."""

    def __init__(self, there: Mapping[Target, Module], base: Base | None, arch: str) -> None:
        self._base, self._arch = base, arch
        self._parts: dict[str, Mapping[str, Shape | None]] = {}
        self._known: dict[tuple[str, str], Shape] = {}
        for target, module in there.items():
            if module.shape is not None:
                self._known.setdefault((target.component, _NUMBER.sub("#", target.path)), module.shape)

    def of(self, target: Target, like: Module) -> Shape | None:
        """(out, in) of a target: as the base has it, as another layer does, or as gate's for up; None if unknown."""
        if self._base is not None:
            if target.component not in self._parts:
                self._parts[target.component] = part_of(self._arch, target.component, self._base)
            found = self._parts[target.component].get(target.path)
            if found is not None:
                return found
        sibling = self._known.get((target.component, _NUMBER.sub("#", target.path)))
        # Gate and up multiply each other, element by element.
        same = target.path.endswith("up_proj") and like.target.path.endswith("gate_proj")
        return sibling or (like.shape if same else None)


def _zeros(target: Target, like: Module, shape: Shape) -> Step:
    """A module that changes nothing, at the rank, the scale and the dtype of another."""
    rank = like.rank or 1
    dtype = like.factors["up"].dtype
    factors = {"up": _zero((shape[0], rank), dtype), "down": _zero((rank, shape[1]), dtype)}
    module = Module(target, "lora", factors, like.scale, None, rank, shape[:2])
    return Step(module, (module,), "added")


def _zero(shape: Shape, dtype: str) -> TensorRef:
    size = shape[0] * shape[1] * DTYPES[dtype].bits // 8
    return TensorRef("", shape, dtype, BytesSource(bytearray(size)))
