"""A pack as one basis for each module and a small core for each adapter, written module by module."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from loratools import io
from loratools.errors import NonFiniteError
from loratools.maths.lowrank import COMPUTE, Factors
from loratools.maths.shared_basis import SharedBasis, shared_basis, widths
from loratools.model import Module, Target
from loratools.ops import _pack_index, _pack_normal
from loratools.ops._pack_planner import Planner
from loratools.ops.pack_results import Packed, PackReport, SharedPart
from loratools.tensors import DTYPES, LazySource, TensorRef, nbytes

# Bytes of float64 factors that are read together, of all adapters; a single module may have more.
_TOGETHER = 256 << 20
_STORE = "F32"
_ROLES = ("left", "right", "cores")


class Shared:
    """The shared basis of a pack.

    Args:
        adapters: Of the pack; their factors are read from their sources.
        shapes_of: The shapes of an adapter's modules, by its name.
        rank: Of every basis, a count; fewer where no more could be used.
        diagonal: Whether the cores are diagonal.
        planner: What reads the adapters.
        dtype: The store dtype, a safetensors name; empty: float32.
    """

    def __init__(
        self,
        adapters: Sequence[Packed],
        shapes_of: Callable[[str], Mapping[str, Sequence[int]]],
        rank: int,
        diagonal: bool,
        planner: Planner,
        dtype: str,
    ) -> None:
        self._adapters = adapters
        self._rank = rank
        self._diagonal = diagonal
        self._planner = planner
        self._store = dtype or _STORE
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._members: dict[str, list[Packed]] = {}
        for entry in adapters:
            for name, shape in shapes_of(entry.name).items():
                self._shapes.setdefault(name, tuple(shape))
                self._members.setdefault(name, []).append(entry)
        self._group_of = {name: group for group in self._groups() for name in group}
        self._read: dict[str, list[Factors]] = {}
        self._targets: dict[str, Module] = {}
        self._errors: dict[str, dict[str, tuple[float, float]]] = {each.name: {} for each in adapters}
        self._parts: list[SharedPart] = []

    def compressed(
        self, report: PackReport, folder: Path | None, progress: Callable[[str, int, int], None] | None
    ) -> tuple[PackReport, dict[str, Any]]:
        """The pack with a shared basis.

        Args:
            report: Of the pack without.
            folder: Where to write; None: nowhere.
            progress: Called with a module's name, how many are done and how many there are.

        Returns:
            What was done, and what the index says of the basis.
        """
        refs = list(self._refs(progress))
        digest = ""
        if folder is not None:
            path = folder / _pack_index.SHARED
            size = io.write_safetensors(path, refs, {"format": "pt"}, order="given", overwrite=True)
            digest = _pack_index.file_digest(path)
        else:
            for ref in refs:
                ref.load()
            size = len(io.build([(ref.name, ref.dtype, ref.shape) for ref in refs], {"format": "pt"}))
            size += sum(ref.nbytes for ref in refs)
        described = {
            "rank": self._rank,
            "diagonal": self._diagonal,
            "file": _pack_index.SHARED,
            "sha256": digest,
            "dtype": self._store,
            "modules": [self._described(name) for name in self._shapes],
        }
        adapters = tuple([self._entry(each) for each in self._adapters])
        found = report._replace(bytes=size, adapters=adapters, shared=tuple(self._parts))
        return found, described

    def _refs(self, progress: Callable[[str, int, int], None] | None) -> Iterator[TensorRef]:
        """The tensors of the file; a module's are computed when its first is asked for."""
        for number, name in enumerate(self._shapes, 1):
            part = _Part(self._computed, name, getattr(torch, DTYPES[self._store].torch))
            (left, right), (out, width) = self._widths(name), self._flat(name)
            cores = (len(self._members[name]), *self._core(name))
            for role, shape in zip(_ROLES, ((out, left), (right, width), cores), strict=True):
                yield TensorRef(f"{name}.{role}", shape, self._store, LazySource(part.maker(role)))
            if progress is not None:
                part.done = _told(progress, name, number, len(self._shapes))

    def _computed(self, name: str) -> SharedBasis:
        if name not in self._read:
            self._read = {}  # let go of the last group before the next is read
            self._read = self._factors(self._group_of[name])
        found = shared_basis(self._read.pop(name), self._rank, diagonal=self._diagonal)
        for entry, norm, error in zip(
            self._members[name], found.norms.tolist(), found.errors.tolist(), strict=True
        ):
            self._errors[entry.name][name] = norm, error
        mean = float(found.errors.square().mean().sqrt())
        self._parts.append(
            SharedPart(name, self._flat(name), min(self._widths(name)), len(found.errors), mean, found.rounds)
        )
        return found

    def _factors(self, group: Sequence[str]) -> dict[str, list[Factors]]:
        """The factors of a group of modules, of every adapter that has them."""
        wanted = set(group)
        found: dict[str, list[Factors]] = {name: [] for name in group}
        for entry in self._adapters:
            planned = self._planner.planned(entry.source)
            modules = planned.plan.adapter.modules.values()
            self._targets.update({str(module.target): module for module in modules})
            for names, stacked in _pack_normal.stacks(planned, wanted, "F64"):
                for name, up, down in zip(names, stacked.up, stacked.down, strict=True):
                    found[name].append(Factors(up.to(COMPUTE), down.to(COMPUTE)))
        return found

    def _groups(self) -> Iterator[list[str]]:
        """Modules whose factors are read together."""
        group: list[str] = []
        held = 0
        for name in self._shapes:
            size = self._columns(name) * sum(self._flat(name)) * COMPUTE.itemsize
            if group and held + size > _TOGETHER:
                yield group
                group, held = [], 0
            group.append(name)
            held += size
        yield group

    def _columns(self, name: str) -> int:
        return sum(entry.ranks.get(name, entry.rank) for entry in self._members[name])

    def _flat(self, name: str) -> tuple[int, int]:
        shape = self._shapes[name]
        return shape[0], math.prod(shape[1:])

    def _widths(self, name: str) -> tuple[int, int]:
        return widths(self._flat(name), self._columns(name), self._rank, diagonal=self._diagonal)

    def _core(self, name: str) -> tuple[int, ...]:
        """The shape of one core."""
        return self._widths(name)[:1] if self._diagonal else self._widths(name)

    def _described(self, name: str) -> dict[str, Any]:
        module = self._targets[name]
        target: Target = module.target
        members = [entry.name for entry in self._members[name]]
        return {
            "name": name,
            "component": target.component,
            "path": target.path,
            "rows": [list(span) for span in target.rows.spans] if target.rows is not None else None,
            "of": target.rows.of if target.rows is not None else 0,
            "op": module.op,
            "in_first": module.in_first,
            "shape": list(self._shapes[name]),
            "rank": min(self._widths(name)),
            "adapters": members if len(members) < len(self._adapters) else None,
        }

    def _entry(self, entry: Packed) -> Packed:
        errors = self._errors[entry.name]
        size = math.sqrt(sum(norm * norm for norm, _ in errors.values()))
        away = math.sqrt(sum((norm * error) ** 2 for norm, error in errors.values()))
        return entry._replace(
            bucket=max(min(self._widths(name)) for name in errors),
            dtype=self._store,
            bytes=sum(nbytes(self._core(name), self._store) for name in errors),
            error=away / size if size else 0.0,
            errors={name: error for name, (_, error) in errors.items()},
        )


