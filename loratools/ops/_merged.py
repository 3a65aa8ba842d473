"""What a merged adapter carries beside its modules: metadata, configuration, and tensors of no module."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loratools import __version__
from loratools.errors import LayoutError, OptionError
from loratools.model import Adapter, Module, Target
from loratools.ops import _metadata
from loratools.tensors import TensorRef

RECORD = "loratools.merge"
_CHUNK = 1 << 20
_UNIONS = ("modules_to_save",)


def extras(
    adapters: Sequence[Adapter], layout: str, drop: Iterable[str]
) -> tuple[dict[str, TensorRef], tuple[str, ...]]:
    """Tensors that belong to no module: taken over where one input has them or all that do agree.

    Returns:
        What is carried, and the keys that were dropped.

    Raises:
        LayoutError: Two inputs differ on one, or it comes from another layout.
    """
    allowed = set(drop)
    if allowed - {"extras"}:
        raise OptionError(
            f"nothing called {sorted(allowed - {'extras'})[0]!r} can be dropped", candidates=["extras"]
        )
    every = {key: ref for adapter in adapters for key, ref in adapter.extras.items()}
    if "extras" in allowed:
        return {}, tuple(every)
    foreign = [key for adapter in adapters if adapter.layout.name != layout for key in adapter.extras]
    if foreign:
        raise LayoutError(
            f"{len(foreign)} tensors belong to no module and the {layout} layout has no name for them",
            keys=foreign,
            todo="Leave them out with --drop extras",
        )
    kept: dict[str, TensorRef] = {}
    differing: list[str] = []
    for adapter in adapters:
        for key, ref in adapter.extras.items():
            if key in kept and not _equal(kept[key], ref):
                differing.append(key)
            kept.setdefault(key, ref)
    if differing:
        raise LayoutError(
            f"{len(differing)} tensors replace weights of the base model and differ between the inputs",
            keys=list(dict.fromkeys(differing)),
            expected="Weights saved in full (modules_to_save, biases) have no sum",
            todo="Leave them out with --drop extras, or take them from one input only",
        )
    return kept, ()


def _equal(one: TensorRef, other: TensorRef) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.raw() == other.raw()


def metadata(adapters: Sequence[Adapter], weights: Sequence[float], method: str) -> dict[str, str]:
    """String metadata: what all inputs agree on, tags united, and a record of what was merged."""
    first = adapters[0].metadata
    agreed = {
        key: value
        for key, value in first.items()
        if all(adapter.metadata.get(key) == value for adapter in adapters[1:])
        and not key.startswith("sshs_")
        and key not in (RECORD, "lora_adapter_metadata")
    }
    tags = _united_tags(adapters)
    if tags:
        agreed["ss_tag_frequency"] = json.dumps(tags)
    record = {"version": __version__, "method": method, "inputs": list(_recorded(adapters, weights))}
    agreed[RECORD] = json.dumps(record)
    return agreed


def _united_tags(adapters: Sequence[Adapter]) -> dict[str, dict[str, int]]:
    """Tag counts per folder of images, added up where inputs share a folder's name."""
    united: dict[str, dict[str, int]] = {}
    for adapter in adapters:
        for folder, tags in _metadata.tag_folders(adapter.metadata).items():
            counts = united.setdefault(folder, {})
            for tag, count in tags.items():
                counts[tag] = counts.get(tag, 0) + count
    return united


def _recorded(adapters: Sequence[Adapter], weights: Sequence[float]) -> Iterator[dict[str, Any]]:
    for each in inputs(adapters, weights):
        # The full path says more of somebody's disk than a shared file should.
        name = Path(each["path"])
        shown = f"{name.parent.name}/{name.name}" if name.name.startswith("adapter") else name.name
        yield {"name": shown, "weight": each["weight"], "sha256": each["sha256"]}


def inputs(adapters: Sequence[Adapter], weights: Sequence[float]) -> Iterator[dict[str, Any]]:
    """One description per input."""
    for adapter, weight in zip(adapters, weights, strict=True):
        yield {
            "path": adapter.path,
            "weight": weight,
            "layout": adapter.layout.name,
            "arch": adapter.arch,
            "modules": len(adapter.modules),
            "sha256": _sha256(adapter.path),
        }


def _sha256(path: str) -> str:
    """SHA-256 of a file; empty where the adapter came from no file."""
    if not path or not os.path.isfile(path):
        return ""
    stamp = os.stat(path)
    return _digest(path, stamp.st_mtime_ns, stamp.st_size)


def _digest(path: str, _stamp: int, _size: int) -> str:
    whole = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            whole.update(chunk)
    return whole.hexdigest()


def config(adapters: Sequence[Adapter], modules: Mapping[Target, Module]) -> dict[str, Any]:
    """A starting point for the merged adapter_config.json: the first input's, as far as it holds for the result."""
    configs = [adapter.config for adapter in adapters if "peft_type" in adapter.config]
    if not configs:
        return {}
    merged = dict(configs[0])
    for key in _UNIONS:
        values = [value for each in configs for value in each.get(key) or ()]
        if values:
            merged[key] = list(dict.fromkeys(values))
    if not merged.get("base_model_name_or_path"):
        names = [each.get("base_model_name_or_path") for each in configs]
        merged["base_model_name_or_path"] = next((name for name in names if name), None)
    if any(set(adapter.modules) != set(modules) for adapter in adapters):
        merged["target_modules"] = None
    return merged
