"""Which files of a folder are a model, by their names: weights, indices, configurations, and what lies beside them.

Sources: huggingface_hub's and transformers' ``*.index.json`` (``weight_map``: the shard of each key; a variant's name
stands before ``.json``) and diffusers' model folders, with one subfolder per network beside ``model_index.json``.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from loratools.errors import LoraError, MalformedFileError, MissingFileError, ReadError
from loratools.io import json_text, storage, unchanged
from loratools.io.links import refuse_leaving

INDEX = ".index.json"
CONFIG = "config.json"
PIPELINE = "model_index.json"
NEEDED = "The base's weights are needed, or their index beside all its shards: names and shapes are in their headers"

# What a library calls its own weights in a folder, best first; variants ("model.fp16.safetensors") come after.
STEMS = ("model", "diffusion_pytorch_model", "pytorch_model", "consolidated")
SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")


class Part(NamedTuple):
    """The weights in one folder.

    Attributes:
        files: Names of its files of tensors, in the index's order.
        index_name: Of their index, or empty.
        said: What the index says: the file of each key.
    """

    files: tuple[str, ...]
    index_name: str = ""
    said: Mapping[str, str] = {}


def is_index(name: str) -> bool:
    """Whether a file of this name is the index of shards."""
    return name.endswith(INDEX) or (".index." in name and name.endswith(".json"))


def listed(folder: str) -> list[str]:
    """The names in a folder, sorted, without hidden ones.

    Raises:
        ReadError: It cannot be read.
    """
    try:
        return sorted(name for name in storage.names(folder) if not name.startswith("."))
    except LoraError:
        raise
    except OSError as error:
        raise ReadError(
            f"cannot be read: {error.strerror}", path=folder, todo="Check its permissions"
        ) from error


def part_of(folder: str, names: Collection[str], whole: str = "") -> Part | None:
    """The weights that lie in a folder itself, or None where it has none.

    Args:
        folder: The folder.
        names: Of what is in it.
        whole: The model's folder, where this is one in it.

    Raises:
        MissingFileError: Files of which none is the model, or not all shards.
        MalformedFileError: An index that is damaged or unsafe.
    """
    indices = [name for name in names if is_index(name)]
    files = [
        name for name in names if name.endswith(SUFFIXES) and storage.is_file(storage.below(folder, name))
    ]
    if not indices and not files:
        return None
    best = min((*indices, *files), key=_preference)
    if best in indices:
        return sharded(folder, best, whole)
    if len(files) > 1 and _stem(best) not in STEMS:
        raise MissingFileError(
            f"the folder holds {len(files)} files of weights and no index",
            path=folder,
            keys=files,
            todo="Name the file itself",
        )
    if _shards_told(best) > 1:
        raise MissingFileError(
            f"one of {_shards_told(best)} shards, without an index",
            path=storage.below(folder, best),
            expected=NEEDED,
            todo="Download the index and the other shards into the same folder",
        )
    refuse_leaving(storage.below(folder, best), whole or folder)
    return Part((best,))


def sharded(folder: str, index: str, whole: str = "") -> Part:
    """The shards that an index names, all of them there.

    Args:
        folder: Of the index.
        index: Its name.
        whole: The model's folder, where the index is in one within it.

    Raises:
        MissingFileError: Some are not.
        MalformedFileError: The index is damaged, or names files elsewhere, or links to such.
    """
    path = storage.below(folder, index)
    said: dict[str, str] = read_index(path)["weight_map"]
    files = tuple(dict.fromkeys(said.values()))
    missing = sorted(name for name in files if not storage.is_file(storage.below(folder, name)))
    if missing:
        raise MissingFileError(
            f"{len(missing)} of {len(files)} shards are missing",
            path=path,
            keys=missing,
            todo="Download them into the same folder",
        )
    for name in (index, *files):
        refuse_leaving(storage.below(folder, name), whole or folder)
    return Part(files, index, said)


def read_index(path: str) -> dict[str, Any]:
    """The content of an index, whose ``weight_map`` names files in the same folder.

    Raises:
        MissingFileError: There is no such file.
        MalformedFileError: It is no index, or names files elsewhere.
    """
    said = read_json(path, "the index")
    shards = said.get("weight_map") if isinstance(said, dict) else None
    if (
        not isinstance(shards, dict)
        or not shards
        or not all(isinstance(name, str) for name in shards.values())
    ):
        raise MalformedFileError(
            "the index has no weight_map of file names",
            path=path,
            expected="An object was expected that names, for each key, a file in the same folder",
            todo="Download it again",
        )
    outside = [name for name in dict.fromkeys(shards.values()) if not _is_name(name)]
    if outside:
        raise MalformedFileError(
            f"the index names {len(outside)} files that do not lie in its own folder",
            path=path,
            keys=outside,
            expected="An object was expected that names, for each key, a file in the same folder",
            todo="Do not use it, and download the model from where you trust it",
        )
    assert isinstance(said, dict)
    return said


def true_index(
    original: str | os.PathLike[str], weight_map: Mapping[str, str], sizes: Mapping[str, int]
) -> dict[str, Any]:
    """The content of an index as huggingface_hub and transformers write it.

    Args:
        original: The base's index, whose other statements are kept.
        weight_map: The file of each tensor, relative to the index.
        sizes: Of each tensor, in bytes.

    Raises:
        MissingFileError: There is no original.
        MalformedFileError: It is damaged.
    """
    said = read_index(os.fspath(original))
    before = said.get("metadata")
    metadata = dict(before) if isinstance(before, dict) else {}
    metadata["total_size"] = sum(sizes[key] for key in weight_map)
    return {**said, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def read_config(folder: str, name: str = CONFIG, *, whole: str = "") -> dict[str, Any]:
    """The content of a folder's config.json, or of another configuration in it; empty where it has none.

    Args:
        folder: The folder.
        name: Of the configuration.
        whole: The model's folder, where this is one in it.

    Raises:
        MalformedFileError: It is not a JSON object, or a link that leaves the folder.
    """
    path = storage.below(folder, name)
    if not storage.is_file(path):
        return {}
    refuse_leaving(path, whole or folder)
    said = read_json(path, "the configuration")
    if not isinstance(said, dict):
        raise MalformedFileError(
            f"the configuration is a JSON {type(said).__name__}",
            path=path,
            expected="An object was expected",
            todo="Get it again from where it was made",
        )
    return said


def beside(folder: str, own: Collection[str]) -> tuple[str, ...]:
    """All files of a folder but its ``own``, by their path relative to it, with "/" between names.

    Hidden ones, as a download's cache, are left out; links are followed.

    Raises:
        MalformedFileError: A link leaves the folder.
    """
    found = _elsewhere(folder) if storage.is_url(folder) else _walk(folder, "", ())
    return tuple(sorted(name for name in found if name not in own))


def _elsewhere(folder: str) -> Iterator[str]:
    for name in storage.tree(folder):
        if not any(part.startswith(".") for part in name.split("/")):
            yield name


def _walk(folder: str, under: str, above: tuple[str, ...]) -> Iterator[str]:
    path = storage.below(folder, under) if under else folder
    real = os.path.realpath(path)
    if real in above:  # a link to a folder that it lies in
        return
    for name in listed(path):
        inner = f"{under}/{name}" if under else name
        place = storage.below(folder, inner)
        if os.path.exists(place):
            refuse_leaving(place, folder)
        if os.path.isdir(place):
            yield from _walk(folder, inner, (*above, real))
        elif os.path.isfile(place):
            yield inner


def _preference(name: str) -> tuple[bool, int, int, bool, str]:
    """Safetensors before pickles, a library's own name before others, the plain file before its variants."""
    plain = name.removesuffix(".json").replace(".index", "") if is_index(name) else name
    stem = _stem(plain)
    rank = STEMS.index(stem) if stem in STEMS else len(STEMS)
    return ".safetensors" not in plain, rank, plain.count("."), not is_index(name), name


