"""Weights in a model's folder that a new model does not bring: an older model's, and copies in other formats.

transformers takes ``model.safetensors`` before an index of shards, and diffusers takes a folder for a pipeline by its
``model_index.json``: what is left of an older model would be loaded instead of the new one, or mixed with it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator

from loratools.errors import LoraError
from loratools.io import storage
from loratools.io._model_files import PIPELINE, STEMS, SUFFIXES, is_index, listed, read_json

# Weights of other programs and frameworks, beside those that are read here.
_WEIGHTS = (*SUFFIXES, ".npz", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot")
# What trainers save beside a model: no weights of it.
_TRAINING = ("optimizer", "rng_state", "scaler", "scheduler", "training_args", "trainer_state")
_NUMBER = re.compile(r"-\d+-of-\d+$")


def unbaked(beside: Iterable[str]) -> list[str]:
    """Of the files that lie beside a model's weights, those that hold weights as well: variants, other formats.

    Args:
        beside: Paths relative to the model's folder, with "/" between names.
    """
    return [
        name
        for name in beside
        if name.endswith(_WEIGHTS) and not name.rpartition("/")[2].startswith(_TRAINING)
    ]


def superseded(folder: str, written: Collection[str]) -> tuple[str, ...]:
    """Files of the model that a folder holds, which go when another one is written into it.

    They are the weights and indices that have a library's own name, their variants included, in the folder and in the
    subfolders of a diffusers model; and the index of such a model where the new one is none.

    Args:
        folder: The output; it need not exist.
        written: Every file of the new model, relative to the folder, with "/" between names.
    """
    if not os.path.isdir(folder):
        return ()
    names = listed(folder)
    places = {os.path.dirname(name) for name in written if name.endswith(SUFFIXES)}
    if PIPELINE in names:
        places |= {*_components(folder)}
    found = [name for place in sorted({"", *places}) for name in _weights(folder, place)]
    if PIPELINE in names:
        found.append(PIPELINE)
    return tuple(name for name in found if name not in written)


def _weights(folder: str, place: str) -> Iterator[str]:
    """The weights and indices of a library's own name in one folder."""
    path = storage.below(folder, place) if place else folder
    for name in listed(path) if os.path.isdir(path) else ():
        stem = _NUMBER.sub("", name.partition(".")[0])
        if stem in STEMS and (name.endswith(SUFFIXES) or is_index(name)):
            yield f"{place}/{name}" if place else name


def _components(folder: str) -> Iterator[str]:
    """The subfolders that a diffusers model's index names."""
    try:
        said = read_json(os.path.join(folder, PIPELINE), "the index")
    except LoraError:  # it was no model that could be loaded
        return
    if isinstance(said, dict):
        yield from (name for name in said if os.path.isdir(os.path.join(folder, name)))
