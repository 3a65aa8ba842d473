"""What tells base weights apart, and how precisely a module's values are stored."""

from __future__ import annotations

from loratools import archs
from loratools.model import Module
from loratools.tensors import DTYPES

Key = tuple[str, str]


def weight_of(module: Module, arch: str) -> Key:
    """What tells a module's base weight from others, however a layout spells it."""
    owner = archs.component(arch, module.target.component)
    if owner is not None and owner.table is not None:
        return module.target.component, module.target.path
    # Where paths are their own names, flattened layouts have lost the dots, and dotted ones the component.
    return "", module.target.path.replace(".", "_")


def least_precise(module: Module) -> str:
    """The least precise floating dtype among a module's factors."""
    floating = [ref.dtype for ref in module.factors.values() if DTYPES[ref.dtype].floating]
    return min(floating, key=lambda dtype: (DTYPES[dtype].bits, dtype != "BF16"), default="F32")
