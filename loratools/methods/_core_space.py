"""Element-wise rules in a small space that all changes share, of which the methods differ in the rule alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loratools.maths.knots import knots
from loratools.maths.lowrank import Factors, compress
from loratools.maths.spectra_ops import full_size_note, reduced_aligned
from loratools.methods._base import Options, Outcome, Part
from loratools.methods._elementwise import Join, Thinner, merged_whole


def merged_cores(parts: Sequence[Part], options: Options, thin: Thinner, join: Join) -> Outcome:
    """The cores between the bases of all inputs and outputs merged by a rule, and brought back.

    Args:
        parts: At least one, with their weights.
        options: Checked.
        thin: What is left of each core.
        join: What becomes of all of them.
    """
    factors = [part.factors for part in parts]
    space = reduced_aligned(factors, [part.multiplier for part in parts])
    core = merged_whole(space.parts, parts, options, thin, join)
    identity = torch.eye(core.shape[1], dtype=core.dtype, device=core.device)
    compressed = compress(Factors(core, identity), options.rank)
    expanded = space.expanded(compressed.factors)
    return Outcome(expanded, compressed.energy, compressed.square, full_size_note(factors))


def merged_knots(parts: Sequence[Part], options: Options, thin: Thinner, join: Join) -> Outcome:
    """The components in the outputs' common basis merged by a rule.

    Args:
        parts: At least one, with their weights.
        options: Checked.
        thin: What is left of each change's components.
        join: What becomes of all of them.
    """
    factors = [part.factors for part in parts]
    tied = knots(factors, [part.multiplier for part in parts])
    whole = merged_whole(tied.parts, parts, options, thin, join)
    compressed = compress(Factors(tied.basis, whole), options.rank)
    return Outcome(compressed.factors, compressed.energy, compressed.square, full_size_note(factors))
