"""One file, as a person reads it: what it is, its components, its training, and what to beware of."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.text import Text

from loratools.ops.results import ComponentInfo, Info, ModuleInfo
from loratools.report import values
from loratools.report.tables import Column, folded, pairs, table
from loratools.report.values import Symbols, clean

TYPES = {
    "adapter": "an adapter",
    "bottleneck-adapter": "a bottleneck adapter",
    "checkpoint": "a model checkpoint",
    "pack": "a pack of adapters (loratools pack)",
    "controlnet": "a ControlNet",
    "controlnet-lllite": "a ControlNet-LLLite",
    "empty": "a file without tensors",
    "ia3": "an IA³ adapter",
    "ip-adapter": "an IP-Adapter",
    "optimizer": "an optimizer's state",
    "prefix-tuning": "a prefix-tuning adapter",
    "prompt-tuning": "a prompt-tuning adapter",
    "t2i-adapter": "a T2I-Adapter",
    "textual-inversion": "a textual inversion",
    "unknown": "something unknown",
    "upscaler": "an upscaler",
    "vae": "a VAE",
}
_UNCLAIMED_SHOWN = 5
_TAGS_SHOWN = 10
_HASH_SHOWN = 12
# The panel's borders and padding, in cells.
_FRAME = 4
_VALUE_SHOWN = 240
_HASH = r"(?:0x|sha256:)?[0-9a-fA-F]{24,}"


def info_text(info: Info, *, width: int, symbols: Symbols, modules: bool = False) -> RenderableType:
    """Everything about one file.

    Args:
        info: What was found.
        width: Of the output, in cells.
        symbols: What the output can show.
        modules: Whether to list every module.
    """
    parts: list[RenderableType] = [_head(info, width, symbols)]
    if info.components:
        parts += _components(info.components, width, symbols)
    if modules:
        parts += [_modules(name, members, width, symbols) for name, members in _by_component(info).items()]
    if info.training or info.metadata:
        parts.append(pairs(_training(info, symbols), width=width))
    if info.unclaimed:
        parts.append(_unclaimed(info, symbols))
    warnings = [Text(f"Warning: {clean(each)}", style="yellow") for each in info.warnings]
    parts += [Padding(warning, (0, 0, 0, 1), expand=False) for warning in warnings]
    return Group(*parts)


def kinds_text(info: Info, symbols: Symbols) -> str:
    """``lora``, ``lora ×120, loha ×4``, with how many experts a layer has, and what is DoRA."""
    kinds = values.counts(info.kinds, symbols) if info.kinds else ""
    experts = sorted({module.experts for module in info.modules if module.experts is not None})
    if experts:
        kinds += f" ({' or '.join(map(str, experts))} experts a layer)"
    doras = sum(module.dora for module in info.modules)
    if not doras:
        return kinds
    share = "all" if doras == len(info.modules) else f"{doras:,}"
    return f"{kinds} ({share} DoRA)"


def _head(info: Info, width: int, symbols: Symbols) -> RenderableType:
    facts = Text(packed(list(_facts(info, symbols)), width - _FRAME, f" {symbols.dot} "))
    name = Text(folded(clean(info.path), width - _FRAME), style="bold")
    return Panel(Group(name, _what(info, symbols), facts), padding=(0, 1), expand=False)


def packed(parts: Sequence[str], width: int, separator: str) -> str:
    """The parts on as few lines of at most ``width`` cells as they need; lines break between parts only."""
    lines: list[str] = []
    for part in filter(None, parts):
        joined = f"{lines[-1]}{separator}{part}" if lines else part
        if lines and cell_len(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(part)
    return "\n".join(lines)


def _what(info: Info, symbols: Symbols) -> Text:
    if info.type == "adapter":
        known = clean(info.arch_title or info.arch) if info.arch != "unknown" else "unknown architecture"
        family = f" {symbols.dot} {clean(info.family)}" if info.family else ""
        return Text(f"Adapter {symbols.dot} {known}{family}", style="green")
    what = TYPES.get(info.type, f"of type {clean(info.type)}")
    text = f"This is {what}, not a LoRA."
    if info.arch != "unknown" and info.arch_title:
        text += f" Architecture: {clean(info.arch_title)}."
    return Text(text, style="yellow")


def _facts(info: Info, symbols: Symbols) -> Iterator[str]:
    if info.layout != "unknown":
        variant = f" ({clean(info.variant)})" if info.variant else ""
        yield f"{clean(info.layout)} layout{variant}"
    yield kinds_text(info, symbols)
    if info.modules:
        yield values.plural(len(info.modules), "module")
    dtypes = f" ({values.counts(info.dtypes, symbols)})" if info.dtypes else ""
    yield values.plural(info.tensors, "tensor") + dtypes if info.tensors else ""
    yield info.container
    yield values.size(info.bytes) if info.bytes else ""


def _components(found: Mapping[str, ComponentInfo], width: int, symbols: Symbols) -> list[RenderableType]:
    names = [clean(name) for name in found]
    each = list(found.values())
    columns = [
        Column("component", names, fold=12),
        Column("modules", [f"{one.modules:,}" for one in each], right=True),
        Column("rank", [values.ranks(one.ranks, symbols) for one in each], right=True),
        Column("norm", [values.number(one.norm) for one in each], right=True),
        Column("spectral", [values.number(one.spectral_norm) for one in each], right=True, priority=1),
        Column("stable rank", [values.number(one.stable_rank) for one in each], right=True, priority=2),
        Column("effective rank", [values.number(one.effective_rank) for one in each], right=True, priority=3),
    ]
    parts: list[RenderableType] = [table(columns, width=width, symbols=symbols)]
    kept = {name: one.energy for name, one in found.items() if one.energy}
    if kept:
        parts.append(_energy(kept, width, symbols))
    varied = {name: one.ranks for name, one in found.items() if len(one.ranks) > 2}
    if varied:
        parts.append(rank_histograms(varied, width, symbols))
    return parts


def _energy(kept: Mapping[str, Mapping[int, float]], width: int, symbols: Symbols) -> RenderableType:
    ranks = sorted({rank for energy in kept.values() for rank in energy})
    # The small and the large ranks say least; powers around 8 are what people resize to.
    columns = [
        Column(
            str(rank),
            [values.percentage(energy.get(rank, 1.0)) for energy in kept.values()],
            right=True,
            priority=1 + abs(rank.bit_length() - 4),
        )
        for rank in ranks
    ]
    names = Column("energy kept at rank", [clean(name) for name in kept], fold=12)
    return table([names, *columns], width=width, symbols=symbols)


def rank_histograms(varied: Mapping[str, Mapping[int, int]], width: int, symbols: Symbols) -> RenderableType:
    """One line of bars per component whose modules differ in rank."""
    columns = [
        Column("component", [clean(name) for name in varied], fold=12),
        Column("ranks", [values.histogram(ranks, symbols) for ranks in varied.values()]),
        Column("most common", [values.counts(ranks, symbols) for ranks in varied.values()], priority=1),
    ]
    return table(columns, width=width, symbols=symbols)


def _by_component(info: Info) -> dict[str, list[ModuleInfo]]:
    groups: dict[str, list[ModuleInfo]] = {}
    for module in info.modules:
        groups.setdefault(module.component, []).append(module)
    return groups


def _modules(component: str, members: list[ModuleInfo], width: int, symbols: Symbols) -> RenderableType:
    kinds = [f"{module.kind}{' (DoRA)' if module.dora else ''}" for module in members]
    norms = [values.number(module.norm) for module in members]
    spectral = [values.number(module.spectral_norm) for module in members]
    stable = [values.number(module.stable_rank) for module in members]
    effective = [values.number(module.effective_rank) for module in members]
    shapes = ["x".join(map(str, module.shape)) if module.shape else "" for module in members]
    columns = [
        Column("target", [clean(module.target) for module in members], fold=28),
        Column("kind", kinds, priority=6 if len(set(kinds)) == 1 else 2),
        Column("shape", shapes, right=True, priority=3),
        Column("rank", ["" if module.rank is None else str(module.rank) for module in members], right=True),
        Column("alpha", [values.number(module.alpha) for module in members], right=True, priority=1),
        Column("scale", [values.number(module.scale) for module in members], right=True, priority=5),
        Column("norm", norms, right=True),
        Column("spectral", spectral, right=True, priority=3),
        Column("stable rank", stable, right=True, priority=2),
        Column("effective rank", effective, right=True, priority=6),
        Column("dtype", [module.dtype for module in members], priority=7),
    ]
    title = f"{clean(component)}: {values.plural(len(members), 'module')}"
    return table(columns, width=width, symbols=symbols, title=title)


def _training(info: Info, symbols: Symbols) -> Iterator[tuple[str, str]]:
    for name, value in info.training.items():
        shown = _tags(value, symbols) if isinstance(value, Mapping) else _shortened(clean(value), symbols)
        yield clean(name), shown
    if info.metadata:
        yield "metadata", f"{values.plural(len(info.metadata), 'field')} (all of them: --json)"


def _tags(tags: Mapping[str, Any], symbols: Symbols) -> str:
    shown = [f"{clean(tag)} {symbols.times}{count}" for tag, count in list(tags.items())[:_TAGS_SHOWN]]
    left = len(tags) - len(shown)
    return ", ".join(shown) + (f" and {left} more" if left else "")


def _shortened(value: str, symbols: Symbols) -> str:
    if re.fullmatch(_HASH, value):
        return value[:_HASH_SHOWN] + symbols.more
    return value if len(value) <= _VALUE_SHOWN else value[:_VALUE_SHOWN].rstrip() + symbols.more


def _unclaimed(info: Info, symbols: Symbols) -> RenderableType:
    first = [clean(key) for key in info.unclaimed[:_UNCLAIMED_SHOWN]]
    left = len(info.unclaimed) - len(first)
    tail = [f"{symbols.more} and {left:,} more"] if left else []
    lines = "\n".join(f"  {line}" for line in [*first, *tail])
    if info.modules:
        verb = "belongs" if len(info.unclaimed) == 1 else "belong"
        head = f"{values.plural(len(info.unclaimed), 'tensor')} {verb} to no module:"
    else:
        head = "It holds:"
    return Padding(Text(f"{head}\n{lines}", overflow="fold"), (0, 0, 1, 1), expand=False)
