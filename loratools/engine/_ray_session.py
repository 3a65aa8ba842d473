"""Joining a Ray that runs, or starting one: quietly, and for this user alone."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

from loratools.errors import EngineError

_STORE = 128 << 20  # bytes of Ray's object store: tensors do not pass through it
_REACHED = 10.0  # seconds until a cluster's head has to answer
# Where files at URLs are found. What opens them is not among these: Ray would show it to whoever asks.
_PLACES = ("HF_ENDPOINT", "HF_HUB_OFFLINE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
# Ray reports nothing to anybody, and does not warn of what later versions do with GPUs that nobody asked for.
_SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


def joined(address: str | None, workers: int | None, *, debug: bool) -> None:
    """Connect this process to a Ray.

    Args:
        address: "auto" or "HOST:PORT"; None to start one on this machine.
        workers: Processors of one that is started, a count; None for those that the process may use.
        debug: Whether Ray may say on stderr what it does.

    Raises:
        EngineError: It cannot be reached, or does not start.
    """
    import ray

    settings: dict[str, Any] = {"address": address}
    if address is None:
        from loratools.engine.local import default_threads

        settings = {
            "address": "local",
            "num_cpus": workers or default_threads(),
            "include_dashboard": False,
            "object_store_memory": _STORE,
        }
    elif address != "auto":
        _reach(address)
    level = logging.INFO if debug else logging.ERROR
    _say_nothing(ray, True)
    try:
        with quiet(), _handlers_kept(ray), _apart(ray), _environment():
            ray.init(logging_level=level, log_to_driver=False, **settings)
    except BaseException as error:
        left(ray)  # whatever of it has started
        if not isinstance(error, Exception):
            raise
        # RuntimeError, ConnectionError, ValueError, OSError, or Ray's own
        raise _failed(address, (str(error).strip() or type(error).__name__).splitlines()[0]) from error


def left(ray: Any) -> None:
    """End what ``joined`` has begun."""
    with quiet():
        ray.shutdown()
    _say_nothing(ray, False)


def _say_nothing(ray: Any, wanted: bool) -> None:
    """Whether Ray keeps to itself that a worker was lost: it would print that to stdout, and has no option for it."""
    worker = ray._private.worker
    if hasattr(worker, "_worker_logs_enabled"):
        worker._worker_logs_enabled = not wanted


def places() -> dict[str, str]:
    """Settings of this process that workers of another machine's Ray need to find the same files at URLs."""
    return {name: os.environ[name] for name in _PLACES if name in os.environ}


def count_of(ray: Any) -> int:
    """Processors of a cluster, a count of one at least."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def cluster_memory(ray: Any) -> int:
    """Bytes that the node with most memory gives to tasks: what needs more has that node for itself."""
    nodes = (node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"])
    return int(max(nodes, default=0))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep stdout for the report: what is printed meanwhile goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _reach(address: str) -> None:
    """Find out soon whether anybody listens: Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACHED).close()
    except (OSError, OverflowError) as error:
        raise _failed(address, getattr(error, "strerror", "") or str(error)) from error


def _failed(address: str | None, reason: str) -> EngineError:
    if address is None:
        return EngineError(
            f"Ray does not start: {reason}",
            expected="Without an address, it is started on this machine",
            todo="See what it says with --debug, or compute with --engine local",
        )
    return EngineError(
        f"no Ray can be reached at {address}: {reason}",
        expected="The address that 'ray start --head' shows, of the Ray version that is installed here",
        todo="Check that it runs ('ray status'), or leave the address away to start one here",
    )


@contextlib.contextmanager
def _handlers_kept(ray: Any) -> Iterator[None]:
    """Leave signals to whoever handles them: Ray's handler ends the process with the signal's number as status."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        with _instead(ray._private.utils, "set_sigterm_handler", lambda _handler: None):
            yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _apart(ray: Any) -> Iterator[None]:
    """Keep from what is started the signals to this process's group, which is left to end it in order.

    Only where Ray has the system end it with this process in any case.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    services = ray._private.services
    own = functools.partial(
        getattr(services, "ConsolePopen", None) or subprocess.Popen, start_new_session=True
    )
    with _instead(services, "ConsolePopen", own):
        yield


@contextlib.contextmanager
def _instead(place: Any, name: str, own: Any) -> Iterator[None]:
    """Replace something of Ray's for which it has no option; what another version does not have is left alone."""
    before = getattr(place, name, None)
    if before is not None:
        setattr(place, name, own)
    try:
        yield
    finally:
        if before is not None:
            setattr(place, name, before)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Settings that Ray and what it starts read; what the user has set stays."""
    added = {name: value for name, value in _SETTINGS.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
