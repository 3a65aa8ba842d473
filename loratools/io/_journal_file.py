"""The journal of a run: a line of JSON for each task that is done, appended and on the disk."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

_VERSION = 2


class Identity(NamedTuple):
    """What decides what a run writes: a journal of another one is refused.

    Attributes:
        operation: "bake", "extract", …
        inputs: A digest of each input, by its name.
        options: All others by name: JSON values.
    """

    operation: str
    inputs: Mapping[str, str]
    options: Mapping[str, Any]

    def differences(self, other: Identity) -> list[str]:
        """What is not the same in the other, in words."""
        if self.operation != other.operation:
            return [f"{other.operation} instead of {self.operation}"]
        found = [f"input {name}" for name in _differing(self.inputs, other.inputs)]
        return found + [f"option {name}" for name in _differing(self.options, other.options)]


class Found(NamedTuple):
    """A journal that was read.

    Attributes:
        identity: Of its run; None where there is none that can be read.
        records: What was said of each task that is done, by its name.
        reason: Why there is no identity.
    """

    identity: Identity | None
    records: dict[str, Any]
    reason: str = ""


def read(path: Path) -> Found:
    """Read a journal as far as it is whole: what a crash tore off at its end was not done.

    Raises:
        OSError: It is there, and cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return Found(None, {}, "no interrupted run left anything here")
    head = _line(lines[0])
    if not isinstance(head, dict):
        return Found(None, {}, "the journal of the interrupted run is damaged")
    if head.get("version") != _VERSION:
        return Found(None, {}, "the interrupted run was one of another version")
    try:
        identity = Identity(str(head["operation"]), dict(head["inputs"]), dict(head["options"]))
    except (KeyError, TypeError, ValueError):
        return Found(None, {}, "the journal of the interrupted run is damaged")
    records: dict[str, Any] = {}
    for text in lines[1:]:
        said = _line(text)
        if not isinstance(said, list) or len(said) != 2:
            break
        records[str(said[0])] = said[1]
    return Found(identity, records)


class Journal:
    """A journal that is being written."""

    def __init__(self, path: Path, identity: Identity, records: Mapping[str, Any]) -> None:
        """Write it as far as it is known, in place of the one that was there.

        Raises:
            OSError: The system refuses.
        """
        draft = path.with_name(f"{path.name}.new")
        with open(draft, "wb") as file:
            file.write(_text({"version": _VERSION, **identity._asdict()}))
            file.writelines(_text([name, value]) for name, value in records.items())
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        self._file = open(path, "ab")  # noqa: SIM115 - closed by close()

    def append(self, records: Mapping[str, Any]) -> None:
        """Add what was done, and have it on the disk.

        Raises:
            OSError: The system refuses.
        """
        self._file.write(b"".join(_text([name, value]) for name, value in records.items()))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file."""
        with suppress(
            OSError
        ):  # what counts was brought to the disk; what a full one refused is tried again here
            self._file.close()


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    one, other = _plain(one), _plain(other)
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives them back: tuples are lists."""
    found: dict[str, Any] = json.loads(json.dumps(dict(values)))
    return found


def _text(value: object) -> bytes:
    text = json.dumps(value, separators=(",", ":"))
    return f"{zlib.crc32(text.encode()):08x} {text}\n".encode()


def _line(text: bytes) -> Any:
    """The value of a line; None where it is torn or damaged."""
    crc, _, rest = text.partition(b" ")
    try:
        return json.loads(rest) if int(crc, 16) == zlib.crc32(rest) else None
    except (ValueError, RecursionError):
        return None
