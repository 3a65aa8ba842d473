"""Whether a tensor that no adapter touches is the base's: its bytes, or its values after a cast."""

from __future__ import annotations

import torch

from loratools.io.base import Weight, load
from loratools.io.regions import opened, read_at
from loratools.ops._verify_tasks import ABSENT, Kept, unexpected
from loratools.ops._verify_tensor import BLOCK, stored
from loratools.ops.checkpoint_results import VerifiedTensor

_PIECE = 1 << 20  # bytes compared at a time, which the caches hold


def untouched(task: Kept) -> VerifiedTensor | None:
    """None where the tensor is the base's, else what it is."""
    weight, baked = task.weight, task.baked
    if baked is None:
        return VerifiedTensor(task.key, "", "", ABSENT, 0.0, None, None, None, "")
    if baked.shape != weight.shape:
        return unexpected(
            task.key, baked.dtype, f"its shape is {list(baked.shape)}, not {list(weight.shape)}"
        )
    same = _same_bytes(weight, baked) if baked.dtype == weight.dtype else _same_after_cast(task, baked)
    return None if same else unexpected(task.key, baked.dtype, "")


def _same_bytes(one: Weight, other: Weight) -> bool:
    if one.start is None or other.start is None:
        first, second = (load(each).contiguous().reshape(-1).view(torch.uint8) for each in (one, other))
        return torch.equal(first, second)
    with opened(one.file) as first_file, opened(other.file) as second_file:
        pair = bytearray(_PIECE), bytearray(_PIECE)
        for done in range(0, one.nbytes, _PIECE):
            if one.nbytes - done < _PIECE:
                pair = bytearray(one.nbytes - done), bytearray(one.nbytes - done)
            read_at(first_file, one.start + done, pair[0], path=one.file)
            read_at(second_file, other.start + done, pair[1], path=other.file)
            if pair[0] != pair[1]:
                return False
    return True


def _same_after_cast(task: Kept, baked: Weight) -> bool:
    before, after = stored(task.weight, task.scale), stored(baked, task.baked_scale)
    for start in range(0, before.data.numel(), BLOCK):
        values = before.block(start)
        if after.scale is None:
            values = values.to(after.data.dtype).double()
        if not torch.equal(values.nan_to_num(), after.block(start).nan_to_num()):
            return False
    return True
