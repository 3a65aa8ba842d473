"""What the checks look at: the header, the adapter as it was read, the base and the program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from loratools.errors import LoraError
from loratools.formats._base import Group
from loratools.formats._group import clean, group
from loratools.io.base import Base
from loratools.model import Adapter, Module
from loratools.runtimes import Runtime
from loratools.tensors import TensorRef


@dataclass(frozen=True)
class Case:
    """One adapter, and what it is to be used with.

    Attributes:
        path: As it was given.
        tensors: By key, as the header has them; empty where not even that can be read.
        config: adapter_config.json, or empty.
        adapter: As it was read; None where it could not be.
        given_base: The base model's path, or empty.
        base: The base model's tensors, or None.
        runtime: The program, or None.
        max_rank: Its limit of the rank, a count; 0: the usual one.
    """

    path: str
    tensors: Mapping[str, TensorRef] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    adapter: Adapter | None = None
    given_base: str = ""
    base: Base | None = None
    runtime: Runtime | None = None
    max_rank: int = 0

    @cached_property
    def groups(self) -> Mapping[str, Group]:
        """The modules by stem, before their names are understood; none where keys contradict each other."""
        try:
            return group(self.tensors)[0]
        except LoraError:  # the reader has told why
            return {}

    @cached_property
    def modules(self) -> tuple[Module, ...]:
        """The adapter's modules."""
        return tuple(self.adapter.modules.values()) if self.adapter is not None else ()

    @cached_property
    def extras(self) -> Mapping[str, TensorRef]:
        """The tensors of no module."""
        return self.adapter.extras if self.adapter is not None else {}

    @property
    def usable_base(self) -> str:
        """The base model's path where it could be read, or empty."""
        return self.given_base if self.base is not None else ""

    @property
    def layout(self) -> str:
        """The layout's name, or "unknown"."""
        return self.adapter.layout.name if self.adapter is not None else "unknown"

    @property
    def by_peft(self) -> bool:
        """Whether a configuration of PEFT's lies beside the weights."""
        return "peft_type" in self.config

    @cached_property
    def by_name(self) -> Mapping[str, Module]:
        """The modules by their names as PEFT sees them, without prefix and wrappers."""
        stems: dict[str, str] = {
            ref.name: found.name for found in self.groups.values() for ref in found.roles.values()
        }
        found: dict[str, Module] = {}
        for module in self.modules:
            key = next((ref.name for ref in module.factors.values() if ref.name), "")
            found[clean(stems.get(key, module.target.path))] = module
        return found
