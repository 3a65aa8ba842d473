"""Where operations compute."""

from __future__ import annotations

import torch

from loratools.engine import Engine
from loratools.errors import OptionError
from loratools.model import Module
from loratools.tensors import LazySource, TensorRef, from_torch

# torch names others as well: "meta" has no data, and what else there is has not been tried.
_COMPUTING = ("cpu", "cuda", "mps")


def usable(name: str, *, auto: str = "cpu", wanted: torch.dtype = torch.float32) -> str:
    """A device by name.

    Args:
        name: "auto", "cpu", "cuda", "cuda:N" or "mps".
        auto: What "auto" means.
        wanted: What is computed in; Apple's devices have no float64.

    Raises:
        OptionError: It is not there, or cannot compute in that.
    """
    if name == "auto":
        return auto
    problem = _problem(name, wanted)
    if not problem:
        return name
    raise OptionError(
        f"the device {name!r} cannot be used here",
        candidates=["auto", "cpu"],
        expected=problem,
        todo="Choose auto, or leave --device away",
    )


def elsewhere(name: str) -> str:
    """Where tasks compute that an engine sends, unless it has devices of its own to give: the CPU.

    Raises:
        OptionError: A device of this machine is asked for.
    """
    if name in ("auto", "cpu"):
        return "cpu"
    raise OptionError(
        f"the device {name!r} and an engine are both given",
        expected="An engine computes where it sends the work",
        todo="Leave one of them away; an engine can have devices of its own",
    )


def for_engine(name: str, engine: Engine | None) -> str:
    """The device that an operation is asked for, seen from the engine that runs its tasks.

    Args:
        name: As for ``usable``.
        engine: Or None.

    Returns:
        The name where the tasks run here; the first of the engine's own devices, where it has any; else the CPU.

    Raises:
        OptionError: A device of this machine is asked for, and the engine sends tasks elsewhere or to its own devices.
    """
    if engine is None or not engine.device_kind:
        return name
    there = elsewhere(name)
    return engine.devices[0] if engine.devices else there


def has_float64(device: str) -> bool:
    """Whether a device computes in float64."""
    return not device.startswith("mps")


def _problem(name: str, wanted: torch.dtype) -> str:
    """Why a device cannot be used, in a sentence; empty where it can."""
    if name.partition(":")[0] not in _COMPUTING:
        return "A device to compute on was expected: cpu, cuda, cuda:N or mps"
    if wanted == torch.float64 and not has_float64(name):
        return "This is computed in float64, which Apple's GPUs do not have"
    try:
        torch.empty(0, device=name, dtype=wanted)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"torch says: {reason.rstrip('.')}"
    return ""


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
