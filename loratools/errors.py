"""Every exception that loratools raises on purpose, on one screen.

A message has four parts: where (file: key), what is wrong with the values, what was expected, what to do.
Each class has a built-in second base, so that a caller may catch either.

Messages repeat names from files that nobody vouches for: :func:`visible` is what keeps them from steering a terminal.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

_SHOWN = 5
_SPACES = frozenset(
    "\N{NO-BREAK SPACE}\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
)
_JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"


class LoraError(Exception):
    """The base of every error that loratools raises on purpose.

    Attributes:
        path: The file at fault, where there is one.
        keys: All offending tensor names or modules (the message shows the first five).
        candidates: What the caller may have meant.
        problem: What is wrong, without the file and the keys.
        expected: What was expected, or empty.
        todo: What to do, or empty.
    """

    def __init__(
        self,
        problem: str,
        *,
        path: str | os.PathLike[str] | None = None,
        keys: Iterable[str] = (),
        candidates: Iterable[str] = (),
        expected: str = "",
        todo: str = "",
    ) -> None:
        self.path = os.fspath(path) if path is not None else None
        self.keys = tuple(keys)
        self.candidates = tuple(candidates)
        self.problem = problem
        self.expected = expected
        self.todo = todo
        super().__init__(_message(self.path, problem, self.keys, self.candidates, expected, todo))

    def __str__(self) -> str:
        # KeyError would show its argument in quotes, OSError its errno.
        return str(self.args[0])


class MissingFileError(LoraError, FileNotFoundError):
    """A path that does not exist, or a folder that holds nothing to read."""


class MalformedFileError(LoraError, ValueError):
    """A file that is not what its content claims: truncated, overlapping offsets, not a known container."""


class ReadError(LoraError, OSError):
    """A file that cannot be read: no permission, a device's fault, closed already."""


class UnsafePickleError(LoraError, ValueError):
    """A pickle that would have to run code to be read. ``keys`` holds what it wanted to import."""


class NotAnAdapterError(LoraError, ValueError):
    """A readable file that is something else (checkpoint, textual inversion, …), or an adapter we cannot use."""


class IncompleteModuleError(LoraError, ValueError):
    """A module that lacks a factor: up without down, a magnitude without factors."""


class ShapeError(LoraError, ValueError):
    """Factors that do not fit each other, or two adapters that disagree on a weight's shape."""


class ConversionError(LoraError, ArithmeticError):
    """A conversion whose result would not do what its input does."""


class NonFiniteError(LoraError, ValueError):
    """NaN or Inf in a factor."""


class UnsupportedKindError(LoraError, NotImplementedError):
    """An adapter kind that an operation cannot handle; named, never skipped."""


class ArchitectureError(LoraError, ValueError):
    """Adapters of different architectures, or an architecture name nobody has described."""


class LayoutError(LoraError, ValueError):
    """What a layout cannot hold, or a layout that cannot be written."""


class NameResolutionError(LoraError, KeyError):
    """A key that resolves to no module, or to more than one."""


class OptionError(LoraError, ValueError):
    """Options that contradict each other or the inputs."""


class OutputExistsError(LoraError, FileExistsError):
    """The output is already there and overwriting was not asked for."""


class WriteError(LoraError, OSError):
    """The output could not be written; nothing was left behind."""


class EngineError(LoraError, RuntimeError):
    """Where work was sent, it cannot be done: a device or Ray is not there, or a worker is not as this machine is."""


def shown(names: Sequence[str], limit: int = _SHOWN) -> str:
    """The first names, and the count of the others."""
    head = ", ".join(names[:limit])
    return head if len(names) <= limit else f"{head} and {len(names) - limit} more"


def visible(text: object) -> str:
    r"""Text from a file, on one line and harmless to a terminal: what steers or hides is shown as an escape.

    Control characters, line breaks, overrides of the direction, lone surrogates (bytes of a file's name that are no
    text), and whatever else has no shape become ``\x1b``, ``\n``, ``\u202e``, ``\ud800``. Everything else stays, a
    backslash too, so that text which is made visible twice is the same.
    """
    found = str(text)
    if found.isprintable():
        return found
    return "".join(
        char if char.isprintable() or char in _SPACES or _joins(found, index) else repr(char)[1:-1]
        for index, char in enumerate(found)
    )


def _joins(text: str, index: int) -> bool:
    """Whether a joiner is where scripts and emoji have one: between two characters that are not ASCII."""
    around = text[max(0, index - 1) : index + 2 : 2]
    return text[index] in _JOINERS and len(around) == 2 and not any(map(str.isascii, around))


def _message(
    path: str | None,
    problem: str,
    keys: Sequence[str],
    candidates: Sequence[str],
    expected: str,
    todo: str,
) -> str:
    text = f"{path}: {problem}" if path else problem
    if keys:
        text += f" ({shown(keys)})"
    parts = [text.rstrip(".") + "."]
    if expected:
        parts.append(expected.rstrip(".") + ".")
    if candidates:
        parts.append(f"Did you mean: {shown(candidates)}?")
    if todo:
        parts.append(todo.rstrip(".") + ".")
    return visible(" ".join(parts))
