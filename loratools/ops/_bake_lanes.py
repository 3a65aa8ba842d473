"""The files of a bake, two of them written side by side, and brought to the disk behind the computation.

The system lets one thread at a time write to a file: tensors of two files in turn keep two threads busy. Files in which
nothing changes are copied meanwhile; the first begin before torch is imported.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from functools import partial
from types import TracebackType

from loratools.io.draft import Draft
from loratools.ops import _bake_run
from loratools.ops._bake_run import Meter, Options, Task, Writer
from loratools.ops._bake_shards import ShardPlan
from loratools.ops.checkpoint_results import BakedTensor

_OPEN = 2  # files that tensors are computed for at a time
_CLOSING = 2  # files that are complete, and waited for until they are on the disk
_TICK = 0.1  # seconds between two looks at the progress


class _Lane:
    """One file with tensors to compute."""

    def __init__(self, shard: ShardPlan, writer: Writer) -> None:
        self.shard = shard
        self.writer = writer
        self.tasks = deque(_bake_run.tasks(shard))
        self.left = len(self.tasks)
        self.found: list[BakedTensor] = []


class Lanes:
    """Writes files; a context, after which all of them are on the disk, or none is being written any more."""

    def __init__(
        self,
        shards: Sequence[ShardPlan],
        draft: Draft,
        options: Options,
        meter: Meter,
    ) -> None:
        """Nothing is written before the context is entered.

        Args:
            shards: What to write.
            draft: Has a place and a log for each file.
            options: How to compute.
            meter: Told how many bytes are done.
        """
        self._draft = draft
        self._options = options
        self._meter = meter
        self._copied = [shard for shard in shards if shard.mode == "copy"]
        self._waiting = deque(shard for shard in shards if shard.mode != "copy")
        self._lanes: list[_Lane] = []
        self._open: deque[_Lane] = deque()
        self._owners: deque[_Lane] = deque()
        self._writers: list[Writer] = []
        self._copies: list[Future[None]] = []
        self._closing: list[Future[None]] = []
        # A file that is only copied may take long: it must not hold up those that are complete.
        self._pools = ThreadPoolExecutor(1, "copied"), ThreadPoolExecutor(1, "complete")

    def __enter__(self) -> Lanes:
        """Begin to copy.

        Raises:
            LoraError: A file is another than when it was planned.
            OSError: A file cannot be written.
        """
        try:
            for shard in self._copied:
                writer = self._writer(shard)
                self._copies.append(self._pools[0].submit(self._copy, writer))
            self._fill()
        except BaseException:
            self._give_up()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait until all is on the disk, or after an error stop."""
        try:
            if error is None:
                self._settle(self._closing, 0)
                self._settle(self._copies, 0)
                self._show("")
        finally:
            self._give_up()

    @property
    def taken(self) -> tuple[int, int]:
        """How many tensors and ranges an interrupted run had written, and their size in bytes."""
        return sum(writer.taken for writer in self._writers), sum(
            writer.taken_bytes for writer in self._writers
        )

    def run(self) -> list[BakedTensor]:
        """Compute all tensors on this machine's threads, which put them into their files.

        Returns:
            What became of each tensor that adapters changed, file by file.
        """
        if not self._open:
            return []
        with closing(self._results()) as results:
            for result in results:
                lane = self._owners.popleft()
                if result is not None:
                    lane.found.append(result)
                lane.left -= 1
                if not lane.left:
                    self._complete(lane)
                self._show(result.key if result is not None else "")
        return [each for lane in self._lanes for each in lane.found]

    def _results(self) -> Generator[BakedTensor | None]:
        # Only now: while torch is imported, the copying goes on.
        from loratools.engine import local
        from loratools.io._load import Room

        options = _bake_run.usable(self._options)
        work = partial(_bake_run.work, options, Room())
        yield from local.run(work, self._tasks(), threads=options.threads)

    def _tasks(self) -> Iterator[tuple[Writer, Task]]:
        """Tasks of the open files in turn."""
        while self._open:
            lane = self._open.popleft()
            task = lane.tasks.popleft()
            self._owners.append(lane)
            if lane.tasks:
                self._open.append(lane)
            yield lane.writer, task
            self._fill()

    def _fill(self) -> None:
        """Open files, as many as may be."""
        while self._waiting and len(self._open) < _OPEN:
            self._settle(self._closing, _CLOSING)
            shard = self._waiting.popleft()
            writer = self._writer(shard)
            writer.start()
            lane = _Lane(shard, writer)
            self._lanes.append(lane)
            if lane.tasks:
                self._open.append(lane)
            else:  # a header that changes alone
                self._complete(lane)

    def _writer(self, shard: ShardPlan) -> Writer:
        writer = _bake_run.writer_for(shard, self._draft.place(shard.name), self._options.store)
        writer.journalled(self._draft.log(shard.name))
        self._writers.append(writer)
        return writer

    def _complete(self, lane: _Lane) -> None:
        self._closing.append(self._pools[1].submit(lane.writer.finish))

    def _copy(self, writer: Writer) -> None:
        writer.start()
        writer.finish()

    def _settle(self, files: list[Future[None]], most: int) -> None:
        """Wait until no more than so many files are being closed; what went wrong with one is raised."""
        while True:
            for each in [each for each in files if each.done()]:
                files.remove(each)
                each.result()
            if len(files) <= most:
                return
            wait(files, _TICK, FIRST_COMPLETED)
            self._show("")

    def _show(self, name: str) -> None:
        self._meter.show(name, sum(writer.progress for writer in self._writers))

    def _give_up(self) -> None:
        """Stop whatever is not done."""
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for writer in self._writers:
            writer.abort()
        for pool in self._pools:
            pool.shutdown()
