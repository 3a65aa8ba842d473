"""A file that is no model, where one was expected: asked only once nothing of it could be used."""

from __future__ import annotations

from contextlib import suppress

from loratools.errors import LoraError, OptionError
from loratools.formats._base import Facts
from loratools.formats._classify import TITLES, classify
from loratools.formats._group import group
from loratools.io.base import Base
from loratools.tensors import BytesSource, TensorRef

_NOTHING = BytesSource(memoryview(b""))
# What may be a model, as far as names tell.
_MODELS = ("checkpoint", "empty", "unknown")


def refuse(base: Base) -> None:
    """Refuse what is an adapter, an embedding or a part of a model, by the names of its tensors.

    Raises:
        OptionError: It says what it is instead of a checkpoint.
    """
    kind = _type_of(base)
    if kind not in _MODELS:
        raise OptionError(
            f"this is {TITLES[kind]}, not a model checkpoint",
            path=base.path,
            expected="The weights of a whole model were expected",
            todo="Give the model's own file or folder; a base model comes before adapters"
            if kind in ("adapter", "ia3")
            else "`loratools info` describes it; give the model that it belongs to",
        )


def _type_of(base: Base) -> str:
    refs = {
        key: TensorRef(key, weight.shape, weight.dtype, _NOTHING)
        for weights in base.parts.values()
        for key, weight in weights.items()
    }
    with suppress(LoraError):  # several adapters in one file, a factor twice: no model, and no matter here
        groups, extras = group(refs, base.path)
        return classify(Facts(groups, tuple(refs), path=base.path), extras)
    return "adapter"
