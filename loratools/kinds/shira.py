"""SHiRA (arXiv 2406.13175): a sparse ΔW whose positions come from a seed or the base weight."""

from __future__ import annotations

from loratools.kinds._base import Kind

KIND = Kind(name="shira", title="SHiRA", needs=(("shira_weight",),))
