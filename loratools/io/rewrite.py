"""Write a checkpoint from another: what stays is copied by the kernel behind the caller's back, what changes is put.

The output is a file that is there and empty (:func:`loratools.io.atomic_output` makes it, and turns what the system
refuses into its own error). Nothing here imports torch, so that copying goes on while torch is imported.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from loratools.errors import ConversionError, LayoutError, MalformedFileError, NameResolutionError
from loratools.io import storage
from loratools.io._archive_sums import ArchiveSums
from loratools.io._copier import sync_data
from loratools.io._layout import Slot, holds
from loratools.io._output import Output
from loratools.io.base import Shard, Weight
from loratools.io.header import build
from loratools.io.pieces import Range, gaps, joined
from loratools.io.regions import opened, read_at
from loratools.tensors import nbytes

__all__ = ["Computed", "Copied", "Restream", "Rewrite", "Slot", "fits", "holds", "sync_data"]

_METADATA = "__metadata__"


class Copied(NamedTuple):
    """A tensor of the output that is in another file as it shall be.

    Attributes:
        name: Its key in the output.
        weight: Where it is.
    """

    name: str
    weight: Weight


class Computed(NamedTuple):
    """A tensor of the output that will be put.

    Attributes:
        name: Its key.
        dtype: The safetensors name of its store dtype.
        shape: As it will be stored.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


class Rewrite(Output):
    """A file as another is, but for some tensors that change their values alone.

    Of safetensors the header stays, or gets other metadata in the same room. Of a torch.save archive everything else
    stays byte for byte, and the checksums of changed records are corrected.
    """

    def __init__(
        self,
        shard: Shard,
        weights: Mapping[str, Weight],
        output: str,
        changed: Collection[str],
        *,
        metadata: Mapping[str, str] | None = None,
        size: int | None = None,
    ) -> None:
        """Plan it; nothing is written yet.

        Args:
            shard: The file to write anew.
            weights: Its tensors by key.
            output: The file to write.
            changed: The tensors that will be put.
            metadata: The metadata of the output where it differs; see :func:`fits`.
            size: Of the source in bytes, where it is not the shard's.

        Raises:
            NameResolutionError: A key is not among the weights.
            ConversionError: A tensor lies compressed or scattered, or shares its bytes with one that stays.
            LayoutError: The metadata does not fit, or is for a pickle.
            MalformedFileError: An archive is damaged, or a tensor lies outside of its file.
        """
        total = shard.size if size is None else size
        slots = _slots(shard, weights, changed, total)
        head = b"" if metadata is None else _new_head(shard, metadata)
        taken = [(0, len(head)), *slots.values()]
        super().__init__(output, total, slots, gaps(shard.path, total, taken), head)
        self._source = shard.path
        self._whole = shard.path
        self.summed = shard.container == "pickle"
        self._sums = (
            ArchiveSums(storage.local(shard.path)) if self.summed and slots and _is_zip(shard.path) else None
        )

    def _check_source(self) -> None:
        found = storage.size(self._source)
        if found != self.total:
            raise MalformedFileError(
                f"the file has {found:,} bytes now, and had {self.total:,}",
                path=self._source,
                expected="It was changed since its header was read",
                todo="Let no other program write it meanwhile",
            )

    def _complete(self, target: int) -> None:
        if self._sums is not None:
            self._sums.renew(target, self._crcs)


class Restream(Output):
    """A safetensors file of its own order: tensors of other files, and such that are put."""

    def __init__(self, outputs: Sequence[Copied | Computed], path: str, metadata: Mapping[str, str]) -> None:
        """Plan it; nothing is written yet.

        Args:
            outputs: All tensors, in the order in which they shall lie.
            path: The file to write.
            metadata: String metadata.

        Raises:
            ConversionError: A tensor to copy lies compressed or scattered.
            LayoutError: Names that occur twice or cannot be written, metadata that is not text.
        """
        scattered = [item.name for item in outputs if isinstance(item, Copied) and item.weight.start is None]
        if scattered:
            raise _scattered(path, scattered)
        specs = [_spec(item) for item in outputs]
        head = build(specs, metadata)
        slots = {}
        ranges = []
        at = len(head)
        for item, (name, dtype, shape) in zip(outputs, specs, strict=True):
            stop = at + nbytes(shape, dtype)
            if isinstance(item, Computed):
                slots[name] = Slot(at, stop)
            elif (start := item.weight.start) is not None:
                ranges.append(Range(item.weight.file, start, start + stop - at, at))
            at = stop
        super().__init__(path, at, slots, joined(ranges), head)


