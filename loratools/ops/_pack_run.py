"""One library on its way into a pack: each adapter read, checked, compared with those before it, and written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch

from loratools import formats
from loratools.errors import LoraError, NonFiniteError, OptionError
from loratools.ops import _pack_index, _pack_normal, _pack_twins
from loratools.ops._pack_fit import Fit
from loratools.ops._pack_inputs import Source
from loratools.ops._pack_normal import Normal
from loratools.ops._pack_plan import Request
from loratools.ops._pack_planner import Planned, Planner
from loratools.ops._pack_work import Record, Shapes, Work, marks_of
from loratools.ops.pack_results import Alias, Packed, PackReport, Unfit

_BASE = "base_model_name_or_path"
_CAUSES_SHOWN = 3


class Run:
    """One library on its way into a pack.

    Attributes:
        arch: The architecture of the first adapter.
        planner: What reads the adapters.
    """

    def __init__(
        self,
        request: Request,
        fit: Fit,
        work: Work,
        limit: float | None,
        skip_unfit: bool,
        *,
        written: bool,
    ) -> None:
        self.arch = "unknown"
        self.planner = Planner(request)
        self._request = request
        self._fit = fit
        self._work = work
        self._skip = skip_unfit
        self._written = written
        self._twins = _pack_twins.Twins(limit)
        self._adapters: dict[str, Packed] = {}
        self._sources: dict[str, Source] = {}
        self._keys: dict[str, str] = {}
        self._shapes: dict[str, Mapping[str, Sequence[int]]] = {}
        self._again_there: set[str] = set()
        self._aliases: list[Alias] = []
        self._unfit: list[Unfit] = []
        self._reused = 0

    def take(self, source: Source) -> None:
        """Put one adapter into the pack, or note why not."""
        try:
            if self._again(source):
                self._reused += 1
                return
            planned = self.planner.planned(source.path)
            plan = planned.plan
            other = self._fit.other_base(plan.key, plan.shapes)
            causes = [other] if other else list(self._fit.causes(plan))
            normal = self._values(planned, causes)
            if causes or normal is None:
                self._unfit.append(Unfit(source.name, source.path, tuple(causes)))
                return
            if self._skip or not self._unfit:
                self._keep(source, planned, normal)
            self._fit.accept(source.name, plan.key, plan.shapes)
        except (LoraError, OSError) as error:
            self._unfit.append(Unfit(source.name, source.path, (str(error),)))

    @staticmethod
    def _values(planned: Planned, causes: list[str]) -> Normal | None:
        """The values of an adapter, or None where they are no numbers, which is one more cause."""
        try:
            return _pack_normal.normal(planned)
        except NonFiniteError as error:
            causes.append(str(error))
            return None

    def _again(self, source: Source) -> bool:
        """Whether an interrupted run has finished this adapter, and nothing has changed since."""
        record = self._work.finished.get(source.path)
        if record is None or record["name"] != source.name or record["state"] != source.state():
            return False
        key = record["key"]
        shapes = self._work.shapes[key]
        if self._fit.other_base(key, shapes):  # than of one that was changed
            return False
        if "alias" in record:
            alias = Alias(**record["alias"])
            if alias.of not in self._again_there:  # it may be another now
                return False
            self._aliases.append(alias)
        else:
            entry = _pack_index.packed(record["adapter"])
            if self._written and not self._work.holds(self._weights(entry.path), entry.sha256):
                return False
            self._again_there.add(entry.name)
            self._remember(source, entry, record, shapes, marks_of(record))
        self._fit.accept(source.name, key, shapes)
        return True

    def _weights(self, path: str) -> str:
        form = formats.get(self._request.layout)
        return f"{path}/{form.weights}" if form.folder else path

    def _remember(
        self, source: Source, entry: Packed, record: Record, shapes: Shapes, marks: torch.Tensor
    ) -> None:
        self.arch = record["arch"] if not self._adapters else self.arch
        key = record["key"]
        self._adapters[entry.name] = entry
        self._sources[entry.name] = source
        self._keys[entry.name] = key
        self._shapes.setdefault(key, shapes)
        self._twins.add(entry.name, key, marks, entry.dtype)

    def shapes_of(self, name: str) -> Mapping[str, Sequence[int]]:
        """The shape of every module's weight of an adapter in the pack."""
        return self._shapes[self._keys[name]]

    def _keep(self, source: Source, planned: Planned, normal: Normal) -> None:
        """Write an adapter, or find that it is there already."""
        plan = planned.plan
        marks = _pack_twins.marks(normal.sketch)
        record: Record = {"name": source.name, "state": source.state(), "key": plan.key}
        alias = self._same(source, planned, normal, marks)
        if alias is not None:
            self._aliases.append(alias)
            self._work.note(source.path, {**record, "alias": alias._asdict()}, plan.shapes)
            return
        path, size, digest = "", 0, ""
        if self._written:
            path = self._place(source.name)
            ready = _pack_normal.filled(normal, self._request.layout)
            size, digest = ready.size, self._work.write(ready, path)
        entry = _entry(source, planned, normal, path, size, digest)
        record |= {"adapter": _pack_index.said(entry), "arch": plan.adapter.arch}
        self._remember(source, entry, record, plan.shapes, marks)
        self._work.note(source.path, record, plan.shapes, marks)

    def _same(self, source: Source, planned: Planned, normal: Normal, marks: torch.Tensor) -> Alias | None:
        """The adapter in the pack that does the same, if there is one."""
        plan = planned.plan
        for name in self._twins.candidates(plan.key, marks, plan.dtype):
            other = self.planner.planned(self._sources[name].path)
            limit = self._twins.limit(plan.dtype, other.plan.dtype)
            error = _pack_twins.difference(normal, _pack_normal.normal(other), limit)
            if error is not None:
                return Alias(source.name, name, source.path, planned.sha256(), error)
        return None

    def _place(self, name: str) -> str:
        form = formats.get(self._request.layout)
        suffix = "" if form.folder else f".{form.container}"
        return f"{_pack_index.ADAPTERS}/{name}{suffix}"

    def settle(self, count: int) -> None:
        """Refuse the library where something does not fit and nobody said that it may be left out.

        Raises:
            OptionError: That, or nothing fits.
        """
        if self._unfit and (not self._skip or not self._adapters):
            told = "; ".join(
                f"{each.name}: {each.causes[0].rstrip('.')}" for each in self._unfit[:_CAUSES_SHOWN]
            )
            more = len(self._unfit) - _CAUSES_SHOWN
            raise OptionError(
                f"{len(self._unfit)} of {count} inputs do not fit: {told}"
                + (f"; and {more} more" if more > 0 else ""),
                expected="Adapters of one base were expected, plain LoRA that the program serves",
                todo="Mend them, or pass --skip-unfit to leave them out and list them"
                if self._adapters or not self._skip
                else "Give other adapters: nothing would be left to pack",
            )

    def report(self, output: str, runtime: str | None) -> PackReport:
        """What was done."""
        entries = tuple(self._adapters.values())
        return PackReport(
            output,
            self._request.layout,
            runtime or "",
            sum(each.bytes for each in entries),
            entries,
            tuple(self._aliases),
            tuple(self._unfit),
            self._reused,
            tuple(self._notes(entries)),
        )

    def _notes(self, entries: Sequence[Packed]) -> Iterator[str]:
        bases = Counter(each.base for each in entries if each.base)
        if len(bases) > 1:
            told = ", ".join(f"{name} ({count})" for name, count in bases.most_common())
            yield f"the adapters name {len(bases)} base models, whose modules have the same shapes: {told}"
        rounded = sum(each.rounded for each in entries)
        if rounded:
            yield f"{rounded} of {len(entries)} adapters were rounded once to their store dtype"
        for said, count in self._fit.warnings.items():
            yield f"{count} of {len(entries)} adapters: {said}"


def _entry(source: Source, planned: Planned, normal: Normal, path: str, size: int, digest: str) -> Packed:
    plan = planned.plan
    base = plan.adapter.config.get(_BASE)
    return Packed(
        name=source.name,
        path=path,
        source=source.path,
        source_sha256=planned.sha256(),
        hash=normal.hash,
        layout=plan.source,
        rank=plan.rank,
        bucket=plan.bucket,
        ranks=plan.ranks,
        modules=len(plan.adapter.modules),
        scales=plan.scales,
        rounded=plan.rounded,
        dtype=plan.dtype,
        base=base if isinstance(base, str) else "",
        bytes=size,
        sha256=digest,
    )
