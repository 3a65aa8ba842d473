"""Every architecture through every ordered pair of layouts that can hold it, there and back.

The adapters are generated from the tables: LoRA of mixed ranks and scales on weights of every component, at the grain
in which the first layout spells them.
"""

from __future__ import annotations

import itertools
import random
import re
from math import lcm

import pytest
import torch

from loratools import archs, formats
from loratools.archs import Arch, Component
from loratools.formats import Format
from loratools.model import Adapter, Layout, Module, Rows, Target
from loratools.ops.convert import Converted, convert, verify
from loratools.tensors import TensorRef, from_torch

# Layouts whose names come from the architectures' tables.
LAYOUTS = (
    "kohya",
    "diffusers",
    "peft",
    "comfy",
    "onetrainer",
    "ai-toolkit",
    "musubi",
    "lycoris",
    "xlabs",
    "attn-procs",
)
ARCHS = [name for name, arch in archs.all_archs().items() if arch.has_table]
PER_COMPONENT = 7
SCALES = (1.0, 0.5, 2.0, 0.375, -0.25)


def shares(component: Component, path: str) -> int:
    """A count of rows that every dialect's pieces divide."""
    table = component.table
    assert table is not None
    every = [
        rows for dialect in ("native", "diffusers", *table.further) for rows in table.pieces(path, dialect)
    ]
    return lcm(*[rows.of for rows in every if rows])


def paths(component: Component, rng: random.Random, wanted: int) -> list[str]:
    """Some weights of a component: those that dialects cut differently first."""
    table = component.table
    assert table is not None
    numbered = [re.sub(r"\{\}", lambda _: str(rng.randrange(3)), native) for native, _ in table.rows]
    fused = [path for path in numbered if shares(component, path) > 1]
    plain = [path for path in numbered if path not in fused]
    rng.shuffle(fused), rng.shuffle(plain)
    return list(dict.fromkeys([*fused[: wanted - 2], *plain]))[:wanted]


def module(target: Target, height: int, rng: random.Random) -> Module:
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    rank, width = rng.randint(1, 4), 6
    factors = {
        "up": from_torch("", torch.randn(height, rank, generator=generator)),
        "down": from_torch("", torch.randn(rank, width, generator=generator)),
    }
    return Module(target, "lora", factors, rng.choice(SCALES), None, rank, (height, width))


def holds(component: Component, form: Format) -> bool:
    return component.table is not None and component.prefix(form.name) is not None


def generated(arch: Arch, form: Format, others: Format) -> Adapter | None:
    """An adapter in the pieces of one layout, of components and weights that another can hold too."""
    rng = random.Random(f"{arch.name} {form.name} {others.name}")
    modules: dict[Target, Module] = {}
    components = [each for each in arch.components if holds(each, form) and holds(each, others)]
    for component in components[:1] if "peft" in (form.name, others.name) else components:
        table = component.table
        assert table is not None
        for path in paths(component, rng, PER_COMPONENT):
            there = table.pieces(path, component.dialect(others.name, others.dialect))
            if there != (None,) and sum(rows.shares / rows.of for rows in there if rows) < 1:
                continue  # it has no name for some of the rows
            whole = 2 * shares(component, path)
            scale = rng.choice(SCALES)
            for rows in table.pieces(path, component.dialect(form.name, form.dialect)) if there else ():
                height = whole * rows.shares // rows.of if rows else whole
                target = Target(component.name, path, rows)
                # Parts of one weight are scaled alike, as trainers do.
                modules[target] = module(target, height, rng)._replace(scale=scale)
    return Adapter(modules, arch=arch.name, layout=Layout(form.name)) if modules else None


def read(converted: Converted, arch: str) -> Adapter:
    document = converted.document
    return formats.read(
        {ref.name: ref for ref in document.tensors},
        metadata=document.metadata,
        config=document.config or {},
        arch=arch,
    )


def content(adapter: Adapter) -> dict[Target, tuple[float, dict[str, bytes]]]:
    return {
        target: (each.scale, {role: bytes(ref.raw()) for role, ref in each.factors.items()})
        for target, each in adapter.modules.items()
    }


def close(one: Adapter, other: Adapter) -> bool:
    for target, each in one.modules.items():
        before, after = each.delta(), other.modules[target].delta()
        if (after - before).norm() > 2e-6 * before.norm():
            return False
    return one.modules.keys() == other.modules.keys()


@pytest.mark.parametrize("name", ARCHS)
def test_there_and_back(name: str) -> None:
    arch = archs.get(name)
    tried = 0
    forms = [formats.get(layout) for layout in LAYOUTS]
    for form, other in itertools.permutations(forms, 2):
        first = generated(arch, form, other)
        if first is None:
            continue
        if other.name == "attn-procs" or form.name == "attn-procs":
            first = _attention_only(first)
        if not first.modules:
            continue
        tried += 1
        start = convert(first, form.name)
        here = read(start, name)
        there = convert(here, other.name)
        assert verify(here, there, read(there, name)).weights == len(
            {(target.component, target.path) for target in here.modules}
        )
        fates = {entry.fate for entry in there.ledger}
        assert fates <= {"moved", "split", "fused", "folded", "metadata", "implied"}
        back = read(convert(read(there, name), form.name), name)
        folded = "none" in (form.alpha, other.alpha)
        where = f"{name}: {form.name} to {other.name} and back"
        if not folded or all(each.scale == 1.0 for each in here.modules.values()):
            assert content(back) == content(here), where
        else:
            assert close(here, back), where
    assert tried, f"no pair of layouts holds {name}"


def _attention_only(adapter: Adapter) -> Adapter:
    """What diffusers' first format names: the attention projections of UNets and CLIP."""
    kept = {
        target: each
        for target, each in adapter.modules.items()
        if re.search(r"attn\d?\.(to_(q|k|v|out\.0)|(q|k|v|out)_proj|in_proj)$", target.path)
    }
    return Adapter(kept, arch=adapter.arch, layout=adapter.layout)


def test_rows_are_cut_as_the_tables_say() -> None:
    """The generator itself: a fused layout starts with whole weights, a split one with their parts."""
    flux = archs.get("flux")
    kohya, diffusers = formats.get("kohya"), formats.get("diffusers")
    whole = generated(flux, kohya, diffusers)
    parts = generated(flux, diffusers, kohya)
    assert whole is not None
    assert parts is not None
    assert any(target.path.endswith("qkv") and target.rows is None for target in whole.modules)
    assert any(target.path.endswith("qkv") and isinstance(target.rows, Rows) for target in parts.modules)
    assert all(isinstance(ref, TensorRef) for each in parts.modules.values() for ref in each.factors.values())
