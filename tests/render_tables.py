"""The documentation's tables that follow from the code: ``python -m tests.render_tables`` writes them.

Each stands between ``<!-- table: name -->`` and ``<!-- /table -->``. What a layout can write is tried, not read off its
declarations: modules of every component and of every kind are given to it, and what it wrote is read again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from loratools import archs, formats
from loratools.archs import Arch, Component
from loratools.archs._table import Piece, swapped
from loratools.errors import LayoutError, LoraError
from loratools.formats import _peft_methods, _peft_special
from loratools.formats._base import Format
from loratools.formats._gguf_names import ARCHITECTURE
from loratools.formats._positions import sam_place
from loratools.model import Adapter, Layout, Module, Target
from tests.kinds import samples

ROOT = Path(__file__).resolve().parents[1]

# In the order in which people look for them; a test compares them with the layouts that there are.
LAYOUTS = (
    *("kohya", "diffusers", "peft", "comfy", "onetrainer", "ai-toolkit", "musubi", "lycoris"),
    *("xlabs", "attn-procs", "cloneofsimo", "loralib", "sam", "gguf", "torchtune", "mlx"),
)
# The layouts whose prefixes differ from component to component.
PREFIXED = ("kohya", "lycoris", "onetrainer", "diffusers", "ai-toolkit", "comfy")

# Readers tell what their numbers mean by shapes, which these modules do not have.
NUMBERED = ("cloneofsimo", "sam")

# Where no table has names: some of each architecture's own.
OWN_NAMES = {
    "llm": ("model.layers.0.self_attn.q_proj", "transformer.h.0.attn.c_attn"),
    "speech": ("model.encoder.layers.0.self_attn.q_proj",),
    "vision": ("vision_model.encoder.layers.0.self_attn.q_proj",),
    "unknown": ("blocks.0.attn.qkv",),
}
# What readers call the networks of a model that nobody has described.
UNKNOWN = ("model", "denoiser", "text_encoder")

# What layouts whose names depend on the model are tried with, and what it calls its embedding.
HOSTS = ("llama", "gpt2")
EMBEDDING = "model.embed_tokens"

LORA = "LoRA"
# Samples of tests.kinds, by what the table calls them.
KINDS = {
    LORA: "lora",
    "LoRA on convolutions (LoCon)": "lora-conv",
    "LoRA on convolutions with `lora_mid`": "lora-mid",
    "AdaLoRA": "adalora",
    "BD-LoRA": "bdlora",
    "LoHa": "loha",
    "LoHa with `hada_t1`, `hada_t2`": "loha-tucker",
    "LoKr": "lokr",
    "LoKr with `lokr_t2`": "lokr-tucker",
    "OFT of Kohya and LyCORIS": "oft-diag",
    "BOFT": "boft",
    "OFT of PEFT and OneTrainer": "oft-peft",
    "GLoRA": "glora",
    "(IA)³ of LyCORIS": "ia3-out",
    "VeRA": "vera",
    "MiSS": "miss",
    "VB-LoRA": "vblora",
    "VB-LoRA, the largest weights alone": "vblora-topk",
    "Uni-LoRA": "unilora",
    "full differences": "full",
    "a sparse residual beside LoRA": "sparse",
}
_PLAIN = samples.sample("lora").module._replace(scale=1.0)

ALL, SOME, OWN, NO = "all", "some", "its own", "–"


class Held(NamedTuple):
    """What a layout can write of a component.

    Attributes:
        weights: Those that it has names for, of one block or more.
        whole: Whether these are all.
    """

    weights: tuple[Target, ...]
    whole: bool


def weights(arch: Arch, component: str, blocks: int) -> list[str]:
    """The paths of a component's weights, of so many blocks."""
    owner = next((each for each in arch.components if each.name == component), None)
    if owner is None or owner.table is None:
        return list(OWN_NAMES[arch.name])
    natives = dict.fromkeys(native for native, _ in owner.table.rows)
    paths = [native.replace("{}", str(number)) for native in natives for number in range(blocks)]
    return list(dict.fromkeys(paths))


