"""What operations return: plain values that a report shows and ``--json`` writes."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from loratools.model import EMPTY


class ModuleInfo(NamedTuple):
    """One module of an adapter.

    Attributes:
        target: The base weight's dotted path, with the rows where it is part of a fused weight.
        component: "denoiser", "text_encoder", "language_model", …
        kind: "lora", "loha", …
        shape: The base weight's shape (out, in[, kh, kw]), or None where the factors do not tell.
        rank: A count, or None.
        alpha: As the file states it, or None.
        scale: What multiplies the product.
        norm: Frobenius norm of ΔW, scale included; None where it was not asked for or needs the base weight.
        spectral_norm: Largest singular value of ΔW.
        stable_rank: norm² / spectral_norm².
        effective_rank: exp of the entropy of the energies.
        energy: Fraction of Σσ² kept at smaller ranks, by rank.
        experts: How many experts of a layer the factors are for, a count; None for other kinds, or where only the base
            tells.
        dtype: The factors' store dtype.
        dora: Whether the module has a magnitude.
        magnitude_axis: "out" or "in" for a DoRA, else None.
        op: "linear", "conv" or "embedding".
    """

    target: str
    component: str
    kind: str
    shape: tuple[int, ...] | None
    rank: int | None
    alpha: float | None
    scale: float
    dtype: str
    dora: bool = False
    magnitude_axis: str | None = None
    op: str = "linear"
    norm: float | None = None
    spectral_norm: float | None = None
    stable_rank: float | None = None
    effective_rank: float | None = None
    energy: Mapping[int, float] | None = None
    experts: int | None = None


class ComponentInfo(NamedTuple):
    """The modules of one component together.

    Attributes:
        modules: How many there are.
        ranks: How many modules have each rank, by rank.
        norm: Frobenius norm over all its modules: sqrt(Σ norm²).
        spectral_norm: The largest of its modules'.
        stable_rank: Median of its modules', those left out that are zero.
        effective_rank: Likewise.
        energy: Fraction of Σσ² over all its modules kept if each is cut to a rank, by rank.
    """

    modules: int
    ranks: Mapping[int, int]
    norm: float | None = None
    spectral_norm: float | None = None
    stable_rank: float | None = None
    effective_rank: float | None = None
    energy: Mapping[int, float] | None = None


class Info(NamedTuple):
    """What a file is.

    Attributes:
        path: As it was given or found.
        bytes: Size of the file.
        type: "adapter", "checkpoint", "textual-inversion", …, or "unknown".
        layout: The layout's name, or "unknown".
        variant: Which generation or dialect of the layout.
        container: "safetensors", "pickle" or "npz".
        arch: The architecture's name, or "unknown".
        arch_title: The architecture as people call it.
        family: The family of language, speech or vision models, as far as something tells it.
        kinds: How many modules there are of each kind.
        components: By component name.
        modules: Every module, in the file's order.
        tensors: How many tensors the file holds.
        dtypes: How many tensors have each store dtype.
        unclaimed: Keys that belong to no module.
        metadata: The header's string metadata.
        training: What people look for in it: base model, trainer, trigger words, date, steps, hashes.
        warnings: What a reader should know, in sentences.
        error: Why the file could not be read, or None.
    """

    path: str
    bytes: int = 0
    type: str = "unknown"
    layout: str = "unknown"
    variant: str = ""
    container: str = ""
    arch: str = "unknown"
    arch_title: str = ""
    family: str = ""
    kinds: Mapping[str, int] = EMPTY
    components: Mapping[str, ComponentInfo] = EMPTY
    modules: tuple[ModuleInfo, ...] = ()
    tensors: int = 0
    dtypes: Mapping[str, int] = EMPTY
    unclaimed: tuple[str, ...] = ()
    metadata: Mapping[str, str] = EMPTY
    training: Mapping[str, Any] = EMPTY
    warnings: tuple[str, ...] = ()
    error: str | None = None


class LedgerEntry(NamedTuple):
    """What became of one tensor of an input.

    Attributes:
        key: Its key in the input.
        fate: "moved", "split", "fused", "folded", "padded" (with zeros), "converted", "metadata", "implied" (an alpha
            that is the rank, which the layout takes it for, or what the base holds alike), "zero" (it changes nothing,
            and is not written), "apart" (written beside, as a whole tensor of the base) or "dropped".
        into: The output's keys that it went into.
        detail: What else there is to say: what --drop calls it, the scale that was folded.
    """

    key: str
    fate: str
    into: tuple[str, ...] = ()
    detail: str = ""


class WrittenTensor(NamedTuple):
    """One tensor of an output.

    Attributes:
        key: Its key.
        dtype: The safetensors name of its store dtype.
        shape: As stored.
        bytes: Its size.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


class Conversion(NamedTuple):
    """A module that was turned into another kind.

    Attributes:
        target: The base weight.
        kind: What it was.
        rank: Of the LoRA, a count.
        error: Relative Frobenius error of ΔW.
        exact: Whether the error is rounding alone.
    """

    target: str
    kind: str
    rank: int
    error: float
    exact: bool


class Normalised(NamedTuple):
    """A module that was brought into the form that a program holds.

    Attributes:
        target: The base weight.
        changes: What was done: "to lora", "padded", "cut", "folded", or "added" for a module of zeros.
        ranks: Before and after, counts; 0 where the kind had none.
        scales: Before and after.
        error: Relative Frobenius error of ΔW by a truncation; 0 where there was none.
        exact: Whether ΔW is the same, and no value was rounded.
    """

    target: str
    changes: tuple[str, ...]
    ranks: tuple[int, int]
    scales: tuple[float, float]
    error: float = 0.0
    exact: bool = True


class ConvertReport(NamedTuple):
    """What a conversion did.

    Attributes:
        input: Path of the input.
        output: Where it was written.
        bytes: Size of what was (or would be) written.
        arch: The architecture's name.
        source: The layout it came in.
        layout: The layout it is in.
        modules: How many the input has, and how many the output.
        kinds: How many modules of the output there are of each kind.
        ranks: How many modules of the output have each rank.
        dtypes: How many tensors of the output have each store dtype.
        ledger: Every tensor of the input.
        tensors: Every tensor of the output.
        conversions: Modules that were turned into another kind.
        weights: How many base weights were compared by probes; None where it was not asked for.
        error: The largest relative error that the probes found.
        worst: The weight that has it.
        notes: What the caller should know.
        runtime: The program whose normal form it is in, or empty.
        normalised: The modules that were changed for it.
        full_weights: Where whole tensors were written apart, or empty.
    """

    input: str
    output: str
    bytes: int
    arch: str
    source: str
    layout: str
    modules: tuple[int, int]
    kinds: Mapping[str, int]
    ranks: Mapping[int, int]
    dtypes: Mapping[str, int]
    ledger: tuple[LedgerEntry, ...]
    tensors: tuple[WrittenTensor, ...] = ()
    conversions: tuple[Conversion, ...] = ()
    weights: int | None = None
    error: float | None = None
    worst: str = ""
    notes: tuple[str, ...] = ()
    runtime: str = ""
    normalised: tuple[Normalised, ...] = ()
    full_weights: str = ""

    @property
    def fates(self) -> dict[str, int]:
        """How many of the input's tensors met each fate."""
        return dict(Counter(entry.fate for entry in self.ledger))

    @property
    def dropped(self) -> tuple[str, ...]:
        """The input's keys that were left out."""
        return tuple(entry.key for entry in self.ledger if entry.fate == "dropped")
