"""Experts one by one, and back: slices of stacked or packed factors, and factors put together of slices.

All is copying: no value is computed. What is put together is padded with zeros to one rank, experts that have no
module are zeros, and taking it apart again leaves both out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from loratools.kinds import experts
from loratools.model import Module, Target
from loratools.tensors import LazySource, TensorRef

if TYPE_CHECKING:
    import torch

Parts = Mapping[int, Module]


def expert(module: Module, number: int, target: Target) -> Module:
    """The module of one expert, of kind "lora".

    Args:
        module: Stacked, or packed with its count known.
        number: Of the expert.
        target: What it is to be called.
    """
    outputs, inputs = (module.factors["up"].shape[-2], module.factors["down"].shape[-1])
    count = experts.count(module) or 1
    down = module.factors["down"].shape
    rank = down[1] if len(down) == 3 else down[0] // count
    factors = {
        "up": _lazily((outputs, rank), module.factors["up"].dtype, partial(_factor, module, number, 0)),
        "down": _lazily((rank, inputs), module.factors["down"].dtype, partial(_factor, module, number, 1)),
    }
    return Module(target, "lora", factors, module.scale, rank=rank, shape=(outputs, inputs))


def turned(part: Module) -> Module:
    """A module of the transposed weight: up and down change places."""
    up, down = part.factors["up"], part.factors["down"]
    factors = {"up": down.flipped(), "down": up.flipped()}
    return part._replace(factors=factors, shape=(down.shape[1], up.shape[0]))


def rows(part: Module, target: Target, start: int, step: int, columns: range | None = None) -> Module:
    """Half of the rows of a module: those from ``start`` on, or every ``step``-th.

    Args:
        part: Of gate_up.
        target: Of gate or up.
        start: The first row.
        step: 1 for half of all, one behind the other; 2 for every second.
        columns: The directions to keep; None for all.
    """
    up, down = part.factors["up"], part.factors["down"]
    half = up.shape[0] // 2
    kept = columns if columns is not None else range(down.shape[0])
    factors = {
        "up": _lazily((half, len(kept)), up.dtype, partial(_rows, up, start, step, kept)),
        "down": _lazily((len(kept), down.shape[1]), down.dtype, partial(_columns, down, kept)),
    }
    return part._replace(target=target, factors=factors, rank=len(kept), shape=(half, down.shape[1]))


def is_diagonal(up: torch.Tensor, step: int) -> bool:
    """Whether the first half of the directions of gate_up's up (2 · out, rank) is gate's alone, the second up's."""
    half, rest = divmod(up.shape[1], 2)
    if rest:
        return False
    middle = up.shape[0] // 2
    gate, other = (up[:middle], up[middle:]) if step == 1 else (up[::2], up[1::2])
    return not (gate[:, half:].any() or other[:, :half].any())


def halves(parts: Mapping[int, Module], step: int) -> dict[str, dict[int, Module]]:
    """gate and up of experts whose two are one weight.

    Args:
        parts: gate_up by number.
        step: 1 where gate's rows come first, 2 where the two alternate.
    """
    diagonal = all(is_diagonal(part.factors["up"].load(), step) for part in parts.values())
    found: dict[str, dict[int, Module]] = {"gate": {}, "up": {}}
    for number, part in parts.items():
        middle = part.factors["up"].shape[0] // 2
        half = (part.rank or 0) // 2
        own, rest = (range(half), range(half, 2 * half)) if diagonal else (None, None)
        second = 1 if step > 1 else middle
        found["gate"][number] = rows(part, part.target, 0, step, own)
        found["up"][number] = rows(part, part.target, second, step, rest)
    return found


def unpadded(part: Module) -> Module | None:
    """A module without the directions at its end that are zero in both factors; None where none is left."""
    up, down = part.factors["up"].load(), part.factors["down"].load()
    acting = (up != 0).any(0) | (down != 0).any(1)
    rank = int(acting.nonzero().max()) + 1 if bool(acting.any()) else 0
    if rank == part.rank:
        return part
    if not rank:
        return None
    kept = range(rank)
    factors = {
        "up": _lazily(
            (up.shape[0], rank), part.factors["up"].dtype, partial(_across, part.factors["up"], rank)
        ),
        "down": _lazily(
            (rank, down.shape[1]), part.factors["down"].dtype, partial(_columns, part.factors["down"], kept)
        ),
    }
    return part._replace(factors=factors, rank=rank)


def joined(
    gate: Module | None, other: Module | None, target: Target, rank: int, step: int, *, shared: bool
) -> Module:
    """gate and up of one expert as gate_up.

    Args:
        gate: Of one expert; None for zeros.
        other: Its up, likewise; of the same scale and dtype.
        target: Of the result.
        rank: The directions of each half; of the whole where both share theirs.
        step: 1 where gate's rows come first, 2 where the two alternate.
        shared: Whether both have the same down.
    """
    first = gate or other
    assert first is not None
    outputs, inputs = first.factors["up"].shape[0], first.factors["down"].shape[1]
    whole = rank if shared else 2 * rank
    dtype = first.factors["up"].dtype
    factors = {
        "up": _lazily((2 * outputs, whole), dtype, partial(_joined_up, gate, other, rank, step, shared)),
        "down": _lazily((whole, inputs), dtype, partial(_joined_down, gate, other, rank, shared)),
    }
    return first._replace(target=target, factors=factors, rank=whole, shape=(2 * outputs, inputs))


