"""Keys of PEFT files that programs do not find: wrappers, doubled or missing prefixes, adapters' names in them."""

from __future__ import annotations

from collections.abc import Mapping

from loratools.formats._group import PEFT
from loratools.formats._parse import split
from loratools.ops._doctor_case import Case

# The name that PEFT gives an adapter.
_DEFAULT = "default"
_WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.")

ODD: Mapping[str, str] = {
    "prefix-doubled": f"begin with {PEFT!r} more than once",
    "prefix-wrapped": "hold a training framework's wrapper",
    "adapter-name": "still hold the adapter's name",
    "prefix-missing": f"do not begin with {PEFT!r}",
}
"""What is said of keys that are odd, by the finding's code."""


def odd(case: Case) -> tuple[str, ...]:
    """The keys that PEFT does not find by their names: all odd ones but those with the name that it gives itself."""
    found = oddities(case)
    found["adapter-name"] = [key for key in found["adapter-name"] if not is_default(key)]
    return tuple(dict.fromkeys(key for keys in found.values() for key in keys))


def named_default(case: Case) -> tuple[str, ...]:
    """The keys with the adapter's name in them, where it is the one that PEFT loads under unless told otherwise."""
    return tuple(key for key in oddities(case)["adapter-name"] if is_default(key))


def is_default(key: str) -> bool:
    """Whether the adapter's name in a key is PEFT's usual one."""
    part = split(key)
    return part is not None and part.adapter == _DEFAULT


def oddities(case: Case) -> dict[str, list[str]]:
    """The keys that are odd in each way, by the finding's code."""
    found: dict[str, list[str]] = {code: [] for code in ODD}
    if case.layout != "peft" and not (case.layout == "unknown" and case.by_peft):
        return found
    for key in case.tensors:
        part = split(key)
        if key.count(PEFT) > 1:
            found["prefix-doubled"].append(key)
        if any(word in key for word in _WRAPPERS):
            found["prefix-wrapped"].append(key)
        if part is not None and part.adapter:
            found["adapter-name"].append(key)
        if part is not None and not key.startswith("base_model."):
            found["prefix-missing"].append(key)
    return found
