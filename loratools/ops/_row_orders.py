"""Rows of attention weights in the order in which a program has them, and back in that of transformers.

llama.cpp and torchtune rotate neighbouring rows of each head where transformers rotates halves; other graphs keep the
rows of all queries together where transformers keeps those of each head. A module's rows are gathered when they are
loaded: no value changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from loratools import kinds
from loratools.errors import LayoutError, OptionError, ShapeError, UnsupportedKindError
from loratools.formats import Format
from loratools.formats._base import HEADS_KV, HEADS_Q, QKV_BY_GROUP, QKV_BY_HEAD
from loratools.io.base import Base
from loratools.model import Adapter, Module, Target
from loratools.ops._host import Host, described
from loratools.registry import scan
from loratools.tensors import BytesSource, TensorRef, torch_bytes

if TYPE_CHECKING:
    import torch

_TODO = (
    "Give the model that the adapter is for with --base: a folder with its config.json is enough; or --heads and "
    "--kv-heads"
)


class Gathered:
    """Rows of a tensor in another order, gathered on request.

    Attributes:
        ref: The tensor; its first axis, or its only one, is that of the rows.
        rows: Which of its rows each row is.
    """

    __slots__ = ("ref", "rows")

    def __init__(self, ref: TensorRef, rows: tuple[int, ...]) -> None:
        self.ref = ref
        self.rows = rows

    def raw(self) -> memoryview:
        """The bytes of the tensor with its rows in order."""
        import numpy

        data = torch_bytes(self.ref.load().contiguous()) if self.ref.transposed else self.ref.raw()
        whole = numpy.frombuffer(data, numpy.uint8).reshape(len(self.rows), -1)
        return whole[list(self.rows)].reshape(-1).data

    def torch(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """The tensor with its rows in order."""
        return BytesSource(self.raw()).torch(shape, dtype)


def orders(adapter: Adapter, form: Format, host: Host) -> dict[Target, str]:
    """The modules whose rows a layout has in another order than transformers, and in which."""
    family = form.family(adapter, host.model_type) or ""
    found = {target: form.row_order(family, target.path) for target in adapter.modules}
    return {target: order for target, order in found.items() if order}


def alike(adapter: Adapter, form: Format, host: Host) -> bool:
    """Whether a layout has an adapter's rows in the order in which they are."""
    own = _form(adapter)
    if own is None or own.name == form.name:
        return True
    return orders(adapter, own, host) == orders(adapter, form, host)


def as_transformers(adapter: Adapter, host: Host) -> Adapter:
    """An adapter whose rows are in transformers' order, from the order of the layout it came in.

    Raises:
        OptionError: How many heads the model has is not known.
        ShapeError: They do not divide the rows.
    """
    own = _form(adapter)
    return adapter if own is None else _reordered(adapter, orders(adapter, own, host), host, back=True)


def as_written(adapter: Adapter, form: Format, host: Host) -> Adapter:
    """An adapter whose rows are in a layout's order, from transformers'.

    Raises:
        OptionError: How many heads the model has is not known.
        ShapeError: They do not divide the rows.
    """
    return _reordered(adapter, orders(adapter, form, host), host, back=False)


def for_base(adapters: Iterable[Adapter], base: Base) -> list[Adapter]:
    """Adapters whose rows are in the order of a base model of transformers, which tells its heads.

    Raises:
        OptionError: It does not tell them, and an adapter's rows are in another order.
        ShapeError: They do not divide the rows.
    """
    config = base.configs.get("", {})
    host = described(base.path, config)
    return [as_transformers(adapter, host) for adapter in adapters]


def refuse_mixture(adapters: Sequence[Adapter], layout: str) -> None:
    """Refuse to combine adapters whose rows are in different orders, or in another than the result's.

    Args:
        adapters: The inputs.
        layout: The result's, or empty.

    Raises:
        LayoutError: Some weight's rows are in two orders.
    """
    known: Mapping[str, Format] = scan("loratools.formats", "FORMAT")
    found: dict[str, tuple[str, Adapter]] = {}
    for adapter in adapters:
        own = _form(adapter)
        if own is None:
            continue
        mine = orders(adapter, own, Host())
        goal = orders(adapter, known[layout], Host()) if layout in known and layout != own.name else mine
        for target in adapter.modules:
            order = mine.get(target, "")
            before, other = found.setdefault(target.path, (order, adapter))
            if order != before or order != goal.get(target, ""):
                raise LayoutError(
                    f"the rows of {target} are in another order than those of {other.path or 'another input'}"
                    if order != before
                    else f"the rows of {target} are in another order than the {layout} layout has them",
                    path=adapter.path or None,
                    expected="llama.cpp and torchtune order rows of queries and keys otherwise than transformers",
                    todo="Convert it first: `loratools convert IN -o OUT --to peft --base MODEL`",
                )