def fits(shard: Shard, metadata: Mapping[str, str]) -> bool:
    """Whether a safetensors header has room for other metadata, so that its data may stay where it lies."""
    return _header_with(shard, metadata) is not None


def _spec(item: Copied | Computed) -> tuple[str, str, tuple[int, ...]]:
    if isinstance(item, Computed):
        return item
    return item.name, item.weight.dtype, item.weight.shape


def _slots(
    shard: Shard, weights: Mapping[str, Weight], changed: Collection[str], size: int
) -> dict[str, Slot]:
    """The places of the tensors that change."""
    unknown = [key for key in changed if key not in weights]
    if unknown:
        raise NameResolutionError("tensors that the file does not have", path=shard.path, keys=unknown)
    scattered = [key for key in changed if weights[key].start is None]
    if scattered:
        raise _scattered(shard.path, scattered)
    slots = {key: slot for key in changed if (slot := _place(weights[key])) is not None}
    outside = [key for key, slot in slots.items() if slot.stop > size]
    if outside:
        raise MalformedFileError(
            "tensors behind the end of the file",
            path=shard.path,
            keys=outside,
            expected=f"It has {size:,} bytes",
        )
    _check_tied(shard, weights, slots)
    return slots


def _check_tied(shard: Shard, weights: Mapping[str, Weight], slots: Mapping[str, Slot]) -> None:
    """Refuse to change bytes of tensors that shall stay; pickles alone have tensors that share them."""
    places = {key: place for key in shard.keys if (place := _place(weights[key])) is not None}
    tied = _overlapping(slots, {key: place for key, place in places.items() if key not in slots})
    if tied:
        raise ConversionError(
            "tensors that share their bytes with others that do not change alike",
            path=shard.path,
            keys=tied,
            expected="Tied tensors change together",
            todo="Write safetensors, where each has its own",
        )


def _place(weight: Weight) -> Slot | None:
    return None if weight.start is None else Slot(weight.start, weight.start + weight.nbytes)


def _overlapping(slots: Mapping[str, Slot], kept: Mapping[str, Slot]) -> list[str]:
    """Tensors that would change, by some of their bytes, with others, but for those that lie exactly alike."""
    places = [(*slot, 1, key) for key, slot in slots.items()] + [
        (*slot, 0, key) for key, slot in kept.items()
    ]
    found: list[str] = []
    # The reach of those before: of all tensors, and of those that change.
    ends = changed_end = 0
    last: tuple[int, int, int] | None = None
    for start, stop, changes, key in sorted(places):
        if start == stop:
            continue
        alike = last == (start, stop, changes)
        if not alike and start < (ends if changes else changed_end):
            found.append(key)
        ends = max(ends, stop)
        changed_end = max(changed_end, stop) if changes else changed_end
        last = (start, stop, changes)
    return found


def _scattered(path: str, keys: Sequence[str]) -> ConversionError:
    return ConversionError(
        "tensors whose bytes do not lie in the file as they are (compressed, or views)",
        path=path,
        keys=keys,
        expected="A file can be rewritten in place where each lies in one piece",
        todo="Write safetensors, where each has its own",
    )


def _is_zip(path: str) -> bool:
    with open(storage.local(path), "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _new_head(shard: Shard, metadata: Mapping[str, str]) -> bytes:
    if shard.container != "safetensors":
        raise LayoutError("a file of torch.save holds no metadata", path=shard.path, keys=metadata)
    head = _header_with(shard, metadata)
    if head is None:
        raise LayoutError(
            "the header has no room for the new metadata",
            path=shard.path,
            keys=metadata,
            expected="It must not become longer where the data stays in place",
            todo="Write less metadata",
        )
    return head


def _header_with(shard: Shard, metadata: Mapping[str, str]) -> bytes | None:
    """The file's first bytes with other metadata at its old place, as long as they were; None if it takes more."""
    build((), metadata)  # refuses what is not text
    with opened(shard.path) as file:
        start = bytearray(8)
        read_at(file, 0, start, path=shard.path)
        length = int.from_bytes(start, "little")
        said = bytearray(length)
        read_at(file, 8, said, path=shard.path)
    table = json.loads(bytes(said))
    if not metadata:
        table.pop(_METADATA, None)
    elif _METADATA in table:
        table[_METADATA] = dict(metadata)
    else:
        table = {_METADATA: dict(metadata), **table}
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    if len(text) > length:
        return None
    return length.to_bytes(8, "little") + text.ljust(length)
