"""Operations that write an output, made to write to URLs as well."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

from loratools.io import storage

Given = ParamSpec("Given")
Found = TypeVar("Found")

_goal: ContextVar[tuple[str, str] | None] = ContextVar("_goal", default=None)  # the path, and the URL


def uploads(work: Callable[Given, Found]) -> Callable[Given, Found]:
    """Have an operation's ``output`` (or ``path``) go to a URL where it is one; ``overwrite`` says if over another.

    The operation writes to a path on this machine; see :func:`loratools.io.staging.staged`. A report's ``output`` is
    the URL.
    """

    @functools.wraps(work)
    def writing(*given: Given.args, **named: Given.kwargs) -> Found:
        if not any(_is_url(value) for value in (*given, *named.values())):
            return work(*given, **named)
        import inspect

        bound = inspect.signature(work).bind(*given, **named)
        options: dict[str, Any] = bound.arguments
        name = "output" if "output" in inspect.signature(work).parameters else "path"
        if not _is_url(options[name]):
            return work(*given, **named)
        from loratools.io.staging import staged

        url = os.fspath(options[name])
        with staged(url, overwrite=bool(_option(options, "overwrite"))) as local:
            options[name] = local
            token = _goal.set((local, url))
            try:
                found = work(*bound.args, **bound.kwargs)
            finally:
                _goal.reset(token)
        return _told(found, local, url)

    return writing


def goal(path: str | os.PathLike[str]) -> str:
    """The URL that what is made at a path goes to; the path itself where it stays."""
    text, found = os.fspath(path), _goal.get()
    return found[1] if found is not None and found[0] == text else text


def _is_url(value: object) -> bool:
    return isinstance(value, str | os.PathLike) and storage.is_url(value)


def _option(options: dict[str, Any], name: str) -> object:
    """An option, be it the operation's own or one that it passes on."""
    others = next((value for value in options.values() if isinstance(value, dict) and name in value), {})
    return options.get(name, others.get(name))


def _told(found: Found, local: str, url: str) -> Found:
    """A report that names the URL."""
    value: Any = found
    return value._replace(output=url) if getattr(value, "output", None) == local else found
