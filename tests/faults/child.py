"""One run of the program in a process of its own, with the faults that it is to meet.

Processes are forked from one that has imported torch and loratools (multiprocessing's fork server), so that a run does
not begin with 1.5 s of imports; what a run does behind them is what the program does.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch

import loratools.cli
import loratools.ops.bake
import loratools.ops.extract
import loratools.ops.merge
import loratools.ops.resize
from tests.faults import hooks

NOBODY = 65534


class Job(NamedTuple):
    """What a process does.

    Attributes:
        arguments: Of the program.
        folder: Where it is run.
        log: The file that it prints to.
        trigger: Something that happens at one of its calls of the system.
        counted: Where to write how many such calls there were; empty for nowhere.
        reads: What becomes of its reads.
        file_size: The largest file that it may write, in bytes; None for any.
        unprivileged: Whether it runs as nobody, whom modes of folders hold off.
        every: How often the journal is brought to the disk, in s, from the first task on; None for its usual times.
    """

    arguments: tuple[str, ...]
    folder: str
    log: str
    trigger: hooks.Trigger | None = None
    counted: str = ""
    reads: hooks.Reads | None = None
    file_size: int | None = None
    unprivileged: bool = False
    every: float | None = None


def run(job: Job) -> None:
    """Do it, and exit with the program's status."""
    os.chdir(job.folder)
    log = os.open(job.log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o666)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)  # pools of threads do not survive a fork
    _limit(job)
    calls = hooks.on_calls(job.trigger)
    if job.reads is not None:
        hooks.on_reads(job.reads)
    sys.argv = ["loratools", *job.arguments]
    try:
        loratools.cli.main()
    finally:
        if job.counted:
            Path(job.counted).write_text(str(calls()))


def _limit(job: Job) -> None:
    if job.every is not None:
        from loratools.io import work_folder

        work_folder._EVERY = job.every
        work_folder._FIRST = 0.0
    if job.file_size is not None:
        import resource

        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (job.file_size, hard))
    if job.unprivileged and os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
