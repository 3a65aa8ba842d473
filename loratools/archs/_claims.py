"""What a file's metadata says that its architecture is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from loratools.archs._catalog import entries


class Claim(NamedTuple):
    """One statement.

    Attributes:
        source: Which piece of metadata makes it.
        value: What it says.
        arch: The architecture that it means.
    """

    source: str
    value: str
    arch: str


def claims(metadata: Mapping[str, str], base_model: str) -> list[Claim]:
    """What the metadata says that the architecture is, the most reliable source first.

    Args:
        metadata: The file's string metadata.
        base_model: The base model's name, where the file's configuration states one.
    """
    version = metadata.get("ss_base_model_version", "").lower()
    spec = metadata.get("modelspec.architecture", "").lower().partition("/")[0]
    model = metadata.get("ss_sd_model_name", "")
    known = entries()
    found = [
        Claim("ss_base_model_version", version, name)
        for name, entry in known.items()
        if version and version in entry.kohya_versions
    ]
    found += [
        Claim("modelspec.architecture", spec, name)
        for name, entry in known.items()
        if spec and spec in entry.modelspec
    ]
    tabled = [name for name, entry in known.items() if entry.readings]
    for source, value in (("the base model's name", base_model), ("ss_sd_model_name", model)):
        found += [Claim(source, value, name) for name in named(tabled, value)]
    return found


def named(archs: Iterable[str], model: str) -> list[str]:
    """The ones of these architectures that a base model's name means: those that say most of it.

    "FLUX.2-dev" begins as Flux.1's models do, but Flux.2 knows more of the name.
    """
    if not model:
        return []
    words = "-" + re.sub(r"[^a-z0-9]", "-", model.lower())
    known = entries()
    lengths = {
        name: max((len(part) for part in known[name].base_models if f"-{part}" in words), default=0)
        for name in archs
    }
    longest = max(lengths.values(), default=0)
    return [name for name, length in lengths.items() if length and length == longest]
