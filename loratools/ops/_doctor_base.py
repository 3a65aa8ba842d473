"""Checks against the base model: names that it does not have, shapes, the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

from loratools.errors import LoraError, ShapeError, shown
from loratools.formats._group import clean
from loratools.io.base import Base
from loratools.ops import _doctor_mend as mend
from loratools.ops import _moe_base, base_names
from loratools.ops._doctor_case import Case
from loratools.ops.doctor_results import ERROR, WARNING, Finding, named

_MADE_FOR = "Give the base that the adapter was trained on"


def names(case: Case) -> Iterator[Finding]:
    """Modules that the base does not have, or has under another name or in another shape."""
    if case.base is None or case.adapter is None or not case.modules:
        return
    try:
        # What a base has in another style, experts one by one or all of a layer in one, it does not lack.
        adapter = _moe_base.for_base(case.adapter, case.base)
        found = base_names.against(adapter, case.base)
    except ShapeError as error:
        yield _misfits(case, error)
        return
    except LoraError as error:
        near = f"; near: {shown(error.candidates, 2)}" if error.candidates else ""
        first = f" (first: {', '.join(error.keys[:2])})" if error.keys else ""
        why = f"{error.expected}. " if error.expected else ""
        yield Finding(
            "not-in-base",
            ERROR,
            f"{error.problem}{first}{near}",
            f"{why}A module that matches nothing is passed over, or stops the program",
            error.todo or _MADE_FOR,
            keys=error.keys,
        )
        return
    moved = [
        f"{before.path} is {after.path}"
        for before, after in zip(adapter.modules, found.modules, strict=True)
        if before.path != after.path
    ]
    if moved:
        yield Finding(
            "other-names",
            WARNING,
            f"{named(moved, 'module', of=len(adapter.modules))} in {case.given_base}",
            "Programs that look modules up by their exact names do not find them, and give the base's own output",
            command=mend.convert(case),
            keys=tuple(moved),
        )


def _misfits(case: Case, error: ShapeError) -> Finding:
    """Modules of another shape; embeddings alone mean another vocabulary."""
    embeddings = {str(module.target) for module in case.modules if module.op == "embedding"}
    told = all(sentence.partition(":")[0].partition(" (")[0] in embeddings for sentence in error.keys)
    if error.keys and embeddings and told:
        return _vocabulary(error.keys)
    return Finding(
        "shape-differs",
        ERROR,
        f"{error.problem} (first: {error.keys[0] if error.keys else ''})",
        "It was made for a model of another size: programs stop at it",
        error.todo or _MADE_FOR,
        keys=error.keys,
    )


def vocabulary(case: Case) -> Iterator[Finding]:
    """Embeddings and output layers saved in full, with another count of rows than the base's."""
    if case.base is None:
        return
    stored = _weights(case.base)
    off: list[str] = []
    for key, ref in case.extras.items():
        name = clean(key).replace(".modules_to_save.", ".").replace(".base_layer.", ".")
        has = next((shape for path, shape in stored.items() if _same(name, path)), None)
        if has is not None and len(has) == len(ref.shape) == 2 and has[0] != ref.shape[0]:
            off.append(f"{key}: {ref.shape[0]} rows, {has[0]} in the base")
    if off:
        yield _vocabulary(tuple(off))


def _weights(base: Base) -> dict[str, tuple[int, ...]]:
    return {key: weight.shape for part in base.parts.values() for key, weight in part.items()}


def _same(name: str, path: str) -> bool:
    return name == path or name.endswith(f".{path}") or path.endswith(f".{name}")


def _vocabulary(keys: tuple[str, ...]) -> Finding:
    return Finding(
        "vocabulary",
        ERROR,
        f"{named(keys, 'embedding')}: the vocabulary is another",
        "Tokens were added, or the base is another model: their rows have no place in the base as it is",
        "Resize the base's embeddings to the adapter's tokenizer first, or give the base that it was trained on",
        keys=keys,
    )
