"""HRA (arXiv 2405.17484): the base weight is multiplied by Householder reflections."""

from __future__ import annotations

from loratools.kinds._base import Kind, first_axis

KIND = Kind(name="hra", title="HRA", needs=(("hra_u",),), rank=first_axis("hra_u"))
