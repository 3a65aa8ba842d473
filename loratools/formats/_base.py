"""What every layout declares, and what a reader sees of a file before it knows the layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from loratools.errors import LayoutError
from loratools.model import EMPTY, Adapter, Layout, Module, Rows, Target
from loratools.tensors import TensorRef

if TYPE_CHECKING:
    from loratools.io.writer import Digest

_LONGEST_PREFIX = 40

# In which order a layout has the rows of a weight whose order transformers has otherwise (see ``Format.row_order``).
HEADS_Q = "q"
"""Rows of each query head that are rotated together lie side by side, where transformers has them in two halves."""
HEADS_KV = "k"
"""The same of key heads."""
QKV_BY_HEAD = "qkv-by-head"
"""All queries, then all keys, then all values, where transformers has the three of each head together."""
QKV_BY_GROUP = "qkv-by-group"
"""The same where transformers has the queries that share a key together with it."""


class Group:
    """The tensors of one module, before its name is understood.

    Attributes:
        stem: The keys without their suffixes, as the file spells them.
        name: The stem without wrappers (``base_model.model.``, ``_orig_mod.``, ``.processor``).
        style: The spelling family of the suffixes.
        roles: Tensors by role.
        in_first: Whether the name alone says that the base stores the weight as (in, out).
    """

    __slots__ = ("in_first", "name", "roles", "stem", "style")

    def __init__(self, stem: str) -> None:
        self.stem = stem
        self.name = stem
        self.style = ""
        self.roles: dict[str, TensorRef] = {}
        self.in_first = False


class Facts:
    """What a file shows before its layout is known.

    Attributes:
        groups: Its modules, by stem.
        keys: All keys, in the file's order.
        metadata: The header's string metadata.
        config: adapter_config.json, or empty.
        container: "safetensors", "pickle", "npz" or "gguf".
        sequence: Whether a pickle held a bare list of tensors.
        path: The file, for messages.
        arch: The detected architecture's name, or "unknown".
        candidates: The architectures that nothing tells apart, where it is unknown for that.
    """

    def __init__(
        self,
        groups: Mapping[str, Group],
        keys: tuple[str, ...],
        *,
        metadata: Mapping[str, str] = EMPTY,
        config: Mapping[str, Any] = EMPTY,
        container: str = "safetensors",
        sequence: bool = False,
        path: str = "",
    ) -> None:
        self.groups = groups
        self.keys = keys
        self.metadata = metadata
        self.config = config
        self.container = container
        self.sequence = sequence
        self.path = path
        self.arch = "unknown"
        self.candidates: tuple[str, ...] = ()

    @cached_property
    def styles(self) -> dict[str, int]:
        """How many modules are spelt in each style."""
        counts: dict[str, int] = {}
        for group in self.groups.values():
            counts[group.style] = counts.get(group.style, 0) + 1
        return counts

    @cached_property
    def style(self) -> str:
        """The style that most modules are spelt in."""
        return max(self.styles, key=lambda style: self.styles[style], default="")

    def share(self, prefixes: tuple[str, ...]) -> float:
        """The fraction of modules whose stem begins with one of these prefixes."""
        if not self.groups:
            return 0.0
        found = sum(count for head, count in self._heads.items() if head.startswith(prefixes))
        return found / len(self.groups)

    @cached_property
    def _heads(self) -> Counter[str]:
        """How the stems begin, as far as any prefix reaches: far fewer than there are stems."""
        return Counter([stem[:_LONGEST_PREFIX] for stem in self.groups])


class Scale(NamedTuple):
    """How a module's product is scaled, and which alpha states it.

    Attributes:
        value: The multiplier.
        alpha: As stated, or None.
        note: What the reader should know, or empty.
    """

    value: float
    alpha: float | None = None
    note: str = ""


class Document(NamedTuple):
    """What is to be written: tensors with their keys, metadata, and files beside.

    Attributes:
        tensors: In the file's order, named by their keys.
        metadata: The header's string metadata.
        config: adapter_config.json for a folder layout, else None.
        ordered: Whether the tensors keep the order given instead of the container's usual one.
        computed: The keys of ``metadata`` whose values are digests of the file's own data, and of what part; they
            hold blanks of the final length, which the writer fills in.
    """

    tensors: tuple[TensorRef, ...]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None = None
    ordered: bool = False
    computed: Mapping[str, Digest] = EMPTY


class Scaler(Protocol):
    """How a layout scales a module that states no alpha of its own."""

    def __call__(self, group: Group, component: str, rank: int, facts: Facts) -> Scale:
        """The scale of one module of ``rank``."""


class Speller(Protocol):
    """How a layout spells one module's tensors."""

    def __call__(self, module: Module, adapter: Adapter, layout: Layout) -> list[TensorRef]:
        """The module's tensors under their keys.

        Raises:
            LayoutError: The layout has no name or place for it.
        """


class Finisher(Protocol):
    """How a layout completes the document once all modules are spelt."""

    def __call__(self, adapter: Adapter, tensors: list[TensorRef], layout: Layout) -> Document:
        """The whole document."""


class Adopter(Protocol):
    """How a layout calls a tensor that belongs to no module and came in another layout."""

    def __call__(self, ref: TensorRef, adapter: Adapter) -> TensorRef | None:
        """The tensor under this layout's key, or None where it has no place for it."""


def nowhere(ref: TensorRef, adapter: Adapter) -> TensorRef | None:  # noqa: ARG001
    """A layout without a place for anything but modules."""
    return None


def unscaled(group: Group, component: str, rank: int, facts: Facts) -> Scale:  # noqa: ARG001
    """A layout in which alpha equals the rank unless it is stated."""
    return Scale(1.0)


