"""RoAd (arXiv 2409.00119): rotations and scalings of pairs of outputs."""

from __future__ import annotations

from loratools.kinds._base import Kind

KIND = Kind(name="road", title="RoAd", needs=(("road_theta", "road_alpha"),))
