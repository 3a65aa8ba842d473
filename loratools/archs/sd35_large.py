"""Stable Diffusion 3.5 Large: the transformer of 3 Medium with other widths and 38 blocks."""

from __future__ import annotations

from loratools.archs._arch import Arch, Width
from loratools.archs._table import NATIVE, Component
from loratools.archs.sd3 import PREFIXES, PROPORTIONS, READS_HIDDEN, TEXT_ENCODERS, TEXT_WIDTHS, mmdit

_BLOCKS = 38

ARCH = Arch(
    name="sd35_large",
    title="Stable Diffusion 3.5 Large",
    components=(Component("denoiser", PREFIXES, mmdit(_BLOCKS), kohya_dialect=NATIVE), *TEXT_ENCODERS),
    kohya_versions=("3-5-large",),
    modelspec=("stable-diffusion-3-5-large",),
    base_models=("stable-diffusion-3-5-large", "sd3-5-large"),
    widths=(Width("denoiser", READS_HIDDEN, 2432), *TEXT_WIDTHS),
    proportions=PROPORTIONS,
    depths={"joint_blocks": _BLOCKS},
    # Tiny models, made for tests, have neither's width: what they are called is Stable Diffusion 3.
    derived_from="sd3",
)
