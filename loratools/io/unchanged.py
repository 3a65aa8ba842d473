"""Files that are read stay as they are until the work is done: what is made of one that changes is made of two.

An operation watches what it reads. Every file is noted when it is opened, by its size, the time of its last change and
its number in the file system, and looked at again right before an output takes its name; where nothing is written,
right before the operation returns. A file that was written to, replaced under its name or removed meanwhile is refused.
Of a file at a URL the size and the store's hash or time are noted, and the store is asked again at the end.

What this cannot tell: a change that leaves size and time as they are (of some systems the time is 4 ms coarse), one
that a program made through a shared map and the system has not accounted for yet, and one in a store that tells neither
hash nor time.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import NamedTuple, ParamSpec, TypeVar

from loratools.errors import LoraError, ReadError

Given = ParamSpec("Given")
Found = TypeVar("Found")

_TODO = "Let no other program write to it until the work is done, and start again"


class State(NamedTuple):
    """What tells that a file is as it was.

    Attributes:
        size: In bytes.
        written: The time of its last change, in ns.
        place: Its device and its number there.
    """

    size: int
    written: int
    place: tuple[int, int]


class _Watch:
    """What one operation has read."""

    def __init__(self) -> None:
        self.seen: dict[str, State] = {}
        self.elsewhere: dict[str, str] = {}
        self.published = False


_watch: ContextVar[_Watch | None] = ContextVar("_watch", default=None)


def state_of(status: os.stat_result) -> State:
    """The state that the system tells."""
    return State(status.st_size, status.st_mtime_ns, (status.st_dev, status.st_ino))


def changed(path: str, how: str, more: int = 0) -> ReadError:
    """The error for a file that changed.

    Args:
        path: Which.
        how: In words.
        more: How many others did, a count.
    """
    also = f", and {more} more of the inputs changed" if more else ""
    return ReadError(
        f"the file has changed while it was read: {how}{also}",
        path=path,
        expected="Inputs that stay as they are until the work is done were expected; nothing was written",
        todo=_TODO,
    )


def difference(then: State, now: State) -> str:
    """In words; empty where there is none."""
    if now.place != then.place:
        return "another file has taken its place"
    if now.size != then.size:
        return f"it has {now.size:,} bytes, and had {then.size:,}"
    return "" if now == then else "it was written to"


def note(path: str | os.PathLike[str], status: os.stat_result | None = None) -> None:
    """Remember a local file that is opened now, if an operation watches what it reads; the first time counts.

    Args:
        path: Which. One that is not there is left to whoever opens it.
        status: Its status, where it is known.
    """
    watch = _watch.get()
    if watch is None:
        return
    with suppress(OSError, ValueError):
        watch.seen.setdefault(os.path.abspath(path), state_of(status or os.stat(path)))


def note_elsewhere(url: str, tag: str) -> None:
    """Remember a file at a URL that is opened now, as :func:`note` does.

    Args:
        url: Which.
        tag: What tells its content from another's, as :func:`loratools.io.storage.tag` has it.
    """
    watch = _watch.get()
    if watch is not None:
        watch.elsewhere.setdefault(url, tag)


def check() -> None:
    """Refuse what was noted and is not as it was.

    Raises:
        ReadError: A file changed, was replaced, or is gone.
    """
    watch = _watch.get()
    if watch is None:
        return
    found = [*_differences(watch.seen), *_differences_elsewhere(watch.elsewhere)]
    if found:
        raise changed(*found[0], more=len(found) - 1)


def rename(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Give a file or folder that was written its name, behind :func:`check`; it may replace one that was read.

    Raises:
        OSError: The system refuses.
    """
    replaced = {*_places(source), *_places(target)}
    os.replace(source, target)
    watch = _watch.get()
    if watch is None:
        return
    watch.published = True
    within = os.path.join(os.path.abspath(source), "")  # what was read back before it took its name
    for path, state in list(watch.seen.items()):
        if state.place in replaced or path.startswith(within):
            del watch.seen[path]


def watched(work: Callable[Given, Found]) -> Callable[Given, Found]:
    """Have an operation watch the files that it reads; one inside another is a part of it.

    Raises:
        ReadError: A file that was read changed, and nothing was written that would have been checked before.
    """

    @functools.wraps(work)
    def watching(*given: Given.args, **named: Given.kwargs) -> Found:
        if _watch.get() is not None:
            return work(*given, **named)
        watch = _Watch()
        with _set(watch):
            found = work(*given, **named)
            if not watch.published:
                check()
        return found

    return watching


@contextmanager
def apart() -> Iterator[None]:
    """For parts of an output, which are written under its names in a folder that has none yet: they are not checked."""
    with _set(None):
        yield


@contextmanager
def _set(watch: _Watch | None) -> Iterator[None]:
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


def _differences(seen: dict[str, State]) -> Iterator[tuple[str, str]]:
    for path, then in seen.items():
        try:
            how = difference(then, state_of(os.stat(path)))
        except OSError as error:
            how = f"it cannot be found any more ({error.strerror})"
        if how:
            yield path, how


def _differences_elsewhere(seen: dict[str, str]) -> Iterator[tuple[str, str]]:
    if not seen:
        return
    from loratools.io import storage

    for url, then in seen.items():
        try:
            now = storage.tag(url, afresh=True)
        except LoraError as error:
            yield url, f"it cannot be looked up any more ({error.problem})"
            continue
        if now != then:
            yield url, f"its size and state are {now!r}, and were {then!r}"


def _places(path: str | os.PathLike[str]) -> Iterator[tuple[int, int]]:
    with suppress(OSError):
        yield state_of(os.stat(path)).place
