"""Small checkpoints, where their tensors lie, and the naive rewrite that others are held against."""

from __future__ import annotations

import collections
import os

import pytest
import torch
from safetensors.torch import save_file

from loratools.io import header, open_tensors
from loratools.io.base import Shard, Weight
from loratools.io.rewrite import Rewrite


def tensors(seed=0):
    """Some of each width, one empty, one scalar; contents that occur nowhere else."""
    torch.manual_seed(seed)
    return {
        "a.weight": torch.randn(64, 33),
        "b.weight": torch.randn(7, 5).to(torch.bfloat16),
        "c.weight": torch.randn(31).half(),
        "d.weight": torch.randn(16, 16, 3, 3).half(),
        "empty": torch.zeros(0, 4),
        "odd": torch.randint(0, 255, (13,), dtype=torch.uint8),
        "step": torch.randn(()),
    }


def raw(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def safetensors(path, metadata=None, content=None):
    """A file, its Shard and its Weights."""
    save_file(content or tensors(), path, metadata=metadata)
    data = path.read_bytes()
    found = header.parse(data, len(data), str(path))
    weights = {
        name: Weight(name, entry.shape, entry.dtype, str(path), found.data_start + entry.start)
        for name, entry in found.entries.items()
    }
    return Shard(str(path), path.name, "", "safetensors", len(data), found.metadata, (*weights,)), weights


def pickled(path, flat):
    """Shard and Weights of what torch.save wrote: where each tensor's bytes are found."""
    data = path.read_bytes()
    with open_tensors(path) as file:
        weights = {}
        for key, ref in file.tensors.items():
            content = raw(flat[key])
            assert not content or data.count(content) == 1
            weights[key] = Weight(key, ref.shape, ref.dtype, str(path), data.index(content))
    return Shard(str(path), path.name, "", "pickle", len(data), {}, (*weights,)), weights


def rewritten(shard, weights, new, output, **options):
    with Rewrite(shard, weights, str(output), tuple(new), **options) as writer:
        for key, tensor in new.items():
            writer.put(key, memoryview(raw(tensor)))
        writer.finish()
    return output.read_bytes()


def naive(source, weights, new):
    data = bytearray(source)
    for key, tensor in new.items():
        content = raw(tensor)
        data[weights[key].start : weights[key].start + len(content)] = content
    return bytes(data)


def refuse(number):
    def call(*_, **__):
        raise OSError(number, os.strerror(number))

    return call


CHANGED = [(), ("a.weight",), ("odd", "step", "empty"), ("b.weight", "c.weight", "d.weight"), (*tensors(),)]
CHANGES = pytest.mark.parametrize("changed", CHANGED, ids=lambda keys: "+".join(keys) or "none")


def checkpoint(seed, width=0):
    """A trainer's file: tensors in nested dicts among other objects, two of them tied, a view of a larger storage."""
    content = tensors(seed)
    content["tied"] = content["d.weight"]
    torch.manual_seed(seed + 100)
    content["slice"] = torch.randn(40)[11:20]
    value = {
        "state_dict": collections.OrderedDict(content),
        "epoch": 7,
        "name": "x" * width,
        "lr": [0.1, (2, None)],
    }
    return value, content
