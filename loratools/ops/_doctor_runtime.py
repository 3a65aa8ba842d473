"""Checks of what one program makes of an adapter: layout, kinds, features, limits, partners."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from loratools import archs, formats
from loratools.ops import _doctor_features
from loratools.ops import _doctor_mend as mend
from loratools.ops._doctor_case import Case
from loratools.ops._doctor_features import Used
from loratools.ops.doctor_results import ERROR, WARNING, Finding, named
from loratools.runtimes import FEATURES, Runtime

_LAYER = re.compile(r"(?<=\.)(\d+)(?=\.)")
# What architectures without tables of names are of.
_FAMILIES = {"llm": "language", "speech": "speech", "vision": "vision"}
_IMAGE = "image"


def layout(case: Case, runtime: Runtime) -> Iterator[Finding]:
    """A layout that the program does not read."""
    if case.adapter is None:
        return
    if case.layout not in runtime.layouts:
        words, way = mend.for_layout(case)
        yield Finding(
            "layout",
            ERROR,
            f"its layout is {case.layout}; {runtime.title} reads {', '.join(runtime.layouts)}",
            "It looks keys up by their names, and finds none of its own",
            words,
            way,
        )


def container(case: Case, runtime: Runtime) -> Iterator[Finding]:
    """A file of another container than the program opens."""
    own = case.adapter.layout.container if case.adapter is not None else ""
    if case.layout in runtime.layouts and runtime.containers and own not in runtime.containers:
        words, way = mend.for_layout(case)
        yield Finding(
            "layout",
            ERROR,
            f"its tensors lie in a file of type {own}; {runtime.title} opens {' or '.join(runtime.containers)}",
            "It looks for a file of that type, and stops",
            words,
            way,
        )


def file_name(case: Case, runtime: Runtime) -> Iterator[Finding]:
    """Weights whose file is called otherwise than the program looks for in the folder."""
    if case.layout not in runtime.layouts or not runtime.configured or not formats.get(case.layout).folder:
        return
    own, wanted = os.path.basename(case.path), os.path.splitext(formats.get(case.layout).weights)[0]
    if os.path.isfile(case.path) and os.path.splitext(own)[0] != wanted:
        yield Finding(
            "file-name",
            ERROR,
            f"the file is called {own}; {runtime.title} looks for {wanted} in the adapter's folder",
            "It does not find the adapter",
            "Rename it, or write it anew",
            mend.convert(case),
        )


def kinds(case: Case, runtime: Runtime) -> Iterator[Finding]:
    """Kinds that the program does not apply."""
    off = [module for module in case.modules if module.kind not in runtime.kinds]
    off = [
        module for module in off if not (module.kind == "full" and case.by_peft)
    ]  # told as modules_to_save
    # Experts in one pair of factors are a feature of LoRA's.
    off = [module for module in off if module.kind != "experts"]
    if not off:
        return
    names = ", ".join(dict.fromkeys(module.kind for module in off))
    lost = mend.lost(off, runtime)
    yield Finding(
        "kind",
        ERROR,
        f"{named([str(module.target) for module in off], 'module', of=len(case.modules))} are of kind {names}; "
        f"{runtime.title} applies {', '.join(sorted(runtime.kinds))}",
        "It stops at their tensors, or passes over them",
        mend.LOST if lost else "",
        "" if lost else mend.for_kinds(case, off),
        keys=tuple([str(module.target) for module in off]),
    )


def family(case: Case, runtime: Runtime) -> Iterator[Finding]:
    """A kind of model that the program does not run."""
    if case.adapter is None or not runtime.families or not case.modules:
        return
    arch = case.adapter.arch
    own = _FAMILIES.get(arch) or (_IMAGE if arch in archs.all_archs() and archs.get(arch).has_table else "")
    if own and own not in runtime.families:
        title = archs.get(arch).title if own == _IMAGE else f"a {archs.get(arch).title}"
        yield Finding(
            "family",
            ERROR,
            f"it is for {title}; {runtime.title} runs {' and '.join(sorted(runtime.families))} models",
            "There is no such model in it to be adapted",
            f"Ask about another program: --for {'diffusers' if own == _IMAGE else 'peft'}",
        )


def features(case: Case, runtime: Runtime) -> Iterator[Finding]:
    """What the program refuses or passes over of what the adapter uses."""
    found = _doctor_features.used(case)
    if "rslora" in found and not runtime.holds("rslora"):
        found.pop("scales", None)  # the same modules, and the same mend
    for feature, each in found.items():
        refused, ignored = runtime.refuses.get(feature), runtime.ignores.get(feature)
        if refused is not None:
            yield _feature(case, "refused", feature, each, refused, ERROR)
        elif ignored is not None:
            # What is announced without a tensor has nothing that could be lost.
            yield _feature(case, "ignored", feature, each, ignored, WARNING if each.stated else ERROR)


def _feature(case: Case, code: str, feature: str, found: Used, said: str, severity: str) -> Finding:
    return Finding(
        code,
        severity,
        f"{FEATURES[feature]}: {named(found.keys, found.word, of=found.of)}",
        f"{case.runtime.title if case.runtime else ''}: {said}",
        mend.words(feature),
        mend.for_feature(case, feature),
        found.keys,
        feature,
    )


def rank(case: Case, runtime: Runtime) -> Iterator[Finding]:
    """Ranks over the program's limit."""
    limit = case.max_rank or runtime.usual_rank
    over = [module for module in case.modules if module.rank and limit and module.rank > limit]
    if not over:
        return
    most = max(module.rank or 0 for module in over)
    room = next((each for each in runtime.ranks if each >= most), 0) if not case.max_rank else 0
    yield Finding(
        "rank-limit",
        WARNING if room else ERROR,
        f"{named([f'{module.target}: {module.rank}' for module in over], 'module', of=len(case.modules))} "
        f"have a rank above {limit}",
        f"{runtime.title} stops at a rank above its limit"
        + (f", which is {limit} unless it is told otherwise" if room else ""),
        f"Start it with {runtime.option.format(room)}; or cut the ranks" if room and runtime.option else "",
        mend.resize(case, limit),
        tuple(f"{module.target}: {module.rank}" for module in over),
    )


