"""What a bake's journal says of a tensor that is done, and what of that is believed.

A journal lies on the disk, where anything may have happened to it: what is not as it would have been written is taken
for nothing, and the tensor is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from loratools.io.checksums import checksum
from loratools.io.regions import Buffer
from loratools.ops.checkpoint_results import BakedTensor


class Said(NamedTuple):
    """A record that was read.

    Attributes:
        sums: Of each tensor's bytes, in the order in which they were put.
        crcs: The CRC-32 of each; empty where the file needs none.
        result: What became of a tensor that adapters changed, or None.
    """

    sums: tuple[str, ...]
    crcs: tuple[int, ...]
    result: BakedTensor | None


def record(data: Sequence[Buffer], crcs: Sequence[int], result: BakedTensor | None) -> dict[str, Any]:
    """What is noted of a task that is done, as JSON holds it.

    Args:
        data: The bytes of each tensor that it has put.
        crcs: The CRC-32 of each; empty where the file needs none.
        result: What became of a tensor that adapters changed, or None.
    """
    return {
        "sums": [checksum(each) for each in data],
        "crcs": list(crcs),
        "result": None if result is None else result._asdict(),
    }


def read(record: Any, keys: Sequence[str], *, key: str = "", summed: bool = False) -> Said | None:
    """A record as far as it can be believed; None where there is none, or it says something else.

    Args:
        record: From the journal.
        keys: The tensors that the task puts.
        key: The tensor that adapters change, by whose result it is told; empty where there is none.
        summed: Whether the file needs CRC-32.
    """
    try:
        sums, crcs = tuple(map(str, record["sums"])), tuple(map(int, record["crcs"]))
        result = None if record["result"] is None else _result(record["result"])
    except (TypeError, ValueError, KeyError, OverflowError):
        return None
    if len(sums) != len(keys) or len(crcs) != (len(keys) if summed else 0):
        return None
    return Said(sums, crcs, result) if (result.key if result is not None else "") == key else None


def _result(said: Any) -> BakedTensor:
    kept, error = said["kept"], said["error"]
    return BakedTensor(
        key=str(said["key"]),
        target=str(said["target"]),
        component=str(said["component"]),
        shape=tuple(map(int, said["shape"])),
        dtype=str(said["dtype"]),
        adapters=tuple(map(int, said["adapters"])),
        norm=float(said["norm"]),
        kept=None if kept is None else float(kept),
        error=None if error is None else float(error),
        sampled=bool(said["sampled"]),
        note=str(said["note"]),
    )
