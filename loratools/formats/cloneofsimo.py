"""The first LoRA files for Stable Diffusion: ``unet:0:up`` or a bare list of alternating up and down matrices.

Modules are numbered in the order in which the trainer met them: ``archs/_positions.py`` has the orders, and a file
whose shapes fit none of them keeps its numbers for names. The scale is 1. Trained tokens lie beside the factors under
their own names. The header says which classes of modules were searched, and every rank.

The trainer's loader takes matrices off a list, one for each module that it meets. A file therefore has to hold every
module of the order: one that lacks some is refused, as a zero module in its place would be an adapter of more weights
than there were. The attention alone, without the feed-forward, is an order too. In a list (``.pt``) there is one
component to a file. Source: cloneofsimo/lora ``lora_diffusion/lora.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache

from loratools import archs
from loratools.errors import LayoutError
from loratools.formats import _carried, _names, _plain
from loratools.formats._base import Document, Facts, Format, cannot_hold
from loratools.model import Adapter, Layout, Module, Target
from loratools.tensors import TensorRef

_PREFIXES = (("text_encoder:", "text_encoder"), ("unet:", "denoiser"))
_KEY = r"(?:(unet|text_encoder):)?(\d+):(up|down)"

# The classes whose linear layers were adapted, as the trainer's own search has them.
_UNET_CLASSES = ("CrossAttention", "Attention", "GEGLU")
_CLIP_CLASSES = ("CLIPAttention",)
_GATE = ".ff.net.0.proj"


def _claims(facts: Facts) -> float:
    return 1.0 if facts.sequence or facts.style == "cloneofsimo" else 0.0


def _gated(adapter: Adapter) -> bool:
    """Whether the feed-forward is adapted too."""
    return any(target.path.endswith(_GATE) for target in adapter.modules)


@lru_cache(maxsize=4)
def _numbers(arch: str, gated: bool) -> Mapping[Target, tuple[str, int]]:
    """What each weight is called: the component's name in the file, and its number there."""
    from loratools.archs import _positions  # few files need it

    unets, clip = _positions.unet_orders(arch), _positions.text_encoder_order(arch)
    if not unets or clip is None:
        return {}
    orders = {"unet": unets[0 if gated else -1].names, "text_encoder": clip.names}
    found: dict[Target, tuple[str, int]] = {}
    for component, names in orders.items():
        for number, name in enumerate(names):
            meaning = archs.get(arch).resolve(name)
            if meaning is not None:
                found[Target(meaning.component, meaning.path, meaning.rows)] = component, number
    return found


def _speller(module: Module, adapter: Adapter, layout: Layout) -> list[TensorRef]:
    if layout.container == "pickle":
        _refuse_second_component(module, adapter, layout)
    up, down = _plain.factors(module, layout)
    numbers = _numbers(adapter.arch, _gated(adapter))
    if module.target not in numbers:
        raise cannot_hold(
            layout,
            "weights that its order does not number",
            [str(module.target)],
            "Only the attention and the gate (ff.net.0.proj) of Stable Diffusion 1 and 2 have numbers",
        )
    component, number = numbers[module.target]
    stem = f"{component}:{number}"
    return [up.renamed(f"{stem}:up"), down.renamed(f"{stem}:down")]


def _refuse_second_component(module: Module, adapter: Adapter, layout: Layout) -> None:
    """Refuse a module of another component than the list is of."""
    own, main = module.target.component, _names.main_component(adapter)
    if own != main:
        raise cannot_hold(
            layout,
            f"two components in one list, a {own} beside a {main}",
            [str(module.target)],
            "A .safetensors file of it holds both",
        )


def _finisher(adapter: Adapter, tensors: list[TensorRef], layout: Layout) -> Document:
    _refuse_gaps(adapter, layout)
    if layout.container == "pickle":
        _refuse_in_list(adapter, tensors, layout)
        tensors = sorted(tensors, key=_place)
    metadata = _carried.metadata(adapter)
    for ref in tensors:
        found = re.fullmatch(_KEY, ref.name)
        if found is None:
            metadata[ref.name] = _carried.EMBEDDED
            continue
        gated = _UNET_CLASSES if _gated(adapter) else _UNET_CLASSES[:-1]
        metadata[found[1]] = json.dumps(gated if found[1] == "unet" else _CLIP_CLASSES)
        if found[3] == "down":
            metadata[f"{found[1]}:{found[2]}:rank"] = str(ref.shape[0])
    return Document(tuple(tensors), metadata, ordered=layout.container == "pickle")


def without_marks(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata of a file of this layout without what speaks of its numbers and tokens, which are written anew."""
    return {
        key: value
        for key, value in metadata.items()
        if value != _carried.EMBEDDED
        and key not in ("unet", "text_encoder")
        and re.fullmatch(r"(unet|text_encoder):\d+:rank", key) is None
    }


def _refuse_gaps(adapter: Adapter, layout: Layout) -> None:
    """Refuse to leave out a module whose absence would move all that follow."""
    numbers = _numbers(adapter.arch, _gated(adapter))
    present = {numbers[target][0] for target in adapter.modules}
    missing = [
        str(target)
        for target, (component, _) in numbers.items()
        if component in present and target not in adapter.modules
    ]
    if missing:
        raise LayoutError(
            f"the {layout.name} layout cannot leave out {len(missing)} modules of its order, by which it knows them",
            path=adapter.path or None,
            keys=missing,
            todo="Choose a layout that names its modules with --to",
        )


def _refuse_in_list(adapter: Adapter, tensors: list[TensorRef], layout: Layout) -> None:
    """Refuse what needs a name: tokens."""
    extras = [ref.name for ref in tensors if re.fullmatch(_KEY, ref.name) is None]
    if extras:
        raise LayoutError(
            f"the {layout.name} layout cannot hold tensors with names in a list",
            path=adapter.path or None,
            keys=extras,
            todo="Write a .safetensors file, or leave them out with --drop extras",
        )


def _place(ref: TensorRef) -> tuple[int, bool]:
    """Where a matrix stands in a list: by number, up before down."""
    _, number, role = ref.name.split(":")
    return int(number), role == "down"


def _adopt(ref: TensorRef, adapter: Adapter) -> TensorRef | None:  # noqa: ARG001
    """A packed textual inversion of one token, (1, dim), as (dim,) under the token."""
    packed = ref.name.startswith(_carried.BUNDLE) and ref.name.endswith(_carried.PACKED)
    name = ref.name[len(_carried.BUNDLE) : -len(_carried.PACKED)]
    if not packed or not name or len(ref.shape) != 2 or ref.shape[0] != 1:
        return None
    return ref.reshaped(ref.shape[1:]).renamed(name)


FORMAT = Format(
    name="cloneofsimo",
    title="cloneofsimo/lora",
    claims=_claims,
    variant=lambda facts: "pt-list" if facts.sequence else "",
    prefixes=_PREFIXES,
    speller=_speller,
    finisher=_finisher,
    roles=_plain.ROLES,
    alpha="none",
    pickled="pt-list",
    adopt=_adopt,
)
