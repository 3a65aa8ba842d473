"""What a merged adapter carries beside its modules: metadata, configuration, and tensors of no module."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from loratools import __version__
from loratools.io import storage
from loratools.model import EMPTY, Adapter, Module, Target
from loratools.ops import _metadata, files
from loratools.ops._combine import Combined
from loratools.ops._merge_steps import shown_name
from loratools.ops._request import Request
from loratools.ops.align import Contribution
from loratools.ops.merge_results import MergedGroup, MergedModule, MergeReport
from loratools.tensors import TensorRef

RECORD = "loratools.merge"
RECIPE = "loratools.recipe"
_CHUNK = 1 << 20


def metadata(
    adapters: Sequence[Adapter],
    method: str,
    inputs: Sequence[Mapping[str, Any]],
    recipe: Mapping[str, Any],
) -> dict[str, str]:
    """String metadata: what all inputs agree on, tags united, a record of what was merged, and the recipe."""
    first = adapters[0].metadata
    agreed = {
        key: value
        for key, value in first.items()
        if all(adapter.metadata.get(key) == value for adapter in adapters[1:])
        and not key.startswith("sshs_")
        and key not in (RECORD, RECIPE, "lora_adapter_metadata")
    }
    tags = _united_tags(adapters)
    if tags:
        agreed["ss_tag_frequency"] = json.dumps(tags)
    record = {"version": __version__, "method": method, "inputs": [recorded(each) for each in inputs]}
    agreed[RECORD] = json.dumps(record)
    agreed[RECIPE] = json.dumps(recipe, ensure_ascii=False)
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


def recorded(described: Mapping[str, Any]) -> dict[str, Any]:
    """What a result's metadata says of one input: its name, and what it takes to know the file again."""
    return {
        "name": shown_name(described["path"]),
        "weight": described["weight"],
        "sha256": described["sha256"],
    }


class Inputs:
    """The inputs' descriptions; their files are hashed on another thread while the merge is computed.

    Args:
        adapters: The inputs.
        weights: One per input.
        hits: What multipliers hit in the input of a position; none unless given.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        weights: Sequence[float],
        hits: Callable[[int], list[dict[str, Any]]] = lambda _: [],
    ) -> None:
        self._adapters = adapters
        self._weights = weights
        self._hits = hits
        self._pool = ThreadPoolExecutor(1)
        self._hashes = [self._pool.submit(sha256, adapter.path) for adapter in adapters]

    def __enter__(self) -> Inputs:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def described(self) -> list[dict[str, Any]]:
        """One mapping per input.

        "path", "weight", "layout", "arch", "modules", "sha256" and "bytes", a count (empty and 0 where it came from
        no file), and "multipliers": what the weights by component, block and pattern hit in it.
        """
        return [
            {
                "path": adapter.path,
                "weight": weight,
                "layout": adapter.layout.name,
                "arch": adapter.arch,
                "modules": len(adapter.modules),
                "sha256": found.result(),
                "bytes": storage.size(adapter.path) if found.result() else 0,
                "multipliers": self._hits(number),
            }
            for number, (adapter, weight, found) in enumerate(
                zip(self._adapters, self._weights, self._hashes, strict=True)
            )
        ]


def sha256(path: str) -> str:
    """The digest of a file's bytes in hexadecimal; empty where the path is no file's.

    Of a file at a URL it is what the store says, or empty: it would have to be read as a whole once more.
    """
    whole = hashlib.sha256()
    if not path or not storage.is_file(path):
        return ""
    if storage.is_url(path):
        return storage.state(path).sha256
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            whole.update(chunk)
    return whole.hexdigest()


def config(
    adapters: Sequence[Adapter],
    modules: Mapping[Target, Module],
    extras: Mapping[str, TensorRef],
    said: Mapping[str, Any] = EMPTY,
) -> dict[str, Any]:
    """A starting point for the merged adapter_config.json: the first input's, as far as it holds for the result.

    Args:
        adapters: The inputs.
        modules: The result's.
        extras: What the result holds in full.
        said: Fields that are told by that.
    """
    configs = [adapter.config for adapter in adapters if "peft_type" in adapter.config]
    if not configs:
        return {}
    merged = dict(configs[0])
    stated = [each["base_model_name_or_path"] for each in configs if each.get("base_model_name_or_path")]
    if stated:
        merged["base_model_name_or_path"] = stated[0]
    merged.update(said)
    if any(set(adapter.modules) != set(modules) for adapter in adapters):
        merged["target_modules"] = None
    return merged if extras else files.without_extras(merged)


def chosen(asked: Request) -> dict[str, Any]:
    """The method's options as used, by the names that users know them by."""
    return {option.name: getattr(asked.options, option.field) for option in asked.method.options}


def report(
    asked: Request,
    merged: Adapter,
    targets: Mapping[Target, Sequence[Contribution]],
    results: Mapping[Target, Combined],
    inputs: Sequence[Mapping[str, Any]],
    dropped: tuple[str, ...],
) -> MergeReport:
    """What a merge did, as a report has it.

    Args:
        asked: What was asked for.
        merged: The result.
        targets: What the inputs bring to each target.
        results: By target.
        inputs: From ``Inputs.described``.
        dropped: Keys of tensors that were left out.
    """
    modules = tuple(
        _entry(target, module, results[target], targets[target]) for target, module in merged.modules.items()
    )
    dtypes = Counter(ref.dtype for module in merged.modules.values() for _, ref in module.tensors())
    return MergeReport(
        method=asked.method.name,
        options={**chosen(asked), **asked.steps.named()},
        inputs=tuple(inputs),
        modules=modules,
        energy=MergedGroup(modules).energy,
        layout=asked.layout.name,
        arch=asked.arch,
        dtypes=dict(dtypes),
        ranks=dict(sorted(Counter(module.rank for module in modules).items())),
        carried=tuple(merged.extras),
        dropped=dropped,
        notes=merged.notes,
    )


def _entry(
    target: Target, module: Module, result: Combined, contributions: Sequence[Contribution]
) -> MergedModule:
    before = Counter[int]()
    for each in contributions:
        before[each.source] += each.module.rank or 0
    return MergedModule(
        target=str(target),
        component=target.component,
        inputs=result.sources,
        rank=module.rank or 0,
        energy=result.energy,
        shape=module.shape,
        before=tuple(before[source] for source in result.sources),
        norm=math.sqrt(result.size),
    )
