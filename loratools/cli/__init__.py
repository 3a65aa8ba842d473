"""The command line: one file per command, imported when it is called for.

A command's file defines ``command``; its row here is what ``loratools --help`` shows without importing it.
Only this package prints, shows progress and sets exit statuses.
"""

from __future__ import annotations

import gc

# A run makes many objects and few cycles, and ends: looking for cycles costs more than it frees, and most of all while
# everything is imported. It is set here since only the program itself imports this package.
gc.set_threshold(200_000, 20, 20)

try:
    import contextlib
    import os
    import sys
    import threading

    import click

    from loratools import __version__
    from loratools.cli import _interrupts, failures, output
    from loratools.cli._group import Commands
except KeyboardInterrupt:  # Ctrl-C before there is anything that could tell of it
    raise SystemExit(130) from None

COMMANDS = {
    "info": "What each file is: architecture, layout, ranks, norms, training.",
    "doctor": "Whether an adapter would load and do what it should, and what to run if not.",
    "convert": "Write an adapter in another layout, losslessly.",
    "merge": "Combine several adapters into one.",
    "resize": "Cut an adapter to lower ranks, as little as the rule allows.",
    "compare": "How adapters relate, and where they would interfere.",
    "pack": "A library of adapters of one base as one folder for batched serving.",
    "unpack": "Single adapters out of a pack, each in a folder of its name in OUT.",
    "bake": "Write a checkpoint with adapters in it.",
    "extract": "Make a LoRA from the difference of two checkpoints.",
    "verify": "Whether a checkpoint is BASE with adapters baked in, tensor by tensor.",
}

# Libraries that may have work of their own to do at exit.
_CLEAN_UP = ("torch", "numpy", "coverage")

_EPILOG = """\b
Examples:
  loratools info style.safetensors
  loratools convert style.safetensors -o style_diffusers.safetensors --to diffusers
  loratools merge style.safetensors character.safetensors -o both.safetensors
  loratools resize style.safetensors -o small.safetensors --energy 0.95
  loratools doctor peft_folder --for vllm
  loratools bake base.safetensors style.safetensors -o baked.safetensors
  loratools extract base.ckpt tuned.ckpt --rank 32
  loratools merge --help
"""


@click.group(
    "loratools",
    cls=Commands,
    commands_in="loratools.cli",
    summaries=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EPILOG,
)
@click.version_option(__version__, prog_name="loratools", message="%(prog)s %(version)s")
def cli() -> None:
    """Inspect, convert, merge, resize, compare, bake and extract LoRA adapters, whatever trainer wrote them.

    A PATH is a .safetensors, .ckpt, .pt, .pth, .bin or .npz file, a .gguf adapter, a folder that is an adapter (PEFT,
    MLX), or a model: sharded, or a diffusers folder. What a file is, is read from its content, never from its name.
    It may lie elsewhere: hf://ORG/REPO[@REVISION][/PATH], s3://BUCKET/KEY, and other URLs (see docs/storage.md).

    Exit status: 0 done; 1 refused or failed, and nothing was written; 2 wrong usage; 130 interrupted (143 by SIGTERM,
    129 by SIGHUP).
    """


def main() -> None:
    """The console entry point."""
    _open_streams()
    try:
        _interrupts.install()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError):  # a replaced stream may not be a text file
                # A name that the terminal's code page lacks must not end a report halfway.
                stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        sys.excepthook = failures.show_traceback
        cli(prog_name="loratools")
    except KeyboardInterrupt:
        raise SystemExit(_interrupts.status()) from None
    except SystemExit as ended:
        _interrupts.finish()
        _settle_streams()
        if isinstance(ended.code, int) and _nothing_left():
            # Taking every object apart before the process ends costs as much as half of `info --no-norms`.
            os._exit(ended.code)
        # At the end the interpreter looks for cycles twice, among all the objects that importing torch has made. None
        # of them has anything to give back but memory.
        gc.freeze()
        raise


def _open_streams() -> None:
    """Give a stream that the caller has closed a place, lest the next file that is opened take its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - stays open to the end


def _settle_streams() -> None:
    """Have all output out; what cannot be was told or cannot be told, and must not change the exit status."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            output.discard(stream)


def _nothing_left() -> bool:
    """Whether nothing has to be done at exit: no library that may clean up was loaded."""
    return threading.active_count() == 1 and sys.modules.keys().isdisjoint(_CLEAN_UP)
