"""What tells a run from another: digests of its inputs, and the options that decide what it writes."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from loratools import __version__
from loratools.io import storage
from loratools.io.base import Base
from loratools.io.work_folder import Identity
from loratools.model import Adapter

if TYPE_CHECKING:
    from loratools.engine import Engine

# What decides how quickly something is done and where, and no byte of it; and inputs, which have digests.
_HOW = frozenset({"progress", "threads", "engine", "protect", "base", "against"})


def identity(operation: str, inputs: Mapping[str, str], options: Mapping[str, Any]) -> Identity:
    """The identity of a run.

    Args:
        operation: "merge", "resize" or "extract".
        inputs: A digest of each input, by its path.
        options: What was asked for and decides a byte of what is written: all but where and how quickly it is done.
            What JSON does not hold is told by its text.
    """
    told = json.loads(json.dumps(dict(options), default=_plain))
    whole = {storage.whole(name): digest for name, digest in inputs.items()}
    return Identity(operation, whole, {**told, "version": __version__})


def asked(operation: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an operation that decide what it writes, those that were not given by their defaults.

    Args:
        operation: Whose keyword-only parameters they are.
        options: Those that were given.
    """
    parameters = inspect.signature(operation).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}
    return {name: value for name, value in {**defaults, **options}.items() if name not in _HOW}


def computed_on(device: str, engine: Engine | None, *, auto: str = "cpu") -> str:
    """What a run computes on, "cpu", "cuda" or "mps": each of them rounds otherwise, so that results are not mixed.

    Args:
        device: As it was asked for.
        engine: Or None.
        auto: What "auto" means.
    """
    given = engine.device_kind if engine is not None else ""
    return given or (auto if device == "auto" else device).partition(":")[0]


def of_adapter(adapter: Adapter) -> str:
    """A digest of an adapter's file as far as its header and the file system tell, and of its configuration.

    Reading the content would take as long as many a merge; it is told by size and time of change.

    Raises:
        OSError: The file is gone.
    """
    tensors = [
        (str(target), target.component, role, ref.name, ref.dtype, ref.shape)
        for target, module in adapter.modules.items()
        for role, ref in module.tensors()
    ]
    tensors += [("", "", "", key, ref.dtype, ref.shape) for key, ref in adapter.extras.items()]
    return _digest(
        [storage.tag(adapter.path) if adapter.path else "", tensors, adapter.metadata, adapter.config]
    )


def of_base(base: Base) -> str:
    """A digest of a checkpoint: of the sizes and times of its files, their headers, and its configurations.

    Raises:
        OSError: A file is gone.
    """
    files = [(shard.name, storage.tag(shard.path)) for shard in base.shards]
    tensors = [
        (part, key, weight.dtype, weight.shape)
        for part, weights in base.parts.items()
        for key, weight in weights.items()
    ]
    return _digest([files, tensors, base.configs])


def _digest(values: Iterable[Any]) -> str:
    found = hashlib.sha256()
    for value in values:
        found.update(json.dumps(value, default=_plain).encode())
        found.update(b"\n")
    return found.hexdigest()


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else str(value)
