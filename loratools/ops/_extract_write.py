"""The adapter of an extraction: its layout, its metadata, its configuration, and the name of its file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from loratools import __version__, archs, formats
from loratools.io import storage
from loratools.io.base import Base, keys_of
from loratools.model import Adapter, Module, Target
from loratools.ops import convert, files
from loratools.ops._extract_options import Options
from loratools.ops._extract_pairs import MATRIX, Stored
from loratools.ops._identify import identify
from loratools.tensors import TensorRef

RECORD = "loratools.extract"
_CAUSAL = "ForCausalLM"


def layout_for(arch: str, to: str | None) -> formats.Format:
    """The layout asked for; else Kohya's for architectures with names of their own, and PEFT's for all others.

    Raises:
        LayoutError: It cannot be written.
    """
    return convert.writable(to or ("kohya" if archs.get(arch).has_table else "peft"))


def output_name(tuned: files.PathLike, form: formats.Format, tag: str) -> str:
    """``<stem>-lora-r32.safetensors`` in the current folder, or the folder of that name where the layout is one."""
    path = os.fspath(tuned)
    path = path.rstrip("/").partition("@")[0] if storage.is_url(path) else os.path.normpath(path)
    stem = os.path.basename(path)
    if not storage.is_dir(os.fspath(tuned)):
        stem = stem.removesuffix(".json").removesuffix(".index")
        stem = os.path.splitext(stem)[0] or stem
    return f"{stem}-lora-{tag}" + ("" if form.folder else ".safetensors")


def arch_of(path: files.PathLike) -> str:
    """The architecture of a checkpoint, from its headers."""
    return identify(keys_of(path)).arch


def adapter(
    modules: Mapping[Target, Module],
    replaced: Sequence[Stored],
    base: Base,
    tuned: Base,
    arch: str,
    form: formats.Format,
    container: str,
    options: Options,
) -> Adapter:
    """An adapter in the layout's own terms.

    Args:
        modules: What was extracted.
        replaced: Tuned tensors that take the place of the base's; of PEFT's layout alone.
        base: The base, which a configuration names.
        tuned: The tuned checkpoint.
        arch: The architecture's name.
        form: The layout.
        container: "safetensors" or "pickle".
        options: What was asked for, for the record.
    """
    extras: dict[str, TensorRef] = {}
    for stored in replaced:
        # PEFT wraps the modules that it adapts.
        inside = "base_layer." if stored.target in modules else ""
        name = f"base_model.model.{stored.target.path}.{inside}{stored.leaf}"
        extras[name] = stored_ref(name, stored)
    record = {
        "version": __version__,
        "base": _name(base),
        "tuned": _name(tuned),
        "rule": options.text,
        "svd": options.svd,
    }
    config = _config(base, replaced)
    return Adapter(
        modules=modules,
        extras=extras,
        metadata={RECORD: json.dumps(record)},
        arch=arch,
        layout=files.layout_of(form, container),
        config=config if form.name == "peft" else {},
    )


def stored_ref(name: str, stored: Stored) -> TensorRef:
    """A checkpoint's tensor under another name, read when it is asked for."""
    from loratools.io.base import load
    from loratools.tensors import LazySource

    weight = stored.weight
    return TensorRef(name, weight.shape, weight.dtype, LazySource(lambda: load(weight)))


def _name(base: Base) -> str:
    # The full path says more of somebody's disk than a shared file should.
    return os.path.basename(os.path.normpath(base.path))


def _config(base: Base, replaced: Sequence[Stored]) -> dict[str, Any]:
    """What adapter_config.json says beside the modules: which model it is for."""
    own = base.configs.get("", {})
    architectures = own.get("architectures") or ()
    causal = any(isinstance(name, str) and name.endswith(_CAUSAL) for name in architectures)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": own.get("_name_or_path") or base.path,
        "task_type": "CAUSAL_LM" if causal else None,
    }
    whole = {
        each.target.path.rpartition(".")[2] for each in replaced if each.role != MATRIX or each.leaf != "bias"
    }
    if whole:
        config["modules_to_save"] = sorted(whole)
    if any(each.role == MATRIX and each.leaf == "bias" for each in replaced):
        config["bias"] = "all"
    return config


def spelt(found: Adapter, form: formats.Format) -> convert.Converted:
    """The adapter as its layout has it: fused or split as the layout names weights.

    Raises:
        LayoutError: The layout cannot hold everything.
    """
    return convert.convert(found, form.name, container=found.layout.container)
