"""Small valid files of every format, which the fuzzers begin with; all are made here, none is kept."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from zlib import crc32

import numpy as np
import torch

from loratools.io import write_gguf
from loratools.tensors import from_torch
from tests import factories

_MODULE = re.compile(r"\.(alpha|dora_scale|(hada|lokr|lora)_.*|lora[._].*)$")
LIBRARY = b"/library"
"""Stands for the folder of a pack's adapters."""
_TWO = ("a.weight", "b.weight")


def headers() -> list[bytes]:
    """Safetensors files of every kind of entry that the header's reader tells apart."""
    table = {
        "__metadata__": {"format": "pt", "x": "é\\u00e9"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "F4", "shape": [2], "data_offsets": [24, 25]},
        "c": {"dtype": "BOOL", "shape": [0, 5], "data_offsets": [25, 25]},
        "d": {"dtype": "I64", "shape": [], "data_offsets": [25, 33]},
    }
    return [_framed(table, 33), _framed({}, 0), _framed({"\ud83d\ude00": table["a"]}, 24)]


def _framed(table: dict, size: int) -> bytes:
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


def adapters() -> list[bytes]:
    """Adapters of several layouts and kinds, a few modules each."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        said = {"ss_network_args": '{"conv_dim": 4}', "ss_network_dim": "4", "modelspec.architecture": "x"}
        files = [
            factories.kohya(place / "a.safetensors", metadata=said).file,
            factories.kohya(place / "b.safetensors", kind="loha").file,
            factories.kohya(place / "c.safetensors", kind="lokr").file,
            factories.kohya(place / "d.safetensors", dora="out").file,
            factories.diffusers(place / "e.safetensors").file,
            factories.peft(place / "f").file,
        ]
        return [_fewer(path.read_bytes(), 2) for path in files]


def _fewer(data: bytes, count: int) -> bytes:
    """A safetensors file of the first modules of another, with data of zeros."""
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    modules = list(dict.fromkeys(_MODULE.sub("", name) for name in table if name != "__metadata__"))[:count]
    kept, stop = {}, 0
    for name, entry in table.items():
        if name == "__metadata__":
            kept[name] = entry
        elif _MODULE.sub("", name) in modules:
            start, stop = stop, stop + entry["data_offsets"][1] - entry["data_offsets"][0]
            kept[name] = {**entry, "data_offsets": [start, stop]}
    return _framed(kept, stop)


def archives() -> list[bytes]:
    """What torch.save writes: a dict, nested ones, a list, views of one storage, half precision."""
    one = torch.arange(6.0).reshape(2, 3)
    values = [
        {"a": one, "b": one.half()},
        {"state_dict": {"a": one, "t": one.t()}, "epoch": 3, "names": ["x", ("y", 2)]},
        [torch.ones(2), torch.ones(3)],
        {"s": torch.nn.Parameter(one), "z": torch.empty(0), "n": {1: one.bfloat16()}},
    ]
    return [_saved(value, zipped=True) for value in values]


def legacy() -> list[bytes]:
    """The same in the form that was used before torch 1.6."""
    one = torch.arange(4.0)
    return [_saved({"a": one, "b": one[1:3]}, zipped=False), _saved([one.half()], zipped=False)]


def _saved(value: object, *, zipped: bool) -> bytes:
    made = io.BytesIO()
    torch.save(value, made, _use_new_zipfile_serialization=zipped)
    return made.getvalue()


def pickles() -> list[bytes]:
    """Pickles of every protocol, with what refers outside and what imports."""
    value = {"a": [1, 2.5, "x", b"y", None, True], ("b", 1): {3}, "c": complex(1, 2), "d": 2**70}
    return [pickle.dumps(value, protocol) for protocol in range(6)]


def arrays() -> list[bytes]:
    """Archives of numpy: stored and compressed, both orders, scalars, and objects."""
    made = []
    one = np.arange(6, dtype="<f4").reshape(2, 3)
    for save, extra in (
        (np.savez, {}),
        (np.savez_compressed, {"o": np.array([None])}),
        (np.savez, {"e": one[:0]}),
    ):
        stream = io.BytesIO()
        save(stream, a=one, b=np.asfortranarray(one), c=np.float16(1), **extra)
        made.append(stream.getvalue())
    return made


def ggufs() -> list[bytes]:
    """An adapter of llama.cpp's, and a header with values of every type."""
    said = {
        "general.type": "adapter",
        "general.architecture": "llama",
        "adapter.type": "lora",
        "adapter.lora.alpha": "16.0",
        "adapter.alora.invocation_tokens": "[3, 4, 5]",
    }
    names = ("blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        write_gguf(path, [from_torch(name, torch.ones(3, 4)) for name in names], said)
        whole = path.read_bytes()
        types = {"x.a": "array:string", "x.b": "bool", "x.d": "float64", "x.l": "array:int64"}
        many = {"x.a": '["p", "q"]', "x.b": "true", "x.d": "0.5", "x.l": json.dumps(list(range(80)))}
        write_gguf(path, [], {**many, "gguf.types": json.dumps(types)}, overwrite=True)
        return [whole, path.read_bytes()]


def indices() -> list[bytes]:
    """Indices of shards."""
    said = {"metadata": {"total_size": 48}, "weight_map": dict.fromkeys(_TWO, "one.safetensors")}
    return [json.dumps(said).encode(), json.dumps({"weight_map": {"a": "two.bin"}}).encode()]


def shard() -> bytes:
    """The shard that the indices name."""
    entry = {"dtype": "F32", "shape": [2, 3]}
    return _framed(
        {name: {**entry, "data_offsets": [24 * at, 24 * at + 24]} for at, name in enumerate(_TWO)}, 48
    )


def models() -> list[bytes]:
    """Configurations of models, of a pipeline and of a network."""
    llama = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 2, "tie_word_embeddings": True}
    return [
        json.dumps(llama).encode(),
        json.dumps(
            {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
        ).encode(),
    ]


def configurations() -> list[bytes]:
    """adapter_config.json as PEFT writes it, with patterns and what lies beside the factors."""
    told = factories.lora_config(4, 8.0, ["q_proj", "v_proj"])
    patterns = {"rank_pattern": {r"^model\.layers\.0\..*": 2}, "alpha_pattern": {"q_proj": 4}}
    more = {"modules_to_save": ["lm_head"], "layers_to_transform": [0, 1], "layers_pattern": "layers"}
    whole = {**told, **patterns, **more, "use_dora": False, "target_modules": r".*\.(q|v)_proj"}
    return [json.dumps(each).encode() for each in (told, whole, {**told, "peft_type": "LOHA", "alpha": 4})]


def mlx_configurations() -> list[bytes]:
    """adapter_config.json as mlx-lm writes it."""
    said = {
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": 4, "scale": 20.0, "keys": ["x"]},
    }
    return [json.dumps(said).encode()]


def recipes() -> list[bytes]:
    """Recipes of merges."""
    full = {
        "recipe": 1,
        "version": "0.1.0",
        "inputs": [{"path": "a.safetensors", "weight": 0.5, "sha256": "00"}, {"path": "b.safetensors"}],
        "method": "ties",
        "options": {"density": 0.5},
        "component_weights": [{"denoiser": 1.0}],
        "block_weights": [[1, 0.5]],
        "weight_for": {"*attn*": 0.5},
        "protect": [{"path": "c.safetensors"}],
        "boost": 1.5,
        "layout": "kohya",
        "drop": ["extras"],
        "base": "model",
    }
    return [json.dumps(full).encode(), b'{"inputs": [{"path": "a"}]}']


def yaml_recipes() -> list[bytes]:
    """Recipes in other YAML, with an alias and a merge key."""
    return [b"inputs:\n  - &a {path: a.safetensors, weight: 1e-5}\n  - {<<: *a, path: b}\nmethod: linear\n"]


def journals() -> list[bytes]:
    """A journal of two finished tasks, and one whose end is torn off."""
    head = {"version": 2, "operation": "bake", "inputs": {"a": "1"}, "options": {"b": [1]}}
    lines = [json.dumps(value).encode() for value in (head, ["one", {"sum": 1}], ["two", None])]
    whole = b"".join(b"%08x %s\n" % (crc32(line), line) for line in lines)
    return [whole, whole[:-5]]


def patterns() -> list[bytes]:
    """A regular expression and, behind a line's end, a name."""
    pairs = (
        (r"(a+)+b", "aaaaaa"),
        (r".*\.(q|v)_proj", "model.q_proj"),
        (r"a{2,5}[^x]\d*?$", "aab1"),
        ("", ""),
    )
    return [f"{pattern}\n{name}".encode() for pattern, name in pairs]


def urls() -> list[bytes]:
    """URLs of a hub's repositories, and of none."""
    return [
        b"hf://org/name",
        b"hf://org/name@refs/pr/1/a/b.safetensors",
        b"hf://org/name@main",
        b"s3://bucket/key",
    ]


def library(folder: Path) -> None:
    """Two adapters and one that does what the first does; as small as can be, and of one time."""
    for name, seed in (("a", 0), ("b", 1), ("same", 0)):
        factories.peft(folder / name, seed=seed, rank=2)
    for file in folder.rglob("*"):
        os.utime(file, (0, 0))


def pack(folder: Path) -> list[bytes]:
    """The files of two packs of one library in one folder: of adapters, and of a shared basis.

    Returns:
        Their indices.
    """
    from loratools.ops.pack import pack as packed

    found = []
    with tempfile.TemporaryDirectory() as made:
        library(Path(made) / "library")
        for name, options in (("adapters", {}), ("shared", {"shared_basis": 2})):
            place = Path(made) / name
            packed([Path(made) / "library"], place, threads=1, **options)
            found.append((place / "index.json").read_bytes().replace(bytes(Path(made) / "library"), LIBRARY))
            shutil.copytree(place, folder, dirs_exist_ok=True)
    return found


def pack_indices() -> list[bytes]:
    """Indices of packs."""
    with tempfile.TemporaryDirectory() as folder:
        return pack(Path(folder) / "pack")


def pack_journals() -> list[bytes]:
    """The journal of a pack of which everything is made, as lines of JSON without checksums."""
    from loratools.io.work_folder import place_of
    from loratools.ops.pack import pack as packed

    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        library(place / "library")

        def interrupted(_name: str, number: int, count: int) -> None:
            if number == count:
                raise KeyboardInterrupt

        with suppress(KeyboardInterrupt):
            packed([place / "library"], place / "pack", resume=True, threads=1, progress=interrupted)
        lines = (place_of(place / "pack") / "journal").read_bytes().splitlines()
        plain = b"\n".join(line.partition(b" ")[2] for line in lines)
        return [plain.replace(bytes(place / "library"), LIBRARY)]
