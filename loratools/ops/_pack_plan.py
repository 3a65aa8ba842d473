"""How one adapter is packed, as far as its values do not matter: shared by all adapters with a header like its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from loratools.errors import OptionError, UnsupportedKindError
from loratools.maths.normal_form import PAIRS
from loratools.model import Adapter, Module
from loratools.ops import as_lora
from loratools.ops._pack_files import Prepared
from loratools.ops._pack_slots import Slot
from loratools.ops._scale import is_power_of_two
from loratools.tensors import DTYPES

# Elements of factors that are widened to float64 together: 64 MiB of it.
_ELEMENTS = 2**23
_PLAIN = {"up", "down"}
_DIGITS = 9  # of the numbers of a sketch that go into the hash


class Request(NamedTuple):
    """What all adapters of a pack have in common.

    Attributes:
        layout: Of the pack.
        ranks: The ranks that adapters are padded to, ascending; empty: the largest of their own.
        dtype: The store dtype, a safetensors name, or empty for each adapter's own.
        base: The base model's path, or empty.
        arch: The architecture, overriding detection, or None.
    """

    layout: str
    ranks: tuple[int, ...] = ()
    dtype: str = ""
    base: str = ""
    arch: str | None = None


class Fill(NamedTuple):
    """The file of an adapter but for its factors.

    Attributes:
        ready: What is written; factors are read from slots.
        slots: Those of each module's up and down, in the order of the plan's groups.
        shared: Whether it is the same whatever the values.
    """

    ready: Prepared
    slots: tuple[tuple[tuple[Slot, ...], tuple[Slot, ...]], ...]
    shared: bool


class Plan:
    """How an adapter is packed, whatever its values.

    Args:
        adapter: In the pack's layout as to what its modules are.
        source: Its layout's name as it came.
        request: What is wanted.

    Attributes:
        rank: The largest of its modules, a count.
        bucket: The rank that it is padded to, a count.
        dtype: The store dtype, a safetensors name.
        fill: The file, once one was made.
        causes: Why it does not fit, and what is to be said of it, once that was checked.

    Raises:
        LoraError: It has what a pack does not keep.
    """

    def __init__(self, adapter: Adapter, source: str, request: Request) -> None:
        refuse_more(adapter)
        modules = list(adapter.modules.values())
        dtypes = {as_lora.store_dtype(module) for module in modules}
        self.adapter = adapter
        self.source = source
        self.rank = max(module.rank or 0 for module in modules)
        self.bucket = _bucket(self.rank, request.ranks, adapter.path)
        self.dtype = request.dtype or (
            dtypes.pop() if len(dtypes) == 1 else "F64" if "F64" in dtypes else "F32"
        )
        self.fill: Fill | None = None
        self.causes: tuple[list[str], list[str]] | None = None

    @cached_property
    def shapes(self) -> dict[str, list[int]]:
        """The shape of every module's weight."""
        return {str(target): list(_weight(module)) for target, module in self.adapter.modules.items()}

    @cached_property
    def key(self) -> str:
        """What adapters that are the same have in common: a hash of the names and shapes of their modules."""
        return key_of(self.shapes)

    @cached_property
    def scales(self) -> tuple[float, float]:
        """The smallest and the largest of the modules' scales."""
        found = [module.scale for module in self.adapter.modules.values()]
        return min(found), max(found)

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Every module's rank, where they differ."""
        found = {str(target): module.rank or 0 for target, module in self.adapter.modules.items()}
        return found if len(set(found.values())) > 1 else {}

    @cached_property
    def rounded(self) -> bool:
        """Whether values are rounded on their way into the pack."""
        return any(_rounds(module, self.dtype) for module in self.adapter.modules.values())

    @cached_property
    def groups(self) -> tuple[tuple[Module, ...], ...]:
        """Modules of one make-up, so many that their factors do not fill the memory."""
        return tuple(grouped(self.adapter.modules.values()))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The modules' names, in the order of the groups."""
        return tuple([str(module.target) for members in self.groups for module in members])

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Where each module stands in ``names``, by name."""
        return tuple(sorted(range(len(self.names)), key=self.names.__getitem__))

    @cached_property
    def _text(self) -> str:
        """What the hash is of, with holes for the numbers of the sketches."""
        digits = " ".join([f"%.{_DIGITS - 1}e"] * PAIRS)
        heads = [f"{name}\0{self.shapes[name]}\0".replace("%", "%%") for name in sorted(self.names)]
        return "".join([f"{head}{digits}\n" for head in heads])

    def hash(self, numbers: Sequence[float]) -> str:
        """Of names, shapes and the leading digits of what tells the values.

        Args:
            numbers: Of the modules' sketches, in the order of their names.
        """
        return hashlib.sha256((self._text % tuple(numbers)).encode()).hexdigest()


def key_of(shapes: Mapping[str, Sequence[int]]) -> str:
    """A hash of modules' names and shapes."""
    return hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()


