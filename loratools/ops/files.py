"""Adapters from paths and back: finding the weights and the configuration that belong together."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

from loratools import formats, io
from loratools.errors import MissingFileError, NotAnAdapterError, OptionError
from loratools.formats._read import refuse_other_types
from loratools.io import storage
from loratools.io._model_files import read_config
from loratools.io.links import refuse_leaving
from loratools.io.uploading import uploads
from loratools.model import Adapter
from loratools.ops._cast import cast as cast
from loratools.ops._cast import cast_module as cast_module
from loratools.ops._outputs import SUFFIXES as SUFFIXES
from loratools.ops._outputs import PathLike as PathLike
from loratools.ops._outputs import check_name as check_name
from loratools.ops._outputs import check_output as check_output
from loratools.ops._outputs import layout_of as layout_of
from loratools.ops._outputs import within as within
from loratools.tensors import TensorRef

CONFIG = "adapter_config.json"
_LORALIB = (".lora_A", ".lora_B")
STORE_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}

_MODEL_FILES = ("config.json", "model_index.json")  # what tells that a folder is a model's
# Where a folder keeps its weights, best first.
_WEIGHTS = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapters.safetensors",
    "adapters.npz",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
    "pytorch_adapter.bin",
    "adapter_0.safetensors",
)
# PEFT's file of weights, by either name; of two, programs disagree which counts.
_PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def weights_of(folder: str) -> str | None:
    """The file that holds a folder's adapter, or None where the folder is not an adapter's."""
    found = (os.path.join(folder, name) for name in _WEIGHTS)
    return next((path for path in found if storage.is_file(path)), None)


def read(path: PathLike, *, arch: str | None = None, embedded: bool = False) -> Adapter:
    """Whatever a path holds, in the common model; its ``type`` says what it is.

    Args:
        path: A file, or a folder that is an adapter.
        arch: The architecture, overriding detection.
        embedded: Whether to read the LoRA that an IP-Adapter may hold beside its projections, too.

    Raises:
        LoraError: It cannot be read.
    """
    return named(io.open_tensors(_file(storage.pinned(path))), arch=arch, embedded=embedded)


def named(opened: io.TensorFile, *, arch: str | None = None, embedded: bool = False) -> Adapter:
    """Whatever an open file holds, in the common model; see ``read``.

    Args:
        opened: The file; its tensors may have been replaced by others of the same names and shapes.
        arch: The architecture, overriding detection.
        embedded: Whether to read the LoRA that an IP-Adapter may hold beside its projections, too.

    Raises:
        LoraError: It cannot be read.
    """
    file = opened.path
    config = {} if opened.container == "gguf" else _config(file, opened.tensors)
    keys = list(opened.tensors)
    listed = opened.container == "pickle" and keys == [str(number) for number in range(len(keys))]
    return formats.read(
        opened.tensors,
        metadata=opened.metadata,
        config=config,
        container=opened.container,
        sequence=listed and len(keys) > 1,
        arch=arch,
        path=file,
        embedded=embedded,
    )


def load(path: PathLike, *, arch: str | None = None, embedded: bool = False) -> Adapter:
    """An adapter, lazily: names, shapes and scales now, data on request.

    Args:
        path: A file, or a folder that is an adapter.
        arch: The architecture, overriding detection.
        embedded: Whether the LoRA in an IP-Adapter counts as one.

    Raises:
        NotAnAdapterError: The file is something else; the message says what.
        LoraError: It cannot be read.
    """
    adapter = read(path, arch=arch, embedded=embedded)
    if not adapter.modules or not embedded:
        refuse_other_types(adapter)
    return adapter


def bakeable(path: PathLike, *, arch: str | None = None) -> Adapter:
    """What changes a base model's weights: an adapter, or (IA)³, which cannot be merged but baked.

    Args:
        path: A file, or a folder that is an adapter.
        arch: The architecture, overriding detection.

    Raises:
        NotAnAdapterError: The file is something else; the message says what.
        LoraError: It cannot be read.
    """
    adapter = read(path, arch=arch)
    if adapter.type != "ia3" or not adapter.modules:
        refuse_other_types(adapter)
    return adapter


def _file(given: str) -> str:
    if not storage.is_dir(given):
        return given
    found = weights_of(given)
    if found is not None:
        refuse_leaving(found, given)
        return found
    inside = storage.names(given)
    names = sorted(name for name in inside if name.lower().endswith(SUFFIXES))
    if len(names) == 1:
        refuse_leaving(os.path.join(given, names[0]), given)
        return os.path.join(given, names[0])
    if any(name in _MODEL_FILES or name.endswith(".index.json") for name in inside):
        raise NotAnAdapterError(
            "this is the folder of a model, not of a LoRA adapter",
            path=given,
            expected=f"An adapter folder has {_WEIGHTS[0]} beside {CONFIG}",
            todo="Check the order of the files: the base model comes first, then adapters",
        )
    raise MissingFileError(
        "the folder holds no adapter" if not names else f"the folder holds {len(names)} weight files",
        path=given,
        keys=names,
        expected=f"An adapter folder has {_WEIGHTS[0]} beside {CONFIG}",
        todo="Name the file itself",
    )


def _config(file: str, tensors: Mapping[str, TensorRef]) -> Mapping[str, Any]:
    """adapter_config.json, where the file is one that it describes rather than a mere neighbour."""
    folder, name = os.path.split(file)
    beside = os.path.join(folder, CONFIG)
    # What loralib writes states all that it has to say, whatever lies beside it.
    whole = bool(tensors) and all(key.endswith(_LORALIB) for key in tensors)
    described = ("adapter" in name.lower() and not whole) or any(
        key.startswith("base_model.") for key in tensors
    )
    if not described or not storage.is_file(beside):
        return {}
    return read_config(folder, CONFIG)


@uploads
def save(
    adapter: Adapter,
    path: PathLike,
    *,
    layout: str | None = None,
    dtype: str = "keep",
    drop: Iterable[str] = (),
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write an adapter.

    Args:
        adapter: From ``load``, ``merge``, …
        path: A file, or a folder where the layout wants one (PEFT).
        layout: Default: the one it came in.
        dtype: "float32", "float16", "bfloat16", "float64", or "keep".
        drop: What may be left out: "extras", the tensors that belong to no module; into another layout, whatever
            it cannot hold (see ``convert``).
        overwrite: Whether an existing output may be replaced.
        progress: Called after each tensor with its size in bytes.

    Returns:
        Bytes written.

    Raises:
        LayoutError: The layout cannot hold everything; the message names the keys.
        WriteError: The output could not be written; nothing was left behind.
    """
    form = formats.get(layout or adapter.layout.name)
    if form.name != adapter.layout.name:
        from loratools.ops import convert

        convert.writable(form.name)
        container = check_name(path, form.name)
        document = convert.convert(adapter, form.name, dtype=dtype, drop=drop, container=container).document
    else:
        prepared = prepare(adapter, layout=layout, dtype=dtype, drop=drop)
        document = _document(prepared, form)
        container = check_name(path, form.name)
    return write(document, form, path, container=container, overwrite=overwrite, progress=progress)