def targets(arch: Arch, component: str, form: Format, blocks: int) -> list[Target]:
    """The same in the pieces in which a layout spells them."""
    if form.name == "sam" and arch.name == "vision":
        places = [sam_place(number) for number in range(blocks)]
        return [Target(place.component, place.path, place.rows) for place in places]
    paths = weights(arch, component, blocks)
    owner = next((each for each in arch.components if each.name == component), None)
    if owner is None or owner.table is None:
        return [Target(component, path) for path in paths]
    dialect = owner.dialect(form.name, form.dialect)
    return [Target(component, path, rows) for path in paths for rows in owner.table.pieces(path, dialect)]


def spelt(form: Format, module: Module, arch: str, *, own: bool = False) -> bool:
    """Whether a layout has names and places for all that a module has.

    Args:
        form: The layout.
        module: The module.
        arch: The architecture that it is of.
        own: Whether it came in this layout, with its configuration.
    """
    if form.speller is None or form.lacking(module):
        return False
    if form.hosted and module.op == "embedding":
        module = module._replace(target=module.target._replace(path=EMBEDDING))
    config = {"peft_type": _peft_methods.TYPES.get(module.kind, "")} if own else {}
    if own and module.kind in _peft_special.KINDS:
        config = {"peft_type": "LORA", _peft_special.KINDS[module.kind]: "as trained"}
    return any(_spelt(form, module, arch, config, host) for host in (HOSTS if form.hosted else ("",)))


def _spelt(form: Format, module: Module, arch: str, config: dict[str, str], host: str) -> bool:
    metadata = {ARCHITECTURE: host} if host else {}
    adapter = Adapter({module.target: module}, arch=arch, config=config, metadata=metadata)
    try:
        form.speller(module, adapter, Layout(form.name))
    except LayoutError:
        return False
    return True


def holds(arch: Arch, component: str, form: Format) -> Held:
    """The weights of a component that a layout can write, and that are found again."""
    # Layouts that number their modules cannot leave any out.
    for blocks in (1, 24):
        named = [
            each for each in targets(arch, component, form, blocks) if spelt(form, plain(each), arch.name)
        ]
        if not named:
            break
        if _found_again(Adapter({each: plain(each) for each in named}, arch=arch.name), arch, form):
            paths = {each.path for each in named}
            return Held(tuple(named), paths >= set(weights(arch, component, blocks)))
    return Held((), False)


def _found_again(adapter: Adapter, arch: Arch, form: Format) -> bool:
    """Whether what a layout writes of an adapter is read as the same weights."""
    if form.hosted:  # the weights are of several models, in each of which some have names
        return True
    try:
        document = formats.document(adapter, Layout(form.name), form)
        if form.name in NUMBERED or not arch.has_table:
            return True
        tensors = {ref.name: ref for ref in document.tensors}
        config = document.config or {}
        found = formats.read(tensors, metadata=document.metadata, config=config, arch=arch.name)
    except LoraError:
        return False
    return found.modules.keys() == adapter.modules.keys()


def plain(target: Target) -> Module:
    """A LoRA of rank 3 with nothing beside it."""
    return _PLAIN._replace(target=target)


@cache
def held(arch: str, layout: str) -> dict[str, Held]:
    """What a layout can write of each component."""
    known = archs.get(arch)
    names = UNKNOWN if arch == "unknown" else [each.name for each in known.components]
    return {name: holds(known, name, formats.get(layout)) for name in names}


def layouts() -> Iterator[tuple[str, ...]]:
    """Architectures by layouts: whether each layout can write them."""
    yield ("architecture", *(f"`{layout}`" for layout in LAYOUTS))
    for name, arch in archs.all_archs().items():
        yield (f"`{name}` {arch.title}", *(_summary(held(name, layout)) for layout in LAYOUTS))


def _summary(found: dict[str, Held]) -> str:
    if all(each.whole for each in found.values()):
        return ALL
    return SOME if any(each.weights for each in found.values()) else NO


def kinds() -> Iterator[tuple[str, ...]]:
    """Adapter kinds by layouts: which layouts have names and places for them."""
    yield ("what", *(f"`{layout}`" for layout in LAYOUTS))
    for title, module in _samples().items():
        yield (title, *(_answer(formats.get(layout), module) for layout in LAYOUTS))


def _answer(form: Format, module: Module) -> str:
    places = [
        (arch, part.weights[0])
        for arch in archs.all_archs()
        for part in held(arch, form.name).values()
        if part.weights
    ]
    answers = {spelt(form, module._replace(target=target), arch) for arch, target in places}
    if True not in answers and any(
        spelt(form, module._replace(target=target), arch, own=True) for arch, target in places
    ):
        return OWN
    return ALL if answers == {True} else SOME if True in answers else NO


