"""A resize into another layout: regrouped first wherever that is possible, so that the ranks are those of the file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from loratools import formats
from loratools.errors import OptionError
from loratools.io.base import Base, keys_of
from loratools.kinds import lora
from loratools.model import Adapter, Layout
from loratools.ops import _request, convert, files
from loratools.ops._resize_options import Options


def goal(adapter: Adapter, layout: str | None) -> str:
    """The layout of the result by name.

    Raises:
        LayoutError: It is not known, or only read.
    """
    return convert.writable(layout or adapter.layout.name).name


def present(adapter: Adapter) -> Layout:
    """The adapter's own layout as it is written today; as it is where it is not written at all."""
    if adapter.layout.name not in formats.writable():
        return adapter.layout
    return _request.written_layout([adapter], None)


def comes_first(adapter: Adapter, goal: str, asked: Options) -> bool:
    """Whether the adapter is brought into its new layout before it is cut.

    Weights that are fused get the sum of their parts' ranks, which the rule should see. Kinds that the other layout
    may not hold have to become LoRA first.

    Raises:
        OptionError: A size is asked for, and the file's would only be known after the ranks are spent.
    """
    if goal == adapter.layout.name:
        return False
    modules = adapter.modules.values()
    # A Tucker form becomes a pair of factors on the way, and full differences beside it would, too.
    full, tucker = adapter.kinds.get("full", 0), _has_tucker(adapter)
    if all(lora.is_product(module) or module.kind == "full" for module in modules) and not (full and tucker):
        return True
    if asked.kind == "size":
        raise OptionError(
            f"the size of a {goal} file cannot be told before its modules are LoRA",
            path=adapter.path or None,
            expected="A size in another layout is reached for LoRA modules alone",
            todo="Run convert --as lora first, or keep the layout",
        )
    return False


def converted(adapter: Adapter, goal: str, base: files.PathLike | None, drop: Iterable[str]) -> Adapter:
    """The adapter as its file in another layout will be read.

    Raises:
        LayoutError: The layout cannot hold everything; the message names the keys.
    """
    kind = "lora" if _has_tucker(adapter) else None
    document = convert.convert(adapter, goal, as_kind=kind, base=base, drop=drop).document
    found = formats.read(
        {ref.name: ref for ref in document.tensors},
        metadata=document.metadata,
        config=document.config or {},
        arch=adapter.arch,
        path=adapter.path,
    )
    return replace(found, order=(), notes=adapter.notes)


def matched(adapter: Adapter, *paths: files.PathLike | None) -> tuple[Adapter, list[Base | None]]:
    """The adapter under the names of the first model that is given, and what each model holds."""
    found = [keys_of(path) if path is not None else None for path in paths]
    first = next((each for each in found if each is not None), None)
    return convert.against(adapter, first), found


def _has_tucker(adapter: Adapter) -> bool:
    return any("mid" in module.factors for module in adapter.modules.values())
