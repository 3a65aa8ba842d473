"""Adapters whose tensors are read when they are used, and not mapped: what a process holds does not grow with them."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from loratools.errors import ReadError
from loratools.io import storage
from loratools.io.mapped import MappedSource
from loratools.io.regions import read_at
from loratools.model import Adapter, Module
from loratools.tensors import BytesSource, TensorRef

if TYPE_CHECKING:
    import torch


class ReadSource:
    """Data that lies in a file from ``start`` to ``stop`` (bytes), read anew whenever it is asked for."""

    __slots__ = ("path", "start", "stop")

    def __init__(self, path: str, start: int, stop: int) -> None:
        self.path = os.path.abspath(path)
        self.start = start
        self.stop = stop

    def raw(self) -> memoryview:
        """The bytes, in memory of their own.

        Raises:
            MalformedFileError: The file is shorter than it was.
            ReadError: It cannot be read.
        """
        data = bytearray(self.stop - self.start)
        try:
            read_at(self.path, self.start, data)
        except OSError as error:
            raise ReadError(
                f"cannot be read: {error.strerror or error}",
                path=self.path,
                todo="Check that it is still there, and its permissions",
            ) from error
        return memoryview(data)

    def torch(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """The tensor, in memory of its own."""
        return BytesSource(self.raw()).torch(shape, dtype)


def unmapped(adapter: Adapter) -> Adapter:
    """The same adapter, of which no mapped page is ever touched; alphas and tensors from elsewhere stay as they are."""
    modules = {target: _module(module) for target, module in adapter.modules.items()}
    extras = {key: _read(ref) for key, ref in adapter.extras.items()}
    return replace(adapter, modules=modules, extras=extras)


def _module(module: Module) -> Module:
    factors = {role: _read(ref) for role, ref in module.factors.items()}
    magnitude = None if module.magnitude is None else _read(module.magnitude)
    return module._replace(factors=factors, magnitude=magnitude)


def _read(ref: TensorRef) -> TensorRef:
    source = ref.source
    if not isinstance(source, MappedSource) or storage.is_url(source.file.path):  # which is not mapped
        return ref
    return ref._replace(source=ReadSource(source.file.path, source.start, source.stop))
