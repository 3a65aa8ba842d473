"""Independent tasks on the nodes of a Ray cluster, or on a Ray of this process's own.

Ray (https://docs.ray.io) schedules, keeps within each node's memory, and runs again what was lost with a worker or a
node; here tasks are put into batches, and their results taken as they come. Nodes have to see the same files under the
same names, and to have the same versions installed: neither data nor code is sent.
"""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from loratools.engine import Item, Plan, Result, Task, _ray_worker
from loratools.engine._cut import cut
from loratools.engine._ray_session import cluster_memory, count_of, joined, left, places
from loratools.engine._ray_worker import Done, RemoteTraceback, run_batch
from loratools.errors import EngineError, LoraError
from loratools.io import storage

if TYPE_CHECKING:
    from ray import ObjectRef

_RETRIES = 3  # times that a batch is run again after its worker or node was lost
_LEAVE = 10.0  # seconds in which workers stop what is no longer wanted
_STEPS = 4  # memory is asked for in so many steps between a power of two and the next


class Ray:
    """The engine of a Ray cluster; a context.

    Ray is started or joined when the first plan is run, and one that was started here is ended with the context. Where
    the process is connected to a Ray already, that is used and left as it is. Ray keeps its own logs in its folder for
    temporary files.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        workers: int | None = None,
        gpus: bool = False,
        debug: bool = False,
    ) -> None:
        """Nothing is started yet.

        Args:
            address: "auto" for a Ray that runs on this machine, "HOST:PORT" for that of a cluster's head; None to start
                one here that nobody else can reach.
            workers: Tasks that run at a time, a count; None for as many as the cluster has processors.
            gpus: Give each task a GPU of its own, where its plan can be computed on one.
            debug: Show on stderr what Ray says.
        """
        self._address = address
        self._workers = workers
        self._gpus = gpus
        self._debug = debug
        self._joined = self._here = False
        self._ray: Any = None

    @property
    def remote(self) -> bool:
        """Tasks run in other processes."""
        return True

    @property
    def devices(self) -> tuple[str, ...]:
        """None of this machine."""
        return ()

    @property
    def device_kind(self) -> str:
        """What tasks are computed on, wherever they are sent."""
        return "cuda" if self._gpus else "cpu"

    @property
    def workers(self) -> int | None:
        """Tasks that run at a time, a count; None for as many as the cluster has processors."""
        return self._workers

    def __enter__(self) -> Ray:
        """See that Ray is installed.

        Raises:
            EngineError: It is not.
        """
        if importlib.util.find_spec("ray") is None:
            raise EngineError(
                "the package ray is not installed",
                expected="It sends work to other processes and machines",
                todo="Install it: pip install 'loratools[ray]'",
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the Ray that was started, or leave the one that was joined."""
        ray, self._ray = self._ray, None
        if ray is not None and self._joined:
            left(ray)

    def run(self, plan: Plan[Task, Result]) -> Iterator[tuple[int, Result]]:
        """The number of each task with its result, in any order; see ``Engine``.

        Raises:
            EngineError: Ray cannot be started or reached, or has no GPU where one was asked for; or a worker was lost
                again and again, has other versions, or does not see a file.
        """
        ray = self._started()
        gpu = self._gpus and plan.bind is not None
        if gpu and not ray.cluster_resources().get("GPU"):
            raise EngineError(
                "no node of the Ray cluster has a GPU",
                expected="A task on a GPU takes one of a node's",
                todo="Give --device cpu, or a cluster with GPUs",
            )
        largest = cluster_memory(ray)
        batch = ray.remote(run_batch)
        common = ray.put(_ray_worker.common(plan.work, plan.bind if gpu else None))
        limit = self._workers or count_of(ray)
        # A Ray that was started here has this process's environment.
        told = {} if self._here or not places() else {"runtime_env": {"env_vars": places()}}

        def send(numbers: Sequence[int]) -> ObjectRef[Done]:
            need = min(rounded(max(plan.items[number].memory for number in numbers)), largest)
            tasks = [(number, plan.tasks[number]) for number in numbers]
            wanted = batch.options(num_cpus=1, num_gpus=int(gpu), memory=need, max_retries=_RETRIES, **told)
            return wanted.remote(common, pickle.dumps(tasks))

        # A few more than can run wait for a node, but where nothing else keeps to the count, no more are sent.
        ahead = limit if self._workers and not self._here else limit + max(2, limit // 4)
        yield from _taken(ray, send, cut(plan.items, limit), ahead, plan.items)

    def _started(self) -> Any:
        """The module ``ray``, connected."""
        if self._ray is None:
            self.__enter__()
            import ray

            if not ray.is_initialized():
                joined(self._address, self._workers, debug=self._debug)
                self._joined, self._here = True, self._address is None
            self._ray = ray
        return self._ray


def rounded(memory: int) -> int:
    """Bytes, rounded up to one of few sizes: Ray keeps a worker for the next task that asks for the same."""
    step = max(1, 1 << max(0, memory.bit_length() - _STEPS.bit_length()))
    return -(-memory // step) * step


def _taken(
    ray: Any,
    send: Callable[[Sequence[int]], ObjectRef[Done]],
    batches: Sequence[tuple[int, ...]],
    ahead: int,
    items: Sequence[Item],
) -> Iterator[tuple[int, Any]]:
    """Results as they come; what is no longer wanted is cancelled."""
    upcoming = iter(batches)
    waiting: dict[ObjectRef[Done], tuple[int, ...]] = {}

    def fill() -> None:
        while len(waiting) < ahead and (numbers := next(upcoming, None)) is not None:
            waiting[send(numbers)] = numbers

    try:
        fill()
        while waiting:
            (ref, *_), _ = ray.wait(list(waiting), num_returns=1)
            done = _got(ray, ref, [items[number].name for number in waiting[ref]])
            del waiting[ref]
            fill()
            yield from done.results
            if done.error is not None:
                raise _seen_from_here(done) from RemoteTraceback(done.trace)
    finally:
        for ref in waiting:
            ray.cancel(ref, force=True)
        if waiting:
            ray.wait(list(waiting), num_returns=len(waiting), timeout=_LEAVE)


def _got(ray: Any, ref: ObjectRef[Done], names: Sequence[str]) -> Done:
    """What a batch came to.

    Raises:
        EngineError: Ray has given it up.
    """
    try:
        found: Done = ray.get(ref)
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # Of what was raised outside of a task, such as a missing package, Ray has the traceback.
        reason = lines[-1 if isinstance(error, ray.exceptions.RayTaskError) else 0]
        raise EngineError(
            f"Ray gave up work: {type(error).__name__}: {reason.rstrip('.')}",
            keys=names,
            expected=f"It is done again {_RETRIES} times where a worker or a node is lost",
            todo="Check that loratools is installed on all nodes and that they have memory enough; --debug shows more",
        ) from error
    return found


def _seen_from_here(done: Done) -> Exception:
    """What a task raised; an error of its own where its node lacks a file that is here."""
    error = done.error
    path = getattr(error, "path", None) or getattr(error, "filename", None)
    if isinstance(error, FileNotFoundError) and isinstance(path, str) and _is_here(path):
        return EngineError(
            f"the worker on {done.host} does not see it",
            path=path,
            expected="All nodes have to see the same files under the same names",
            todo="Put it on storage that they share, and give all nodes the settings by which they reach it",
        )
    assert error is not None
    return error


def _is_here(path: str) -> bool:
    try:
        return storage.is_file(path) or storage.is_dir(path)
    except LoraError:  # a URL that cannot be asked here either
        return False