def partners(case: Case, runtime: Runtime) -> Iterator[Finding]:
    """Modules without those that the program needs beside them."""
    paths = {module.target.path for module in case.modules}
    for pair in runtime.pairs:
        alone = [
            path
            for path in sorted(paths)
            if path.rpartition(".")[2] == pair.there and path[: -len(pair.there)] + pair.needed not in paths
        ]
        if alone:
            yield Finding(
                "partner-missing",
                ERROR,
                f"{named(alone, 'module')} have no {pair.needed} beside them",
                f"{runtime.title} keeps them in one buffer, and stops where {pair.there} comes without {pair.needed}",
                "" if runtime.normal else "Train both, or bake it into its base model",
                mend.convert(case) if runtime.normal else mend.bake(case),
                tuple(alone),
            )


def layers(case: Case, runtime: Runtime) -> Iterator[Finding]:
    """Targets that some layer lacks, where the program then leaves them out of all."""
    if not runtime.every_layer:
        return
    there: dict[str, set[int]] = {}
    for module in case.modules:
        number = _LAYER.search(module.target.path)
        if number is not None:
            there.setdefault(_LAYER.sub("#", module.target.path, count=1), set()).add(int(number[1]))
    count = max((max(numbers) + 1 for numbers in there.values()), default=0)
    if case.base is not None:
        keys = (key for part in case.base.parts.values() for key in part)
        count = max([count, *(int(found[1]) + 1 for key in keys if (found := _LAYER.search(key)))])
    short = [
        f"{target}: {len(numbers)} of {count}" for target, numbers in there.items() if len(numbers) < count
    ]
    if short:
        yield Finding(
            "layers-missing",
            ERROR,
            f"{named(short, 'target', of=len(there))} are not in every layer",
            f"{runtime.title} leaves a target out of the whole model where any layer lacks it",
            "" if runtime.normal else "Train it on all layers, or bake it into its base model",
            mend.convert(case) if runtime.normal else mend.bake(case),
            tuple(short),
        )


def checked(case: Case, runtime: Runtime) -> Iterator[Finding]:
    """What a program makes of an adapter; of one for a kind of model that it does not run, that alone."""
    foreign = list(family(case, runtime))
    yield from foreign
    for check in () if foreign else (layout, container, file_name, kinds, features, rank, partners, layers):
        yield from check(case, runtime)
