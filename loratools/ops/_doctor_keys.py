"""Checks of the header alone: whole pairs, prefixes, spellings, tensors without elements."""

from __future__ import annotations

from collections.abc import Iterator

from loratools.ops import _doctor_mend as mend
from loratools.ops import _doctor_odd
from loratools.ops._doctor_case import Case
from loratools.ops.doctor_results import ERROR, INFO, WARNING, Finding, named

# Roles that come in pairs, whatever the layout.
_PAIRS = (("up", "down"), ("embedding_up", "embedding_down"))
# What the reader of Kohya's layout calls such files.
_MALFORMED = "malformed"
# Spellings that real files have beside each other: LyCORIS adds its own names to Kohya's.
_ALIKE = {"lycoris": "kohya"}


def empty(case: Case) -> Iterator[Finding]:
    """Tensors without elements: what ZeRO-3 leaves where weights were saved without being gathered."""
    keys = [key for key, ref in case.tensors.items() if 0 in ref.shape]
    if keys:
        yield Finding(
            "empty-tensors",
            ERROR,
            f"{named(keys, 'tensor', of=len(case.tensors))} hold no elements",
            "This is what DeepSpeed ZeRO-3 leaves where weights are saved without being gathered: what was trained is "
            "not in the file",
            "Save it again with stage3_gather_16bit_weights_on_model_save, or make it from the checkpoint with "
            "zero_to_fp32.py",
            keys=tuple(keys),
        )


def pairs(case: Case) -> Iterator[Finding]:
    """Modules with one factor of two."""
    alone = [
        f"{stem} (no {'down' if up in found.roles else 'up'})"
        for stem, found in case.groups.items()
        for up, down in _PAIRS
        if (up in found.roles) != (down in found.roles)
    ]
    if alone:
        yield Finding(
            "incomplete-pairs",
            ERROR,
            f"{named(alone, 'module', of=len(case.groups))} lack a factor",
            "A product needs both of its factors: programs stop here, or leave the module out",
            "Get the file again from where it was made",
            keys=tuple(alone),
        )


def prefixes(case: Case) -> Iterator[Finding]:
    """PEFT's prefix doubled or missing, wrappers of frameworks, and an adapter's name left in the keys."""
    found = _doctor_odd.oddities(case)
    for code, said in _doctor_odd.ODD.items():
        keys = found[code]
        if keys:
            yield _odd(case, code, keys, said)


def _odd(case: Case, code: str, keys: list[str], said: str) -> Finding:
    """A finding on names; what a program that is asked about does with them, ``_doctor_runtime`` says."""
    # PEFT itself finds its own usual name, others do not.
    usual = WARNING if code == "adapter-name" and all(_doctor_odd.is_default(key) for key in keys) else ERROR
    return Finding(
        code,
        INFO if case.runtime is not None else usual,
        f"{named(keys, 'key', of=len(case.tensors))} {said}",
        "PEFT and others look keys up by their exact names, and pass over those that they do not find: the adapter "
        "loads, and does nothing",
        command=mend.convert(case, to="peft"),
        keys=tuple(keys),
    )


def styles(case: Case) -> Iterator[Finding]:
    """Modules spelt in the ways of several layouts."""
    counts: dict[str, list[str]] = {}
    for stem, found in case.groups.items():
        style = _ALIKE.get(found.style, found.style)
        if style:
            counts.setdefault(style, []).append(stem)
    if len(counts) < 2:
        return
    most = max(counts, key=lambda style: len(counts[style]))
    others = [stem for style, stems in counts.items() if style != most for stem in stems]
    shown = ", ".join(f"{len(stems)} as {style}" for style, stems in counts.items())
    yield Finding(
        "mixed-styles",
        WARNING,
        f"the modules are spelt in {len(counts)} ways: {shown} (first of the fewer: {others[0]})",
        "Programs tell a layout by some of its keys, and leave out what is spelt otherwise",
        command=mend.convert(case),
        keys=tuple(others),
    )


def malformed(case: Case) -> Iterator[Finding]:
    """Keys like Kohya's with a doubled prefix or a missing dot."""
    if case.adapter is None or case.adapter.layout.variant != _MALFORMED:
        return
    keys = tuple(case.tensors)
    yield Finding(
        "malformed-keys",
        ERROR,
        f"{named(keys, 'key')} have a doubled prefix or a missing dot",
        "No program has such names: they are passed over, and the adapter does nothing",
        command=mend.convert(case),
        keys=keys,
    )
