"""The common model: what every layout is read into and written from.

Frozen values, so that operations stay pure. No torch, and no name of any file format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from loratools.tensors import TensorRef

if TYPE_CHECKING:
    import torch

EMPTY: Mapping[str, Any] = MappingProxyType({})


class Rows(NamedTuple):
    """Some rows of a base weight, in shares, so that the same value fits any width.

    ``Rows(((0, 1),), of=3)`` is the q third of a fused qkv. Several spans are taken in the order given:
    ``Rows(((1, 2), (0, 1)), of=2)`` is a weight with its halves exchanged.

    Attributes:
        spans: Half-open intervals of shares.
        of: How many shares the whole weight has.
    """

    spans: tuple[tuple[int, int], ...]
    of: int

    @property
    def shares(self) -> int:
        """How many of the whole weight's shares these are."""
        return sum(stop - start for start, stop in self.spans)

    def __str__(self) -> str:
        return "+".join(f"{start}:{stop}" for start, stop in self.spans) + f"/{self.of}"


class Target(NamedTuple):
    """The base weight that a module changes.

    Attributes:
        component: "denoiser", "text_encoder", "text_encoder_2", "language_model", …
        path: The module's dotted path in the base checkpoint's own names.
        rows: Which of its rows, or None for all.
    """

    component: str
    path: str
    rows: Rows | None = None

    @property
    def sort_key(self) -> tuple[str, str, str]:
        """A total order over targets with and without rows."""
        return (self.component, self.path, str(self.rows or ""))

    def __str__(self) -> str:
        return self.path if self.rows is None else f"{self.path}[{self.rows}]"


class Layout(NamedTuple):
    """How a file spells its keys.

    Attributes:
        name: The layout's name ("kohya", "diffusers", "peft", …).
        variant: Which generation or dialect of it ("attn-procs", "no-prefix", …); empty for the usual one.
        container: "safetensors", "pickle" or "npz".
    """

    name: str
    variant: str = ""
    container: str = "safetensors"

    def __str__(self) -> str:
        return f"{self.name} ({self.variant})" if self.variant else self.name


class Module(NamedTuple):
    """One adapted weight: the factors of a kind, and the scale they are applied with.

    Attributes:
        target: The base weight.
        kind: "lora", "loha", "lokr", …
        factors: The kind's tensors by role; for "lora": up (out, rank), down (rank, in), optionally mid
            (rank, rank, kh, kw) and up_bias (out,).
        scale: What multiplies the product: alpha / rank, alpha / sqrt(rank) (rsLoRA), or 1.
        alpha: As the file states it, or None where it states none.
        rank: A count; None where the kind has none.
        shape: The base weight's shape (out, in[, kh, kw]) as far as the factors tell.
        op: "linear", "conv" or "embedding".
        alpha_tensor: The tensor that states alpha, where the file has one.
        magnitude: DoRA's magnitude vector.
        magnitude_axis: "out" (one per output row) or "in" (one per input column); None without magnitude.
        in_first: Whether the base stores this weight as (in, out): GPT-2's Conv1D, embeddings.
        variant: Which of the kind's formulas holds, as the configuration says it and the factors do not; empty for the
            usual one.
    """

    target: Target
    kind: str
    factors: Mapping[str, TensorRef]
    scale: float = 1.0
    alpha: float | None = None
    rank: int | None = None
    shape: tuple[int, ...] | None = None
    op: str = "linear"
    alpha_tensor: TensorRef | None = None
    magnitude: TensorRef | None = None
    magnitude_axis: str | None = None
    in_first: bool = False
    variant: str = ""

    def tensors(self) -> Iterator[tuple[str, TensorRef]]:
        """Every tensor of the module with its role, in the file's usual order."""
        if self.alpha_tensor is not None:
            yield "alpha", self.alpha_tensor
        yield from self.factors.items()
        if self.magnitude is not None:
            yield "magnitude", self.magnitude

    def delta(self, base: torch.Tensor | None = None) -> torch.Tensor:
        """ΔW, scale included, as a float32 tensor (out, in[, kh, kw]).

        Args:
            base: The rows of the base weight that the module changes, for kinds that need it (DoRA, OFT, (IA)³).

        Raises:
            UnsupportedKindError: The kind cannot be computed, or needs the base weight and there is none.
        """
        from loratools.kinds import delta

        return delta(self, base)


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """A whole adapter file in the common model.

    Attributes:
        modules: The adapted weights, in the file's order.
        extras: Tensors that belong to no module (modules saved in full, added tokens), by key.
        metadata: The file's string metadata.
        arch: The architecture's name, or "unknown".
        layout: How the file spelt it.
        config: The configuration that came with it (adapter_config.json), or empty.
        path: Where it was read from, or empty.
        notes: What a reader should know (a stale alpha, a guessed prefix), in sentences.
        type: "adapter", or what the file is instead.
        order: The file's keys in their order, so that the same file can be written again.
        candidates: The architectures that nothing tells apart, where the architecture is unknown for that.
    """

    modules: Mapping[Target, Module]
    extras: Mapping[str, TensorRef] = field(default_factory=lambda: EMPTY)
    metadata: Mapping[str, str] = field(default_factory=lambda: EMPTY)
    arch: str = "unknown"
    layout: Layout = Layout("unknown")  # noqa: RUF009 - a named tuple cannot be changed
    config: Mapping[str, Any] = field(default_factory=lambda: EMPTY)
    path: str = ""
    notes: tuple[str, ...] = ()
    type: str = "adapter"
    order: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()

    @property
    def kinds(self) -> dict[str, int]:
        """How many modules there are of each kind."""
        counts: dict[str, int] = {}
        for module in self.modules.values():
            counts[module.kind] = counts.get(module.kind, 0) + 1
        return counts

    def components(self) -> dict[str, list[Module]]:
        """The modules grouped by component, in order."""
        groups: dict[str, list[Module]] = {}
        for module in self.modules.values():
            groups.setdefault(module.target.component, []).append(module)
        return groups
