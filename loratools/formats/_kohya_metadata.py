"""The string metadata that Kohya's tools expect: true dimensions, and the two hashes over what is written.

Source: kohya-ss/sd-scripts ``library/train_util.py`` (``precalculate_safetensors_hashes``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence

from loratools import archs
from loratools.io import header
from loratools.model import Adapter
from loratools.tensors import TensorRef

_LEGACY_START, _LEGACY_STOP = 0x100000, 0x110000


def complete(adapter: Adapter, tensors: Sequence[TensorRef]) -> dict[str, str]:
    """The adapter's metadata with rank, alpha, base version and hashes made true for these tensors."""
    metadata = {key: value for key, value in adapter.metadata.items() if not key.startswith("sshs_")}
    metadata.pop("lora_adapter_metadata", None)
    metadata.pop("format", None)
    metadata.setdefault("ss_network_module", "networks.lora")
    metadata["ss_network_dim"], metadata["ss_network_alpha"] = _dimensions(adapter, convolutions=False)
    _network_args(adapter, metadata)
    versions = archs.get(adapter.arch).kohya_versions
    if versions and metadata.get("ss_base_model_version") not in versions:
        metadata["ss_base_model_version"] = versions[0]
    metadata["sshs_model_hash"], metadata["sshs_legacy_hash"] = hashes(tensors, metadata)
    return metadata


def _dimensions(adapter: Adapter, *, convolutions: bool) -> tuple[str, str]:
    modules = [
        module
        for module in adapter.modules.values()
        if convolutions == (module.shape is not None and any(size > 1 for size in module.shape[2:]))
    ]
    ranks = {module.rank for module in modules}
    alphas = {module.scale * (module.rank or 1) for module in modules}
    dim = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    return dim, _number(alphas.pop()) if len(alphas) == 1 else "Dynamic"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def _network_args(adapter: Adapter, metadata: dict[str, str]) -> None:
    # conv_dim describes 3x3 convolutions alone; a stale one would contradict the tensors.
    try:
        stated = json.loads(metadata.get("ss_network_args", "{}"))
    except ValueError:
        stated = {}
    arguments = stated if isinstance(stated, dict) else {}
    arguments.pop("conv_dim", None)
    arguments.pop("conv_alpha", None)
    if any(any(size > 1 for size in (module.shape or ())[2:]) for module in adapter.modules.values()):
        arguments["conv_dim"], arguments["conv_alpha"] = _dimensions(adapter, convolutions=True)
    if arguments or "ss_network_args" in metadata:
        metadata["ss_network_args"] = json.dumps(arguments)


def hashes(tensors: Sequence[TensorRef], metadata: dict[str, str]) -> tuple[str, str]:
    """``sshs_model_hash`` and ``sshs_legacy_hash`` of a file with these tensors.

    The first is the SHA-256 of the payload. The second is eight digits of the SHA-256 of 64 KiB from offset 1 MiB
    of a file whose header holds the ``ss_`` metadata alone; of nothing where the file is shorter.
    """
    import hashlib

    ordered = sorted(tensors, key=lambda ref: header.canonical_key(ref.name, ref.dtype))
    trained = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    head = header.build([(ref.name, ref.dtype, ref.shape) for ref in ordered], trained)
    whole, legacy = hashlib.sha256(), hashlib.sha256()
    position = 0
    for number, chunk in enumerate(_chunks(head, ordered)):
        if number:
            whole.update(chunk)
        start, stop = max(_LEGACY_START - position, 0), max(_LEGACY_STOP - position, 0)
        legacy.update(chunk[start:stop])
        position += len(chunk)
    return whole.hexdigest(), legacy.hexdigest()[:8]


def _chunks(head: bytes, tensors: Iterable[TensorRef]) -> Iterator[memoryview]:
    yield memoryview(head)
    for ref in tensors:
        yield ref.raw().cast("B")
