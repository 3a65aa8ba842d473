"""Where operations compute."""

from __future__ import annotations

import contextlib

import torch

from loratools.errors import OptionError
from loratools.model import Module
from loratools.tensors import LazySource, TensorRef, from_torch


def usable(name: str, *, auto: str = "cpu", wanted: torch.dtype = torch.float32) -> str:
    """A device by name.

    Args:
        name: "auto", "cpu", "cuda", "cuda:N" or "mps".
        auto: What "auto" means.
        wanted: What is computed in; Apple's devices have no float64.

    Raises:
        OptionError: It is not there.
    """
    if name == "auto":
        return auto
    with contextlib.suppress(RuntimeError, AssertionError, TypeError):
        torch.empty(0, device=name, dtype=wanted)
        return name
    raise OptionError(f"the device {name!r} cannot be used here", candidates=["auto", "cpu"])


def on(module: Module, device: str) -> Module:
    """The module with tensors that load onto a device; itself where that is the CPU, whose tensors files hold."""
    if device == "cpu":
        return module
    factors = {role: _moved(ref, device) for role, ref in module.factors.items()}
    magnitude = _moved(module.magnitude, device) if module.magnitude is not None else None
    return module._replace(factors=factors, magnitude=magnitude)


def home(module: Module) -> Module:
    """The module with its tensors in the CPU's memory, computed now."""
    factors = {role: from_torch("", ref.load()) for role, ref in module.factors.items()}
    magnitude = from_torch("", module.magnitude.load()) if module.magnitude is not None else None
    return module._replace(factors=factors, magnitude=magnitude)


def _moved(ref: TensorRef, device: str) -> TensorRef:
    source = LazySource(lambda: ref.load().to(device))
    return ref._replace(source=source, transposed=False)
