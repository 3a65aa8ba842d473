"""What a Ray worker does: some tasks one after the other, as any other engine would do them."""

from __future__ import annotations

import copy
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from typing import Any, NamedTuple

from loratools import __version__
from loratools.errors import EngineError

_DEVICE = "cuda:0"  # Ray shows a worker the GPU that it was given, and no other


class Here(NamedTuple):
    """What a worker has to have like whoever sends it work.

    Attributes:
        loratools: Its version.
        torch: Its version, without what it was built for: the same everywhere, since others may round otherwise.
        folder: That relative names start from.
        processor: What torch's kernels take it for ("AVX2", "AVX512", …): others may round otherwise.
    """

    loratools: str
    torch: str
    folder: str
    processor: str = ""


class Common(NamedTuple):
    """What all batches of a plan share.

    Attributes:
        sender: What whoever sent it has.
        work: The plan's, pickled; and its ``bind`` where each task gets a GPU, else None.
    """

    sender: Here
    work: bytes


class Done(NamedTuple):
    """What a batch came to.

    Attributes:
        results: The number of each task that was done with its result.
        error: What the next one raised, or None.
        trace: Where it was raised, as text.
        host: Who did it.
    """

    results: list[tuple[int, Any]]
    error: Exception | None = None
    trace: str = ""
    host: str = ""


class RemoteTraceback(Exception):
    """Where an exception was raised in another process: the cause of its copy here."""

    def __init__(self, trace: str) -> None:
        super().__init__(f"\n{trace}")


def here() -> Here:
    """What this process has."""
    import torch

    processor: str = torch.backends.cpu.get_cpu_capability()
    return Here(__version__, metadata.version("torch").partition("+")[0], os.getcwd(), processor)


def common(work: Callable[[Any], Any], bind: Callable[[Any, str], Any] | None) -> Common:
    """What batches of a plan of this process share."""
    return Common(here(), pickle.dumps((work, bind)))


def run_batch(common: Common, tasks: bytes) -> Done:
    """The results of some tasks, as far as an exception lets them be done.

    What may fail to come back as it was (files are opened, and other versions may lack a class) is unpickled here.

    Args:
        common: What is done with each.
        tasks: A list of them with their numbers in the plan, pickled.
    """
    done = Done([], host=socket.gethostname())
    try:
        prepare(common.sender)
        work, bind = pickle.loads(common.work)
        for number, task in pickle.loads(tasks):
            done.results.append((number, work(task if bind is None else bind(task, _DEVICE))))
    except Exception as error:
        return done._replace(error=portable(error), trace=traceback.format_exc())
    return done


def prepare(sender: Here) -> None:
    """Make this process one whose results are those of the sender's own.

    Raises:
        EngineError: Other versions are installed, or it runs on another type of processor.
    """
    own = here()
    for name in ("loratools", "torch"):
        found, expected = getattr(own, name), getattr(sender, name)
        if found != expected:
            raise EngineError(
                f"the worker on {socket.gethostname()} has {name} {found}",
                expected=f"{name} {expected}, as whoever sends the work has it: results would differ otherwise",
                todo="Install the same versions on all nodes",
            )
    if own.processor != sender.processor:
        raise EngineError(
            f"the worker on {socket.gethostname()} has a processor of type {own.processor}",
            expected=f"{sender.processor}, as whoever sends the work has: results could differ in their last bits",
            todo="Use nodes of one type, or set ATEN_CPU_CAPABILITY to what all of them have (avx2) on each, before "
            "Ray is started, and for this command",
        )
    with suppress(OSError):  # a node need not have it where all names are absolute
        os.chdir(sender.folder)
    import torch

    torch.set_num_threads(1)


def portable(error: Exception) -> Exception:
    """The exception, or what it says where it cannot be pickled."""
    try:
        pickle.dumps(error)
        twin = copy.copy(error)  # made anew as unpickling would make it
    except Exception:
        twin = None
    return error if type(twin) is type(error) else EngineError(f"{type(error).__name__}: {error}")
