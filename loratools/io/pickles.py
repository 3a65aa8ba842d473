"""Files of torch.save (``.ckpt``, ``.pt``, ``.pth``, ``.bin``), read without running any code in them.

Two locks: a walk over the opcodes refuses every import but those that rebuild tensors and plain containers,
and torch's own restricted unpickler (``weights_only=True``) does the reading. The first also names what the
second would refuse, and holds for older versions of torch whose restricted unpickler had gaps.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterable, Mapping
from typing import Any

from loratools.errors import MalformedFileError, UnsafePickleError
from loratools.io.archive import check_sums, open_archive
from loratools.io.flatten import flatten
from loratools.io.mapped import TensorFile, damaged
from loratools.io.opcodes import Global, scan

# What rebuilds tensors and plain containers. Sparse, quantised and meta tensors are among them, so that they
# are refused by their key rather than as code.
_HARMLESS = re.compile(
    r"collections\.(OrderedDict|Counter)"
    r"|(builtins|__builtin__)\.(set|bytearray|complex)"
    r"|_codecs\.encode"
    r"|torch\.(Size|Tensor|device)"
    r"|torch(\.cuda)?(\.sparse)?\.[A-Z][A-Za-z0-9]*(Storage|Tensor)"
    r"|torch\.storage\.(UntypedStorage|TypedStorage)"
    r"|torch\.(bool|bfloat16|(float|complex|u?int|bits|quint|qint)[a-z0-9_]*|per_(tensor|channel)_[a-z_]+)"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state|qtensor"
    r"|sparse_tensor|meta_tensor_no_storage|nested_tensor|device_tensor_from_cpu_tensor)"
    r"|torch\._tensor\._rebuild_from_type_v2"
    r"|torch\.nn\.parameter\.Parameter"
    r"|torch\.serialization\._get_layout"
)

# Bytes per element by the name of torch's storage; where none is named, one.
_STORAGE_BYTES = {
    **{"ComplexDouble": 16, "ComplexFloat": 8, "Double": 8, "Long": 8, "Float": 4, "Int": 4, "QInt32": 4},
    **{"Half": 2, "BFloat16": 2, "Short": 2},
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
_LEGACY_PICKLES = 5  # magic number, version, system, the object, the storages' keys


def read_pickle(path: str, size: int) -> TensorFile:
    """Open what torch.save wrote, as a zip archive or in the form used before torch 1.6.

    A zip archive is mapped, not read; tied tensors and views keep sharing memory.

    Args:
        path: The file.
        size: Its size in bytes.

    Raises:
        UnsafePickleError: Reading it would take code; ``keys`` names the imports.
        MalformedFileError: It is damaged, or not torch.save's, or its tensors have no place in safetensors.
    """
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    mapped = _check_archive(path) if zipped else _check_legacy(path)
    value = _load(path, mapped=mapped)
    tensors, objects, wrapper = flatten(value, path)
    return TensorFile(path, "pickle", tensors, {}, size, objects, wrapper)


def _check_archive(path: str) -> bool:
    """Refuse damage and code; say whether the records lie uncompressed, so that they can be mapped."""
    with open_archive(path) as archive:
        check_sums(archive, path)
        members = archive.infolist()
    records, data = _torch_view(path)
    if "constants.pkl" in records:
        raise UnsafePickleError(
            "a TorchScript archive, which holds a program", path=path, keys=["torch.jit.load"]
        )
    found = scan(data, path)
    _refuse_code(found.imports, path)
    sizes = {info.filename.partition("/")[2]: info.file_size for info in members}
    _check_records(found.references, sizes, path)
    return not any(info.compress_type for info in members)


def _check_records(references: Iterable[Any], sizes: Mapping[str, int], path: str) -> None:
    """Refuse storages longer than the record that holds them: torch would read what lies behind it."""
    needed = _storages(references, path)
    short = [f"data/{key}" for key, bytes_ in needed.items() if bytes_ > sizes.get(f"data/{key}", -1)]
    if short:
        raise MalformedFileError(
            "records that are missing, or shorter than the tensors in them",
            path=path,
            keys=short,
            expected="The file is damaged",
            todo="Download the file again",
        )


def _storages(references: Iterable[Any], path: str) -> dict[str, int]:
    """The size in bytes of each storage that a pickle refers to, by its key.

    Raises:
        MalformedFileError: A reference is none that torch.save writes, so that what it would read cannot be told.
    """
    found: dict[str, int] = {}
    for reference in references:
        match reference:
            case ("storage", Global(name), str(key), _, int(count), *_) if count >= 0:
                kind = re.fullmatch(r"torch\.(?:cuda\.|storage\.)?(\w+)Storage", name)
                width = _STORAGE_BYTES.get(kind[1], 1) if kind else 1
                found[key] = max(found.get(key, 0), count * width)
            case _:
                raise MalformedFileError(
                    "the pickle refers to something other than a storage",
                    path=path,
                    expected="The file is damaged, or not what torch.save writes",
                    todo="Download the file again",
                )
    return found


def _torch_view(path: str) -> tuple[list[str], bytes]:
    """The records' names and the pickle, as torch's own reader sees them: two zip readers may disagree."""
    import torch

    try:
        with open(path, "rb") as file:
            reader = torch._C.PyTorchFileReader(file)
            return reader.get_all_records(), reader.get_record("data.pkl")
    except MemoryError:
        raise  # too large for this machine is not damaged
    except Exception as error:  # IndexError, OverflowError and others come out of its C++
        raise damaged(path, error, "the archive of torch.save") from error


def _check_legacy(path: str) -> bool:
    """Refuse damage, code, and pickles that torch.save did not write; these cannot be mapped."""
    with open(path, "rb") as file:
        legacy = _LEGACY_MAGIC in file.read(64)
        file.seek(0)
        scans = [scan(file, path) for _ in range(_LEGACY_PICKLES if legacy else 1)]
        left = os.fstat(file.fileno()).st_size - file.tell()
    _refuse_code((name for each in scans for name in each.imports), path)
    if not legacy:
        raise MalformedFileError(
            "a pickle that torch.save did not write",
            path=path,
            expected="A file of torch.save, or safetensors, was expected",
            todo="Save it again with safetensors",
        )
    needed = sum(_storages((each for found in scans for each in found.references), path).values())
    if needed > left:
        raise MalformedFileError(
            f"the file is truncated: its storages take {needed:,} bytes, and {left:,} follow the pickle",
            path=path,
            expected="A download that broke off, or a damaged file",
            todo="Download the file again",
        )
    return False


def _refuse_code(names: Iterable[str], path: str) -> None:
    wanted = list(dict.fromkeys(name for name in names if not _HARMLESS.fullmatch(name)))
    if wanted:
        raise UnsafePickleError(
            "the pickle would have to run code to be read; it wants to import",
            path=path,
            keys=wanted,
            expected="Only tensors and plain containers are read from a pickle",
            todo="If you trust it, load it in the program that saved it and save it again as safetensors",
        )


def _load(path: str, *, mapped: bool) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        # torch puts advice on unsafe loading around its reason.
        reason = re.search(r"WeightsUnpickler error: (.*)", str(error))
        raise damaged(path, ValueError(reason[1] if reason else error), "the pickle") from error
    except MemoryError:
        raise  # too large for this machine is not damaged
    except Exception as error:
        # A damaged file makes torch raise nearly anything: RuntimeError, EOFError, KeyError, struct.error, …
        raise damaged(path, error, "the file of torch.save") from error
