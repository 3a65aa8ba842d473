"""What a reader will call modules whose names a layout does not keep whole.

llama.cpp and torchtune have one name for a weight, whatever class of transformers it was adapted in: what is
``bert.encoder.…``, ``roberta.encoder.…`` or ``encoder.…`` is one there, and so are a language model's layers by
themselves and inside a model that sees images, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from loratools.errors import LayoutError
from loratools.formats import Format
from loratools.model import Adapter


def names(paths: Iterable[str], form: Format, family: str) -> dict[str, str]:
    """The paths that a reader of a layout will call otherwise, by what it will call them.

    Args:
        paths: Of the modules that are written.
        form: The layout.
        family: What it calls the model, or empty.

    Raises:
        LayoutError: Two modules would have one name.
    """
    found: dict[str, str] = {}
    for path in dict.fromkeys(paths):
        other = found.setdefault(form.read_path(family, path), path)
        if other != path:
            raise LayoutError(
                f"the {form.name} layout has one name for {other} and {path}",
                keys=[other, path],
                expected="Modules of one model were expected",
                todo="Choose another layout with --to",
            )
    return {there: path for there, path in found.items() if there != path}


def under(adapter: Adapter, own: Mapping[str, str]) -> Adapter:
    """An adapter that was read back, its modules under the names that they were written from.

    Args:
        adapter: As it was read.
        own: From :func:`names`.
    """
    if not own:
        return adapter
    modules = {}
    for target, module in adapter.modules.items():
        named = target._replace(path=own.get(target.path, target.path))
        modules[named] = module._replace(target=named)
    return replace(adapter, modules=modules)


def notes(own: Mapping[str, str], form: Format) -> list[str]:
    """That a reader will call modules otherwise."""
    if not own:
        return []
    there, path = next(iter(own.items()))
    return [f"{form.title} does not keep names whole: {path} will be read as {there} ({len(own)} modules)"]
