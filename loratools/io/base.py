"""The tensors of a base model by key: a file, a sharded checkpoint, or a diffusers model folder; headers only.

Sources: huggingface_hub's ``*.index.json`` (``weight_map``: the shard of each key) and diffusers' model folders, which
have one subfolder per network beside ``model_index.json``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from loratools.errors import MalformedFileError, MissingFileError, ReadError
from loratools.io.reader import open_tensors
from loratools.tensors import nbytes

INDEX = ".index.json"
_PIPELINE = "model_index.json"
_CONFIG = "config.json"
# What a library calls its own weights in a folder, best first; variants ("model.fp16.safetensors") come after.
_STEMS = ("model", "diffusion_pytorch_model", "pytorch_model", "consolidated")
_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")
_NETWORKS = ("unet", "transformer", "prior", "text_encoder")
_NEEDED = "The base's weights are needed, or their index beside all its shards: names and shapes are in their headers"


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
        name: Its path relative to the model's folder; of a single file its own name.
        part: The subfolder of a diffusers model that it belongs to, or empty.
        container: "safetensors" or "pickle".
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
        configs: By part, the content of its config.json.
        beside: All other files of the folder, relative to it: configurations, tokenizers, other variants' weights.
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
        MalformedFileError: A file or an index is damaged, or of a container that is not read (GGUF).
        LoraError: A file cannot be read.
    """
    given = os.fspath(path)
    if os.path.isdir(given):
        return Base(given, _folder(given))
    if given.endswith(INDEX) and os.path.basename(given) != _PIPELINE:
        return Base(given, {"": _sharded(given)})
    if given.endswith(".json") and os.path.isfile(given):
        raise MissingFileError(
            "a configuration, which names no weights",
            path=given,
            expected=_NEEDED,
            todo="Give the model's folder",
        )
    return Base(given, {"": _file(given)})


def _folder(folder: str) -> dict[str, dict[str, Weight]]:
    names = _listed(folder)
    # A pipeline's folder may have a checkpoint in one file beside its subfolders.
    if _PIPELINE not in names:
        own = _own(folder, names)
        if own is not None:
            return {"": own}
    inside = [name for name in names if os.path.isdir(os.path.join(folder, name))]
    if _PIPELINE in names or any(name in _NETWORKS for name in inside):
        parts = {name: _own(os.path.join(folder, name)) for name in inside}
        found = {name: weights for name, weights in parts.items() if weights is not None}
        if found:
            return found
    what = (
        "a configuration without weights"
        if {_CONFIG, _PIPELINE} & {*names}
        else "the folder holds no weights"
    )
    raise MissingFileError(
        what, path=folder, expected=_NEEDED, todo="Give the folder or file that holds them"
    )


def _own(folder: str, names: list[str] | None = None) -> dict[str, Weight] | None:
    """The weights that lie in a folder itself, or None where it has none."""
    listed = _listed(folder) if names is None else names
    indices = [name for name in listed if name.endswith(INDEX) and name != _PIPELINE]
    if indices:
        return _sharded(os.path.join(folder, min(indices, key=_preference)))
    files = [
        name for name in listed if name.endswith(_SUFFIXES) and os.path.isfile(os.path.join(folder, name))
    ]
    if not files:
        return None
    best = min(files, key=_preference)
    if len(files) > 1 and best.partition(".")[0] not in _STEMS:
        raise MissingFileError(
            f"the folder holds {len(files)} files of weights and no index",
            path=folder,
            keys=files,
            todo="Name the file itself",
        )
    return _file(os.path.join(folder, best))


def _preference(name: str) -> tuple[int, int, int, str]:
    """Safetensors before pickles, a library's own name before others, the plain file before its variants."""
    stem = name.partition(".")[0]
    return (
        ".safetensors" not in name,
        _STEMS.index(stem) if stem in _STEMS else len(_STEMS),
        name.count("."),
        name,
    )


def _listed(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise ReadError(
            f"cannot be read: {error.strerror}", path=folder, todo="Check its permissions"
        ) from error


def _file(path: str) -> dict[str, Weight]:
    with open_tensors(path) as opened:
        return {key: Weight(key, ref.shape, ref.dtype, path) for key, ref in opened.tensors.items()}


def _sharded(index: str) -> dict[str, Weight]:
    """The tensors of all shards that an index names."""
    shards = _weight_map(index)
    folder = os.path.dirname(index)
    missing = sorted(name for name in {*shards.values()} if not os.path.isfile(os.path.join(folder, name)))
    if missing:
        raise MissingFileError(
            f"{len(missing)} of {len({*shards.values()})} shards are missing",
            path=index,
            keys=missing,
            todo="Download them into the same folder",
        )
    found: dict[str, Weight] = {}
    for name in dict.fromkeys(shards.values()):
        found.update(_file(os.path.join(folder, name)))
    lost = [key for key in shards if key not in found]
    if lost:
        raise MalformedFileError(
            f"{len(lost)} of {len(shards)} tensors are in none of the shards",
            path=index,
            keys=lost,
            expected="Index and shards of one model were expected",
            todo="Download them again",
        )
    return found


def _weight_map(index: str) -> dict[str, str]:
    """The shard of each key, as an index has it."""
    try:
        with open(index, encoding="utf-8") as stream:
            said: Any = json.load(stream)
    except FileNotFoundError as error:
        raise MissingFileError("no such file", path=index, todo="Check the path") from error
    except (ValueError, OSError) as error:
        raise MalformedFileError(f"the index cannot be read: {error}", path=index) from error
    shards: Any = said.get("weight_map") if isinstance(said, dict) else None
    if not isinstance(shards, dict) or not shards or not all(_is_name(name) for name in shards.values()):
        raise MalformedFileError(
            "the index has no weight_map of file names",
            path=index,
            expected="An object was expected that names, for each key, a file in the same folder",
            todo="Download it again",
        )
    return shards


def _is_name(value: object) -> bool:
    """Whether this is the name of a file in the same folder."""
    return isinstance(value, str) and os.path.basename(value) == value != ""
