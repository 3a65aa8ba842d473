"""Where the bytes of the tensors of a torch.save file lie, so that they can be read and rewritten in place.

A zip archive keeps each storage as a record; torch maps the file as one piece, so that a storage's address less the
record's place in the file is the same number for all of them. The older form (before torch 1.6) has the storages one
after the other behind its pickles, in the order of their keys, each after its count of elements.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import product
from typing import IO, TYPE_CHECKING

from loratools.io.archive import open_archive, read_member
from loratools.io.mapped import TensorFile
from loratools.io.opcodes import scan
from loratools.io.storage import local
from loratools.tensors import TensorRef

if TYPE_CHECKING:
    import torch

_ZIP = b"PK\x03\x04"
_LOCAL_HEADER = 30  # bytes before a member's name in a zip archive; then follow the name and an extra field
_PICKLES_BEFORE = (
    3  # of the older form: magic number, version, system; then the object and the storages' keys
)
_COUNT = 8  # bytes of the count of elements before each storage of the older form
_SAMPLE = 64  # bytes of each end of a tensor that are compared with the file


def offsets(opened: TensorFile) -> dict[str, int]:
    """The file offset of each tensor's bytes, by key; little-endian and in C order there.

    Tensors that do not lie so are left out: transposed and conjugate views, compressed records, files of big-endian
    machines, and tensors that share some of their bytes but not all. Every offset is compared with the tensor.

    Args:
        opened: A pickle from :func:`loratools.io.open_tensors`.
    """
    tensors = {key: ref.load() for key, ref in opened.tensors.items() if ref.nbytes}
    path = local(opened.path)
    with open(path, "rb") as file:
        starts = _in_archive(path, file, tensors) if _is_zip(file) else _legacy(path, file, tensors)
        spans = {
            key: (start, start + opened.tensors[key].nbytes)
            for key, start in starts.items()
            if tensors[key].is_contiguous() and _same(file, start, opened.tensors[key])
        }
    return _apart(spans)


def _is_zip(file: IO[bytes]) -> bool:
    found = file.read(len(_ZIP)) == _ZIP
    file.seek(0)
    return found


def _in_archive(path: str, file: IO[bytes], tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Offsets in a zip archive whose storages were mapped."""
    records = _records(path, file)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()
    }
    origin = _origin(storages, records)
    if origin is None:
        return {}
    found: dict[str, int] = {}
    for key, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if records.get(storage.data_ptr() - origin) == storage.nbytes():
            found[key] = tensor.data_ptr() - origin
    return found


def _records(path: str, file: IO[bytes]) -> dict[int, int]:
    """The size of each record that is not compressed, by its place in the file; none if of a big-endian machine."""
    found: dict[int, int] = {}
    with open_archive(path) as archive:
        for info in archive.infolist():
            if info.filename.endswith("/byteorder") and read_member(archive, info.filename, path) == b"big":
                return {}
            if not info.compress_type:
                file.seek(info.header_offset + _LOCAL_HEADER - 4)
                lengths = file.read(4)
                if len(lengths) == 4:
                    start = info.header_offset + _LOCAL_HEADER + sum(struct.unpack("<HH", lengths))
                    found[start] = info.file_size
    return found


def _origin(storages: Mapping[int, int], records: Mapping[int, int]) -> int | None:
    """The address that the file's first byte is mapped to; None if there is no one that most storages agree on.

    Args:
        storages: Sizes in bytes by address.
        records: Sizes in bytes by place in the file.
    """
    votes: Counter[int] = Counter()
    places = _by_size(records)
    for size, addresses in _by_size(storages).items():
        there = places.get(size, [])
        # As many as there are records: both in order. All pairs only where some are unused, or were copied.
        pairs = zip(addresses, there) if len(addresses) == len(there) else product(addresses, there)  # noqa: B905
        votes.update(address - place for address, place in pairs if (address - place) % mmap.PAGESIZE == 0)
    best = votes.most_common(2)
    if not best or (len(best) == 2 and best[0][1] == best[1][1]):
        return None
    return best[0][0]


def _by_size(sizes: Mapping[int, int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for place in sorted(sizes):
        found.setdefault(sizes[place], []).append(place)
    return found


def _legacy(path: str, file: IO[bytes], tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Offsets in a file of the older form: its storages are met in one order by the pickle and by the tensors."""
    for _ in range(_PICKLES_BEFORE):
        scan(file, path)
    counts: dict[str, int] = {}
    for reference in scan(file, path).references:
        match reference:
            case ("storage", _, str(key), _, int(count), _):
                counts.setdefault(key, count)
    scan(file, path)
    storages = {each._cdata: each for each in (tensor.untyped_storage() for tensor in tensors.values())}
    keys = [key for key, count in counts.items() if count]
    if len(keys) != len(storages):
        return {}
    sizes = {key: storage.nbytes() for key, storage in zip(keys, storages.values(), strict=True)}
    begins = _after_each_other(file, counts, sizes)
    by_storage = dict(zip(storages, (begins.get(key) for key in keys), strict=True))
    found: dict[str, int] = {}
    for key, tensor in tensors.items():
        begin = by_storage[tensor.untyped_storage()._cdata]
        if begin is not None:
            found[key] = begin + tensor.data_ptr() - tensor.untyped_storage().data_ptr()
    return found


def _after_each_other(file: IO[bytes], counts: Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, int]:
    """Where the storages of the older form begin, by their keys; none where the file says otherwise."""
    place = file.tell()
    found: dict[str, int] = {}
    for key in sorted(counts):
        file.seek(place)
        if int.from_bytes(file.read(_COUNT), "little") != counts[key]:
            return {}
        found[key] = place + _COUNT
        place += _COUNT + sizes.get(key, 0)
    return found if place == os.fstat(file.fileno()).st_size else {}


def _same(file: IO[bytes], start: int, ref: TensorRef) -> bool:
    """Whether the file has the tensor's first and last bytes where they should be."""
    data = ref.raw()
    for at in (0, max(0, ref.nbytes - _SAMPLE)):
        file.seek(start + at)
        part = bytes(data[at : at + _SAMPLE])
        if file.read(len(part)) != part:
            return False
    return True


def _apart(spans: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """The starts of spans that are equal to, or apart from, every other one."""
    found: dict[str, int] = {}
    group: list[str] = []
    end = 0
    for key in sorted(spans, key=lambda key: spans[key]):
        start, stop = spans[key]
        if start >= end:
            found.update(_alike(group, spans))
            group, end = [], stop
        group.append(key)
        end = max(end, stop)
    found.update(_alike(group, spans))
    return found


def _alike(group: Iterable[str], spans: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """The starts of a group of overlapping spans if they are one and the same; else none."""
    starts = {key: spans[key][0] for key in group}
    return starts if len({spans[key] for key in starts}) == 1 else {}
