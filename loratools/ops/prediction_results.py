"""What a dry run says of the time, the bytes and the memory that the work would take."""

from __future__ import annotations

from typing import NamedTuple


class Estimate(NamedTuple):
    """What a run would take, by rates that were measured in a few seconds.

    Attributes:
        seconds: From the start to the end, ``sequential`` included.
        workers: Tasks that run at a time, a count.
        sequential: Seconds of them in which one thing is done after the other, however many workers there are.
        read: Bytes that are read.
        written: Bytes that are written.
        memory: Bytes that a worker holds at most.
        peak: Bytes that all workers together hold at most.
        bound: Seconds that no order of the tasks can undercut, without ``sequential``.
        efficiency: ``bound`` by the seconds without ``sequential``, in (0, 1].
        tasks: How many tasks.
        read_rate: Bytes per second that one worker reads; None where nothing is read.
        write_rate: Bytes per second that reach the output's storage; None where nothing is written.
    """

    seconds: float
    workers: int
    sequential: float
    read: int
    written: int
    memory: int
    peak: int
    bound: float
    efficiency: float
    tasks: int
    read_rate: float | None = None
    write_rate: float | None = None
