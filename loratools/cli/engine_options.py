"""Options of the commands whose work can be spread: over this machine's devices, or over the machines of a cluster."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import click

from loratools.cli import failures, options
from loratools.cli.options import Decorated, Decorator

if TYPE_CHECKING:
    from loratools.engine import Engine

_ADDRESS = r"auto|(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):\d{1,5}"
_DEVICES = r"all|cuda:\d+(,cuda:\d+)*"
_GPU = re.compile(r"cuda(:\d+)?")


class _Asked(NamedTuple):
    """What the options say.

    Attributes:
        kind: "local" or "ray"; None where it was not said.
        address: Of a Ray that runs; None for one of this command's own.
        workers: Tasks at a time, a count; None for as many as there are processors.
        devices: Names, or ("all",); empty where they were not given.
        device: --device; "auto" where it was not given, or the command has none.
        threads: Whether --threads was given.
    """

    kind: str | None
    address: str | None
    workers: int | None
    devices: tuple[str, ...]
    device: str
    threads: bool


def running(command: Decorated) -> Decorated:
    """--engine, --ray-address, --workers and --devices: the command gets them as ``engine``, None for the usual way.

    An engine with GPUs of its own leaves ``device`` at "auto".
    """
    return _engine_given(_with((_engine, _address, _workers, _devices), command))


def running_on_cpus(command: Decorated) -> Decorated:
    """As ``running``, without --devices: for a command that computes on CPUs alone."""
    return _engine_given(_with((_engine, _address, _workers), command))


def _with(given: tuple[Decorator[Any], ...], command: Decorated) -> Decorated:
    for option in reversed(given):
        command = option(command)
    return command


def _engine_given(command: Decorated) -> Decorated:
    """The command, called with one engine instead of the options that say which."""

    @functools.wraps(command)
    def called(
        *args: Any,
        engine: str | None,
        ray_address: str | None,
        workers: int | None,
        devices: tuple[str, ...] = (),
        **others: Any,
    ) -> Any:
        ctx = click.get_current_context()
        threads = ctx.get_parameter_source("threads") == click.core.ParameterSource.COMMANDLINE
        asked = _Asked(engine, ray_address, workers, devices, others.get("device", "auto"), threads)
        chosen = _chosen(ctx, asked)
        if chosen is not None and "device" in others and _GPU.fullmatch(asked.device):
            others["device"] = "auto"  # the engine's own to give
        return command(*args, engine=chosen, **others)

    return cast(Decorated, called)


def _chosen(ctx: click.Context, asked: _Asked) -> Engine | None:
    """The engine, which ends with the command.

    Raises:
        click.UsageError: The options contradict each other.
        LoraError: A device is not there, or Ray is not installed.
    """
    if asked.kind == "ray" or asked.address is not None:
        _check_ray(asked)
        from loratools.engine.ray import Ray

        gpus = _GPU.fullmatch(asked.device) is not None
        return ctx.with_resource(
            Ray(asked.address, workers=asked.workers, gpus=gpus, debug=failures.debugging(ctx))
        )
    _check_local(asked)
    if asked.workers is not None:
        options.limit_threads(asked.workers)
    if not asked.devices:
        return None
    from loratools.engine.local import Local, present

    return Local(devices=present(None if asked.devices == ("all",) else asked.devices))


def _check_ray(asked: _Asked) -> None:
    if asked.kind == "local":
        raise click.UsageError("--ray-address is for Ray, and --engine is local. Leave one of them away.")
    if asked.devices:
        raise click.UsageError("--devices are this machine's own. With Ray, give --device cuda for its GPUs.")
    if asked.device not in ("auto", "cpu", "cuda"):
        raise click.UsageError(
            f"--device {asked.device} is one of this machine. With Ray, give --device cuda, and each worker takes a "
            "GPU that is free."
        )


def _check_local(asked: _Asked) -> None:
    if asked.devices and asked.device != "auto":
        raise click.UsageError("--device and --devices both say where to compute. Leave one of them away.")
    if asked.workers is not None and asked.devices:
        raise click.UsageError("--devices has a worker for each of them. Leave --workers away.")
    if asked.workers is not None and asked.threads:
        raise click.UsageError("--workers and --threads both say how many run here. Leave one of them away.")


def _spelt(pattern: str, expected: str) -> Callable[[click.Context, click.Parameter, str | None], str | None]:
    """A callback that looks at the spelling alone."""

    def checked(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(pattern, value):
            raise click.BadParameter(f"{value!r} is none. {expected}", ctx, param)
        return value

    return checked


def _names(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Callback of --devices; whether they are there is found out later."""
    _spelt(_DEVICES, "Give names with commas between, cuda:0,cuda:1, or all.")(ctx, param, value)
    found = tuple(value.split(",")) if value else ()
    if len(set(found)) < len(found):
        raise click.BadParameter(f"{value!r} names a device twice. Name each once.", ctx, param)
    return found


_engine: Decorator[Any] = click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    help="What runs the work: this machine (local, the default), or a cluster (ray), whose nodes see the same files.",
)
_address: Decorator[Any] = click.option(
    "--ray-address",
    callback=_spelt(_ADDRESS, "Give auto, or HOST:PORT."),
    metavar="ADDRESS",
    help="The Ray to send work to: auto for one that runs on this machine, or HOST:PORT. Default: one is started "
    "here, and ended.",
)
_workers: Decorator[Any] = click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tasks that run at a time, at most. Default: one per core.",
)
_devices: Decorator[Any] = click.option(
    "--devices",
    callback=_names,
    metavar="NAMES",
    help="The GPUs that share the work, a worker each: cuda:0,cuda:1, or all.",
)
