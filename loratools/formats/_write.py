"""The common model into a document: tensors under their keys, metadata, and what lies beside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from loratools.errors import LayoutError
from loratools.formats._base import Document, Format, Speller
from loratools.model import Adapter, Layout
from loratools.tensors import TensorRef

# How many reasons a message gives for what a layout cannot hold.
_REASONS = 3
_ELSEWHERE = "Choose another layout with --to"


def document(adapter: Adapter, layout: Layout, form: Format) -> Document:
    """What has to be written.

    An adapter that is written in the layout it came in keeps its keys, their order and its metadata; computed ones
    (those without an ``order``) are completed by the layout.

    Raises:
        LayoutError: The layout cannot hold a module, or extras that only another layout can name.
    """
    same = layout.name == adapter.layout.name and layout.variant == adapter.layout.variant
    if same and adapter.order:
        return _verbatim(adapter, form)
    if form.speller is None or form.finisher is None:
        raise LayoutError(
            f"the {form.title} layout can be read but not written yet", todo="Choose another with --to"
        )
    extras = _extras(adapter, layout, form)
    tensors = _once(_spelt(adapter, layout, form.speller)) + extras
    _refuse_twins(tensors)
    return form.finisher(adapter, tensors, layout)


def _spelt(adapter: Adapter, layout: Layout, speller: Speller) -> list[TensorRef]:
    """The tensors of all modules under the layout's keys.

    Raises:
        LayoutError: The layout cannot hold some of them; all of these are named.
    """
    tensors: list[TensorRef] = []
    refused: list[LayoutError] = []
    for module in adapter.modules.values():
        try:
            tensors += speller(module, adapter, layout)
        except LayoutError as error:
            refused.append(error)
    if not refused:
        return tensors
    problems = list(dict.fromkeys(error.problem for error in refused))
    more = f"; and {len(problems) - _REASONS} other reasons" if len(problems) > _REASONS else ""
    raise LayoutError(
        "; ".join(problems[:_REASONS]) + more,
        path=adapter.path or None,
        keys=[key for error in refused for key in error.keys],
        todo="; ".join(dict.fromkeys(error.todo for error in refused if error.todo)) or _ELSEWHERE,
    ) from refused[0]


def _extras(adapter: Adapter, layout: Layout, form: Format) -> list[TensorRef]:
    """The tensors of no module under the layout's keys.

    Raises:
        LayoutError: It has no place for some of them.
    """
    if layout.name == adapter.layout.name:
        return list(adapter.extras.values())
    adopted = {key: form.adopt(ref, adapter) for key, ref in adapter.extras.items()}
    foreign = [key for key, ref in adopted.items() if ref is None]
    if foreign:
        raise LayoutError(
            f"the {form.title} layout cannot hold {len(foreign)} tensors that belong to no module",
            path=adapter.path or None,
            keys=foreign,
            todo="Leave them out with --drop extras, or keep the layout they came in",
        )
    return [ref for ref in adopted.values() if ref is not None]


def _verbatim(adapter: Adapter, form: Format) -> Document:
    named: dict[str, TensorRef] = dict(adapter.extras)
    for module in adapter.modules.values():
        for _, ref in module.tensors():
            named[ref.name] = _as_stored(ref)
    tensors = tuple(named[key] for key in adapter.order if key in named)
    missing = [key for key in adapter.order if key not in named]
    if missing:
        raise LayoutError("keys of the file belong to no module and no extras", keys=missing)
    config: Mapping[str, object] | None = adapter.config if form.folder and adapter.config else None
    return Document(tensors, adapter.metadata, config, ordered=True)


def _as_stored(ref: TensorRef) -> TensorRef:
    """A transposed view back in the orientation of its file."""
    return ref.flipped() if ref.transposed else ref


def _once(tensors: list[TensorRef]) -> list[TensorRef]:
    """Tensors without the repetitions of those that several modules share: the same data under the same key."""
    first: dict[str, TensorRef] = {}
    return [ref for ref in tensors if not _is_same(first.setdefault(ref.name, ref), ref)]


def _is_same(one: TensorRef, other: TensorRef) -> bool:
    """Whether a tensor is another one once more."""
    if one is other or (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return one.source is other.source or one.raw() == other.raw()


def _refuse_twins(tensors: list[TensorRef]) -> None:
    twins = [name for name, count in Counter(ref.name for ref in tensors).items() if count > 1]
    if twins:
        raise LayoutError("several modules would be written under one key", keys=twins)
