"""Every tensor of an input accounted for: where it went, or why it did not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from loratools.errors import LayoutError
from loratools.formats import Format
from loratools.model import Adapter, Module, Target
from loratools.ops._fit import Fitted, Misfit
from loratools.ops.results import LedgerEntry
from loratools.tensors import TensorRef

# Which of the output's tensors an input's goes into, where the roles differ.
_BECOMES = {"diff_b": ("diff_b", "up_bias"), "up_bias": ("up_bias", "diff_b")}


def account(
    adapter: Adapter,
    ready: Adapter,
    fitted: Sequence[Fitted],
    origins: Mapping[Target, Module],
    dropped: Iterable[Misfit],
    *,
    written: Sequence[TensorRef],
    form: Format,
) -> tuple[LedgerEntry, ...]:
    """An entry for every tensor of an input.

    Args:
        adapter: As it was read.
        ready: As it was regrouped: with the base's names, and its modules turned into another kind.
        fitted: What is written of each module.
        origins: The modules as they were read, by target, where they were turned into another kind.
        dropped: What the caller allowed to be left out.
        written: All tensors of the output.
        form: Its layout.

    Raises:
        LayoutError: A tensor of the input is not accounted for.
    """
    ledger = Ledger(form)
    ledger.dropped(dropped)
    for each in fitted:
        ledger.fitted(each, origins)
    touched = {source.target for each in fitted for source in each.step.sources}
    ledger.zero(module for target, module in ready.modules.items() if target not in touched)
    ledger.extras(adapter.extras, written)
    return ledger.closed(adapter)


class Ledger:
    """Entries by the input's keys, in the order in which they are made."""

    def __init__(self, form: Format) -> None:
        self._form = form
        self._entries: dict[str, LedgerEntry] = {}

    def dropped(self, misfits: Iterable[Misfit]) -> None:
        """What the caller allowed to be left out."""
        for misfit in misfits:
            for key in misfit.keys:
                self._add(key, "dropped", (), misfit.tag)

    def zero(self, modules: Iterable[Module]) -> None:
        """Modules of which nothing is left."""
        for module in modules:
            for _, ref in module.tensors():
                self._add(ref.name, "zero", (), "it changes nothing")

    def fitted(self, found: Fitted, origins: Mapping[Target, Module]) -> None:
        """One module of the result.

        Args:
            found: What is written of it.
            origins: The modules as they were read, by target, where they were turned into another kind first.
        """
        module, fate = found.module, found.step.fate
        if module is None:
            return
        written = _keys_by_source(found.spelt)
        into = {role: written.get(id(ref.source), ()) for role, ref in module.factors.items()}
        if module.magnitude is not None:
            into["magnitude"] = written.get(id(module.magnitude.source), ())
        every = tuple([ref.name for ref in found.spelt])
        for source in found.step.sources:
            origin = origins.get(source.target) if origins else None
            for role, ref in (origin or source).tensors():
                if origin is not None:
                    self._add(ref.name, "converted", every, f"{origin.kind} to {module.kind}")
                elif role == "alpha":
                    self._alpha(ref, source, module, found)
                elif role == "scalar":
                    self._add(ref.name, "folded", (), "in the scale")
                else:
                    became = next((each for each in _BECOMES.get(role, (role,)) if each in into), role)
                    new = module.factors.get(became)
                    # Data of another source has been computed: only a scale does that to a module that stays whole.
                    folded = fate == "moved" and new is not None and new.source is not ref.source
                    self._add(ref.name, "folded" if folded else fate, into.get(became, ()), "")

    def _alpha(self, ref: TensorRef, source: Module, module: Module, found: Fitted) -> None:
        stated = tuple(each.name for each in found.spelt if each.name.endswith("alpha"))
        if stated:
            changed = module.scale != source.scale and found.step.fate == "moved"
            self._add(ref.name, "folded" if changed else found.step.fate, stated, "")
        elif module.scale != source.scale:
            self._add(ref.name, "folded", (), f"scale {source.scale:g} in the factors")
        elif self._form.states_scale(module):
            self._add(ref.name, "metadata", (), "")
        else:
            self._add(ref.name, "implied", (), "alpha is the rank")

    def extras(self, before: Mapping[str, TensorRef], written: Iterable[TensorRef]) -> None:
        """Tensors of no module."""
        out = _keys_by_source(written) if before else {}
        for key, ref in before.items():
            if key not in self._entries:
                self._add(key, "moved", out.get(id(ref.source), ()), "")

    def closed(self, adapter: Adapter) -> tuple[LedgerEntry, ...]:
        """All entries, in the input's order.

        Raises:
            LayoutError: A tensor of the input is not accounted for.
        """
        order: Sequence[str] = adapter.order or tuple(self._entries)
        missing = [key for key in order if key not in self._entries]
        if missing:
            raise LayoutError(
                f"{len(missing)} tensors are not accounted for", path=adapter.path or None, keys=missing
            )
        return tuple(self._entries[key] for key in order)

    def _add(self, key: str, fate: str, into: tuple[str, ...], detail: str) -> None:
        if not key:
            return
        known = self._entries.get(key)
        if known is not None and known.fate == "dropped" and not into:
            return
        if known is not None and fate != "dropped":
            into = tuple(dict.fromkeys((*known.into, *into)))
            fate = known.fate if known.fate != "dropped" else fate
        elif known is not None:
            return
        self._entries[key] = LedgerEntry(key, fate, into, detail)


def _keys_by_source(spelt: Iterable[TensorRef]) -> dict[int, tuple[str, ...]]:
    """The keys under which data is written, by the identity of where it comes from."""
    found: dict[int, tuple[str, ...]] = {}
    for ref in spelt:
        source = id(ref.source)
        found[source] = (*found[source], ref.name) if source in found else (ref.name,)
    return found