def stacked(parts: Parts, count: int, target: Target) -> Module:
    """Modules of single experts as one with an axis for them: up (experts, out, rank), down (experts, rank, in).

    Args:
        parts: By number; of one scale and dtype. Numbers that are missing become zeros.
        count: How many experts there are.
        target: Of the result.
    """
    first = next(iter(parts.values()))
    rank = max(part.rank or 0 for part in parts.values())
    outputs, inputs = first.factors["up"].shape[0], first.factors["down"].shape[1]
    dtype = first.factors["up"].dtype
    factors = {
        "up": _lazily((count, outputs, rank), dtype, partial(_stacked, parts, "up", (count, outputs, rank))),
        "down": _lazily(
            (count, rank, inputs), dtype, partial(_stacked, parts, "down", (count, rank, inputs))
        ),
    }
    shape = (count, outputs, inputs)
    return Module(target, experts.KIND.name, factors, first.scale, rank=rank, shape=shape)


def packed(module: Module) -> Module:
    """A stacked module as PEFT packs it: up (out, rank · experts), rank-major; down (experts · rank, in)."""
    if not experts.is_stacked(module.factors):
        return module
    up, down = module.factors["up"], module.factors["down"]
    count, outputs, rank = up.shape
    before = up.source.packed if isinstance(up.source, _Opened) else None
    factors = {
        "up": before or _lazily((outputs, rank * count), up.dtype, partial(_rank_major, up)),
        "down": down.reshaped((count * rank, down.shape[2])),
    }
    return module._replace(
        factors=factors, rank=rank, shape=(count, outputs, down.shape[2]), alpha_tensor=None
    )


def unpacked(module: Module) -> Module:
    """A packed module whose count is known with an axis for the experts."""
    if experts.is_stacked(module.factors):
        return module
    count = experts.count(module) or 1
    up, down = module.factors["up"], module.factors["down"]
    rank = down.shape[0] // count
    factors = {
        "up": TensorRef(up.name, (count, up.shape[0], rank), up.dtype, _Opened(up, count)),
        "down": down.reshaped((count, rank, down.shape[1])),
    }
    return module._replace(factors=factors)


class _Opened(LazySource):
    """An up that was packed, with an axis for the experts."""

    __slots__ = ("packed",)

    def __init__(self, packed: TensorRef, count: int) -> None:
        super().__init__(partial(_expert_major, packed, count))
        self.packed = packed


def _lazily(shape: tuple[int, ...], dtype: str, compute: Callable[[], torch.Tensor]) -> TensorRef:
    return TensorRef("", shape, dtype, LazySource(compute))


def _factor(module: Module, number: int, which: int) -> torch.Tensor:
    return experts.pair(module, number)[which].contiguous()


def _rows(up: TensorRef, start: int, step: int, columns: range) -> torch.Tensor:
    whole = up.load()
    half = whole.shape[0] // 2
    chosen = whole[start::step] if step > 1 else whole[start : start + half]
    return chosen[:, columns.start : columns.stop].contiguous()


def _columns(down: TensorRef, kept: range) -> torch.Tensor:
    return down.load()[kept.start : kept.stop].contiguous()


def _across(up: TensorRef, rank: int) -> torch.Tensor:
    return up.load()[:, :rank].contiguous()


def _joined_up(gate: Module | None, other: Module | None, rank: int, step: int, shared: bool) -> torch.Tensor:
    import torch

    loaded = [None if part is None else part.factors["up"].load() for part in (gate, other)]
    first = next(each for each in loaded if each is not None)
    outputs = first.shape[0]
    whole = torch.zeros(2 * outputs, rank if shared else 2 * rank, dtype=first.dtype)
    for half, up in enumerate(loaded):
        if up is None:
            continue
        chosen = whole[half::2] if step > 1 else whole[half * outputs : (half + 1) * outputs]
        column = 0 if shared else half * rank
        chosen[:, column : column + up.shape[1]] = up
    return whole


def _joined_down(gate: Module | None, other: Module | None, rank: int, shared: bool) -> torch.Tensor:
    import torch

    loaded = [None if part is None else part.factors["down"].load() for part in (gate, other)]
    first = next(each for each in loaded if each is not None)
    whole = torch.zeros(rank if shared else 2 * rank, first.shape[1], dtype=first.dtype)
    for half, down in enumerate(loaded):
        row = 0 if shared else half * rank
        if down is not None:
            whole[row : row + down.shape[0]] = down
    return whole


def _stacked(parts: Parts, role: str, shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    first = next(iter(parts.values())).factors[role].load()
    whole = torch.zeros(shape, dtype=first.dtype)
    for number, part in parts.items():
        factor = part.factors[role].load()
        whole[number, : factor.shape[0], : factor.shape[1]] = factor
    return whole


def _rank_major(up: TensorRef) -> torch.Tensor:
    whole = up.load()
    return whole.permute(1, 2, 0).reshape(whole.shape[1], -1).contiguous()


def _expert_major(up: TensorRef, count: int) -> torch.Tensor:
    whole = up.load()
    return whole.reshape(whole.shape[0], -1, count).permute(2, 0, 1).contiguous()