def grouped(modules: Iterable[Module]) -> Iterator[tuple[Module, ...]]:
    """Modules of one make-up together, so many that their factors do not fill the memory."""
    groups: dict[tuple[object, ...], list[Module]] = {}
    for module in modules:
        make_up = [
            (ref.shape, ref.dtype, ref.transposed) for ref in (module.factors["up"], module.factors["down"])
        ]
        groups.setdefault(tuple(make_up), []).append(module)
    for members in groups.values():
        size = sum(ref.numel for ref in members[0].factors.values())
        step = max(1, _ELEMENTS // max(1, size))
        for start in range(0, len(members), step):
            yield tuple(members[start : start + step])


def refuse_more(adapter: Adapter) -> None:
    """Refuse what is not the product of two factors alone.

    Raises:
        UnsupportedKindError: There is more, or something else.
    """
    more = [
        f"{module.target} ({_what(module)})"
        for module in adapter.modules.values()
        if module.kind != "lora" or module.factors.keys() != _PLAIN or module.magnitude is not None
    ]
    if more:
        raise UnsupportedKindError(
            f"{len(more)} of {len(adapter.modules)} modules are more than two factors",
            path=adapter.path,
            keys=more,
            expected="A pack holds plain LoRA: up and down",
            todo=f"Turn them into it with: loratools convert {adapter.path} --as lora -o OUT (DoRA: with --base)",
        )
    if adapter.extras:
        count = len(adapter.extras)
        raise UnsupportedKindError(
            f"{count} tensors belong to no module" if count > 1 else "1 tensor belongs to no module",
            path=adapter.path,
            keys=adapter.extras,
            expected="A pack holds plain LoRA: up and down",
            todo="Write them apart with: loratools convert "
            f"{adapter.path} --to vllm --full-weights WHOLE.safetensors -o OUT",
        )


def _what(module: Module) -> str:
    if module.magnitude is not None:
        return "DoRA"
    beside = sorted(module.factors.keys() - _PLAIN)
    return module.kind if module.kind != "lora" else f"lora with {', '.join(beside)}"


def _bucket(rank: int, ranks: Sequence[int], path: str) -> int:
    found = next((each for each in ranks if each >= rank), 0) if ranks else rank
    if not found:
        raise OptionError(
            f"its rank of {rank} is above all of --ranks ({', '.join(map(str, ranks))})",
            path=path,
            todo=f"Add a higher one, or cut it with: loratools resize {path} --rank {ranks[-1]} -o OUT",
        )
    return found


def _weight(module: Module) -> tuple[int, ...]:
    up, down = module.factors["up"], module.factors["down"]
    return module.shape or (up.shape[0], *down.shape[1:])


def _rounds(module: Module, dtype: str) -> bool:
    same = all(ref.dtype == dtype for ref in module.factors.values())
    wider = all(DTYPES[ref.dtype].bits < DTYPES[dtype].bits for ref in module.factors.values())
    return not (same or wider) or not is_power_of_two(module.scale)
