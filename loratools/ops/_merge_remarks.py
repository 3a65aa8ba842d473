"""What the caller of a merge should know of a result that is right, and may surprise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from loratools.model import Target
from loratools.ops._combine import Combined
from loratools.ops._merge_steps import shown_name
from loratools.ops._request import Request


def remarks(asked: Request, merged: Mapping[Target, Combined], whole: Sequence[str]) -> list[str]:
    """One sentence for each matter.

    Args:
        asked: What was asked for.
        merged: The results by target, those that have a module.
        whole: Keys of tensors that are carried beside them as they were.
    """
    said = [*_missed_blocks(asked), *_bases(asked)]
    # What holds NaN or Inf is of no known size, and has a note of its own.
    zero = [target for target, each in merged.items() if each.size == 0.0 and not each.note]
    if zero:
        said.append(
            f"{len(zero)} of {len(merged)} merged modules are zero (first: {zero[0]}): what the inputs bring there "
            f"cancels, or is nothing"
        )
    if whole and set(asked.weights) - {0.0, 1.0}:
        said.append(
            f"{len(whole)} tensors replace weights of the base and were carried whole, whatever the weights "
            f"(first: {whole[0]})"
        )
    modules = [each.module for each in merged.values() if each.module is not None]
    alphas = {module.scale * (module.rank or 1) for module in modules}
    if asked.layout.name == "kohya" and len(alphas) > 1:
        said.append(
            "modules that went over unchanged state an alpha of their own; diffusers 0.42 applies one alpha to all "
            "modules of a Kohya file. For diffusers choose --to diffusers"
        )
    return said


def noted(asked: Request, results: Mapping[Target, Combined]) -> list[str]:
    """What the inputs' readers and the methods have to say; what holds of many targets once, with their count."""
    notes = [note for adapter in asked.adapters for note in adapter.notes]
    notes += [each.note for each in results.values() if each.note]
    remarks = Counter(each.remark for each in results.values() if each.remark)
    return notes + [
        f"{count} module{'s' if count > 1 else ''}: {remark}" for remark, count in remarks.items()
    ]


def _bases(asked: Request) -> list[str]:
    """The base models that the inputs name, where they name several."""
    named = Counter(
        str(each.config["base_model_name_or_path"])
        for each in asked.adapters
        if each.config.get("base_model_name_or_path")
    )
    if len(named) < 2:
        return []
    shown = ", ".join(f"{name} ({count})" for name, count in named.most_common())
    apart = not set.intersection(*(set(each.modules) for each in asked.adapters))
    return [f"the inputs name {len(named)} base models: {shown}" + ", and have no module in common" * apart]


def _missed_blocks(asked: Request) -> list[str]:
    """The modules of each input that a vector or a preset of block weights does not speak of."""
    said = []
    for source, adapter in enumerate(asked.adapters):
        missed = asked.weigh.missed(source)
        if missed:
            name = shown_name(adapter.path) or f"input {source + 1}"
            said.append(
                f"{len(missed)} of {len(adapter.modules)} modules of {name} lie in no block that the block weights "
                f"name, and keep their weight (first: {missed[0]})"
            )
    return said
