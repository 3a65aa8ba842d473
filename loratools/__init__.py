"""loratools: inspect, merge, convert, resize, bake and extract LoRA adapters.

Importing it does not import torch; an operation imports what it needs when it is called.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from loratools.errors import LoraError
from loratools.model import Adapter, Layout, Module, Rows, Target

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from loratools.engine import Engine
    from loratools.ops.checkpoint_results import BakeReport, VerifyReport
    from loratools.ops.compare_results import CompareReport
    from loratools.ops.doctor_results import DoctorReport
    from loratools.ops.pack_results import PackReport, UnpackReport
    from loratools.ops.results import ConvertReport, Info

    Multipliers = Mapping[str, float] | Sequence[float]

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Layout",
    "LoraError",
    "Module",
    "Rows",
    "Target",
    "__version__",
    "bake",
    "compare",
    "convert",
    "doctor",
    "extract",
    "info",
    "load",
    "merge",
    "pack",
    "resize",
    "save",
    "unpack",
    "verify",
]


def load(path: str | PathLike[str], *, arch: str | None = None) -> Adapter:
    """An adapter of any layout, lazily: names, shapes and scales now, data on request.

    Args:
        path: A file, or a folder that is an adapter (PEFT, MLX).
        arch: The architecture ("sd15", "sdxl", "flux", …), overriding detection.

    Raises:
        LoraError: It cannot be read, or is no adapter; the message says what it is.
    """
    from loratools.ops.files import load as run

    return run(path, arch=arch)


def save(
    adapter: Adapter,
    path: str | PathLike[str],
    *,
    layout: str | None = None,
    dtype: str = "keep",
    drop: Iterable[str] = (),
    overwrite: bool = False,
) -> int:
    """Write an adapter, whole or not at all.

    Args:
        adapter: From ``load``, ``merge``, …
        path: A file, or a folder where the layout wants one (PEFT).
        layout: "kohya", "diffusers", "peft", "comfy", …; default: the one it came in. Another one is converted to, as
            :func:`convert` does it.
        dtype: The store dtype: "float32", "float16", "bfloat16", or "keep".
        drop: What may be left out: "extras", the tensors that belong to no module; into another layout, whatever
            that cannot hold.
        overwrite: Whether an existing output may be replaced.

    Returns:
        Bytes written.

    Raises:
        LoraError: The layout cannot hold everything, or the output cannot be written; nothing is left behind.
    """
    from loratools.ops.files import save as run

    return run(adapter, path, layout=layout, dtype=dtype, drop=drop, overwrite=overwrite)


def convert(
    path: str | PathLike[str],
    output: str | PathLike[str],
    *,
    to: str | None = None,
    arch: str | None = None,
    base: str | PathLike[str] | None = None,
    as_kind: str | None = None,
    rank: int | None = None,
    dtype: str = "keep",
    fold: bool = False,
    drop: Iterable[str] = (),
    bucket: bool = False,
    full_weights: str | PathLike[str] | None = None,
    check: bool = True,
    overwrite: bool = False,
    dry_run: bool = False,
) -> ConvertReport:
    """Write an adapter in another layout, losslessly: names change, ΔW does not, and every tensor is accounted for.

    Args:
        path: The input.
        output: A file, or a folder where the layout wants one (PEFT).
        to: The layout ("kohya", "diffusers", "peft", "comfy", …), or the program whose form is wanted ("vllm",
            "sglang", "lorax", "llama.cpp"); default: the layout it came in.
        arch: The architecture, overriding detection.
        base: The base checkpoint: names that no architecture explains are matched against its own, and kinds that
            depend on its weights become LoRA with it.
        as_kind: "lora": turn modules of other kinds into LoRA first.
        rank: Of those, a count; None: their full rank, which is exact. For a program: of all modules, the higher ones
            of which are cut.
        dtype: The store dtype: "float32", "float16", "bfloat16", or "keep".
        fold: Fold alpha into the factors though the layout has a place for it.
        drop: What may be left out where the layout cannot hold it: "extras", "magnitude", "bias", "norm", "unnamed", a
            kind ("loha") or a component ("text_encoder").
        bucket: For a program: whether to pad the rank to the next one that it provides for.
        full_weights: For a program: where to write whole tensors that it cannot load.
        check: Whether to compare ΔW · x of both files on random x before the output takes its name.
        overwrite: Whether an existing output may be replaced.
        dry_run: Do everything but write.

    Returns:
        What became of every tensor, and what the comparison found.

    Raises:
        LoraError: The layout cannot hold everything, or ΔW would change; nothing is left behind.
    """
    from loratools.ops.convert import convert_file as run

    return run(
        path,
        output,
        to=to,
        arch=arch,
        base=base,
        as_kind=as_kind,
        rank=rank,
        dtype=dtype,
        fold=fold,
        drop=drop,
        bucket=bucket,
        full_weights=full_weights,
        check=check,
        overwrite=overwrite,
        dry_run=dry_run,
    )


def merge(
    adapters: Sequence[Adapter],
    *,
    weights: Sequence[float] | None = None,
    component_weights: Multipliers | Sequence[Multipliers] = (),
    block_weights: Multipliers | Sequence[Multipliers] = (),
    method: str = "linear",
    rank: int | None = None,
    layout: str | None = None,
    dtype: str = "keep",
    device: str = "auto",
    threads: int | None = None,
    allow_nonfinite: bool = False,
    drop: Iterable[str] = (),
    **options: Any,
) -> Adapter:
    """Combine adapters of one architecture into one.

    Args:
        adapters: From ``load``; rank, alpha, layout, dtype and modules may differ.
        weights: What each ΔW is multiplied by; default 1 each.
        component_weights: Multipliers by component ({"text_encoder": 0.5}): one mapping for all, or a list of one each.
        block_weights: Multipliers by block (IN04, MID, D07, or the beginning of a path), or a vector of numbers: one
            for all, or a list of one each.
        method: "linear" (Σ weight · ΔW exactly), "concat", "ties".
        rank: Of the result, a count; None: lossless where the method allows it.
        layout: Of the result; default as the first adapter came.
        dtype: The store dtype: "float32", "float16", "bfloat16", or "keep".
        device: Where to compute: "auto", "cpu", "cuda", "cuda:N" or "mps".
        threads: How many modules are worked on side by side, a count; default: one per processor.
        allow_nonfinite: Go on with NaN or Inf in a factor.
        drop: What may be left out: "extras", the tensors that belong to no module.
        options: The method's own (``density``, ``lam``, ``seed``, …), and for any method ``weight_for`` (patterns on
            paths), ``protect``, ``protect_energy``, ``protect_strength``, ``boost``, ``full_modules`` and ``base``; see
            :func:`loratools.ops.merge.merge`.

    Raises:
        LoraError: They cannot be merged; the message says which and why.
    """
    from loratools.ops.merge import merge as run

    merged, _ = run(
        adapters,
        weights=weights,
        component_weights=component_weights,
        block_weights=block_weights,
        method=method,
        rank=rank,
        layout=layout,
        dtype=dtype,
        device=device,
        threads=threads,
        allow_nonfinite=allow_nonfinite,
        drop=drop,
        **options,
    )
    return merged


def resize(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    ratio: float | None = None,
    error: float | None = None,
    size: int | str | None = None,
    **options: Any,
) -> Adapter:
    """Cut every module of an adapter to a lower rank, by exactly one rule; each is the best of its rank.

    Args:
        adapter: From ``load``.
        rank: Of every module, a count.
        energy: Or the smallest ranks that keep this fraction of Σσ², in (0, 1].
        ratio: Or as many directions as have σ of at least this fraction of the largest; above 1: of its F-th part.
        error: Or the smallest ranks with this relative error of each ΔW.
        size: Or the best file of this many bytes ("20MB").
        options: ``min_rank``, ``max_rank``, ``conv_rank``, ``multiple_of``, ``to_rank_of``, ``base``, ``against``,
            ``layout``, ``dtype``, ``device``, ``threads``; see :func:`loratools.ops.resize.resize`.

    Returns:
        The smaller adapter; ``save`` writes it.

    Raises:
        LoraError: It cannot be resized; the message says which module and why.
    """
    from loratools.ops.resize import resize as run

    found, _ = run(adapter, rank=rank, energy=energy, ratio=ratio, error=error, size=size, **options)
    return found


def compare(
    adapters: Sequence[Adapter | str | PathLike[str]],
    *,
    weights: Sequence[float] | None = None,
    **options: Any,
) -> CompareReport:
    """How adapters relate: cosines, norm ratios, overlap of subspaces, sign conflict, and which are one adapter.

    Args:
        adapters: From ``load``, or paths; two at least.
        weights: What each ΔW is multiplied by; default 1 each.
        options: ``components``, ``modules``, ``suggest``, ``exact``, ``base``, ``arch``, ``device``, ``threads``,
            ``engine``; see :func:`loratools.ops.compare.compare`.

    Raises:
        LoraError: They cannot be compared.
    """
    from loratools.ops.compare import compare as run

    return run(adapters, weights=weights, **options)


def bake(
    base: str | PathLike[str],
    adapters: Sequence[Adapter | str | PathLike[str]],
    output: str | PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    components: Collection[str] | None = None,
    precise: bool = False,
    rounding: str = "nearest",
    seed: int = 0,
    resume: bool = False,
    skip_missing: bool = False,
    arch: str | None = None,
    dtype: str = "keep",
    device: str = "auto",
    threads: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    engine: Engine | None = None,
) -> BakeReport:
    """Write a base checkpoint with adapters in it: W + Σ weight · ΔW, one tensor at a time.

    Args:
        base: The checkpoint: a file, a sharded model's folder, or a diffusers folder.
        adapters: From ``load``, or paths.
        output: A file where the base is one, else a folder; same container, sharding and dtypes as the base.
        weights: What each ΔW is multiplied by; default 1 each.
        components: Only these ("denoiser", "text_encoder", …); default: all.
        precise: Compute in float64 instead of float32.
        rounding: To the store dtype: "nearest", "stochastic", or "compensated".
        seed: Of stochastic rounding.
        resume: Go on where an interrupted bake of several files stopped.
        skip_missing: Leave out modules that the base has no weight for.
        arch: The architecture, overriding detection.
        dtype: The store dtype: "float32", "float16", "bfloat16", or "keep".
        device: Where to compute: "auto", "cpu", "cuda", "cuda:N" or "mps".
        threads: How many tensors are worked on side by side, a count; default: one per processor.
        overwrite: Whether an existing output may be replaced.
        dry_run: Plan and estimate; write nothing.
        engine: Where to compute; default: this machine's threads.

    Returns:
        What changed, and how much of each ΔW survived the store dtype.

    Raises:
        LoraError: It cannot be baked; nothing is left behind.
    """
    from loratools.ops.bake import bake as run

    return run(
        base,
        adapters,
        output,
        weights=weights,
        components=components,
        precise=precise,
        rounding=rounding,
        seed=seed,
        resume=resume,
        skip_missing=skip_missing,
        arch=arch,
        dtype=dtype,
        device=device,
        threads=threads,
        overwrite=overwrite,
        dry_run=dry_run,
        engine=engine,
    )


def extract(
    base: str | PathLike[str],
    tuned: str | PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    ratio: float | None = None,
    error: float | None = None,
    size: int | str | None = None,
    **options: Any,
) -> Adapter:
    """A LoRA from the difference of two checkpoints; one weight of each is in memory at a time.

    Args:
        base: The checkpoint that was tuned.
        tuned: The result; its container, sharding and names may differ from the base's.
        rank: Of every module, a count. Without a rule: 32.
        energy: Or the smallest rank that keeps this fraction of Σσ² of each module, in (0, 1].
        ratio: Or all singular values above this fraction of the largest.
        error: Or the smallest rank with this relative error of each ΔW.
        size: Or the best adapter of this many bytes ("20MB").
        options: ``max_rank``, ``min_rank``, ``conv_rank``, ``components``, ``include``, ``exclude``, ``svd``,
            ``tolerance``, ``seed``, ``embeddings``, ``full_small``, ``to``, ``dtype``, ``arch``, ``device``,
            ``threads``; see :func:`loratools.ops.extract.extract`.

    Returns:
        The adapter; ``save`` writes it.

    Raises:
        LoraError: The checkpoints are not of one architecture, or damaged.
    """
    from loratools.ops.extract import extract as run

    if rank is energy is ratio is error is size is None:
        rank = 32
    found, _ = run(base, tuned, rank=rank, energy=energy, ratio=ratio, error=error, size=size, **options)
    assert found is not None
    return found


def verify(
    base: str | PathLike[str],
    adapters: Sequence[Adapter | str | PathLike[str]],
    baked: str | PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    components: Collection[str] | None = None,
    skip_missing: bool = False,
    arch: str | None = None,
    threads: int | None = None,
    engine: Engine | None = None,
) -> VerifyReport:
    """Whether a bake happened, and what of it survived the store dtype; ``.ok`` says it in a word.

    Args:
        base: The checkpoint that was baked into.
        adapters: From ``load``, or paths.
        baked: What should be the result.
        weights: What each ΔW was multiplied by; default 1 each.
        components: Those that were baked; default: all.
        skip_missing: Whether modules that the base has no weight for were left out.
        arch: The architecture, overriding detection.
        threads: How many tensors are worked on side by side, a count; default: one per processor.
        engine: Where to compare; default: this machine's threads.

    Raises:
        LoraError: A file cannot be read, or the adapters do not fit the base.
    """
    from loratools.ops.verify import verify as run

    return run(
        base,
        adapters,
        baked,
        weights=weights,
        components=components,
        skip_missing=skip_missing,
        arch=arch,
        threads=threads,
        engine=engine,
    )


def info(path: str | PathLike[str], *, norms: bool = True, arch: str | None = None) -> Info:
    """What a file is: layout, architecture, kinds, components, modules, ranks, norms and training metadata.

    Args:
        path: A file, or a folder that is an adapter.
        norms: Whether to compute norms and spectra of ΔW, which reads the factors.
        arch: The architecture, overriding detection.

    Raises:
        LoraError: It cannot be read.
    """
    from loratools.ops.inspect import info as run

    return run(path, norms=norms, arch=arch)


def doctor(
    path: str | PathLike[str],
    *,
    base: str | PathLike[str] | None = None,
    runtime: str | None = None,
    max_rank: int | None = None,
    arch: str | None = None,
    values: bool = True,
) -> DoctorReport:
    """Whether an adapter would load and do what it should; ``.ok`` says it in a word, ``.findings`` what is wrong.

    Args:
        path: A file, or a folder that is an adapter. One that cannot be read is a finding.
        base: The base model that it is to be used with.
        runtime: The program: "vllm", "sglang", "llama.cpp", "mlx", "peft", "diffusers", "comfyui", "a1111" or "lorax".
        max_rank: The program's limit of the rank, a count; default: its usual one.
        arch: The architecture, overriding detection.
        values: Whether to read the tensors for NaN, zeros and overflows; else the header alone.

    Raises:
        LoraError: There is no such program.
    """
    from loratools.ops.doctor import doctor as run

    return run(path, base=base, runtime=runtime, max_rank=max_rank, arch=arch, values=values)


def pack(libraries: Sequence[str | PathLike[str]], output: str | PathLike[str], **options: Any) -> PackReport:
    """A library of adapters of one base as one folder for batched serving: one layout, few ranks, no duplicates.

    Args:
        libraries: Adapters, or folders in which they lie at any depth.
        output: The pack, a folder.
        options: ``layout``, ``runtime``, ``max_rank``, ``ranks``, ``dtype``, ``base``, ``arch``, ``duplicate_error``,
            ``shared_basis``, ``diagonal``, ``skip_unfit``, ``resume``, ``overwrite``, ``dry_run``, ``threads``,
            ``engine``; see :func:`loratools.ops.pack.pack`.

    Raises:
        LoraError: Something does not fit, or cannot be read or written; no pack was written.
    """
    from loratools.ops.pack import pack as run

    return run(libraries, output, **options)


def unpack(
    path: str | PathLike[str],
    output: str | PathLike[str],
    *,
    names: Sequence[str] = (),
    overwrite: bool = False,
    dry_run: bool = False,
) -> UnpackReport:
    """Single adapters out of a pack, bit for bit as they were packed, or as a shared basis has them.

    Args:
        path: The pack, a folder.
        output: A folder, in which each gets a folder or a file of its name.
        names: Which; default: all.
        overwrite: Whether files of an existing folder may be replaced.
        dry_run: Do everything but write.

    Raises:
        LoraError: It is no pack, a file of it is damaged, or the output cannot be written.
    """
    from loratools.ops.unpack import unpack as run

    return run(path, output, names=names, overwrite=overwrite, dry_run=dry_run)
