"""Keys into groups: one group per module, everything else left over; and what the shapes of a group say."""

from __future__ import annotations

import re
from collections.abc import Mapping

from loratools import kinds
from loratools.errors import NameResolutionError, NotAnAdapterError
from loratools.formats import _peft_shared
from loratools.formats._base import Group
from loratools.formats._parse import Part, split, tail_of
from loratools.tensors import TensorRef

# Put around a model by training frameworks; the weight below is the same.
_WRAPPERS = r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_orig_mod)\."
PEFT = "base_model.model."

# diffusers' first format names the projections after the attention processor's attributes.
_PROCESSOR_OUT = r"\.to_out$"
_CLIP_PROJECTION = r"\.self_attn\.to_(q|k|v|out)$"

_STEMLESS = "(whole model)"


def group(tensors: Mapping[str, TensorRef], path: str = "") -> tuple[dict[str, Group], dict[str, TensorRef]]:
    """Take all keys apart.

    Args:
        tensors: By key.
        path: The file, for messages.

    Returns:
        The modules by stem, in the file's order, and the tensors that belong to none.

    Raises:
        NotAnAdapterError: The file holds several adapters under different names.
        NameResolutionError: Two keys spell the same factor.
    """
    groups: dict[str, Group] = {}
    left: dict[str, TensorRef] = {}
    adapters: set[str] = set()
    found: Group | None = None
    for key, ref in tensors.items():
        # The tensors of one module usually follow each other, and need not be taken apart again.
        suffix = tail_of(key, found.stem) if found is not None else None
        if found is not None and suffix is not None and suffix.role not in found.roles:
            found.style = found.style or suffix.style
            found.roles[suffix.role] = ref
            continue
        part = split(key)
        if part is None:
            left[key] = ref
            continue
        if part.adapter:
            adapters.add(part.adapter)
        stem = _stem(part)
        found = groups.get(stem)
        if found is None:
            found = groups[stem] = Group(stem)
        if part.suffix.role in found.roles and not part.adapter:
            raise NameResolutionError(
                f"{stem} has its {part.suffix.role} twice",
                path=path or None,
                keys=[found.roles[part.suffix.role].name, key],
                todo="Keep one of them",
            )
        found.style = found.style or part.suffix.style
        found.roles[part.suffix.role] = ref
    if len(adapters) > 1:
        raise NotAnAdapterError(
            f"the file holds {len(adapters)} adapters at once",
            path=path or None,
            keys=sorted(adapters),
            todo="Save them one by one, or keep the keys of one",
        )
    for stem, found in groups.items():
        found.name = clean(stem, found.style)
    _claim_ia3(groups, left)
    _peft_shared.distribute(groups, left)
    return groups, left


def _stem(part: Part) -> str:
    # A network alpha may be named after the processor's attribute: to_q_lora.alpha beside to_q_lora.up.weight.
    if part.suffix.role == "alpha" and part.stem.endswith("_lora"):
        return part.stem.removesuffix("_lora")
    return part.stem or _STEMLESS


def clean(stem: str, style: str = "") -> str:
    """A stem without the wrappers that frameworks put around or inside a model's names."""
    name = re.sub(_WRAPPERS, "", stem) if "_fsdp_wrapped_module" in stem or "_orig_mod" in stem else stem
    while name.startswith(PEFT):
        name = name[len(PEFT) :]
    if style == "attn-procs":
        name = name.replace(".processor.", ".")
        found = re.search(_CLIP_PROJECTION, name)
        if found:
            return name[: found.start()] + f".self_attn.{found[1]}_proj"
        name = re.sub(_PROCESSOR_OUT, ".to_out.0", name)
    return name


def _claim_ia3(groups: dict[str, Group], left: dict[str, TensorRef]) -> None:
    # LyCORIS' (IA)³ stores its vector as a plain ".weight"; only the flag beside it tells.
    for stem, found in groups.items():
        if "on_input" in found.roles and f"{stem}.weight" in left:
            found.roles["ia3_weight"] = left.pop(f"{stem}.weight")


def widths(found: Group) -> tuple[int, int] | None:
    """The weight's height and width, as far as the factors tell."""
    roles = {role.removeprefix("embedding_"): ref for role, ref in found.roles.items()}
    if "up" in roles and "down" in roles:
        up, down = roles["up"].shape, roles["down"].shape
        return (up[0], down[1]) if len(up) > 1 and len(down) > 1 else None
    kind = kinds.of_roles(roles)
    shape = kind.shape(roles) if kind is not None else None
    return (shape[0], shape[1]) if shape is not None and len(shape) > 1 else None


def magnitude_axis(magnitude: TensorRef) -> str:
    """Which axis of the weight DoRA's magnitude runs along.

    LyCORIS and OneTrainer store one value per input as (1, in, …), PEFT a convolution's as (1, out, 1, 1) under its
    own name; one-dimensional ones are per output.
    """
    several = len(magnitude.shape) > 1 and magnitude.shape[0] == 1 and magnitude.shape[1] > 1
    return "in" if several and magnitude.name.endswith("dora_scale") else "out"
