"""One library on its way into a pack: what its adapters are to each other, one after the other in their order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch

from loratools.errors import OptionError
from loratools.ops import _pack_fields, _pack_make, _pack_normal, _pack_twins
from loratools.ops._pack_fit import Fit
from loratools.ops._pack_inputs import Source
from loratools.ops._pack_make import Made, Making
from loratools.ops._pack_planner import Planner
from loratools.ops._pack_work import Record, Shapes, Work, marks_of
from loratools.ops.pack_results import Alias, Packed, PackReport, Unfit

_CAUSES_SHOWN = 3


class Run:
    """One library on its way into a pack.

    Args:
        making: What is the same for all adapters.
        fit: What they are checked against.
        work: Where the pack comes into being.
        limit: The relative difference of ΔW up to which two are one; None: by their dtypes; 0: all are kept.
        skip_unfit: Whether what does not fit is left out.

    Attributes:
        arch: The architecture of the first adapter.
        planner: What reads the adapters.
    """

    def __init__(
        self, making: Making, fit: Fit, work: Work, limit: float | None, *, skip_unfit: bool
    ) -> None:
        self.arch = "unknown"
        self.planner = Planner(making.request)
        self._making = making
        self._fit = fit
        self._work = work
        self._skip = skip_unfit
        self._twins = _pack_twins.Twins(limit)
        self._adapters: dict[str, Packed] = {}
        self._sources: dict[str, Source] = {}
        self._keys: dict[str, str] = {}
        self._shapes: dict[str, Mapping[str, Sequence[int]]] = {}
        self._again_there: set[str] = set()
        self._aliases: list[Alias] = []
        self._unfit: list[Unfit] = []
        self._reused = 0

    def finished(self, source: Source) -> bool:
        """Whether an interrupted run has made this adapter, and neither it nor what was made has changed since."""
        record = self._work.finished.get(source.path)
        if record is None or record.get("name") != source.name or record.get("state") != source.state():
            return False
        if "alias" in record:
            return bool(record["alias"]["name"] == source.name)
        layout, named = self._making.request.layout, self._making.named
        entry, place = record["adapter"], _pack_make.place(layout, source.name) if named else ""
        if (entry["name"], entry["path"], entry["source"]) != (source.name, place, source.path):
            return False
        return not named or self._work.holds(_pack_make.weights(layout, place), entry["sha256"])

    def note(self, source: Source, made: Made) -> None:
        """Have an adapter in the journal as soon as it is made, whatever those before it are."""
        if made.entry is not None:
            record = self._record(source, made.key) | {"adapter": made.entry, "arch": made.arch}
            self._work.note(source.path, record, made.shapes, made.marks)

    def take(self, source: Source, made: Made | None) -> None:
        """Put the next adapter into the pack, or note why not.

        Args:
            source: Which, in the order of the library.
            made: What became of it; None where an interrupted run has finished it.
        """
        if made is None:
            if self._again(source):
                self._reused += 1
                return
            made = _pack_make.make(self._making, source)
            _pack_make.forget()
            self.note(source, made)
        other = self._fit.other_base(made.key, made.shapes) if made.key else ""
        if not other:
            self._fit.warn(made.warnings)
        causes = [*([other] if other else made.causes), *filter(None, [made.problem])]
        if causes or made.entry is None or made.marks is None:
            self._unfit.append(Unfit(source.name, source.path, tuple(causes)))
            self._work.discard(made.entry["path"] if made.entry is not None else "")
            return
        if self._skip or not self._unfit:
            entry = _pack_fields.packed(made.entry, source.path)
            self._keep(source, entry, made.key, made.shapes, made.marks, made.arch)
        self._fit.accept(source.name, made.key, made.shapes)

    def _again(self, source: Source) -> bool:
        """Take what an interrupted run has made of an adapter; False where it does not hold beside those before it."""
        record = self._work.finished[source.path]
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
            entry = _pack_fields.packed(record["adapter"], source.path)
            if self._keep(source, entry, key, shapes, marks_of(record), record["arch"]):
                self._again_there.add(entry.name)
        self._fit.accept(source.name, key, shapes)
        return True

    def shapes_of(self, name: str) -> Mapping[str, Sequence[int]]:
        """The shape of every module's weight of an adapter in the pack."""
        return self._shapes[self._keys[name]]

    def _keep(
        self, source: Source, entry: Packed, key: str, shapes: Shapes, marks: torch.Tensor, arch: str
    ) -> bool:
        """Keep an adapter that was made; False where the pack has one that does the same."""
        alias = self._same(source, entry, key, marks)
        if alias is not None:
            self._aliases.append(alias)
            self._work.note(source.path, self._record(source, key) | {"alias": alias._asdict()}, shapes)
            self._work.discard(entry.path)
            return False
        self.arch = arch if not self._adapters else self.arch
        self._adapters[entry.name] = entry
        self._sources[entry.name] = source
        self._keys[entry.name] = key
        self._shapes.setdefault(key, shapes)
        self._twins.add(entry.name, key, marks, entry.dtype)
        return True

    @staticmethod
    def _record(source: Source, key: str) -> Record:
        return {"name": source.name, "state": source.state(), "key": key}

    def _same(self, source: Source, entry: Packed, key: str, marks: torch.Tensor) -> Alias | None:
        """The adapter in the pack that does the same, if there is one."""
        own = None
        for name in self._twins.candidates(key, marks, entry.dtype):
            own = own or _pack_normal.normal(self.planner.planned(source.path))
            other = self.planner.planned(self._sources[name].path)
            limit = self._twins.limit(entry.dtype, other.plan.dtype)
            error = _pack_twins.difference(own, _pack_normal.normal(other), limit)
            if error is not None:
                return Alias(source.name, name, source.path, entry.source_sha256, error)
        return None

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
            self._making.request.layout,
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
