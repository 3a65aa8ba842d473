"""FourierFT and WaveFT (arXiv 2405.03003, 2505.12532): ΔW is given by few coefficients of a transform."""

from __future__ import annotations

from loratools.kinds._base import Kind

KIND = Kind(
    name="spectral",
    title="FourierFT / WaveFT",
    needs=(("fourierft_spectrum",), ("waveft_spectrum",), ("c3a_kernel",)),
)
