"""One adapter at lower ranks: the best approximation of every ΔW, found in factor space.

By Eckart, Young and Mirsky nothing of a rank is nearer to ΔW than its truncated singular value decomposition. It is
computed from the factors (``maths.lowrank``), in float64, of one module per thread at a time, on an accelerator of
batches of modules of one make-up (``_batching``); what is held of all modules is the result in its store dtype. Where
ranks depend on all modules (a size, scores against a base, a server's one rank), spectra are computed first and the
factors in a second pass, so that no more is held then either.

Unlike sd-scripts' ``resize_lora``, which keeps one direction more than its rules ask for, ranks are the exact minima;
1x1 convolutions count as linear; √σ goes into both factors; and the scale goes into them, so that alpha is the rank,
or in a Kohya file one number for all modules, since some readers (diffusers 0.42) apply one alpha to all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch

from loratools import formats
from loratools.engine import Engine
from loratools.engine.kept import Kept
from loratools.engine.local import Local
from loratools.errors import OptionError
from loratools.io import unchanged
from loratools.io.base import config_of, keys_of
from loratools.io.uploading import uploads
from loratools.io.work_folder import Identity
from loratools.model import Adapter
from loratools.ops import _identity_of, _moe_open, _prediction, _resize_layout, _resize_report, files
from loratools.ops._base_weights import Weights
from loratools.ops._batching import batch_bytes
from loratools.ops._device import for_engine, usable
from loratools.ops._resize_each import Progress, Work
from loratools.ops._resize_options import options
from loratools.ops._resize_run import common_alpha, run, to_cut
from loratools.ops._resize_steps import RESULTS
from loratools.ops._resize_store import Form
from loratools.ops.resize_results import ResizeReport


def resize(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    ratio: float | None = None,
    error: float | None = None,
    size: str | int | None = None,
    min_rank: int = 1,
    max_rank: int | None = None,
    conv_rank: int | None = None,
    multiple_of: int = 1,
    to_rank_of: str | None = None,
    base: files.PathLike | None = None,
    against: files.PathLike | None = None,
    against_norm: str = "frobenius",
    layout: str | None = None,
    dtype: str = "keep",
    drop: Iterable[str] = (),
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
    engine: Engine | None = None,
) -> tuple[Adapter, ResizeReport]:
    """Cut every module to a lower rank, by exactly one of five rules.

    LoHa, LoKr and all other kinds whose ΔW is known become LoRA. Norms, biases and full differences are carried as
    they are, and so is a LoRA of which nothing is cut.

    Args:
        adapter: From ``load``.
        rank: The rank of every module, a count; modules that have fewer directions keep those.
        energy: The smallest ranks that keep this fraction of Σσ², in (0, 1].
        ratio: As many directions as have σ above this fraction of the largest; above 1: above its F-th part.
        error: The smallest ranks with at most this relative Frobenius error, in (0, 1).
        size: The best file of at most this size, header included: bytes, or a text such as "20MB".
        min_rank: No rank below this, a count, where ΔW has as many directions.
        max_rank: No rank above this, a count.
        conv_rank: The rank of convolutions with a kernel (of the other rules: their largest), a count; 0 leaves them
            out.
        multiple_of: Ranks are rounded up to multiples of this, a count, where ΔW has as many directions.
        to_rank_of: "vllm", "punica" or "sglang": one rank for all modules, the smallest that it provides for and that
            holds what the rule asks for (without a rule: all), at most the largest; filled up with zeros.
        base: The model that the adapter was trained on, for DoRA, OFT, (IA)³ and GLoRA.
        against: A model: directions count by their share of its weights' norms (see ``_resize_ranks``).
        against_norm: Which norm: "frobenius" or "spectral".
        layout: Of the result; default as it came.
        dtype: "float32", "float16", "bfloat16", "float64", or "keep".
        drop: What another layout may leave out; see ``convert``.
        device: "auto" (the CPU: what is moved costs more than it saves), "cpu", "cuda", "cuda:N" or "mps".
        threads: How many modules are worked on side by side, a count; default: one per processor.
        progress: Called with a module's name, its number and the count of all.
        engine: Where to compute; default: this machine's threads.

    Returns:
        The adapter, in memory, and what was done.

    Raises:
        OptionError: Not exactly one rule, a value out of range, or a size that cannot be reached.
        UnsupportedKindError: Modules whose ΔW depends on a base that was not given; all are named.
        NonFiniteError: NaN or Inf in a factor.
    """
    rules = {"rank": rank, "energy": energy, "ratio": ratio, "error": error, "size": size}
    asked = options(
        rules,
        min_rank=min_rank,
        max_rank=max_rank,
        conv_rank=conv_rank,
        multiple_of=multiple_of,
        to_rank_of=to_rank_of,
        against_norm=against_norm if against is not None else "",
        dtype=dtype,
    )
    place = usable(for_engine(device, engine), wanted=torch.float64)
    goal = _resize_layout.goal(adapter, layout)
    early = _resize_layout.comes_first(adapter, goal, asked)
    given = _resize_layout.converted(adapter, goal, base, drop) if early else adapter
    given, experts = _opened(given, base, size=size, against=against)
    given, known = _resize_layout.matched(given, base, against)
    with ExitStack() as stack:
        weights = [stack.enter_context(Weights(each, given.arch)) if each else None for each in known]
        modules = to_cut(given, asked, weights[0])
        form = Form(asked.dtype, common_alpha(given.layout, modules, asked), place)
        batch = batch_bytes(place)
        work = Work(given, modules, asked, form, weights[0], weights[1], threads, progress, batch, engine)
        result, report = run(work, adapter)
    result = experts.closed(result)
    if result.layout.name == goal:
        return result, report
    result = _resize_layout.converted(result, goal, base, drop)
    return result, _resize_report.in_layout(report, result)


def _opened(
    adapter: Adapter,
    base: files.PathLike | None,
    *,
    size: str | int | None,
    against: files.PathLike | None,
) -> tuple[Adapter, _moe_open.Closing]:
    """The adapter with a module for every expert, each of which is cut by itself; the result has the largest rank.

    Raises:
        OptionError: A rule is asked for that looks at more than the experts' own factors.
    """
    (found,), closing = _moe_open.opened([adapter], None, {} if base is None else config_of(base)[1])
    given = [name for name, value in (("--size", size), ("--against", against), ("--base", base)) if value]
    if closing.counts and given:
        raise OptionError(
            f"{' and '.join(given)} cannot be combined with fused experts, whose ranks are filled up to the largest",
            path=adapter.path or None,
            keys=[str(target) for target in closing.counts],
            expected="--rank, --energy, --ratio or --error was expected",
            todo="Write a module for each expert with `loratools convert --experts split` first",
        )
    return found, closing


@uploads
@unchanged.watched
def resize_file(
    path: files.PathLike,
    output: files.PathLike,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    arch: str | None = None,
    engine: Engine | None = None,
    resume: bool = False,
    **options: Any,
) -> ResizeReport:
    """Load, resize and write.

    Args:
        path: The input.
        output: A file, or a folder where the layout wants one.
        overwrite: Whether an existing output may be replaced.
        dry_run: Do everything but write.
        arch: The input's architecture, overriding detection.
        engine: Where to compute; default: this machine's threads.
        resume: Go on with a resize that was interrupted, and keep what is done if this one is. What was done is written
            down once a second, whether this is asked for or not.
        options: As for ``resize``.

    Raises:
        LoraError: Nothing was written.
    """
    # Whatever is wrong with the output is said before any work is done, not after.
    files.check_output(output, overwrite=overwrite)
    load = files.bakeable if options.get("base") is not None else files.load
    adapter = load(path, arch=arch)
    layout = options.get("layout") or adapter.layout.name
    if layout in formats.writable():
        files.check_name(output, layout)
    if dry_run:
        threads = options.get("threads")
        seen = _prediction.foreseeing(engine, threads, inputs=[path], output=output)
        result, report = resize(adapter, engine=seen, **options)
        size = files.size(result)
        estimate = _prediction.foreseen(seen, engine, threads, assembled=size)
        return report._replace(output=os.fspath(output), bytes=size, estimate=estimate)
    inner = engine or Local(options.get("threads"))
    with Kept(inner, output, lambda: _identity(adapter, options, inner), RESULTS, resume=resume) as kept:
        result, report = resize(adapter, engine=kept, **options)
        written = files.save(result, output, overwrite=overwrite)
    notes = (*report.notes, *kept.notes)
    return report._replace(output=os.fspath(output), bytes=written, notes=notes, resumed=kept.taken)


def _identity(adapter: Adapter, options: Mapping[str, Any], engine: Engine) -> Identity:
    """What tells a resize from another."""
    inputs = {adapter.path: _identity_of.of_adapter(adapter)}
    used = {name: os.fspath(options[name]) for name in ("base", "against") if options.get(name) is not None}
    inputs.update({path: _identity_of.of_base(keys_of(path)) for path in used.values()})
    told = _identity_of.asked(resize, options)
    told["device"] = _identity_of.computed_on(told["device"], engine)
    return _identity_of.identity("resize", inputs, {**told, "arch": adapter.arch, "models": sorted(used)})
