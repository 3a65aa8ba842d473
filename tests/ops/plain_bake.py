"""What terms do to a tensor, written out plainly in float64: the reference for plans."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from loratools import kinds
from loratools.ops._changes import Term


def applied(terms: Iterable[Term], before: torch.Tensor) -> torch.Tensor:
    """A stored tensor after its terms, which change it in their order."""
    tensor = before.double()
    for term in terms:
        if term.role == "weight":
            assert term.module is not None
            delta = kinds.delta(term.module, wide=True)
            tensor = tensor + term.strength * (delta.T if term.module.in_first else delta)
        elif term.role == "replace":
            assert term.tensor is not None
            new = term.tensor.load().double()
            tensor = new if new.shape != tensor.shape else tensor + term.strength * (new - tensor)
        else:
            assert term.role == "rows"
            assert term.tensor is not None
            places = list(term.places)
            tensor = tensor.clone()
            tensor[places] += term.strength * (term.tensor.load().double() - tensor[places])
    return tensor