def write(
    document: formats.Document,
    form: formats.Format,
    path: PathLike,
    *,
    container: str = "safetensors",
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
    check: Callable[[str], None] | None = None,
) -> int:
    """Write a document, whole or not at all.

    Args:
        document: From ``formats.document``.
        form: Its layout.
        path: A file, or a folder where the layout wants one.
        container: "safetensors", "pickle" or "gguf".
        overwrite: Whether an existing output may be replaced.
        progress: Called after each tensor with its size in bytes.
        check: Called with the path of what was written, before it takes its name; an error keeps it from that.

    Returns:
        Bytes written.

    Raises:
        WriteError: The output could not be written; nothing was left behind.
    """
    order: Literal["given", "canonical"] = "given" if document.ordered else "canonical"
    if container == "pickle":
        size: int = io.write_pickle_list(
            path, document.tensors, overwrite=overwrite, progress=progress, check=check
        )
        return size
    if container == "gguf":
        return io.write_gguf(
            path,
            document.tensors,
            document.metadata,
            overwrite=overwrite,
            progress=progress,
            check=check,
        )
    if not form.folder:
        return io.write_safetensors(
            path,
            document.tensors,
            document.metadata,
            overwrite=overwrite,
            order=order,
            computed=document.computed,
            progress=progress,
            check=check,
        )
    replaced = _PEFT_WEIGHTS if form.weights in _PEFT_WEIGHTS else ()
    with io.atomic_folder(path, overwrite, replaced) as folder:
        written = io.write_safetensors(
            folder / form.weights,
            document.tensors,
            document.metadata,
            order=order,
            computed=document.computed,
            progress=progress,
        )
        text = _config_text(document.config)
        if text:
            (folder / CONFIG).write_text(text, "utf-8", newline="\n")
        if check is not None:
            check(os.fspath(folder))
    return written + len(text.encode())


