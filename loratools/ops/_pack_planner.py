"""Files into plans: what follows from a header and a configuration is worked out once for all files that share them.

Libraries of one base consist of adapters of few makes, so that most files cost their reading alone. A plan also keeps
the data that was asked for while it was made, such as alphas, and serves only files that have the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Hashable
from dataclasses import replace
from typing import Any, NamedTuple

from loratools import io
from loratools.errors import LoraError
from loratools.formats._peft_special import refuse_unmergeable
from loratools.formats._read import refuse_other_types
from loratools.formats._scaling import refuse_nonfinite
from loratools.io import json_text, storage
from loratools.io.mapped import FileMap
from loratools.model import Adapter
from loratools.ops import _pack_index, convert, files
from loratools.ops._pack_plan import Plan, Request, refuse_more
from loratools.ops._pack_slots import Slots

_PLANS = 32  # that are remembered
_ASKED = 1 << 16  # bytes of data that a plan may depend on
_TARGETS = "target_modules"


class Planned(NamedTuple):
    """An adapter before its factors are read.

    Attributes:
        path: Its file of weights.
        plan: How it is packed.
        slots: What the plan's modules read from; None where they read from the file itself.
        data: The file; empty without slots.
    """

    path: str
    plan: Plan
    slots: Slots | None = None
    data: memoryview = memoryview(b"")

    def bind(self) -> None:
        """Let the plan's modules read this file."""
        if self.slots is not None:
            self.slots.bind(self.data)

    def sha256(self) -> str:
        """Of the file of weights."""
        if self.slots is not None:
            return hashlib.sha256(self.data).hexdigest()
        return _pack_index.file_digest(self.path)


class Planner:
    """What makes plans of files, and remembers the last of them.

    Args:
        request: What all adapters of a pack have in common.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._known: list[tuple[Hashable, Plan, Slots]] = []  # the last used is the last

    def planned(self, path: str) -> Planned:
        """An adapter as it will be packed, from its header.

        Args:
            path: A file of weights.

        Raises:
            LoraError: It cannot be read, or has what a pack does not keep.
        """
        data = _mapped(path)
        if data is None:
            return Planned(path, self._plan(io.open_tensors(path)))
        key = _key(path, data)
        for number, (own, plan, slots) in enumerate(self._known):
            if own == key and slots.agrees(data):
                self._known.append(self._known.pop(number))
                return Planned(path, plan, slots, data)
        opened = io.open_tensors(path)
        header = io.parse(data, len(data), path)
        places = [
            (header.data_start + entry.start, header.data_start + entry.stop)
            for entry in header.entries.values()
        ]
        slots = Slots(places, data)
        for (name, ref), slot in zip(list(opened.tensors.items()), slots.slots, strict=True):
            opened.tensors[name] = ref._replace(source=slot)
        opened.close()
        found = Planned(path, self._plan(opened), slots, data)
        if slots.fix(_ASKED):
            self._known.append((key, found.plan, slots))
            del self._known[:-_PLANS]
        return found

    def _plan(self, opened: io.TensorFile) -> Plan:
        request = self._request
        given = files.named(opened, arch=request.arch)
        refuse_other_types(given)
        refuse_nonfinite(given)
        refuse_unmergeable(given)
        refuse_more(given)
        ready = given = _sorted(given)
        if given.layout.name != request.layout or request.base:
            ready = convert.convert(given, request.layout, base=request.base or None).adapter
        return Plan(ready, given.layout.name, request)


def _mapped(path: str) -> memoryview | None:
    """A file of safetensors in memory; None for other files, and where it cannot be had."""
    try:
        if storage.is_url(path) or io.sniff(path) != "safetensors":
            return None
        return FileMap(path).view(0, os.path.getsize(path))
    except (LoraError, OSError):  # the reader says why
        return None


def _key(path: str, data: memoryview) -> Hashable:
    """What files have in common that are read alike but for their data."""
    folder, name = os.path.split(path)
    start = bytes(data[: 8 + int.from_bytes(data[:8], "little")])
    return len(data), start, "adapter" in name.lower(), _config(folder)


def _config(folder: str) -> str:
    """The configuration beside a file, whatever the order in which it was written."""
    try:
        with open(os.path.join(folder, files.CONFIG), encoding="utf-8") as stream:
            text = stream.read()
    except (OSError, ValueError):
        return ""
    try:
        found = json_text.loads(text)
        return json.dumps(_with_sorted_targets(found)) if isinstance(found, dict) else text
    except ValueError:
        return text


def _sorted(adapter: Adapter) -> Adapter:
    """With the names of the modules to be changed in order: PEFT writes them as a set, in any."""
    return replace(adapter, config=_with_sorted_targets(adapter.config)) if adapter.config else adapter


def _with_sorted_targets(config: Any) -> dict[str, Any]:
    targets = config.get(_TARGETS)
    if isinstance(targets, list) and all(isinstance(each, str) for each in targets):
        return {**config, _TARGETS: sorted(targets)}
    return dict(config)
