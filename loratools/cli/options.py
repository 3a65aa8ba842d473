"""Options that several commands share, and callbacks that check values."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from loratools.cli import failures

Decorated = TypeVar("Decorated", bound=Callable[..., Any])
Decorator = Callable[[Decorated], Decorated]
Callback = Callable[[click.Context, click.Parameter, Any], Any]

PATH = click.Path(readable=False)
"""An input. Whether it is there and can be read, the reader says, as it does of all else that is wrong with it."""

# Every library that may hold a thread pool reads one of these when it is imported.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
_DTYPES = ("float32", "float16", "bfloat16", "keep")
# What other programs and headers call them.
_OTHER_DTYPES = {
    "fp32": "float32", "f32": "float32", "float": "float32",
    "fp16": "float16", "f16": "float16", "half": "float16",
    "bf16": "bfloat16",
}  # fmt: skip
_DEVICE = r"auto|cpu|mps|cuda(:\d+)?"


def _other_layouts() -> Mapping[str, str]:
    """What people call layouts after the programs that read them."""
    from loratools.formats import CALLED

    return {word: names[0] for word, names in CALLED.items()}


def _programs() -> list[str]:
    """The programs that have a normal form to convert to."""
    from loratools.runtimes import runtimes

    return [name for name, found in runtimes().items() if found.normal]


def _layouts_and_programs() -> Mapping[str, str]:
    """What people call layouts, and the programs that --to takes beside them."""
    return {**_other_layouts(), **{name: name for name in _programs()}}


def layout_or_program(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Callback of --to where a program's name may stand for the form that it holds."""
    if value is not None and value in _programs():
        return value
    checked = registered("loratools.formats", "FORMAT", "layout", _layouts_and_programs)
    found: str | None = checked(ctx, param, value)
    return found


def registered(
    package: str, constant: str, word: str, aliases: Callable[[], Mapping[str, str]] = dict
) -> Callback:
    """A callback for the name of something that one file of a package defines: a layout, a method.

    The package is imported when a name is given, never for --help. ``aliases`` gives other words that people use,
    which are not taken but answered.
    """

    def checked(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
        # The default is known to be good, and looking it up may mean importing torch.
        if value is None or value == param.default:
            return value
        from loratools.registry import scan

        known = scan(package, constant)
        if value not in known:
            names = {**{name: name for name in known}, **aliases()}
            raise click.BadParameter(_unknown(word, value, names), ctx, param)
        return value

    return checked


def dtype(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Callback of --dtype."""
    if value not in _DTYPES:
        names = {name: name for name in _DTYPES} | _OTHER_DTYPES
        raise click.BadParameter(_unknown("store dtype", value, names), ctx, param)
    return value


def _unknown(word: str, value: str, names: Mapping[str, str]) -> str:
    """What is said of a name that nothing has, with what may have been meant.

    Args:
        word: What it should have been the name of.
        value: The name.
        names: What each known name, and each other name for it, is called here.
    """
    import difflib

    plain = {_plain(name): found for name, found in names.items()}
    near = difflib.get_close_matches(_plain(value), plain, n=1)
    hint = f"Did you mean {plain[near[0]]}? " if near else ""
    return f"there is no {word} {value!r}. {hint}Known: {', '.join(dict.fromkeys(names.values()))}."


def _plain(name: str) -> str:
    """A name as it compares with others: SD1.5 with sd15."""
    return "".join(char for char in name.lower() if char.isalnum())


def device(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Callback of --device: the spelling is checked here; whether it is there, the operation finds out."""
    if not re.fullmatch(_DEVICE, value):
        text = f"{value!r} is no device. Choose auto, cpu, cuda, cuda:N or mps."
        raise click.BadParameter(text, ctx, param)
    return value


def numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    """Callback for finite numbers with commas between them: ``0.8,-0.5``."""
    if value is None:
        return None
    found: list[float] = []
    for part in value.split(","):
        try:
            number = float(part)
        except ValueError:
            text = f"{part.strip()!r} is not a number. Write numbers with commas between: 0.8,0.5."
            raise click.BadParameter(text, ctx, param) from None
        if not math.isfinite(number):
            raise click.BadParameter(f"{part.strip()} is not a finite number.", ctx, param)
        found.append(number)
    return tuple(found)


def multipliers(
    ctx: click.Context, param: click.Parameter, value: tuple[str, ...]
) -> list[dict[str, float] | tuple[float, ...]]:
    """Callback for sets of multipliers: ``IN04=0.5,MID=0``, or a vector of numbers."""
    found: list[dict[str, float] | tuple[float, ...]] = []
    for text in value:
        if not text.strip():
            found.append({})
            continue
        if "=" not in text:
            found.append(numbers(ctx, param, text) or ())
            continue
        named: dict[str, float] = {}
        for part in text.split(","):
            name, equals, number = part.partition("=")
            if not equals or not name.strip():
                raise click.BadParameter(f"{part!r} is no NAME=WEIGHT, such as IN04=0.5.", ctx, param)
            named[name.strip()] = (numbers(ctx, param, number) or (1.0,))[0]
        found.append(named)
    return found


def common(command: Decorated) -> Decorated:
    """--json, --threads, --quiet and --debug, which every command has."""
    for option in reversed((_json, _threads, _quiet, _debug)):
        command = option(command)
    return command


def writing(command: Decorated) -> Decorated:
    """--output, --to, --dtype, --device, --overwrite and --dry-run: for a command that writes an adapter."""
    for option in reversed((_output, _to, _dtype, _device, _overwrite, _dry_run)):
        command = option(command)
    return command


def converting(command: Decorated) -> Decorated:
    """As ``writing``, for a command whose --to takes programs, too."""
    for option in reversed((_output, _to_program, _dtype, _device, _overwrite, _dry_run)):
        command = option(command)
    return command


def baking(command: Decorated) -> Decorated:
    """--output, --dtype, --device, --overwrite and --dry-run: for a command that writes a checkpoint."""
    output = _named_output("A file where BASE is one (.safetensors, or a pickle where it is), else a folder.")
    for option in reversed((output, _dtype, _device, _overwrite, _dry_run)):
        command = option(command)
    return command


def extracting(command: Decorated) -> Decorated:
    """As ``writing``, for a command that makes an adapter of its own and finds a name for it."""
    output = _named_output(
        "Where to write. Default: TUNED's name and the rank, in the current folder.", required=False
    )
    layout = _layout("kohya where the architecture has names of its own, else peft")
    for option in reversed((output, layout, _dtype, _device, _overwrite, _dry_run)):
        command = option(command)
    return command


def packing(command: Decorated) -> Decorated:
    """--output, --to, --dtype, --overwrite and --dry-run: for a command that writes a folder of adapters."""
    folder = _named_output("The pack, a folder.")
    layout = _layout("what the program reads, else peft")
    for option in reversed((folder, layout, _dtype, _replace_pack, _dry_run)):
        command = option(command)
    return command


def unpacking(command: Decorated) -> Decorated:
    """--output, --overwrite and --dry-run: for a command that writes into a folder."""
    folder = click.option(
        "output_path",
        "--output",
        "-o",
        required=True,
        callback=_a_name,
        metavar="OUT",
        help="A folder, in which each adapter gets one of its name.",
    )
    for option in reversed((folder, _overwrite, _dry_run)):
        command = option(command)
    return command


def arch(command: Decorated) -> Decorated:
    """--arch."""
    return click.option(
        "--arch",
        callback=registered("loratools.archs", "ARCH", "architecture"),
        metavar="NAME",
        help="The architecture (sd15, sdxl, flux, llm, …), where detection is wrong.",
    )(command)


def limit_threads(count: int) -> None:
    """Compute with so many threads, in libraries that are imported later, too."""
    for variable in _THREAD_VARIABLES:
        os.environ[variable] = str(count)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)


def _limit_threads(_ctx: click.Context, _param: click.Parameter, value: int | None) -> int | None:
    if value is not None:
        limit_threads(value)
    return value


_json: Decorator[Any] = click.option(
    "as_json", "--json", is_flag=True, help="One JSON document on stdout, nothing else there."
)
_threads: Decorator[Any] = click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    expose_value=False,
    # Before any other value is converted, since that may import what reads the variables.
    is_eager=True,
    callback=_limit_threads,
    help="Threads to compute with. Default: one per core.",
)
_quiet: Decorator[Any] = click.option("--quiet", "-q", is_flag=True, help="No progress bar, and no report.")
_debug: Decorator[Any] = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=failures.remember_debug,
    help="Show the traceback of an error.",
)