def size(adapter: Adapter) -> int:
    """Bytes that ``save`` would write in the adapter's own layout, header and configuration included."""
    form = formats.get(adapter.layout.name)
    return document_size(_document(adapter, form), form)


def _document(adapter: Adapter, form: formats.Format) -> formats.Document:
    """An adapter in its own layout, with the one alpha that some layouts have for all modules."""
    if form.alpha == "file" and not adapter.order:
        from loratools.ops import _one_alpha

        adapter = replace(adapter, modules=_one_alpha.modules(adapter.modules))
    return formats.document(adapter, adapter.layout, form)


def document_size(document: formats.Document, form: formats.Format) -> int:
    """Bytes that ``write`` would write, header and configuration included."""
    if form.container == "gguf":
        return io.gguf_size(document.tensors, document.metadata)
    specs = [(ref.name, ref.dtype, ref.shape) for ref in document.tensors]
    header = io.build(specs if document.ordered else io.canonical_order(specs), document.metadata)
    config = len(_config_text(document.config).encode()) if form.folder else 0
    return len(header) + sum(ref.nbytes for ref in document.tensors) + config


def _config_text(config: Mapping[str, Any] | None) -> str:
    return json.dumps(dict(config), indent=2, ensure_ascii=False) if config is not None else ""


def prepare(
    adapter: Adapter, *, layout: str | None = None, dtype: str = "keep", drop: Iterable[str] = ()
) -> Adapter:
    """The adapter as it will be written: cast, and without what may be dropped."""
    unknown = set(drop) - {"extras"}
    if unknown:
        raise OptionError(f"nothing called {sorted(unknown)[0]!r} can be dropped", candidates=["extras"])
    if "extras" in set(drop) and adapter.extras:
        kept = tuple(key for key in adapter.order if key not in adapter.extras)
        adapter = replace(adapter, extras={}, order=kept, config=without_extras(adapter.config))
    if dtype == "keep":
        return adapter
    if dtype not in STORE_DTYPES:
        raise OptionError(f"there is no store dtype {dtype!r}", candidates=[*STORE_DTYPES, "keep"])
    wanted = STORE_DTYPES[dtype]
    modules = {target: cast_module(module, wanted) for target, module in adapter.modules.items()}
    # Hashes and orders of the old bytes say nothing of the new ones.
    order = adapter.order if layout is None and adapter.layout.name != "kohya" else ()
    return replace(adapter, modules=modules, order=order)


def without_extras(config: Mapping[str, Any]) -> dict[str, Any]:
    """A PEFT configuration that announces no tensors beside the factors."""
    announced = {"modules_to_save": None, "trainable_token_indices": None, "bias": "none"}
    return {key: announced.get(key, value) for key, value in config.items()}
