"""Single adapters out of a pack, bit for bit as they were packed, or as a shared basis has them."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loratools import formats, io
from loratools.errors import MalformedFileError, OptionError
from loratools.io import storage, unchanged
from loratools.io.names import distinct
from loratools.io.uploading import uploads
from loratools.maths.lowrank import COMPUTE
from loratools.model import Adapter, Layout, Module, Rows, Target
from loratools.ops import _pack_index, convert, files
from loratools.ops._pack_files import prepared
from loratools.ops._pack_index import Index
from loratools.ops.pack_results import Packed, Unpacked, UnpackReport
from loratools.tensors import TensorRef, from_torch

Progress = Callable[[str, int, int], None]


@uploads
@unchanged.watched
def unpack(
    path: files.PathLike,
    output: files.PathLike,
    *,
    names: Sequence[str] = (),
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> UnpackReport:
    """Write adapters of a pack as single ones, without the zeros that padded them.

    Args:
        path: The pack, a folder.
        output: A folder, in which each gets a folder or a file of its name.
        names: Which; default: all, duplicates included, which come out as what was kept of them.
        overwrite: Whether files of an existing folder may be replaced.
        dry_run: Do everything but write.
        progress: Called with an adapter's name, how many are done and how many there are.

    Raises:
        OptionError: There is no adapter of a name.
        MalformedFileError: A file of the pack is damaged.
        LoraError: It is no pack, or the output cannot be written.
    """
    index = _pack_index.read(path)
    wanted = _wanted(index, names)
    files.check_output(output, overwrite=overwrite or dry_run)
    form = convert.writable(index.layout)
    shared = _shared(index)
    places = distinct(name for name, _ in wanted)
    done: list[Unpacked] = []

    def write(folder: Path | None) -> None:
        for number, ((name, entry), own) in enumerate(zip(wanted, places, strict=True), 1):
            adapter = _of_basis(index, shared, entry) if shared else _trimmed(index, entry)
            ready = prepared(formats.document(adapter, files.layout_of(form, "safetensors"), form), form)
            place = own if form.folder else f"{own}.{form.container}"
            if folder is not None:
                ready.write(folder / place)
            rank = max(module.rank or 0 for module in adapter.modules.values())
            done.append(Unpacked(name, entry.name, storage.below(os.fspath(output), place), rank, ready.size))
            if progress is not None:
                progress(name, number, len(wanted))

    if dry_run:
        write(None)
    else:
        with io.atomic_folder(output, overwrite) as folder:
            write(folder)
    return UnpackReport(
        os.fspath(path), os.fspath(output), form.name, tuple(done), sum(each.bytes for each in done)
    )


def _wanted(index: Index, names: Sequence[str]) -> list[tuple[str, Packed]]:
    """Names, and the adapters that they are in the pack."""
    known = [*index.adapters, *index.aliases]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise OptionError(
            f"the pack has no adapter {unknown[0]!r}",
            path=index.path,
            keys=unknown[1:],
            candidates=difflib.get_close_matches(unknown[0], known),
            expected=f"It has {len(index.adapters)} adapters and {len(index.aliases)} other names of them",
            todo=f"Look it up in {storage.below(index.path, _pack_index.NAME)}",
        )
    found = []
    for name in dict.fromkeys(names or known):
        alias = index.aliases.get(name)
        found.append((name, index.adapters[alias.of if alias is not None else name]))
    return found


def _trimmed(index: Index, entry: Packed) -> Adapter:
    """An adapter of a pack at its own ranks: what was padded are zeros behind them."""
    form = formats.get(index.layout)
    weights = f"{entry.path}/{form.weights}" if form.folder else entry.path
    _pack_index.check(index, entry.name, weights, entry.sha256)
    adapter = files.load(storage.below(index.path, entry.path), arch=index.arch)
    modules = {
        target: _cut(module, entry.ranks.get(str(target), entry.rank))
        for target, module in adapter.modules.items()
    }
    return replace(adapter, modules=modules, order=())


def _cut(module: Module, rank: int) -> Module:
    if module.rank is None or rank >= module.rank:
        return module
    up, down = module.factors["up"].load(), module.factors["down"].load()
    factors = {
        "up": from_torch("", up[:, :rank].contiguous()),
        "down": from_torch("", down[:rank].contiguous()),
    }
    own = {role: factors[role] for role in module.factors}
    return module._replace(factors=own, alpha=module.scale * rank, rank=rank, alpha_tensor=None)


def _shared(index: Index) -> Mapping[str, TensorRef]:
    """The tensors of the shared basis; none where the pack has none."""
    if not index.shared:
        return {}
    _pack_index.check(index, "the shared basis", index.shared["file"], index.shared["sha256"])
    return io.open_tensors(storage.below(index.path, index.shared["file"])).tensors


def _of_basis(index: Index, tensors: Mapping[str, TensorRef], entry: Packed) -> Adapter:
    """An adapter as LoRA: the core multiplied into one side of the basis."""
    modules = {module.target: module for module in _modules(index, tensors, entry)}
    config = {"base_model_name_or_path": entry.base} if entry.base else {}
    return Adapter(modules, arch=index.arch, layout=Layout(index.layout), config=config, path=entry.name)


def _modules(index: Index, tensors: Mapping[str, TensorRef], entry: Packed) -> Iterator[Module]:
    for said in index.shared["modules"]:
        members = said["adapters"] if said["adapters"] is not None else [*index.adapters]
        if entry.name not in members:
            continue
        left, right, cores = _basis(index, tensors, said, len(members))
        up, down = _product(left, right, cores.load()[members.index(entry.name)])
        shape, rank = tuple(said["shape"]), int(said["rank"])
        factors = {
            "up": from_torch("", up.reshape(shape[0], rank, *(1 for _ in shape[2:]))),
            "down": from_torch("", down.reshape(rank, *shape[1:])),
        }
        rows = (
            Rows(tuple([(span[0], span[1]) for span in said["rows"]]), said["of"]) if said["rows"] else None
        )
        yield Module(
            Target(said["component"], said["path"], rows),
            "lora",
            factors,
            alpha=float(rank),
            rank=rank,
            shape=shape,
            op=said["op"],
            in_first=said["in_first"],
        )


def _basis(
    index: Index, tensors: Mapping[str, TensorRef], said: Mapping[str, Any], count: int
) -> tuple[TensorRef, TensorRef, TensorRef]:
    """The tensors of one module: U (out, left), V (right, in), and the cores (adapters, left[, right]).

    Raises:
        MalformedFileError: They are not of the shapes that the index says.
    """
    named = [f"{said['name']}.{role}" for role in ("left", "right", "cores")]
    found = [tensors[name] for name in named if name in tensors]
    out, *rest = said["shape"]
    if len(found) == len(named):
        left, right, cores = found
        core = cores.shape[1:]
        fits = (
            len(core) == (1 if index.shared["diagonal"] else 2)
            and cores.shape[0] == count
            and left.shape == (out, core[0])
            and right.shape == (core[-1], math.prod(rest))
            and said["rank"] == min(core)
        )
        if fits:
            return left, right, cores
    raise MalformedFileError(
        f"{index.shared['file']} does not hold what {_pack_index.NAME} says of {said['name']}",
        path=index.path,
        keys=named,
        expected=f"A basis of rank {said['rank']} for a weight of {said['shape']} was expected, and {count} cores",
        todo="Make the pack again; what is in it must not be changed",
    )


def _product(left: TensorRef, right: TensorRef, core: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """U · Σ · V as two factors of the smaller of both ranks."""
    up, down = left.load(), right.load()
    wide = core.to(COMPUTE)
    if core.ndim == 1:
        return (up.to(COMPUTE) * wide).to(up.dtype), down
    if core.shape[0] < core.shape[1]:
        return up, (wide @ down.to(COMPUTE)).to(down.dtype)
    return (up.to(COMPUTE) @ wide).to(up.dtype), down
