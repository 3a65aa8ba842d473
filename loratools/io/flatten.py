"""The nested dicts and lists of a pickle, as flat tensors and other objects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from loratools.errors import MalformedFileError
from loratools.tensors import TensorRef, dtype_of, from_torch

if TYPE_CHECKING:
    import torch

WRAPPERS = ("state_dict", "model", "module", "params", "params_ema", "network")
"""Keys under which programs save the one dict that holds the tensors."""

_DEEPEST = 64
_MOST_LEAVES = 1_000_000
_MOST_LETTERS = (
    100_000_000  # of all keys; a few containers that hold each other by long names make any number
)
# Views of one storage may be many, but what they would take on the disk is not without end.
_FREE_BYTES, _MOST_COPIES = 64 << 20, 64


def flatten(value: Any, path: str) -> tuple[dict[str, TensorRef], dict[str, Any], str]:
    """Tensors and other leaves by key, nested keys joined with ".", and the wrapper that was taken off.

    A container without a tensor in it stays whole, as one object.

    Args:
        value: What the pickle holds.
        path: The file's name, for messages.

    Raises:
        MalformedFileError: Neither a container nor a tensor; keys that meet when joined; tensors that a
            safetensors file cannot hold; containers that hold themselves.
    """
    import torch

    if isinstance(value, torch.Tensor):
        value = {"tensor": value}
    if not isinstance(value, (Mapping, list, tuple)):
        raise MalformedFileError(
            f"the pickle holds one value of type {type(value).__name__} and no tensors",
            path=path,
            expected="A dict of tensors was expected",
        )
    wrapper = _wrapper(value)
    leaves = list(_Walk(path).leaves(value, wrapper))
    flat = dict(leaves)
    if len(flat) != len(leaves):
        counts = Counter(key for key, _ in leaves)
        raise MalformedFileError(
            "different tensors get the same name when nested keys are joined with '.'",
            path=path,
            keys=[key for key, count in counts.items() if count > 1],
        )
    tensors = {key: leaf for key, leaf in flat.items() if isinstance(leaf, torch.Tensor)}
    return _refs(tensors, path), {key: leaf for key, leaf in flat.items() if key not in tensors}, wrapper


class _Walk:
    """A walk over nested containers that neither cycles nor endless sharing can keep going."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.count = 0
        self.letters = 0
        self.known: dict[int, bool] = {}

    def leaves(
        self, value: Any, wrapper: str = "", prefix: str = "", depth: int = 0
    ) -> Iterator[tuple[str, Any]]:
        """Every tensor and every tensor-free value with its joined key; ``wrapper`` adds nothing to a key."""
        for name, item in _items(value):
            self.count += 1
            if self.count > _MOST_LEAVES:
                raise MalformedFileError(
                    f"the pickle holds more than {_MOST_LEAVES:,} values", path=self.path
                )
            key = f"{prefix}.{name}" if prefix else name
            self.letters += len(key)
            if self.letters > _MOST_LETTERS:
                raise MalformedFileError(
                    f"the keys of the pickle, joined, have more than {_MOST_LETTERS:,} letters",
                    path=self.path,
                )
            if self.holds_tensor(item, depth) and not _is_tensor(item):
                yield from self.leaves(item, "", "" if wrapper and name == wrapper else key, depth + 1)
            else:
                yield key, item

    def holds_tensor(self, value: Any, depth: int) -> bool:
        """Whether there is a tensor in ``value``, at any depth."""
        if _is_tensor(value):
            return True
        if not isinstance(value, (Mapping, list, tuple)):
            return False
        if depth > _DEEPEST:
            raise MalformedFileError(
                f"the pickle is nested more than {_DEEPEST} levels deep, or holds itself", path=self.path
            )
        if id(value) not in self.known:
            self.known[id(value)] = False  # the answer for a container met again inside itself
            self.known[id(value)] = any(self.holds_tensor(item, depth + 1) for _, item in _items(value))
        return self.known[id(value)]


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
    return ((str(name), item) for name, item in pairs)


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _wrapper(value: Any) -> str:
    """The one key that holds a dict of mostly tensors, or empty where there is none or a choice."""
    if not isinstance(value, Mapping):
        return ""
    inner = {key: value[key] for key in WRAPPERS if isinstance(value.get(key), Mapping)}
    found = [key for key, held in inner.items() if 2 * sum(map(_is_tensor, held.values())) > len(held)]
    return found[0] if len(found) == 1 else ""


def _refs(tensors: Mapping[str, torch.Tensor], path: str) -> dict[str, TensorRef]:
    problems = {key: problem for key, tensor in tensors.items() if (problem := _problem(tensor))}
    if problems:
        raise MalformedFileError(
            f"{len(problems)} of {len(tensors)} tensors cannot be read: {next(iter(problems.values()))}",
            path=path,
            keys=problems,
            expected="Dense tensors of the dtypes that safetensors knows were expected",
            todo="Convert them with torch and save the file again",
        )
    _refuse_multiplied(tensors, path)
    # A conjugate or negative view shares memory that holds other numbers than the tensor's.
    return {key: from_torch(key, tensor.resolve_conj().resolve_neg()) for key, tensor in tensors.items()}


def _refuse_multiplied(tensors: Mapping[str, torch.Tensor], path: str) -> None:
    """Refuse views, expanded ones above all, that have far more bytes than all storages have."""
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()
    }
    stored = sum(held.values())
    told = {key: tensor.numel() * tensor.element_size() for key, tensor in tensors.items()}
    if sum(told.values()) > _FREE_BYTES + _MOST_COPIES * stored:
        raise MalformedFileError(
            f"the tensors take {sum(told.values()):,} bytes, of which the file holds {stored:,}",
            path=path,
            keys=sorted(told, key=lambda key: -told[key])[:1],
            expected="Expanded views, and views of the same numbers, were expected to be few and small",
            todo="Save contiguous tensors, or the one that the others are views of",
        )


def _problem(tensor: torch.Tensor) -> str:
    """Why a tensor has no bytes that a safetensors file could hold; empty where it has."""
    import torch

    if tensor.is_nested:
        return "a nested tensor"
    if tensor.is_quantized:
        return f"a quantised tensor ({tensor.dtype})"
    if tensor.layout is not torch.strided:
        return f"a sparse tensor ({tensor.layout})"
    if tensor.is_meta:
        return "a tensor without data (device meta)"
    try:
        dtype_of(tensor)
    except MalformedFileError as error:
        return error.problem
    return ""
