"""A device that is not there, played by the CPU: it refuses what the real one would.

Tensors that were sent to it are remembered. Mixing them with others, taking them for arrays without a copy and, where
the device has no float64 (Apple's), making float64 of them raises what torch raises. Of this thread alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_INTO = (torch.Tensor.copy_, torch.Tensor.__setitem__)
_OUT = (torch.Tensor.numpy, torch.Tensor.__array__)
_DEVICE = torch.Tensor.device.__get__  # type: ignore[attr-defined]
_MARK = "_pretended"


class Pretended(TorchFunctionMode):
    """Plays one device.

    Attributes:
        name: "cuda" or "mps".
        sent: How many tensors were sent to it.
        computed: How many operations it ran.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.wide = name != "mps"
        self.sent = 0
        self.computed = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == _DEVICE:  # made anew at every look
            return torch.device(self.name) if is_there(args[0]) else func(*args)
        if func is torch.Tensor.cpu:
            return args[0].clone() if is_there(args[0]) else func(*args, **kwargs)
        target, args, kwargs = _sent_to(self.name, args, kwargs)
        tensors = list(_tensors((*args, *kwargs.values())))
        there = [is_there(tensor) for tensor in tensors]
        if func in _OUT and any(there):
            raise TypeError(f"can't convert {self.name} device type tensor to numpy")
        if target is None and func not in _INTO:
            self._refuse_mixed(func, tensors, there)
        result = func(*args, **kwargs)
        if target is not None:
            marked = target == self.name
            self.sent += marked and any(not each for each in there)
            result = result.clone() if any(result is each for each in tensors) else result
        else:
            marked = there[0] if func in _INTO else any(there)
            self.computed += marked
        for tensor in _tensors([result]):
            if marked and tensor.dtype == torch.float64 and not self.wide:
                raise TypeError(f"Cannot convert a {self.name} Tensor to float64")
            setattr(tensor, _MARK, marked)
        return result

    def _refuse_mixed(self, func: Any, tensors: list[torch.Tensor], there: list[bool]) -> None:
        whole = [each for tensor, each in zip(tensors, there, strict=True) if tensor.dim()]
        if any(whole) and not all(whole):
            raise RuntimeError(
                f"Expected all tensors to be on the same device: {func} of {self.name} and cpu"
            )


def is_there(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies on the pretended device."""
    return bool(getattr(tensor, _MARK, False))


def _sent_to(name: str, args: Any, kwargs: Any) -> tuple[str | None, Any, Any]:
    """Where a call sends its result, if it says so; and its arguments with the CPU in that place."""
    found: str | None = None

    def real(value: Any) -> Any:
        nonlocal found
        if isinstance(value, torch.device) or (isinstance(value, str) and value in ("cpu", "mps", "cuda")):
            found = name if str(value).startswith(name) else "cpu"
            return torch.device("cpu")
        return value

    args = tuple(real(each) for each in args)
    kwargs = {key: real(each) for key, each in kwargs.items()}
    return found, args, kwargs


def _tensors(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
