"""An adapter in the form that a pack keeps: one layout, one rank, one dtype, scale 1; and what tells it apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, NoReturn

import torch

from loratools import formats
from loratools.errors import NonFiniteError
from loratools.maths import normal_form
from loratools.maths.normal_form import Stacked
from loratools.model import Module, Target
from loratools.ops import files
from loratools.ops._pack_files import Prepared, prepared
from loratools.ops._pack_plan import Fill, Plan, grouped
from loratools.ops._pack_planner import Planned
from loratools.ops._pack_slots import Slot
from loratools.tensors import DTYPES, BytesSource, TensorRef, torch_bytes


class Normal(NamedTuple):
    """An adapter as a pack keeps it.

    Attributes:
        plan: How it is packed.
        stacks: The factors of each of the plan's groups.
        sketch: Float64, of all modules in the order of their names.
        hash: Of ΔW.
    """

    plan: Plan
    stacks: tuple[Stacked, ...]
    sketch: torch.Tensor
    hash: str

    def by_name(self) -> dict[str, tuple[Stacked, int]]:
        """Every module's stack, and where in it the module lies."""
        return {
            str(module.target): (stacked, place)
            for members, stacked in zip(self.plan.groups, self.stacks, strict=True)
            for place, module in enumerate(members)
        }


def normal(planned: Planned) -> Normal:
    """The values of an adapter as a pack keeps them.

    Raises:
        NonFiniteError: A factor holds NaN or Inf, or does not fit the store dtype.
    """
    plan = planned.plan
    planned.bind()
    found = tuple([_stacked(members, plan.dtype) for members in plan.groups])
    sketches = torch.cat([normal_form.sketches(stacked) for stacked in found])
    if not bool(sketches.isfinite().all()):
        _refuse_nonfinite(sketches, planned)
    sketch = sketches[list(plan.order)].flatten()
    # A zero's sign says nothing.
    return Normal(plan, found, sketch, plan.hash((sketch + 0.0).tolist()))


def stacks(planned: Planned, wanted: Iterable[str], dtype: str) -> Iterator[tuple[tuple[str, ...], Stacked]]:
    """The factors of some modules in one dtype, scale folded in: by shape, the modules' names and what they hold.

    Args:
        planned: An adapter.
        wanted: The modules' names; the adapter need not have all.
        dtype: A safetensors name.
    """
    planned.bind()
    names = set(wanted)
    own = [module for module in planned.plan.adapter.modules.values() if str(module.target) in names]
    for members in grouped(own):
        yield tuple([str(module.target) for module in members]), _stacked(members, dtype)


def _stacked(members: Sequence[Module], dtype: str) -> Stacked:
    store: torch.dtype = getattr(torch, DTYPES[dtype].torch)
    up, down = (_joined([module.factors[role] for module in members]) for role in ("up", "down"))
    return normal_form.folded(Stacked(up, down), [module.scale for module in members], store)


def _joined(refs: Sequence[TensorRef]) -> torch.Tensor:
    """Tensors of one make-up as (n, rows, columns)."""
    first = refs[0]
    data = bytearray().join([ref.raw() for ref in refs])
    shape = (len(refs), first.stored_shape[0], first.numel // first.stored_shape[0])
    found = BytesSource(data).torch(shape, first.dtype)
    return found.transpose(1, 2) if first.transposed else found


def filled(normal: Normal, layout: str) -> Prepared:
    """The files of an adapter; their data holds until the next one of the same plan is filled in.

    Args:
        normal: The adapter.
        layout: Of the pack.

    Raises:
        LoraError: The layout cannot hold it.
    """
    plan = normal.plan
    if plan.fill is not None and plan.fill.shared:
        _pour(normal, plan.fill.slots)
        return plan.fill.ready
    slots = tuple(
        [(tuple([_slot() for _ in members]), tuple([_slot() for _ in members])) for members in plan.groups]
    )
    _pour(normal, slots)
    kept: dict[Target, Module] = dict(plan.adapter.modules)
    for members, (ups, downs) in zip(plan.groups, slots, strict=True):
        for module, up, down in zip(members, ups, downs, strict=True):
            kept[module.target] = _padded(module, up, down, plan)
    form = formats.get(layout)
    adapter = replace(plan.adapter, modules=kept, order=())
    document = formats.document(adapter, files.layout_of(form, "safetensors"), form)
    asked = any(slot.asked for pair in slots for side in pair for slot in side)
    plan.fill = Fill(prepared(document, form), slots, not asked and not document.computed)
    return plan.fill.ready


def _slot() -> Slot:
    return Slot(memoryview(b""))


def _pour(normal: Normal, slots: Sequence[tuple[Sequence[Slot], Sequence[Slot]]]) -> None:
    """Padded factors into the slots that they are written from."""
    for stacked, pair in zip(normal.stacks, slots, strict=True):
        padded = normal_form.padded(stacked, normal.plan.bucket)
        for side, tensor in zip(pair, (padded.up, padded.down), strict=True):
            data = torch_bytes(tensor)
            step = data.nbytes // len(side)
            for number, slot in enumerate(side):
                slot.buffer = data[number * step : (number + 1) * step]


def _padded(module: Module, up: Slot, down: Slot, plan: Plan) -> Module:
    """The module with its factors in slots, in the shapes that they had but for the rank."""
    rank, before = plan.bucket, module.factors
    made = {
        "up": TensorRef("", (before["up"].shape[0], rank, *before["up"].shape[2:]), plan.dtype, up),
        "down": TensorRef("", (rank, *before["down"].shape[1:]), plan.dtype, down),
    }
    factors = {role: made[role] for role in before}
    return module._replace(factors=factors, scale=1.0, alpha=float(rank), rank=rank, alpha_tensor=None)


def _refuse_nonfinite(sketches: torch.Tensor, planned: Planned) -> NoReturn:
    names = planned.plan.names
    bad = [name for name, sketch in zip(names, sketches, strict=True) if not bool(sketch.isfinite().all())]
    raise NonFiniteError(
        f"{len(bad)} of {len(names)} modules hold NaN or Inf as {planned.plan.dtype}",
        path=planned.path,
        keys=bad,
        expected="Finite numbers were expected",
        todo="Take an earlier checkpoint of its training; or, if they do not fit the dtype, choose another --dtype",
    )
