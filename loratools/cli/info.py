"""``loratools info``: what each file is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import click

from loratools.cli import failures, options, output
from loratools.errors import visible

if TYPE_CHECKING:
    from loratools.ops.results import Info

_EPILOG = """\b
Examples:
  loratools info style.safetensors
  loratools info style.safetensors --modules
  loratools info ~/loras --no-norms
  loratools info style.safetensors --json | jq .components
"""


class Entry(NamedTuple):
    """A file to look at.

    Attributes:
        path: The file, or a folder that is one adapter or model.
        named: Whether the user named it, rather than a folder that it lies in.
    """

    path: str
    named: bool


@click.command("info", epilog=_EPILOG, short_help="What each file is.")
@click.argument("paths", metavar="[PATH]...", nargs=-1, type=click.Path(readable=False))
@click.option("--modules", is_flag=True, help="List every module of each adapter.")
@click.option("--no-norms", is_flag=True, help="Read headers only: no norms, spectra and energies.")
@options.arch
@options.common
@click.pass_context
def command(
    ctx: click.Context,
    paths: Sequence[str],
    modules: bool,
    no_norms: bool,
    arch: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """What each file is: architecture, layout, ranks, norms, training.

    Without PATH: the adapters in the current folder. A folder that is not itself an adapter or a model is
    searched, subfolders included; files in it that cannot be read are listed with the reason.

    Norms are of ΔW with its scale: norm is Frobenius, spectral the largest singular value. Stable rank is
    norm² / spectral²; effective rank the exponential of the entropy of the energies σ²/Σσ². "Energy kept at
    rank R" is the share of Σσ² that the R largest singular values hold. For a component: norm over all its
    modules, the largest spectral norm, and the medians of the ranks.

    Exit status 1 if a file named outright cannot be read; the others are shown all the same.
    """
    entries = list(_named(paths)) if paths else list(_here())
    infos = _look(ctx, entries, norms=not no_norms, arch=arch, quiet=quiet)
    failed = [info for entry, info in zip(entries, infos, strict=True) if entry.named and info.error]
    if not paths:
        infos = [info for info in infos if info.type == "adapter" or info.error]
    single = len(paths) == 1 and len(entries) == 1 and entries[0].named
    if as_json:
        _write_json(infos, single=single)
    elif single:
        _write_one(infos[0], modules=modules)
    else:
        _write_several(infos, failed, paths, modules=modules)
    for info in failed:
        output.write_error(str(info.error))
    if failed:
        ctx.exit(1)


def _named(paths: Sequence[str]) -> Iterator[Entry]:
    """What the user named; a folder of files becomes its files."""
    from loratools.ops import inspect

    for path in paths:
        if inspect.is_folder(path) and not _single(path):
            yield from (Entry(found, named=False) for found in inspect.candidates(path))
        else:
            yield Entry(path, named=True)


def _here() -> Iterator[Entry]:
    """The current folder, if it is an adapter itself; else its files and the adapter folders in it."""
    from loratools.ops import inspect

    if _single("."):
        yield Entry(".", named=False)
        return
    files = {os.path.basename(path) for path in inspect.candidates(".") if os.path.dirname(path) == "."}
    for name in sorted(os.listdir(".")):
        if name in files or (not name.startswith(".") and os.path.isdir(name) and _single(name)):
            yield Entry(name, named=False)


def _single(folder: str) -> bool:
    """Whether a folder is one adapter or model; one that cannot be read is, and will say why."""
    from loratools.errors import LoraError
    from loratools.ops import inspect

    try:
        return inspect.is_single(folder)
    except (LoraError, OSError):
        return True


def _look(
    ctx: click.Context, entries: Sequence[Entry], *, norms: bool, arch: str | None, quiet: bool
) -> list[Info]:
    """What each file is; one that cannot be read has its ``error``, and the others are looked at."""
    from loratools.ops import inspect
    from loratools.ops.results import Info

    found: list[Info] = []
    with output.progress("reading", quiet=quiet or len(entries) < 2) as progress:
        for number, entry in enumerate(entries):
            if progress is not None:
                progress(os.path.basename(entry.path), number, len(entries))
            try:
                found.append(inspect.info(entry.path, norms=norms, arch=arch))
            except Exception as error:
                if entry.named and failures.debugging(ctx):
                    raise
                size = inspect.size_of(entry.path)
                found.append(Info(path=entry.path, bytes=size, error=failures.message(error)))
    return found


def _write_json(infos: Sequence[Info], *, single: bool) -> None:
    from loratools.report import data

    each = [data.info_json(info) for info in infos]
    output.write_json(each[0] if single else each)


def _write_one(info: Info, *, modules: bool) -> None:
    if info.error:
        return
    from loratools.report.info_text import info_text

    output.write_report(lambda width, symbols: info_text(info, width=width, symbols=symbols, modules=modules))


def _write_several(
    infos: Sequence[Info], failed: Sequence[Info], paths: Sequence[str], *, modules: bool
) -> None:
    """A table, why files of a folder cannot be read, and every module where that was asked for."""
    if not infos:
        where = ", ".join(paths) if paths else f"the current folder ({os.getcwd()})"
        output.write_text(
            f"No adapters in {visible(where)}. Name a file or another folder: loratools info PATH"
        )
        return
    from loratools.report.table_text import table_text

    # What was named outright and failed is told on stderr.
    told = {info.path for info in failed}
    output.write_report(lambda width, symbols: table_text(infos, width=width, symbols=symbols, told=told))
    for info in infos if modules else ():
        if not info.error:
            _write_one(info, modules=True)
