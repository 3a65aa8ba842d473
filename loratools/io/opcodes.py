"""What a pickle would import, found by walking over its opcodes. Nothing is executed.

pickletools states how each opcode changes the stack; following it finds the two strings that STACK_GLOBAL
takes, wherever they come from (the memo included).
"""

from __future__ import annotations

import os
import pickletools
from collections.abc import Iterable
from io import BytesIO
from typing import IO, Any, NamedTuple, cast

from loratools.errors import MalformedFileError

UNKNOWN = "(a name computed while unpickling)"
"""Stands for an import whose name the opcodes do not spell out."""

# Values in tuples. What rebuilds a tensor takes some dozens; a list or dict of any size is no tuple.
_LIGHT, _MOST_VISITS = 100, 10_000_000
_MARK = object()
_GETS = frozenset({"GET", "BINGET", "LONG_BINGET"})
_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_TUPLES = frozenset({"EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"})
_EXTENSIONS = frozenset({"EXT1", "EXT2", "EXT4"})
_CONSTANTS = (
    *(pickletools.pyunicode, pickletools.pystring, pickletools.pybytes_or_str),
    *(pickletools.pyint, pickletools.pylong, pickletools.pyinteger_or_bool),
)


class Global(NamedTuple):
    """An import on the stack, as ``module.name``."""

    name: str


class Scan(NamedTuple):
    """What one pickle asks for.

    Attributes:
        imports: Every global that it names, as ``module.name``, in order, each once.
        references: What it refers to outside itself (torch: storages), as far as the opcodes spell it out.
    """

    imports: tuple[str, ...]
    references: tuple[Any, ...]


def scan(pickle: bytes | IO[bytes], path: str) -> Scan:
    """Walk over one pickle.

    Args:
        pickle: The pickle's bytes, or a file at its beginning; the file is left behind its end.
        path: The file's name, for messages.

    Raises:
        MalformedFileError: It is not a complete pickle.
    """
    walk = _Walk()
    try:
        stream = _Bounded(BytesIO(pickle) if isinstance(pickle, bytes) else pickle)
        for opcode, argument, _ in pickletools.genops(cast("IO[bytes]", stream)):
            walk.step(opcode, argument)
    except (ValueError, IndexError, OverflowError, EOFError) as error:
        raise MalformedFileError(
            f"the pickle is damaged: {error}",
            path=path,
            expected="The file is truncated, or not what torch.save writes",
            todo="Download the file again",
        ) from error
    return Scan(tuple(walk.names), tuple(walk.references))


class _Bounded:
    """A file of which no more is asked for than it has: Python would first make room for as much as was asked for."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        here = file.tell()
        self._size = file.seek(0, os.SEEK_END)
        file.seek(here)
        self.readline = file.readline
        self.tell = file.tell

    def read(self, count: int) -> bytes:
        """As many bytes, or all that are left."""
        return self._file.read(min(count, self._size))


class _Tuple(tuple[Any, ...]):
    """A tuple that knows how many values whoever hashes or prints it has to visit.

    Attributes:
        weight: That count; tuples of the same tuple twice, and so on, double it each time.
    """

    weight: int

    def __init__(self, _: Iterable[Any]) -> None:
        self.weight = 1 + sum(item.weight if isinstance(item, _Tuple) else 1 for item in self)


class _Walk:
    """The unpickler's stack and memo, of which strings, numbers, imports and tuples of them are known."""

    def __init__(self) -> None:
        self.names: dict[str, None] = {}
        self.references: list[Any] = []
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.visits = 0

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """Follow one opcode."""
        name = opcode.name
        if name in _GETS:
            self.stack.append(self.memo.get(int(argument)))
        elif name in _PUTS or name == "MEMOIZE":
            self.memo[len(self.memo) if name == "MEMOIZE" else int(argument)] = self._top()
        elif name == "DUP":
            self.stack.append(self._top())
        else:
            taken = self._take(opcode)
            self.stack.extend(self._made(opcode, argument, taken))

    def _top(self) -> Any:
        return self.stack[-1] if self.stack else None

    def _take(self, opcode: pickletools.OpcodeInfo) -> list[Any]:
        """Take off the stack what the opcode consumes; a mark itself is left out."""
        before = opcode.stack_before
        taken = []
        rest = len(before)
        if pickletools.markobject in before:
            while self.stack and (item := self.stack.pop()) is not _MARK:
                taken.append(item)
            rest = before.index(pickletools.markobject)
        for _ in range(min(rest, len(self.stack))):
            taken.append(self.stack.pop())
        self._visit(taken)
        return taken[::-1]

    def _visit(self, taken: list[Any]) -> None:
        """Count what whoever hashes or prints these has to visit."""
        for item in taken:
            if isinstance(item, _Tuple) and item.weight > _LIGHT:
                self.visits += item.weight
        if self.visits > _MOST_VISITS:
            raise ValueError(f"tuples of the same tuples hold more than {_MOST_VISITS:,} values")

    def _made(self, opcode: pickletools.OpcodeInfo, argument: Any, taken: list[Any]) -> list[Any]:
        """What the opcode leaves on the stack; None stands for anything unknown."""
        name = opcode.name
        if name in ("GLOBAL", "INST"):  # pickletools joins the module and the name with a space
            return [self._import(argument.replace(" ", ".", 1))]
        if name == "STACK_GLOBAL":
            known = len(taken) == 2 and all(isinstance(part, str) for part in taken)
            return [self._import(".".join(taken) if known else UNKNOWN)]
        if name in _EXTENSIONS:
            return [self._import(f"copyreg extension {argument}")]
        if name in _TUPLES:
            return [_Tuple(taken)]
        if name == "BINPERSID":
            self.references += taken
        return [_pushed(kind, argument) for kind in opcode.stack_after]

    def _import(self, name: str) -> Global:
        self.names[name] = None
        return Global(name)


def _pushed(kind: pickletools.StackObject, argument: Any) -> Any:
    if kind is pickletools.markobject:
        return _MARK
    return argument if kind in _CONSTANTS else None
