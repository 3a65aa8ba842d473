"""What a file is: layout, architecture, kinds, ranks and norms, without torch where the container allows."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from loratools import archs
from loratools.archs import _families as families
from loratools.errors import LoraError, MalformedFileError
from loratools.formats import _carried
from loratools.io import json_text, storage, unchanged
from loratools.kinds import experts, lora
from loratools.model import EMPTY, Adapter, Module
from loratools.ops import _initial, _metadata, _moe_known, _moe_norms, _pack_index, _split, files
from loratools.ops.results import ComponentInfo, Info, ModuleInfo


@unchanged.watched
def info(path: files.PathLike, *, norms: bool = True, arch: str | None = None) -> Info:
    """What one file, or a folder that is an adapter or a model, is.

    Args:
        path: A file or folder.
        norms: Whether to compute norms and spectra of ΔW, which reads the factors.
        arch: The architecture, overriding detection.

    Raises:
        LoraError: It cannot be read.
    """
    given = os.fspath(path)
    if storage.is_dir(given):
        model = _model_folder(given)
        if model is not None:
            return model
    adapter = files.read(given, arch=arch)
    return describe(adapter, path=given, size=size_of(adapter.path), norms=norms)


def candidates(folder: str) -> Iterator[str]:
    """Files below a folder that could be an adapter or a model, hidden folders left out, in order of names."""
    if storage.is_url(folder):
        for name in sorted(storage.tree(folder)):
            if name.lower().endswith(files.SUFFIXES) and not any(map(_hidden, name.split("/"))):
                yield f"{folder.rstrip('/')}/{name}"
        return
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(files.SUFFIXES) and not name.startswith("."):
                yield os.path.join(where, name)


def _hidden(name: str) -> bool:
    return name.startswith(".")


def is_single(folder: str) -> bool:
    """Whether a folder is itself an adapter or a model, rather than a place where some lie."""
    described = storage.is_file(os.path.join(folder, files.CONFIG))
    return (described and files.weights_of(folder) is not None) or _model_folder(folder) is not None


def is_folder(path: str) -> bool:
    """Whether there is a folder; of a URL that cannot be asked, reading it says why."""
    try:
        return storage.is_dir(path)
    except LoraError:
        return False


def size_of(path: str) -> int:
    """Of a file in bytes; 0 where there is none."""
    try:
        return max(0, storage.size(path)) if storage.is_file(path) else 0
    except OSError:
        return 0


def _model_folder(folder: str) -> Info | None:
    """A pack, a diffusers model or a sharded checkpoint, by its index."""
    names = sorted(storage.names(folder))
    if _pack_index.is_pack(folder):
        return _pack(folder)
    if "model_index.json" in names:
        return Info(path=folder, type="checkpoint", layout="diffusers", bytes=_tree_size(folder))
    index = next((name for name in names if name.endswith(".index.json")), None)
    if index is None:
        return None
    path = os.path.join(folder, index)
    try:
        shards = json_text.loads(storage.read_all(path, storage.TEXT).decode())["weight_map"]
        count = len(shards)
    except (ValueError, OSError, TypeError, KeyError) as error:
        raise MalformedFileError(
            f"the index cannot be read: {error}",
            path=path,
            expected="An object with a weight_map was expected",
        ) from error
    return Info(path=folder, type="checkpoint", layout="sharded", bytes=_tree_size(folder), tensors=count)


def _pack(folder: str) -> Info:
    """A pack of adapters, as its index describes it."""
    index = _pack_index.read(folder)
    said = {
        "adapters": str(len(index.adapters)),
        "duplicates": str(len(index.aliases)),
        "ranks": ", ".join(str(rank) for rank in sorted({each.bucket for each in index.adapters.values()})),
        "base": ", ".join(sorted({each.base for each in index.adapters.values() if each.base})),
    }
    if index.shared:
        said["shared basis"] = f"rank {index.shared['rank']}"
    return Info(
        path=folder,
        bytes=_tree_size(folder),
        type="pack",
        layout=index.layout,
        arch=index.arch,
        training={name: value for name, value in said.items() if value},
    )


def _tree_size(folder: str) -> int:
    if storage.is_url(folder):
        return sum(storage.tree(folder).values())
    return sum(size_of(os.path.join(where, name)) for where, _, names in os.walk(folder) for name in names)


def describe(adapter: Adapter, *, path: str = "", size: int = 0, norms: bool = True) -> Info:
    """What an adapter in memory is.

    Args:
        adapter: From ``load`` or an operation.
        path: To be shown.
        size: Bytes, to be shown.
        norms: Whether to compute norms and spectra of ΔW.
    """
    adapter = _counted(adapter)
    spectra = _spectra(adapter) if norms else {}
    modules = tuple(_module(module, spectra.get(id(module))) for module in adapter.modules.values())
    groups: dict[str, list[ModuleInfo]] = {}
    for module in modules:
        groups.setdefault(module.component, []).append(module)
    ranks = Counter(module.rank for module in modules if module.rank is not None)
    known = archs.all_archs().get(adapter.arch)
    dtypes = _dtypes(adapter)
    return Info(
        path=path or adapter.path,
        bytes=size,
        type=adapter.type,
        layout=adapter.layout.name,
        variant=adapter.layout.variant,
        container=adapter.layout.container,
        arch=adapter.arch,
        arch_title=known.title if known is not None else "",
        family=families.family(adapter.arch, _said(adapter), [target.path for target in adapter.modules]),
        kinds=adapter.kinds,
        components={name: _component(members) for name, members in groups.items()},
        modules=modules,
        tensors=sum(dtypes.values()),
        dtypes=dict(dtypes),
        unclaimed=tuple(adapter.extras),
        metadata=dict(adapter.metadata),
        training=_metadata.training(adapter.metadata, adapter.config),
        warnings=(
            *adapter.notes,
            *_initial.notes(adapter),
            *_metadata.contradictions(adapter.metadata, ranks),
            *_metadata.alphas(adapter.metadata, modules),
            *_metadata.patterns(adapter.config, _peft_names(adapter)),
            *_measured(modules, norms),
            *(_split.notes(adapter) if norms else ()),
        ),
    )


def _counted(adapter: Adapter) -> Adapter:
    """The adapter with its packed experts named and counted, as far as its configuration tells."""
    try:
        return _moe_known.known(adapter)
    except LoraError:
        return adapter


def _said(adapter: Adapter) -> Mapping[str, Any]:
    """The configuration that came with an adapter, or that another layout passed on."""
    return adapter.config or next(iter(_carried.configs(adapter).values()), EMPTY)


def _dtypes(adapter: Adapter) -> Counter[str]:
    """How many tensors have each store dtype."""
    refs = [ref for module in adapter.modules.values() for ref in module.factors.values()]
    for module in adapter.modules.values():
        refs += [ref for ref in (module.alpha_tensor, module.magnitude) if ref is not None]
    refs += adapter.extras.values()
    # What modules share is one tensor of the file.
    return Counter({ref.name or id(ref): ref.dtype for ref in refs}.values())


def _peft_names(adapter: Adapter) -> Iterator[str]:
    """The modules' names as PEFT's patterns see them; none where no configuration has patterns."""
    if "peft_type" in adapter.config:
        stems = (key.partition(".lora_")[0] for key in adapter.order if ".lora_" in key)
        yield from dict.fromkeys(stem.replace("base_model.model.", "") for stem in stems)


def _measured(modules: Sequence[ModuleInfo], norms: bool) -> list[str]:
    """What the norms say, and which modules have none."""
    if not norms:
        return []
    said: list[str] = []
    # A scale of NaN is told by the reader, and says nothing of the factors.
    bad = [
        module.target
        for module in modules
        if module.norm is not None and math.isnan(module.norm) and math.isfinite(module.scale)
    ]
    if bad:
        said.append(f"{len(bad)} of {len(modules)} modules hold NaN or Inf (first: {bad[0]})")
    zero = [module.target for module in modules if module.norm == 0]
    if zero:
        said.append(f"{len(zero)} of {len(modules)} modules are zero and change nothing (first: {zero[0]})")
    unmeasured = [module for module in modules if module.norm is None]
    if unmeasured:
        kinds = sorted({"DoRA" if module.dora else module.kind for module in unmeasured})
        said.append(
            f"{len(unmeasured)} of {len(modules)} modules have no norm: "
            f"ΔW of {', '.join(kinds)} is not a product of two factors alone"
        )
    return said


def _module(module: Module, sigma: Any) -> ModuleInfo:
    from_spectrum: dict[str, Any] = {}
    if sigma is not None:
        from loratools.maths import norms as maths

        several = sigma.ndim > 1
        found = maths.summarise(_moe_norms.together(sigma) if several else sigma, module.scale)
        from_spectrum = {
            "norm": found.frobenius,
            "spectral_norm": found.spectral,
            "stable_rank": found.stable_rank,
            "effective_rank": found.effective_rank,
            "energy": _moe_norms.energy(sigma) if several else found.energy,
        }
    target, factors = module.target, module.factors
    dtype = next(iter(factors.values())).dtype if factors else ""
    dora = module.magnitude is not None
    return ModuleInfo(
        str(target),
        target.component,
        module.kind,
        module.shape,
        module.rank,
        module.alpha,
        module.scale,
        dtype,
        dora,
        module.magnitude_axis,
        module.op,
        experts=experts.count(module) if module.kind == experts.KIND.name else None,
        **from_spectrum,
    )


def _component(members: Sequence[ModuleInfo]) -> ComponentInfo:
    ranks = Counter(module.rank for module in members if module.rank is not None)
    counted = dict(sorted(ranks.items()))
    measured = [module for module in members if module.norm is not None]
    if not measured:
        return ComponentInfo(len(members), counted)
    acting = [module for module in measured if module.norm] or measured
    return ComponentInfo(
        modules=len(members),
        ranks=counted,
        norm=math.sqrt(sum((module.norm or 0.0) ** 2 for module in measured)),
        spectral_norm=max(module.spectral_norm or 0.0 for module in measured),
        stable_rank=_median(module.stable_rank or 0.0 for module in acting),
        effective_rank=_median(module.effective_rank or 0.0 for module in acting),
        energy=_energy(measured),
    )


def _median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _energy(modules: Sequence[ModuleInfo]) -> dict[int, float]:
    """Energy kept over all modules if each were cut to a rank; a module below that rank keeps all of its own."""
    total = sum((module.norm or 0.0) ** 2 for module in modules)
    ranks = sorted({rank for module in modules for rank in (module.energy or {})})
    if not total:
        return {}
    return {
        rank: sum((module.norm or 0.0) ** 2 * (module.energy or {}).get(rank, 1.0) for module in modules)
        / total
        for rank in ranks
    }


def _spectra(adapter: Adapter) -> dict[int, Any]:
    """Singular values of up · down, without the scale, by the identity of the module."""
    chosen = [module for module in adapter.modules.values() if lora.is_product(module)]
    fused = [module for module in adapter.modules.values() if _moe_norms.is_counted(module)]
    if not chosen and not fused:
        return {}
    from loratools.maths import norms as maths

    # One pair at a time, so that no more than a few modules are in memory together.
    found = maths.spectra(_factors(module) for module in chosen)
    own = {id(module): sigma for module, sigma in zip(chosen, found, strict=True)}
    # One row of singular values for each expert.
    return own | {id(module): _moe_norms.spectra(module) for module in fused}


def _factors(module: Module) -> tuple[Any, Any]:
    """up (out, rank) and down (rank, in · kh · kw) as arrays; bfloat16 as the bits that maths.norms reads."""
    up, down, mid = (module.factors.get(role) for role in ("up", "down", "mid"))
    assert up is not None
    assert down is not None
    flat = up.numpy(widen=False)
    if mid is not None:
        import numpy

        core, inner = mid.numpy().astype(numpy.float64), down.numpy().astype(numpy.float64)
        folded = numpy.einsum("pqyx,qi->piyx", core, inner.reshape(inner.shape[0], -1))
        return flat.reshape(flat.shape[0], -1), folded.reshape(folded.shape[0], -1)
    return flat.reshape(flat.shape[0], -1), down.numpy(widen=False).reshape(down.shape[0], -1)