def _stem(name: str) -> str:
    return name.partition(".")[0]


def _shards_told(name: str) -> int:
    """How many shards a file's name says that there are: "model-00001-of-00004.safetensors"."""
    _, said, count = _stem(name).rpartition("-of-")
    return int(count) if said and count.isdecimal() else 1


def _is_name(name: str) -> bool:
    """Whether this is the name of a file in the same folder, on whatever system it is read."""
    return name not in ("", ".", "..") and not set("/\\\0") & {*name} and name[1:2] != ":"


def read_json(path: str, what: str) -> object:
    """The content of a JSON file; ``what`` is what messages call it.

    Raises:
        MissingFileError: There is no such file.
        MalformedFileError: It cannot be read.
    """
    unchanged.note(path)
    try:
        said: object = json_text.loads(storage.read_all(path, storage.TEXT).decode("utf-8"))
    except LoraError:
        raise
    except FileNotFoundError as error:
        raise MissingFileError(
            "no such file", path=path, expected="A JSON file was expected", todo="Check the path"
        ) from error
    except (ValueError, OSError) as error:
        raise _unread(f"{what} cannot be read: {error}", path) from error
    return said


def _unread(problem: str, path: str) -> MalformedFileError:
    return MalformedFileError(
        problem,
        path=path,
        expected="JSON text in UTF-8, with every name once, was expected",
        todo="Correct it, or get it again from where it was made",
    )