class _Part:
    """One module's tensors, of which each is made once, in their order."""

    def __init__(self, compute: Callable[[str], SharedBasis], name: str, dtype: torch.dtype) -> None:
        self.done: Callable[[], None] = lambda: None
        self._compute = compute
        self._name = name
        self._dtype = dtype
        self._made: dict[str, torch.Tensor] = {}

    def maker(self, role: str) -> Callable[[], torch.Tensor]:
        """What makes a tensor when it is asked for."""

        def make() -> torch.Tensor:
            if role not in self._made:
                found = self._compute(self._name)
                self._made = {each: self._stored(getattr(found, each)) for each in _ROLES}
                self.done()
            return self._made.pop(role)

        return make

    def _stored(self, values: torch.Tensor) -> torch.Tensor:
        stored = values.to(self._dtype).contiguous()
        if not bool(stored.isfinite().all()):
            raise NonFiniteError(
                f"{self._name}: values up to {float(values.abs().max()):.3g} do not fit {self._dtype}",
                expected="A dtype was expected that holds the cores",
                todo="Choose --dtype float32 or bfloat16",
            )
        return stored


def _told(
    progress: Callable[[str, int, int], None], name: str, number: int, count: int
) -> Callable[[], None]:
    return lambda: progress(name, number, count)
