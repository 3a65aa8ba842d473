"""The tensors of a base model by key: a file, a sharded checkpoint, or a diffusers model folder.

What is there, and where, comes from headers alone; data is read one tensor at a time, never mapped, so that what a
process holds does not grow with the model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from loratools.errors import MalformedFileError, MissingFileError
from loratools.io import storage
from loratools.io._load import load, load_rows
from loratools.io._model_files import (
    CONFIG,
    INDEX,
    NEEDED,
    PIPELINE,
    Part,
    beside,
    is_index,
    listed,
    part_of,
    read_config,
    read_index,
    sharded,
)
from loratools.io.mapped import MappedSource, TensorFile
from loratools.io.reader import open_tensors
from loratools.tensors import nbytes

__all__ = [
    "INDEX",
    "Base",
    "Shard",
    "Weight",
    "config_of",
    "keys_of",
    "load",
    "load_rows",
    "read_index",
    "tied",
]

_NETWORKS = ("unet", "transformer", "prior", "text_encoder")


class Weight(NamedTuple):
    """One tensor of a base model.

    Attributes:
        key: Its name in the file.
        shape: As stored.
        dtype: The safetensors name of its store dtype.
        file: Where it lies.
        start: Where its bytes begin in the file, contiguous and little-endian; None where they do not lie so (views,
            compressed archives), and the tensor has to be loaded through :func:`loratools.io.open_tensors`.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    start: int | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes as stored."""
        return nbytes(self.shape, self.dtype)


class Shard(NamedTuple):
    """One file of tensors.

    Attributes:
        path: Where it lies.
        name: Its path relative to the model's folder, with "/" between names; of a single file its own name.
        part: The subfolder of a diffusers model that it belongs to, or empty.
        container: "safetensors", "pickle" or "npz".
        size: Of the file, in bytes.
        metadata: The string metadata of a safetensors file.
        keys: Its tensors, in the file's order.
    """

    path: str
    name: str
    part: str
    container: str
    size: int
    metadata: Mapping[str, str]
    keys: tuple[str, ...]


class Base(NamedTuple):
    """What a base model holds.

    Attributes:
        path: As it was given.
        parts: The tensors by key; in a diffusers folder one mapping for each subfolder, else all under "".
        folder: The folder that is the model; empty where it is a single file.
        shards: The files of tensors.
        indices: By part, the path of its index relative to the folder.
        configs: By part, the content of its config.json; empty where it has none.
        beside: All other files of the folder, relative to it, with "/" between names: configurations, tokenizers, other
            variants' weights. Hidden ones are left out.
    """

    path: str
    parts: Mapping[str, Mapping[str, Weight]]
    folder: str = ""
    shards: tuple[Shard, ...] = ()
    indices: Mapping[str, str] = {}
    configs: Mapping[str, Mapping[str, Any]] = {}
    beside: tuple[str, ...] = ()


def keys_of(path: str | os.PathLike[str]) -> Base:
    """The tensors of a base model, by the headers of its files; all of them are closed again.

    Args:
        path: A file (safetensors or a pickle), an index, or a folder: sharded, of one file, or diffusers'.

    Raises:
        MissingFileError: There is nothing, no weights, or not all shards.
        MalformedFileError: A file, an index or a configuration is damaged, a tensor is in two shards, an index names
            files elsewhere, or a container is not read (GGUF).
        LoraError: A file cannot be read.
    """
    given = storage.pinned(path)
    folder, name = os.path.split(given.rstrip("/") if storage.is_url(given) else given)
    if storage.is_dir(given):
        return _model(given, given, _parts(given))
    if is_index(name):
        return _model(given, folder or os.curdir, {"": sharded(folder, name)})
    if name.endswith(".json") and storage.is_file(given):
        raise MissingFileError(
            "a configuration, which names no weights",
            path=given,
            expected=NEEDED,
            todo="Give the model's folder",
        )
    shard, weights = _file(given, name, "")
    return Base(given, {"": weights}, shards=(shard,), configs={"": {}})


def config_of(path: str | os.PathLike[str]) -> tuple[str, Mapping[str, Any]]:
    """The configuration of a base model and where it lies, be its weights there or not; empty where it has none.

    Args:
        path: A model's folder, a configuration itself, or a file of weights with its configuration beside.

    Raises:
        MissingFileError: There is nothing of this name.
        MalformedFileError: The configuration is not a JSON object.
    """
    given = storage.pinned(path)
    folder, name = os.path.split(given)
    if name.endswith(".json") and not is_index(name) and storage.is_file(given):
        return given, read_config(folder or os.curdir, name)
    place = given if storage.is_dir(given) else folder or os.curdir
    return storage.below(place, CONFIG), read_config(place)


def tied(base: Base) -> tuple[tuple[Weight, ...], ...]:
    """Groups of tensors whose bytes are the same ones of the same file, so that changing one changes all of its group.

    Only pickles can hold such, and only tensors with a known ``start`` are found.
    """
    groups: dict[tuple[str, int], list[Weight]] = {}
    for part in base.parts.values():
        for weight in part.values():
            if weight.start is not None and weight.nbytes:
                groups.setdefault((weight.file, weight.start), []).append(weight)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def _parts(folder: str) -> dict[str, Part]:
    """The weights of a folder by subfolder, or its own under ""."""
    names = listed(folder)
    # A pipeline's folder may have a checkpoint in one file beside its subfolders.
    if PIPELINE not in names:
        own = part_of(folder, names)
        if own is not None:
            return {"": own}
    inside = [name for name in names if storage.is_dir(storage.below(folder, name))]
    if PIPELINE in names or any(name in _NETWORKS for name in inside):
        places = {name: storage.below(folder, name) for name in inside}
        parts = {name: part_of(place, listed(place), folder) for name, place in places.items()}
        found = {name: part for name, part in parts.items() if part is not None}
        if found:
            return found
    what = (
        "a configuration without weights" if {CONFIG, PIPELINE} & {*names} else "the folder holds no weights"
    )
    raise MissingFileError(what, path=folder, expected=NEEDED, todo="Give the folder or file that holds them")


def _model(given: str, folder: str, parts: Mapping[str, Part]) -> Base:
    """A model that is a folder."""
    weights: dict[str, dict[str, Weight]] = {}
    shards: list[Shard] = []
    for name, part in parts.items():
        place = storage.below(folder, name) if name else folder
        read = [_file(storage.below(place, file), _within(name, file), name) for file in part.files]
        weights[name] = _together(read, place, part)
        shards += [shard for shard, _ in read]
    indices = {name: _within(name, part.index_name) for name, part in parts.items() if part.index_name}
    return Base(
        given,
        weights,
        folder=folder,
        shards=tuple(shards),
        indices=indices,
        configs={
            name: read_config(storage.below(folder, name) if name else folder, whole=folder) for name in parts
        },
        beside=beside(folder, {*(shard.name for shard in shards), *indices.values()}),
    )


def _within(part: str, name: str) -> str:
    return f"{part}/{name}" if part else name


def _file(path: str, name: str, part: str) -> tuple[Shard, dict[str, Weight]]:
    """One file of tensors, by its header."""
    with open_tensors(path) as opened:
        if opened.container == "gguf":
            raise MalformedFileError(
                "a GGUF file, whose weights are not read as a base model's",
                path=path,
                expected="The model as it was published was expected: safetensors, or a pickle of torch.save",
                todo="Give the model that the GGUF file was made from",
            )
        starts = _starts(opened)
        weights = {
            key: Weight(key, ref.shape, ref.dtype, path, starts.get(key))
            for key, ref in opened.tensors.items()
        }
        shard = Shard(path, name, part, opened.container, opened.size, dict(opened.metadata), tuple(weights))
    return shard, weights


def _starts(opened: TensorFile) -> Mapping[str, int]:
    """Where each tensor's bytes begin in the file, as far as they lie there as they are."""
    if opened.container == "pickle":
        from loratools.io.pickle_offsets import offsets

        return offsets(opened)
    return {
        key: ref.source.start
        for key, ref in opened.tensors.items()
        if isinstance(ref.source, MappedSource) and not ref.transposed
    }


def _together(read: Iterable[tuple[Shard, dict[str, Weight]]], place: str, part: Part) -> dict[str, Weight]:
    """The tensors of all shards of one part, each of them in one shard alone, and none missing."""
    found: dict[str, Weight] = {}
    twice: list[str] = []
    for _, weights in read:
        twice += [key for key in weights if key in found]
        found.update(weights)
    if twice:
        raise MalformedFileError(
            f"{len(twice)} tensors are in more than one of the shards",
            path=storage.below(place, part.index_name),
            keys=twice,
            expected="Each was expected once",
            todo="Download the shards again, those of one model alone",
        )
    lost = [key for key in part.said if key not in found]
    if lost:
        raise MalformedFileError(
            f"{len(lost)} of {len(part.said)} tensors are in none of the shards",
            path=storage.below(place, part.index_name),
            keys=lost,
            expected="Index and shards of one model were expected",
            todo="Download them again",
        )
    return found
