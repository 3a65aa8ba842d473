"""Checks of the strength, of what is mixed, and of what nothing claims."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from loratools import formats
from loratools.formats import _names, _scaling
from loratools.ops import _doctor_mend as mend
from loratools.ops import _metadata, inspect
from loratools.ops._doctor_case import Case
from loratools.ops.doctor_results import ERROR, INFO, WARNING, Finding, named

# What the reader notes, and a check of its own tells.
_ASSUMED = "a scale of 1 is assumed"
_TOLD = re.compile(
    rf"no adapter_config\.json|{_ASSUMED}|states MLX's scale|says rank \d|^init_lora_weights is"
    r"|^layer_replication |(an alpha|a scale) that is (not a number|infinite)|more modules like that"
)
_KNOWN_EXTRAS = re.compile(
    r"\.base_layer\.|trainable_tokens|token_adapter|vera_[AB]$|vblora_|unilora_|\.bias$|modules_to_save"
)


def unknown(case: Case) -> Iterator[Finding]:
    """Modules that state no alpha where their layout would."""
    low_rank = {
        str(module.target): module for module in case.modules if module.kind == "lora" and module.rank
    }
    without = [name for name, module in low_rank.items() if module.alpha is None]
    if case.layout == "peft" and case.config and without:
        yield Finding(
            "unknown-alpha",
            WARNING,
            f"adapter_config.json states no lora_alpha: a scale of 1 is assumed for {named(without, 'module')}",
            "PEFT takes its own default of 8 for it, others stop",
            "Write lora_alpha into adapter_config.json",
            keys=tuple(without),
        )
    for note in case.adapter.notes if case.adapter is not None and case.layout != "peft" else ():
        if _ASSUMED in note:
            why = "Alpha is kept elsewhere: without it the strength is a guess"
            yield Finding("unknown-alpha", WARNING, note, why, "Look it up where it was trained")
    known = case.layout != "unknown" and formats.get(case.layout).alpha == "tensor"
    if known and without:
        some = len(without) < len(low_rank)
        yield Finding(
            "unknown-alpha",
            WARNING if some else INFO,
            f"{named(without, 'module', of=len(low_rank))} state no alpha: their rank is taken for it, a scale of 1",
            "The others state one; a trainer that leaves some out has lost them"
            if some
            else "Trainers of this layout write one; some other programs assume 1 instead, a scale of 1 / rank",
            command=mend.convert(case),
            keys=tuple(without),
        )


def stale(case: Case) -> Iterator[Finding]:
    """Alphas that no training means, and what the metadata says otherwise."""
    if case.adapter is None or not case.modules:
        return
    described = inspect.describe(case.adapter, norms=False)
    odd = _metadata.alphas({}, described.modules)
    for said in odd:
        yield Finding(
            "odd-alpha", WARNING, said, "The strength is alpha / rank", "Train it again, or mend alpha"
        )
    why = "Where the rank was changed and alpha was not, the strength has changed with it"
    for said in _metadata.alphas(case.adapter.metadata, described.modules):
        if said not in odd:
            todo = "If so, apply it with the inverse of that factor"
            yield Finding("stale-alpha", WARNING, said, why, todo)
    ranks = Counter(module.rank for module in described.modules if module.rank is not None)
    for said in _metadata.contradictions(case.adapter.metadata, ranks):
        yield Finding(
            "metadata-contradicts", INFO, said, "Programs that go by the metadata show what is not so"
        )


def nonfinite(case: Case) -> Iterator[Finding]:
    """Scales of NaN or infinity."""
    keys = _scaling.nonfinite(case.modules)
    if keys:
        yield Finding(
            "nonfinite-scale",
            ERROR,
            f"{named(keys, 'module', of=len(case.modules))} have a scale that is NaN or infinite",
            "All that the model computes with it becomes NaN",
            "The file is damaged; get it again from where it was made",
            keys=tuple(keys),
        )


def mixed(case: Case) -> Iterator[Finding]:
    """DoRA beside plain LoRA in one model, which a layout may make all of one sort."""
    both = _names.mixed(case.modules)
    plain = [
        str(module.target)
        for module in case.modules
        if module.target.component in both and module.magnitude is None
    ]
    if not plain:
        return
    own = (case.layout,) if case.runtime is None else case.runtime.layouts
    uniform = any(name in formats.writable() and formats.get(name).uniform for name in own[:1])
    yield Finding(
        "dora-mixed",
        ERROR if uniform else WARNING,
        f"{named(plain, 'module', of=len(case.modules))} have no magnitude, the others are DoRA",
        "PEFT and diffusers have one setting for all: they make these DoRA too, with the base's own norms, and their "
        "result is another",
        command=mend.convert(case, "--as", "lora", base=True),
        keys=tuple(plain),
    )


def unclaimed(case: Case) -> Iterator[Finding]:
    """Tensors that belong to no module, and are none of those that go with adapters."""
    saved = case.config.get("modules_to_save")
    names = [str(name) for name in saved] if isinstance(saved, list) else []
    keys = [
        key
        for key in case.extras
        if not _KNOWN_EXTRAS.search(key) and not any(f".{name}." in f".{key}" for name in names)
    ]
    if keys and case.modules:
        yield Finding(
            "unclaimed",
            WARNING,
            f"{named(keys, 'tensor', of=len(case.tensors))} belong to no module",
            "Nothing says what they are for: programs pass over them, or stop",
            "Name the modules in modules_to_save if they were saved in full; see `loratools info`",
            keys=tuple(keys),
        )


def notes(case: Case) -> Iterator[Finding]:
    """What the reader noted, and no other check tells."""
    for note in case.adapter.notes if case.adapter is not None else ():
        if not _TOLD.search(note):
            yield Finding("note", INFO, note, "This is how the file was read")