def _form(adapter: Adapter) -> Format | None:
    """The layout that an adapter came in; None where it is none of those that are described."""
    known: Mapping[str, Format] = scan("loratools.formats", "FORMAT")
    return known.get(adapter.layout.name)


def _reordered(adapter: Adapter, found: Mapping[Target, str], host: Host, *, back: bool) -> Adapter:
    if not found:
        return adapter
    _refuse_widths(adapter, found, host)
    modules = {
        target: _gathered(module, found[target], host, adapter.path, back=back) if target in found else module
        for target, module in adapter.modules.items()
    }
    return replace(adapter, modules=modules)


def _refuse_widths(adapter: Adapter, found: Mapping[Target, str], host: Host) -> None:
    """Refuse heads of queries and of keys that would not be equally wide: their counts are another model's."""
    counts = {HEADS_Q: host.heads, HEADS_KV: host.kv_heads}
    widths: dict[float, Target] = {}
    for target, order in found.items():
        rows = (adapter.modules[target].shape or (0,))[0]
        if counts.get(order):
            widths.setdefault(rows / counts[order], target)
    if len(widths) > 1:
        raise ShapeError(
            f"heads of {' and '.join(f'{width:g}' for width in sorted(widths))} rows do not make one model: "
            f"{host.heads} heads of queries and {host.kv_heads} of keys are not this adapter's",
            path=adapter.path or None,
            keys=[str(target) for target in widths.values()],
            todo=_TODO,
        )


def _gathered(module: Module, order: str, host: Host, path: str, *, back: bool) -> Module:
    axes = kinds.get(module.kind).row_axes(module.factors)
    if not axes or any(axes.values()) or module.shape is None or module.target.rows is not None:
        raise UnsupportedKindError(
            f"{module.target}: the rows of a {kinds.get(module.kind).title} module cannot be put in another order",
            path=path or None,
            keys=[ref.name for _, ref in module.tensors() if ref.name],
            todo="Turn it into LoRA with --as lora",
        )
    rows = _rows(module, order, host, path)
    if back:
        rows = _inverse(rows)
    factors = {role: _in_order(ref, rows) if role in axes else ref for role, ref in module.factors.items()}
    magnitude = module.magnitude
    if magnitude is not None and module.magnitude_axis == "out":
        magnitude = _in_order(magnitude, rows)
    return module._replace(factors=factors, magnitude=magnitude)


def _in_order(ref: TensorRef, rows: tuple[int, ...]) -> TensorRef:
    return ref._replace(source=Gathered(ref, rows), transposed=False)


def _rows(module: Module, order: str, host: Host, path: str) -> tuple[int, ...]:
    """Which of transformers' rows each row of a layout is."""
    height = (module.shape or (0,))[0]
    heads, kv_heads = host.heads, host.kv_heads
    needed = {
        HEADS_Q: (heads,),
        HEADS_KV: (kv_heads,),
        QKV_BY_HEAD: (heads,),
        QKV_BY_GROUP: (heads, kv_heads),
    }
    if not all(needed[order]):
        raise OptionError(
            f"the rows of {module.target} lie in an order that depends on how many heads the model has",
            path=path or None,
            expected="The model's configuration was expected, which says that",
            todo=_TODO,
        )
    parts = {
        HEADS_Q: 2 * heads,
        HEADS_KV: 2 * kv_heads,
        QKV_BY_HEAD: 3 * heads,
        QKV_BY_GROUP: heads + 2 * kv_heads,
    }[order]
    if height % parts:
        raise ShapeError(
            f"{module.target} has {height} rows, which {heads} heads of queries and {kv_heads} of keys do not divide",
            path=path or None,
            expected=f"A multiple of {parts} was expected",
            todo=_TODO,
        )
    return _permutation(order, height, heads, kv_heads)


@lru_cache(maxsize=16)
def _permutation(order: str, height: int, heads: int, kv_heads: int) -> tuple[int, ...]:
    if order in (HEADS_Q, HEADS_KV):
        count = heads if order == HEADS_Q else kv_heads
        half = height // count // 2
        return tuple(
            (2 * head + side) * half + row
            for head in range(count)
            for row in range(half)
            for side in range(2)
        )
    groups = heads if order == QKV_BY_HEAD else kv_heads
    queries = heads // groups
    width = height // (groups * (queries + 2))
    blocks: Sequence[range] = (range(queries), range(queries, queries + 1), range(queries + 1, queries + 2))
    return tuple(
        (group * (queries + 2) + member) * width + row
        for block in blocks
        for group in range(groups)
        for member in block
        for row in range(width)
    )


@lru_cache(maxsize=16)
def _inverse(rows: tuple[int, ...]) -> tuple[int, ...]:
    found = [0] * len(rows)
    for place, row in enumerate(rows):
        found[row] = place
    return tuple(found)