class Format(NamedTuple):
    """One layout.

    Attributes:
        name: As in ``--to``.
        title: What people call it.
        claims: How sure the layout is that a file is its own: 0 (no) to 1; the highest wins.
        variant: Which generation or dialect of it a file is.
        prefixes: Component prefixes used where the architecture's table does not tell, longest first.
        scaler: How modules without an alpha tensor are scaled.
        flipped: Whether factors are stored transposed: down (in, rank), up (rank, out).
        speller: How to write a module, or None where the layout is only read.
        finisher: How to complete what is written.
        folder: Whether it is written as a folder.
        weights: The name of the weights in that folder.
        roles: Tensors of a module that it has names for; "alpha" where it states alpha in the file.
        dialect: Which names of an architecture it uses ("native", "diffusers"), or "kohya": as its component says.
            A component may say otherwise for this layout.
        alpha: Where it states a module's scale: "tensor", "config" (a configuration or the header), "file" (one alpha
            for all modules, to which the others have to be brought beforehand), or "none", in which case the scale has
            to be folded into the factors beforehand.
        adopt: How a tensor of no module from another layout is called here; None where there is no place for it.
        reads_as: The layouts that files written so are recognised as, where that is not its own name.
        split: The pieces in which it names a weight of an architecture without a table; empty: in those that it has.
        parts: Whether it names parts of fused weights where no table does.
        separator: What stands between the words of a path: ".", or "_", which cannot be told from their own.
        uniform: Whether all modules of a component are DoRA, or none.
        one_rank: Whether it states one rank for all modules, to which the others have to be brought beforehand.
        fields: What a program finds in it of a PEFT configuration beside what modules tell; None: all of it.
        unread: Whether readers pass over a component of an architecture, both by name, though it has a name here.
        single: Whether its names do not tell components apart, so that a file is of one.
        pickled: The variant that is written as a pickle, where it has one.
        container: What it is written in: "safetensors" or "gguf".
        family: What the layout calls the model that an adapter is of, given the ``model_type`` of the base's
            configuration (or ""); None where it has no name for it. Only layouts that depend on it say so.
        row_order: In which order it has the rows of a weight, by family and path; "" where as transformers has them.
        hosted: Whether it can only be written for a family that it knows.
        experts: The styles in which it names experts (see ``archs/_experts.py``), its usual one first; empty where it
            has no such names.
        for_base: What a base model's configuration and its number of layers (0 where unknown) add to a document.
        read_path: What a reader of it calls a module, by family and path, where one name there stands for several.
        embedding_axis: Along which axis it has DoRA's magnitude of an embedding: "out" (its width) or "in" (words).
    """

    name: str
    title: str
    claims: Callable[[Facts], float]
    variant: Callable[[Facts], str] = lambda _: ""
    prefixes: tuple[tuple[str, str], ...] = ()
    scaler: Scaler = unscaled
    flipped: Callable[[Facts], bool] = lambda _: False
    speller: Speller | None = None
    finisher: Finisher | None = None
    folder: bool = False
    weights: str = "adapter_model.safetensors"
    roles: frozenset[str] = frozenset()
    dialect: str = "diffusers"
    alpha: str = "config"
    adopt: Adopter = nowhere
    reads_as: tuple[str, ...] = ()
    parts: bool = False
    split: Callable[[str], tuple[Rows | None, ...]] = lambda _: ()
    single: bool = False
    separator: str = "."
    uniform: bool = False
    one_rank: bool = False
    fields: frozenset[str] | None = None
    unread: Callable[[str, str], bool] = lambda _arch, _component: False
    pickled: str = ""
    container: str = "safetensors"
    family: Callable[[Adapter, str], str | None] = lambda _adapter, model_type: model_type
    row_order: Callable[[str, str], str] = lambda _family, _path: ""
    hosted: bool = False
    experts: tuple[str, ...] = ()
    for_base: Callable[[Document, Mapping[str, Any], int], Document] = lambda document, _config, _layers: (
        document
    )
    embedding_axis: str = "out"
    read_path: Callable[[str, str], str] = lambda _, path: path

    def states_scale(self, module: Module) -> bool:
        """Whether the layout has a place for this module's scale."""
        # PEFT divides by the configuration's rank where the factors have none.
        if self.alpha == "config" and module.kind == "lokr":
            return True
        # Readers make no scale of alpha where there is no rank to divide it by.
        if not module.rank:
            return False
        if self.alpha == "file":
            return module.kind in ("lora", "experts")
        if self.alpha == "config":
            return module.kind in ("lora", "adalora", "loha", "experts", "bdlora", "kasa")
        # Layouts that fold LoRA's may state it for kinds that they took over with their alphas.
        return self.alpha == "tensor" or ("alpha" in self.roles and module.kind == "lokr")

    def lacking(self, module: Module) -> tuple[str, ...]:
        """The roles of a module that the layout has no names for; "magnitude_in" is a magnitude per input."""
        magnitude = "magnitude_in" if module.magnitude_axis == "in" else "magnitude"
        roles = [*module.factors, *([magnitude] if module.magnitude is not None else [])]
        return tuple([role for role in roles if role not in self.roles])

    def locate(self, name: str) -> Target:
        """A target by prefix alone, for names that no table explains."""
        for prefix, component in self.prefixes:
            if name.startswith(prefix) and len(name) > len(prefix):
                return Target(component, name[len(prefix) :])
        return Target("model", name)


def cannot_hold(layout: Layout, what: str, keys: list[str], todo: str = "") -> LayoutError:
    """The error for what a layout has no place for."""
    return LayoutError(f"the {layout.name} layout cannot hold {what}", keys=keys, todo=todo)