def _samples() -> dict[str, Module]:
    """A module of every kind and form at a scale of 1, by what the table calls it."""
    vector = samples.ref(np.ones(samples.OUT))
    across = samples.ref(np.ones((1, samples.IN)))
    found = {title: samples.sample(name).module for title, name in KINDS.items()}
    lora = found[LORA]
    return {
        title: module._replace(scale=1.0, alpha=None)
        for title, module in {
            **found,
            "LoRA on embeddings": lora._replace(op="embedding", in_first=True),
            "DoRA, a norm per output": lora._replace(magnitude=vector, magnitude_axis="out"),
            "DoRA, a norm per input": lora._replace(magnitude=across, magnitude_axis="in"),
            "LoRA with a bias of PEFT's": lora._replace(factors={**lora.factors, "up_bias": vector}),
            "LoRA with a bias of LyCORIS'": lora._replace(factors={**lora.factors, "diff_b": vector}),
        }.items()
    }


def prefixes() -> Iterator[tuple[str, ...]]:
    """Components by layouts: what stands before a weight's name."""
    yield ("architecture", "component", *(f"`{layout}`" for layout in PREFIXED))
    for name, arch in archs.all_archs().items():
        for component in arch.components if arch.has_table else ():
            yield (f"`{name}`", component.name, *(_prefix(arch, component, layout) for layout in PREFIXED))


def _prefix(arch: Arch, component: Component, layout: str) -> str:
    written = held(arch.name, layout)[component.name].weights
    if not written:
        return NO
    form, target = formats.get(layout), written[0]
    dialect = component.dialect(layout, form.dialect)
    body = arch.spell(target.component, target.path, target.rows, dialect) or ""
    adapter = Adapter({target: plain(target)}, arch=arch.name)
    key = form.speller(plain(target), adapter, Layout(layout))[-1].name if form.speller else ""
    start = key.replace(".", "_").rindex(body.replace(".", "_"))
    return f"`{key[:start]}`"


def pieces() -> Iterator[tuple[str, ...]]:
    """The weights that diffusers splits or stores in another order."""
    yield ("architecture", "weight", "in diffusers", "rows")
    for name, arch in archs.all_archs().items():
        for component in arch.components:
            for native, twin in component.table.rows if component.table is not None else ():
                if isinstance(twin, tuple):
                    names = [piece if isinstance(piece, str) else piece[0] for piece in twin]
                    yield (f"`{name}`", f"`{native}`", ", ".join(f"`{each}`" for each in names), _rows(twin))


def _rows(twin: tuple[Piece, ...]) -> str:
    if twin == swapped(str(twin[0][0])):
        return "halves exchanged"
    shares = [piece[1] if isinstance(piece, tuple) else 1 for piece in twin]
    if all(isinstance(share, int) for share in shares):
        return " : ".join(str(share) for share in shares)
    return ", ".join(str(share) for share in shares)


def table(rows: Iterator[tuple[str, ...]]) -> str:
    """Rows as Markdown, the first one as the head."""
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + "---|" * (head.count("|") - 1), *body])


TABLES: dict[str, tuple[str, Callable[[], Iterator[tuple[str, ...]]]]] = {
    "layouts": ("README.md", layouts),
    "kinds": ("docs/formats.md", kinds),
    "prefixes": ("docs/architectures.md", prefixes),
    "pieces": ("docs/architectures.md", pieces),
}


def block(name: str) -> str:
    """A table between its markers, as its page should have it."""
    return f"<!-- table: {name} -->\n{table(TABLES[name][1]())}\n<!-- /table -->"


def stands(name: str) -> str:
    """A table between its markers, as its page has it."""
    text = (ROOT / TABLES[name][0]).read_text("utf-8")
    found = re.search(rf"<!-- table: {name} -->.*?<!-- /table -->", text, re.DOTALL)
    return found[0] if found else ""


if __name__ == "__main__":
    for name, (page, _) in TABLES.items():
        path = ROOT / page
        path.write_text(path.read_text("utf-8").replace(stands(name), block(name)), "utf-8", newline="\n")
