"""``loratools doctor``: whether an adapter would load and do what it should."""

from __future__ import annotations

import click

from loratools import runtimes
from loratools.cli import options, output

_EPILOG = """\b
Examples:
  loratools doctor peft_folder
  loratools doctor peft_folder --for vllm --max-rank 64
  loratools doctor peft_folder --base model_folder --json
  loratools doctor style.safetensors --for comfyui
"""
_NAMES = sorted(runtimes.runtimes())


@click.command("doctor", epilog=_EPILOG, short_help="Whether an adapter would work.")
@click.argument("path", metavar="ADAPTER", type=options.PATH)
@click.option(
    "--for",
    "runtime",
    type=click.Choice(_NAMES),
    help="The program that is to run it.",
)
@click.option(
    "--base",
    type=options.PATH,
    metavar="BASE",
    help="The base model: whether it has the adapter's modules, in their shapes.",
)
@click.option(
    "--max-rank",
    type=click.IntRange(min=1),
    metavar="N",
    help="With --for: the limit of the rank that the program was started with. Default: its usual one.",
)
@click.option("--no-values", is_flag=True, help="Read headers only: no search for NaN, zeros and overflows.")
@options.arch
@options.common
@click.pass_context
def command(
    ctx: click.Context,
    path: str,
    runtime: str | None,
    base: str | None,
    max_rank: int | None,
    no_values: bool,
    arch: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Whether an adapter would load and do what it should, and what to run if not.

    An error is what keeps it from loading, or makes it do something else than it was trained to; a warning what is
    likely a fault. With --for, all that the program refuses or passes over in silence is named, with the command that
    turns it into what the program holds.

    Exit status 1 if it would not work: there is an error, or the file cannot be read.
    """
    if max_rank is not None and runtime is None:
        raise click.UsageError("--max-rank is the limit of a program. Add --for.")
    from loratools.ops.doctor import doctor

    report = doctor(path, base=base, runtime=runtime, max_rank=max_rank, arch=arch, values=not no_values)
    if as_json:
        from loratools.report.doctor_data import doctor_json

        output.write_json(doctor_json(report))
    elif not quiet:
        from loratools.report.doctor_text import doctor_text

        output.write_report(lambda width, symbols: doctor_text(report, width=width, symbols=symbols))
    if not report.ok:
        ctx.exit(1)
