"""The string metadata that Kohya's tools expect: true dimensions, and the two hashes over what is written.

Source: kohya-ss/sd-scripts ``library/train_util.py`` (``precalculate_safetensors_hashes``), LyCORIS ``lycoris/kohya``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loratools import archs
from loratools.formats import _carried
from loratools.formats._base import Document
from loratools.io import header, json_text
from loratools.model import Adapter, Layout, Module
from loratools.tensors import TensorRef

if TYPE_CHECKING:
    from loratools.io.writer import Digest

_LEGACY_START, _LEGACY_STOP = 0x100000, 0x110000

_BASE_VERSION, _ARCHITECTURE = "ss_base_model_version", "modelspec.architecture"
_LORA_MODULE, _LYCORIS_MODULE = "networks.lora", "lycoris.kohya"
# LyCORIS' names of the algorithms that make each kind; the first one is written.
_ALGORITHMS = {
    "lora": ("lora", "locon", "dylora"),
    "loha": ("loha",),
    "lokr": ("lokr",),
    "oft": ("diag-oft", "boft"),
    "glora": ("glora",),
    "ia3": ("ia3",),
    "full": ("full",),
}


def finish(adapter: Adapter, tensors: list[TensorRef], layout: Layout) -> Document:  # noqa: ARG001
    """The document of a layout whose header is Kohya's."""
    metadata = complete(adapter)
    computed = hashes(tensors, metadata)
    metadata.update({key: digest.blank for key, digest in computed.items()})
    return Document(tuple(tensors), metadata, computed=computed)


def complete(adapter: Adapter) -> dict[str, str]:
    """The adapter's metadata with network, rank, alpha and base version made true for its modules."""
    metadata = _carried.metadata(adapter)
    metadata.pop("format", None)
    metadata.setdefault("ss_network_module", _LORA_MODULE)
    metadata.setdefault("ss_network_dim", "")
    correct(adapter, metadata)
    for key in [key for key in ("ss_network_dim", "ss_network_alpha") if metadata.get(key) == ""]:
        del metadata[key]
    versions = archs.get(adapter.arch).kohya_versions
    if versions:
        metadata.setdefault(_BASE_VERSION, versions[0])
    return metadata


def correct(adapter: Adapter, metadata: dict[str, str]) -> None:
    """Make what Kohya's metadata says of the network true for these modules, where it says something at all."""
    modules = list(adapter.modules.values())
    if "ss_network_dim" in metadata and any(module.rank for module in modules):
        found = _dimensions(module for module in modules if not _is_wide(module))
        metadata["ss_network_dim"], metadata["ss_network_alpha"] = found
    if "ss_network_module" in metadata:
        _network(modules, metadata)
    for key in (_BASE_VERSION, _ARCHITECTURE):
        if key in metadata:
            _base_model(adapter.arch, key, metadata)


def _base_model(arch: str, key: str, metadata: dict[str, str]) -> None:
    """Correct what names another architecture; what nobody knows may be true, and stays."""
    from loratools.archs import _claims

    meant = {claim.arch for claim in _claims.claims({key: metadata[key]}, "")}
    if arch == "unknown" or not meant or arch in meant:
        return
    table = archs.get(arch)
    known = table.kohya_versions if key == _BASE_VERSION else table.modelspec
    _, slash, purpose = metadata.pop(key).partition("/")
    if known:
        metadata[key] = known[0] + slash + purpose


def _is_wide(module: Module) -> bool:
    """Whether it is a convolution with a kernel of more than one, which trainers give dimensions of its own."""
    return any(size > 1 for size in (module.shape or ())[2:])


def _dimensions(modules: Iterable[Module]) -> tuple[str, str]:
    """Rank and alpha, or "Dynamic" where modules differ; those of kinds without a rank say nothing."""
    ranked = [module for module in modules if module.rank]
    ranks = {module.rank for module in ranked}
    alphas = {module.scale * (module.rank or 1) for module in ranked}
    dim = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    return dim, _number(alphas.pop()) if len(alphas) == 1 else "Dynamic"


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)


def _network(modules: Sequence[Module], metadata: dict[str, str]) -> None:
    """The program that the file is one of, and its arguments as far as the tensors tell them."""
    try:
        stated = json_text.loads(metadata.get("ss_network_args", "{}"))
    except ValueError:
        stated = {}
    arguments = stated if isinstance(stated, dict) else {}
    _algorithm(modules, metadata, arguments)
    # They describe wide convolutions alone; stale ones would contradict the tensors.
    dim = "conv_rank" if "conv_rank" in arguments else "conv_dim"
    arguments.pop(dim, None)
    arguments.pop("conv_alpha", None)
    wide = [module for module in modules if module.rank and _is_wide(module)]
    if wide:
        arguments[dim], arguments["conv_alpha"] = _dimensions(wide)
    if arguments or "ss_network_args" in metadata:
        metadata["ss_network_args"] = json.dumps(arguments)


def _algorithm(modules: Sequence[Module], metadata: dict[str, str], arguments: dict[str, Any]) -> None:
    """Name LyCORIS, and its algorithm, where the modules are of its kinds and nothing fitting is said."""
    kinds = Counter(module.kind for module in modules)
    # Norms and biases are stored as full differences beside modules of any kind.
    kind = max(kinds, key=lambda name: (name != "full", kinds[name]), default="lora")
    stated = metadata["ss_network_module"]
    own = stated == "networks.oft" and kind == "oft"
    if kind == "lora" and not stated.startswith("lycoris"):
        if stated == "networks.oft":
            metadata["ss_network_module"] = _LORA_MODULE
        return
    if kind not in _ALGORITHMS or own:
        return
    if not stated.startswith("lycoris"):
        metadata["ss_network_module"] = _LYCORIS_MODULE
    known = _ALGORITHMS[kind]
    if str(arguments.get("algo", "lora")).lower() not in known:
        butterfly = any(len(ref.shape) == 4 for module in modules for ref in _blocks(module))
        arguments["algo"] = known[1] if butterfly else known[0]


def _blocks(module: Module) -> Iterable[TensorRef]:
    found = module.factors.get("oft_blocks")
    return () if found is None else (found,)


def hashes(tensors: Sequence[TensorRef], metadata: Mapping[str, str]) -> dict[str, Digest]:
    """What ``sshs_model_hash`` and ``sshs_legacy_hash`` of a file with these tensors are made of.

    The first is the SHA-256 of the payload. The second is eight digits of the SHA-256 of 64 KiB from offset 1 MiB
    of a file whose header holds the ``ss_`` metadata alone; of nothing where the file is shorter.
    """
    from loratools.io.writer import Digest

    ordered = sorted(tensors, key=lambda ref: header.canonical_key(ref.name, ref.dtype))
    trained = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    head = header.build([(ref.name, ref.dtype, ref.shape) for ref in ordered], trained)
    start, stop = (max(edge - len(head), 0) for edge in (_LEGACY_START, _LEGACY_STOP))
    legacy = Digest(8, head[_LEGACY_START:_LEGACY_STOP], start, stop)
    return {"sshs_model_hash": Digest(), "sshs_legacy_hash": legacy}
