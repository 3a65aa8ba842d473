"""What was extracted as modules of an adapter: factors of any rank up to the one computed, and full differences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from loratools.engine.kept import head, held
from loratools.model import Module, Target
from loratools.ops._extract_pairs import EMBEDDING, NORM, Stored
from loratools.ops._extract_tensor import Found
from loratools.ops._identify import is_conv1d
from loratools.tensors import LazySource, TensorRef

_CONV = 3  # axes of the simplest


class Parted(NamedTuple):
    """A result, and its tensors where they can be moved to the disk.

    Attributes:
        found: The result; its tensors are None.
        up: (rank, out), transposed so that its first rows are a smaller rank's; or None.
        down: (rank, in·kh·kw), or None.
        full: The difference itself, or None.
    """

    found: Found
    up: TensorRef | None = None
    down: TensorRef | None = None
    full: TensorRef | None = None


def parted(found: Found) -> Parted:
    """A result without its tensors, and those."""
    refs = (held("", tensor) if tensor is not None else None for tensor in (found.up, found.down, found.full))
    return Parted(found._replace(up=None, down=None, full=None), *refs)


class Extracted(NamedTuple):
    """One result without its data.

    Attributes:
        stored: The base's tensor.
        found: The result; its tensors are None.
        up: (rank, out), transposed so that its first rows are a smaller rank's; or None.
        down: (rank, in·kh·kw), or None.
        full: The difference itself, or None.
    """

    stored: Stored
    found: Found
    up: TensorRef | None = None
    down: TensorRef | None = None
    full: TensorRef | None = None

    @property
    def rank(self) -> int:
        """The largest rank there is, a count."""
        return len(self.found.sigma)

    @property
    def cost(self) -> int:
        """Bytes of one more rank."""
        refs = [ref for ref in (self.up, self.down) if ref is not None]
        return sum(ref.nbytes // ref.shape[0] for ref in refs)


def modules(kept: Iterable[Extracted], ranks: Mapping[int, int]) -> dict[Target, Module]:
    """Modules of results; a bias goes with the weight beside it.

    Args:
        kept: In the order of the result.
        ranks: By job number, of those that have fewer than there are; a count.
    """
    groups: dict[Target, list[Extracted]] = {}
    for each in kept:
        groups.setdefault(each.stored.target, []).append(each)
    return {target: _module(target, group, ranks) for target, group in groups.items()}


def _module(target: Target, group: list[Extracted], ranks: Mapping[int, int]) -> Module:
    weight = next((each for each in group if each.up is not None), None)
    full = {_role(each.stored): each.full for each in group if each.full is not None}
    if weight is None:
        shape = next((each.stored.shape for each in group if each.stored.leaf == "weight"), None)
        return Module(target, "full", full, shape=shape, op="conv" if len(shape or ()) >= _CONV else "linear")
    rank = ranks.get(weight.found.number, weight.rank)
    factors = {**_factors(weight, rank), **full}
    shape = weight.stored.shape
    embedding = weight.stored.role == EMBEDDING
    return Module(
        target,
        "lora",
        factors,
        scale=1.0,
        alpha=float(rank),
        rank=rank,
        shape=shape[::-1] if embedding else shape,
        op="embedding" if embedding else "conv" if len(shape) >= _CONV else "linear",
        in_first=embedding or (weight.stored.turned and is_conv1d(target.path, shape)),
    )


def _role(stored: Stored) -> str:
    if stored.role == NORM:
        return "b_norm" if stored.leaf == "bias" else "w_norm"
    return "diff_b" if stored.leaf == "bias" else "diff"


def _factors(kept: Extracted, rank: int) -> dict[str, TensorRef]:
    """up (out, rank[, 1, 1]) and down (rank, in[, kh, kw]); of an embedding, stored (vocabulary, dim), exchanged."""
    if kept.up is None or kept.down is None:
        return {}
    across, down = kept.up, kept.down
    if rank < kept.rank:
        across, down = head(across, rank), head(down, rank)
    shape = kept.stored.shape
    if kept.stored.role == EMBEDDING:
        return {"up": _turned(down, (shape[1], rank)), "down": across.reshaped((rank, shape[0]))}
    ones = (1,) * len(shape[2:])
    return {
        "up": _turned(across, (shape[0], rank, *ones)),
        "down": down.reshaped((rank, *shape[1:])),
    }


def _turned(ref: TensorRef, shape: tuple[int, ...]) -> TensorRef:
    """The transpose of a stored matrix under a shape of as many elements, made when it is loaded."""
    source = LazySource(lambda: ref.load().t().contiguous().reshape(shape))
    return TensorRef(ref.name, shape, ref.dtype, source)
