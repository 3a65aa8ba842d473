"""What a conversion reports."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from loratools.model import Adapter
from loratools.ops.results import ConvertReport, WrittenTensor

if TYPE_CHECKING:
    from loratools.ops._probe import Probed
    from loratools.ops.convert import Converted

Progress = Callable[[str, int, int], None]


def counted(progress: Progress | None, total: int) -> Callable[[int], None] | None:
    """A callback for every tensor that is written, which tells its number; None where nobody wants to know."""
    if progress is None:
        return None
    numbers = itertools.count(1)
    return lambda _: progress("", next(numbers), total)


def report(
    adapter: Adapter, converted: Converted, output: str, to: str, size: int, probed: Probed | None
) -> ConvertReport:
    """What became of an adapter that was converted, and what a comparison of both files said."""
    modules = converted.adapter.modules
    return ConvertReport(
        input=adapter.path,
        output=output,
        bytes=size,
        arch=adapter.arch,
        source=str(adapter.layout),
        layout=to,
        modules=(len(adapter.modules), len(modules)),
        kinds=converted.adapter.kinds,
        ranks=dict(sorted(Counter(module.rank or 0 for module in modules.values()).items())),
        dtypes=dict(Counter(ref.dtype for ref in converted.document.tensors)),
        ledger=converted.ledger,
        tensors=tuple(
            [WrittenTensor(ref.name, ref.dtype, ref.shape, ref.nbytes) for ref in converted.document.tensors]
        ),
        conversions=converted.conversions,
        weights=probed.weights if probed else None,
        error=probed.error if probed else None,
        worst=probed.worst if probed else "",
        notes=converted.notes,
        runtime=converted.normal.runtime,
        normalised=converted.normal.account,
    )