def _a_name(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Callback of --output: a script's variable that is empty must not stand for the default."""
    if value == "":
        raise click.BadParameter("the name is empty. Give a file's or a folder's name.", ctx, param)
    return value


def _named_output(text: str, *, required: bool = True) -> Decorator[Any]:
    return click.option("--output", "-o", required=required, callback=_a_name, metavar="OUT", help=text)


_output = _named_output("Where to write: a .safetensors file, or a folder where the layout wants one (peft).")


def _layout(default: str) -> Decorator[Any]:
    return click.option(
        "--to",
        "layout",
        callback=registered("loratools.formats", "FORMAT", "layout", _other_layouts),
        metavar="LAYOUT",
        help=f"The layout to write (kohya, diffusers, peft, …). Default: {default}.",
    )


_to = _layout("that of the first input")
_to_program: Decorator[Any] = click.option(
    "--to",
    "layout",
    callback=layout_or_program,
    metavar="LAYOUT",
    help="The layout to write (kohya, diffusers, peft, mlx, …), or the program that it is for (vllm, sglang, lorax, "
    "llama.cpp): one rank and one scale where it wants them, and nothing that it does not apply. Default: the input's "
    "layout.",
)
_dtype: Decorator[Any] = click.option(
    "--dtype",
    callback=dtype,
    default="keep",
    metavar="DTYPE",
    help="Store dtype: float32, float16, bfloat16, or keep (default).",
)
_device: Decorator[Any] = click.option(
    "--device",
    callback=device,
    default="auto",
    metavar="DEVICE",
    help="Where to compute: auto (default), cpu, cuda, cuda:N or mps.",
)
_overwrite: Decorator[Any] = click.option("--overwrite", is_flag=True, help="Replace an existing output.")
_replace_pack: Decorator[Any] = click.option(
    "--overwrite", is_flag=True, help="Replace an existing pack, as a whole."
)
_dry_run: Decorator[Any] = click.option(
    "--dry-run", is_flag=True, help="Do everything but write, and say what would be written."
)
