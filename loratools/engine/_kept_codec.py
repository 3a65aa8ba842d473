"""Results as JSON and places in files, and back.

What comes back was on a disk that others may write to: nothing of it is run or imported. A class is one of a table that
the reader gives, and gets as many fields as it has; what is not exactly as ``encoded`` writes it is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import torch

from loratools.engine._kept_types import field_types, fits
from loratools.tensors import TensorRef, from_torch

Put = Callable[[TensorRef], Any]
Get = Callable[[Any], TensorRef]
Classes = Mapping[str, type]


class DamagedError(ValueError):
    """What was read is not what was written."""


def fields_of(kind: type) -> tuple[str, ...]:
    """The fields of a class of the table, in the order in which it takes them."""
    if dataclasses.is_dataclass(kind):
        return tuple(field.name for field in dataclasses.fields(kind))
    names: tuple[str, ...] = getattr(kind, "_fields", ())
    return names


def encoded(value: Any, classes: Classes, put: Put) -> Any:
    """A value as JSON can hold it.

    Args:
        value: None, numbers, texts, tuples, lists, mappings, tensors, arrays, and objects of the classes.
        classes: By name.
        put: Puts a tensor away, and says where as JSON can hold it.

    Raises:
        TypeError: There is something else in it.
    """
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return float(value)
    if isinstance(value, TensorRef):
        return ["ref", value.name, list(value.shape), value.dtype, value.transposed, put(value)]
    if isinstance(value, torch.Tensor):
        return ["tensor", encoded(from_torch("", value), classes, put)]
    if isinstance(value, numpy.ndarray):
        return [
            "array",
            encoded(from_torch("", torch.from_numpy(numpy.ascontiguousarray(value))), classes, put),
        ]
    name = type(value).__name__
    if classes.get(name) is type(value):
        return [
            "object",
            name,
            [encoded(getattr(value, each), classes, put) for each in fields_of(type(value))],
        ]
    if type(value) in (tuple, list):
        return [type(value).__name__, [encoded(each, classes, put) for each in value]]
    if isinstance(value, Mapping):
        return ["dict", [[encoded(part, classes, put) for part in pair] for pair in value.items()]]
    raise TypeError(f"{type(value).__name__} is not among what results are made of")


def decoded(said: Any, classes: Classes, get: Get) -> Any:
    """What ``encoded`` was given.

    Args:
        said: What it gave, or what somebody else has made of it.
        classes: As it had them.
        get: A tensor by where it was put; its shape and dtype are checked here.

    Raises:
        DamagedError: It is something else.
        OSError: A tensor cannot be read.
    """
    if said is None or isinstance(said, bool | str | int | float):
        return said
    if not isinstance(said, list) or not said or not isinstance(said[0], str):
        raise DamagedError("no value")
    word, rest = said[0], said[1:]
    if word == "ref":
        return _ref(rest, get)
    if word == "object":
        return _object(rest, classes, get)
    if len(rest) != 1:
        raise DamagedError("no value")
    if word in ("tensor", "array"):
        found = decoded(rest[0], classes, get)
        if not isinstance(found, TensorRef):
            raise DamagedError("no tensor")
        return found.load() if word == "tensor" else found.numpy()
    if word not in ("tuple", "list", "dict") or not isinstance(rest[0], list):
        raise DamagedError("no value")
    if word == "dict":
        return _mapping(rest[0], classes, get)
    values = [decoded(each, classes, get) for each in rest[0]]
    return tuple(values) if word == "tuple" else values


def _ref(said: list[Any], get: Get) -> TensorRef:
    if len(said) != 5:
        raise DamagedError("no tensor")
    name, shape, dtype, transposed, place = said
    sizes = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    if not (isinstance(name, str) and sizes and isinstance(dtype, str) and isinstance(transposed, bool)):
        raise DamagedError("no tensor")
    found = get(place)
    stored = tuple(shape[::-1]) if transposed else tuple(shape)
    if found.dtype != dtype or found.shape != stored:
        raise DamagedError("a tensor of another shape")
    return TensorRef(name, tuple(shape), dtype, found.source, transposed)


def _object(said: list[Any], classes: Classes, get: Get) -> Any:
    kind = classes.get(said[0]) if len(said) == 2 and isinstance(said[0], str) else None
    if kind is None or not isinstance(said[1], list) or len(said[1]) != len(fields_of(kind)):
        raise DamagedError("no object of a class that is known")
    values = [decoded(each, classes, get) for each in said[1]]
    types = field_types(kind)
    for name, value in zip(fields_of(kind), values, strict=True):
        if not fits(value, types[name]):
            raise DamagedError(f"{kind.__name__}.{name} of another type")
    return kind(*values)


def _mapping(said: list[Any], classes: Classes, get: Get) -> dict[Any, Any]:
    found = {}
    for pair in said:
        if not isinstance(pair, list) or len(pair) != 2:
            raise DamagedError("no mapping")
        key = decoded(pair[0], classes, get)
        found[_hashable(key)] = decoded(pair[1], classes, get)
    return found


def _hashable(key: Any) -> Any:
    try:
        hash(key)
    except TypeError as error:
        raise DamagedError("no key") from error
    return key
