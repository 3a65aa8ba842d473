"""What a merged adapter carries beside its modules: metadata, configuration, and tensors of no module."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from loratools import __version__
from loratools.errors import LayoutError, OptionError
from loratools.model import Adapter, Module, Target
from loratools.ops import _metadata, files
from loratools.ops._combine import Combined
from loratools.ops._merge_steps import shown_name
from loratools.ops._request import Request
from loratools.ops.results import MergedModule, MergeReport
from loratools.tensors import TensorRef

RECORD = "loratools.merge"
RECIPE = "loratools.recipe"
_CHUNK = 1 << 20


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

        "path", "weight", "layout", "arch", "modules", "sha256" (empty where it came from no file), and "multipliers":
        what the weights by component, block and pattern hit in it.
        """
        return [
            {
                "path": adapter.path,
                "weight": weight,
                "layout": adapter.layout.name,
                "arch": adapter.arch,
                "modules": len(adapter.modules),
                "sha256": found.result(),
                "multipliers": self._hits(number),
            }
            for number, (adapter, weight, found) in enumerate(
                zip(self._adapters, self._weights, self._hashes, strict=True)
            )
        ]


def sha256(path: str) -> str:
    """The digest of a file's bytes in hexadecimal; empty where the path is no file's."""
    whole = hashlib.sha256()
    if not path or not os.path.isfile(path):
        return ""
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            whole.update(chunk)
    return whole.hexdigest()


def remarks(asked: Request, extras: Mapping[str, TensorRef], modules: Mapping[Target, Module]) -> list[str]:
    """What the caller should know of a result that is right, and may surprise."""
    said: list[str] = []
    if extras and set(asked.weights) - {0.0, 1.0}:
        said.append(
            f"{len(extras)} tensors replace weights of the base and were carried whole, whatever the weights "
            f"(first: {next(iter(extras))})"
        )
    alphas = {module.scale * (module.rank or 1) for module in modules.values()}
    if asked.layout.name == "kohya" and len(alphas) > 1:
        said.append(
            "modules that went over unchanged state an alpha of their own; diffusers 0.42 applies one alpha to all "
            "modules of a Kohya file. For diffusers choose --to diffusers"
        )
    return said


def config(
    adapters: Sequence[Adapter], modules: Mapping[Target, Module], extras: Mapping[str, TensorRef]
) -> dict[str, Any]:
    """A starting point for the merged adapter_config.json: the first input's, as far as it holds for the result."""
    configs = [adapter.config for adapter in adapters if "peft_type" in adapter.config]
    if not configs:
        return {}
    merged = dict(configs[0])
    for key in ("modules_to_save", "trainable_token_indices", "bias", "base_model_name_or_path"):
        stated = [each.get(key) for each in configs if each.get(key) not in (None, [], {}, "none")]
        if stated:
            merged[key] = _united(stated)
    if any(set(adapter.modules) != set(modules) for adapter in adapters):
        merged["target_modules"] = None
    return merged if extras else files.without_extras(merged)


def _united(values: Sequence[Any]) -> Any:
    """Lists of names together; of anything else the first."""
    if all(isinstance(value, list) for value in values):
        return list(dict.fromkeys(each for value in values for each in value))
    return values[0]


def chosen(asked: Request) -> dict[str, Any]:
    """The method's options as used, by the names that users know them by."""
    return {option.name: getattr(asked.options, option.field) for option in asked.method.options}


def report(
    asked: Request,
    merged: Adapter,
    results: Mapping[Target, Combined],
    inputs: Sequence[Mapping[str, Any]],
    dropped: tuple[str, ...],
) -> MergeReport:
    """What a merge did, as a report has it.

    Args:
        asked: What was asked for.
        merged: The result.
        results: By target.
        inputs: From ``Inputs.described``.
        dropped: Keys of tensors that were left out.
    """
    # What was carried over or kept whole has lost nothing.
    whole = sum(each.size / (1.0 if each.energy is None else each.energy or 1.0) for each in results.values())
    modules = merged.modules.values()
    return MergeReport(
        method=asked.method.name,
        options={**chosen(asked), **asked.steps.named()},
        inputs=tuple(inputs),
        modules=tuple(_entry(target, module, results[target]) for target, module in merged.modules.items()),
        energy=sum(each.size for each in results.values()) / whole if whole else 1.0,
        layout=asked.layout.name,
        arch=asked.arch,
        dtypes=dict(Counter(ref.dtype for module in modules for _, ref in module.tensors())),
        ranks=dict(sorted(Counter(module.rank or 0 for module in modules).items())),
        carried=tuple(merged.extras),
        dropped=dropped,
        notes=merged.notes,
    )


def _entry(target: Target, module: Module, result: Combined) -> MergedModule:
    return MergedModule(
        str(target), target.component, result.sources, module.rank or 0, result.energy, module.shape
    )
