"""An adapter from the difference of two checkpoints, streamed: memory is bounded by the largest weight.

Each weight's difference is decomposed by itself and put on the disk beside the output; what is written in the end is
read back one tensor at a time. Fused weights are extracted as the base stores them. Factors are balanced, √σ on both
sides, with alpha = rank and no clamp: ΔW is the best approximation of its rank (Eckart, Young, Mirsky).
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable

import torch

from loratools import archs
from loratools.engine import Engine
from loratools.errors import ArchitectureError, LayoutError, OptionError
from loratools.io import unchanged
from loratools.io.base import keys_of
from loratools.io.uploading import uploads
from loratools.model import Adapter
from loratools.ops import _extract_dry, _extract_run, _extract_write, _no_checkpoint, files
from loratools.ops._device import for_engine, has_float64, usable
from loratools.ops._extract_jobs import work
from loratools.ops._extract_options import Options, options
from loratools.ops._extract_plan import compare
from loratools.ops._extract_run import Extraction, Progress
from loratools.ops._extract_side import sides
from loratools.ops.checkpoint_results import ExtractReport


@uploads
@unchanged.watched
def extract(
    base: files.PathLike,
    tuned: files.PathLike,
    output: files.PathLike | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    ratio: float | None = None,
    error: float | None = None,
    size: int | str | None = None,
    max_rank: int | None = None,
    min_rank: int = 1,
    conv_rank: int | None = None,
    components: Collection[str] | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    svd: str = "auto",
    tolerance: float = 1e-3,
    seed: int = 0,
    embeddings: bool = False,
    full_small: bool = False,
    to: str | None = None,
    dtype: str = "keep",
    arch: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    engine: Engine | None = None,
    resume: bool = False,
) -> tuple[Adapter | None, ExtractReport]:
    """Extract an adapter.

    Args:
        base: The checkpoint that was tuned: a file or a folder. It decides names, and which weights are fused.
        tuned: What came of it; may be sharded, stored and named otherwise.
        output: A file, or a folder where the layout wants one; None to return the adapter instead.
        rank: A count, the same for all.
        energy: The fraction of Σσ² to keep, in (0, 1].
        ratio: Keep σ above this fraction of the largest; above 1: above the largest divided by it.
        error: The largest ‖ΔW − extracted‖ / ‖ΔW‖ of a module, in (0, 1).
        size: Of the whole output, bytes or "20MB"; ranks are spent where they keep most.
        max_rank: The largest rank, a count.
        min_rank: The smallest rank, a count.
        conv_rank: The rank of convolutions with a kernel, a count: at most, where another rule than ``rank`` is given;
            0 leaves them out; None treats them as all others.
        components: Those to extract ("denoiser", …); None for all.
        include: Regular expressions: only weights of whose path or key one of them matches a part.
        exclude: Regular expressions: no weights of which one does.
        svd: "exact", "randomized" or "auto".
        tolerance: By how large a fraction of the optimum an error may exceed it.
        seed: Of random starts.
        embeddings: Whether to extract embeddings; where a vocabulary grew, PEFT's layout gets the whole tensor.
        full_small: Whether to take biases, norms and bare parameters along as full differences.
        to: The layout; default: Kohya's for image models, PEFT's for all others.
        dtype: The store dtype: "float32", "float16", "bfloat16", or "keep", the base's own.
        arch: The architecture, overriding detection.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps"; for the last the CPU computes, since decompositions need
            float64.
        threads: How many matrices are worked on side by side, a count; default: one per processor.
        overwrite: Whether an existing output may be replaced.
        dry_run: Plan and estimate only.
        progress: Called with a weight's name, bytes done and bytes in all.
        engine: Where to compute; default: this machine's threads, or its accelerator.
        resume: Go on with an extraction that was interrupted, and keep what is done if this one is. What was done is
            written down once a second, whether this is asked for or not.

    Returns:
        The adapter, in memory, where there is no output (and no dry run); and what was found.

    Raises:
        LoraError: Nothing was written; the message says why.
    """
    started = time.monotonic()
    asked = options(
        {"rank": rank, "energy": energy, "ratio": ratio, "error": error, "size": size},
        max_rank=max_rank,
        min_rank=min_rank,
        conv_rank=conv_rank,
        components=components,
        include=include,
        exclude=exclude,
        dtype=dtype,
        svd=svd,
        tolerance=tolerance,
        seed=seed,
        embeddings=embeddings,
        full_small=full_small,
    )
    if output is not None:
        _check_output(output, (base, tuned), overwrite=overwrite)
    place = _place(device, engine)
    planned = _planned(base, tuned, output, asked, arch, to)
    planned = planned._replace(device=place, threads=threads, progress=progress, engine=engine, resume=resume)
    _check_layout(planned)
    if dry_run:
        report = _extract_dry.report(planned, planning=time.monotonic() - started)
        return None, report._replace(seconds=time.monotonic() - started)
    found, report = _extract_run.run(planned, overwrite=overwrite)
    return found, report._replace(seconds=time.monotonic() - started)


def _place(device: str, engine: Engine | None) -> str:
    """Where to compute.

    Raises:
        OptionError: The device is not there, or an engine is given as well.
    """
    place = usable(for_engine(device, engine), auto="cuda" if torch.cuda.is_available() else "cpu")
    return place if has_float64(place) else "cpu"


def default_output(
    tuned: files.PathLike,
    *,
    to: str | None = None,
    arch: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    ratio: float | None = None,
    error: float | None = None,
    size: int | str | None = None,
) -> str:
    """Where an extraction is written that no output was given for: ``<TUNED stem>-lora-r32.safetensors``, here.

    Args:
        tuned: The tuned checkpoint.
        to: See ``extract``, as all others.
        arch: The architecture, overriding detection.
        rank: The rule.
        energy: The rule.
        ratio: The rule.
        error: The rule.
        size: The rule.

    Raises:
        LoraError: There is no such checkpoint, layout or rule.
    """
    asked = options(
        {"rank": rank, "energy": energy, "ratio": ratio, "error": error, "size": size},
        max_rank=None,
        min_rank=1,
        conv_rank=None,
        components=None,
        include=(),
        exclude=(),
        dtype="keep",
        svd="auto",
        tolerance=1e-3,
        seed=0,
        embeddings=False,
        full_small=False,
    )
    form = _extract_write.layout_for(arch or _extract_write.arch_of(tuned), to)
    return _extract_write.output_name(tuned, form, asked.tag)


def _check_output(output: files.PathLike, inputs: Iterable[files.PathLike], *, overwrite: bool) -> None:
    """Refuse an output that cannot be written, or that would take the place of a checkpoint."""
    files.check_output(output, overwrite=overwrite)
    for path in inputs:
        if files.within(output, path):
            raise OptionError(
                "the output would be written over a checkpoint",
                path=os.fspath(output),
                todo="Choose another name for the output",
            )


def _planned(
    base: files.PathLike,
    tuned: files.PathLike,
    output: files.PathLike | None,
    asked: Options,
    arch: str | None,
    to: str | None,
) -> Extraction:
    """What is to be done, from headers alone."""
    own, other = sides(keys_of(base), keys_of(tuned), arch)
    try:
        compared = compare(own, other, asked)
    except ArchitectureError:
        # An adapter, or a textual inversion, seems to be of any architecture or of none.
        _no_checkpoint.refuse(own.base)
        _no_checkpoint.refuse(other.base)
        raise
    form = _extract_write.layout_for(compared.arch, to)
    container = files.check_name(output, form.name) if output is not None else "safetensors"
    # Whole tensors keep the checkpoint's names, which tables would translate for modules alone.
    replaces = form.name == "peft" and not archs.get(compared.arch).has_table
    todo = work(compared, asked, replaces=replaces)
    path = os.fspath(output) if output is not None else ""
    return Extraction(own, other, asked, compared, todo, form, container, path, "cpu", None, None)


def _check_layout(planned: Extraction) -> None:
    """Refuse what the layout has no place for before the work is done, not after.

    Raises:
        LayoutError: With what would leave it out here.
        OptionError: There is nothing to extract.
    """
    found = _extract_dry.placeholders(planned.work)
    if not found:
        raise OptionError(
            "nothing is left to extract",
            path=planned.tuned.base.path,
            todo="Choose more with --include, --components or --full-small",
        )
    if not planned.output:
        return
    try:
        _extract_run.size_of(planned, found)
    except LayoutError as error:
        # Converting has further options for the same trouble.
        ways = [way for way in error.todo.split(". ") if "--drop" not in way and "--as" not in way]
        raise LayoutError(
            error.problem.replace("the input's", "the extracted"),
            path=planned.output,
            keys=error.keys,
            expected=error.expected,
            todo=". ".join([*ways, "Leave them out with --components or --exclude"]),
        ) from error
