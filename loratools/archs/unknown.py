"""What nobody has described: names stay as they are, enough to inspect, resize, compare and merge."""

from __future__ import annotations

from loratools.archs._arch import Arch
from loratools.archs._table import Component

ARCH = Arch(
    name="unknown",
    title="unknown architecture",
    components=(Component("model", {"peft": ("base_model.model.",)}),),
)
