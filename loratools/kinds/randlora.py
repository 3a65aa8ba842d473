"""RandLoRA (arXiv 2502.00987): learned diagonals between frozen random bases."""

from __future__ import annotations

from loratools.kinds._base import Kind

KIND = Kind(name="randlora", title="RandLoRA", needs=(("randlora_lambda", "randlora_gamma"),))
