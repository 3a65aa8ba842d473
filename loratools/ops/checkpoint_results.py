"""What baking, extracting and verifying found out: plain values that reports show and --json writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from loratools.ops.prediction_results import Estimate


class BakedTensor(NamedTuple):
    """One tensor of the base that changed.

    Attributes:
        key: Its name in the base.
        target: Component and path of the module, as reports show it.
        component: "denoiser", "text_encoder", …
        shape: As stored.
        dtype: The store dtype, a safetensors name.
        adapters: Positions of the adapters that changed it.
        norm: ‖ΔW‖, Frobenius, of all adapters together.
        kept: How much of ΔW is in the stored result: ⟨stored − W, ΔW⟩ / ‖ΔW‖²; 1 is all. None where ΔW is 0.
        error: ‖stored − (W + ΔW)‖ / ‖ΔW‖, what rounding to the store dtype added. None where ΔW is 0.
        sampled: Whether ``kept`` and ``error`` come from some of the rows.
        note: What the caller should know of it (rounded otherwise than asked, a new float8 scale).
    """

    key: str
    target: str
    component: str
    shape: tuple[int, ...]
    dtype: str
    adapters: tuple[int, ...]
    norm: float
    kept: float | None
    error: float | None
    sampled: bool = False
    note: str = ""


class BakeEstimate(NamedTuple):
    """What a bake will take, from a quick probe.

    Attributes:
        whole: All of it.
        copy_rate: Bytes per second that were copied to the output's disk; infinite where the base is at a URL.
        compute_rate: Bytes per second of weights that all workers compute; infinite where none are.
    """

    whole: Estimate
    copy_rate: float
    compute_rate: float


class BakeReport(NamedTuple):
    """What a bake did, or with --dry-run would do.

    Attributes:
        base: Path of the base.
        output: Where it was written.
        adapters: Their paths.
        weights: What each was multiplied by.
        arch: The architecture's name.
        container: "safetensors" or "pickle".
        bytes: Size of all files of tensors that were (or would be) written.
        files: How many files of tensors.
        beside: Other files that were copied (configurations, tokenizers), relative to the folder.
        tensors: Those that changed.
        copied: How many tensors were copied unchanged.
        changed_bytes: Size of the tensors that changed.
        matched: How many modules of each adapter were baked.
        missing: By adapter, what the base has no place for and --skip-missing left out.
        left_out: By adapter, how many modules --components left out.
        rounding: "nearest", "stochastic" or "compensated".
        precise: Whether it was computed in float64.
        kept: As in ``BakedTensor``, of all tensors together; None on a dry run.
        error: Likewise.
        resumed: How many tensors and copied ranges of an interrupted run were found to be as they should be.
        resumed_bytes: Their size.
        seconds: How long it took.
        estimate: On a dry run.
        notes: What the caller should know.
    """

    base: str
    output: str
    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    arch: str
    container: str
    bytes: int
    files: int
    beside: tuple[str, ...]
    tensors: tuple[BakedTensor, ...]
    copied: int
    changed_bytes: int
    matched: tuple[int, ...]
    missing: tuple[tuple[str, ...], ...] = ()
    left_out: tuple[int, ...] = ()
    rounding: str = "nearest"
    precise: bool = False
    kept: float | None = None
    error: float | None = None
    resumed: int = 0
    resumed_bytes: int = 0
    seconds: float = 0.0
    estimate: BakeEstimate | None = None
    notes: tuple[str, ...] = ()


class ExtractedModule(NamedTuple):
    """One weight whose difference was extracted.

    Attributes:
        target: The base weight, path and rows.
        component: "denoiser", "text_encoder", …
        kind: "lora", or "full" for a difference that was kept whole.
        shape: (out, in[, kh, kw]).
        rank: A count; None for a full difference.
        norm: ‖ΔW‖, Frobenius.
        energy: The fraction of ‖ΔW‖² that was kept, in [0, 1].
        error: ‖ΔW − extracted‖ / ‖ΔW‖ before the store dtype rounds.
        optimum: A lower bound of what ``error`` is at best at this rank.
        method: "exact", "randomized" or "full".
    """

    target: str
    component: str
    kind: str
    shape: tuple[int, ...]
    rank: int | None
    norm: float
    energy: float
    error: float
    optimum: float
    method: str


class LeftOut(NamedTuple):
    """A tensor that differs between the two checkpoints and is not in the result.

    Attributes:
        key: Its name in the base.
        why: In words: "a bias; --full-small takes it along".
        norm: ‖difference‖, Frobenius.
    """

    key: str
    why: str
    norm: float


class ExtractReport(NamedTuple):
    """What an extraction found.

    Attributes:
        base: Path of the base.
        tuned: Path of the tuned checkpoint.
        output: Where the adapter was written.
        arch: The architecture's name.
        layout: The layout written.
        rule: The rank rule in words: "rank 32", "energy 0.95", "size 20 MB".
        bytes: Size of what was (or would be) written.
        dtype: The store dtype, a safetensors name.
        modules: What was extracted.
        unchanged: How many weights do not differ at all.
        left_out: What differs and was not taken.
        energy: The fraction of Σ‖ΔW‖² over all extracted modules that was kept.
        error: sqrt(1 − energy): the relative error of all together.
        optimum: The lower bound of it at these ranks.
        device: Where it was computed.
        seconds: How long it took.
        estimate: What it would take, on a dry run; None otherwise.
        notes: What the caller should know.
        resumed: How many weights were compared before, by the run that was interrupted.
    """

    base: str
    tuned: str
    output: str
    arch: str
    layout: str
    rule: str
    bytes: int
    dtype: str
    modules: tuple[ExtractedModule, ...]
    unchanged: int
    left_out: tuple[LeftOut, ...] = ()
    energy: float = 1.0
    error: float = 0.0
    optimum: float = 0.0
    device: str = "cpu"
    seconds: float = 0.0
    estimate: Estimate | None = None
    notes: tuple[str, ...] = ()
    resumed: int = 0

    @property
    def ranks(self) -> Mapping[int, int]:
        """How many modules have each rank."""
        counts: dict[int, int] = {}
        for module in self.modules:
            if module.rank is not None:
                counts[module.rank] = counts.get(module.rank, 0) + 1
        return dict(sorted(counts.items()))


class VerifiedTensor(NamedTuple):
    """One tensor that the adapters should have changed, or that changed without them.

    Attributes:
        key: Its name in the base.
        target: Component and path.
        component: "denoiser", "text_encoder", …
        verdict: "baked", "partly" (at another strength, or with much lost), "not baked", "wrong" (changed to
            something else), "unexpected" (changed though no adapter touches it) or "absent".
        norm: ‖ΔW‖ that was expected.
        kept: ⟨baked − W, ΔW⟩ / ‖ΔW‖²: 1 is all of it.
        error: ‖baked − (W + ΔW)‖ / ‖ΔW‖.
        rounding: What rounding to the store dtype alone would make of ``error``.
        dtype: Of the baked tensor, a safetensors name.
        strength: What ΔW seems to have been multiplied by, where the change is along it and another one was asked for.
        note: What the caller should know of it (another shape, NaN, a change that the store dtype has no room for).
    """

    key: str
    target: str
    component: str
    verdict: str
    norm: float
    kept: float | None
    error: float | None
    rounding: float | None
    dtype: str
    strength: float | None = None
    note: str = ""


class VerifyReport(NamedTuple):
    """Whether a bake happened.

    Attributes:
        base: Path of the base.
        baked: Path of the checkpoint that should be the result.
        adapters: Their paths.
        weights: What each was multiplied by.
        arch: The architecture's name.
        ok: Whether every tensor is what it should be.
        tensors: Those that should have changed, and those that changed without reason.
        untouched: How many tensors are the base's, bit for bit, as they should be.
        kept: Of all tensors together; None where nothing should have changed.
        error: Likewise.
        missing: By adapter, what the base has no place for and --skip-missing left out.
        notes: What the caller should know.
    """

    base: str
    baked: str
    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    arch: str
    ok: bool
    tensors: tuple[VerifiedTensor, ...]
    untouched: int
    kept: float | None
    error: float | None
    missing: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()
