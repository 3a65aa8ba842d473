"""What is to blame where a baked tensor would not be finite."""

from __future__ import annotations

from typing import NoReturn

import torch

from loratools.errors import NonFiniteError
from loratools.ops._bake_steps import Block
from loratools.ops._changes import Change, Term
from loratools.tensors import DTYPES


def refuse(change: Change, block: Block, store: str) -> NoReturn:
    """Say what is not finite: the base, an adapter, or the result.

    Args:
        change: Which tensor, and what is done to it.
        block: The rows at fault, changed and not yet stored.
        store: The store dtype, a safetensors name.

    Raises:
        NonFiniteError: Always.
    """
    weight = change.weight
    if not bool(block.base.isfinite().all()):
        raise NonFiniteError(
            "the base holds NaN or infinity",
            path=weight.file,
            keys=[weight.key],
            expected="Finite values were expected",
            todo="Get the base again from where it was made",
        )
    names = _not_finite(change.terms)
    if names:
        raise NonFiniteError(
            f"{weight.key} of {weight.file} would not be finite: tensors of an adapter hold NaN or infinity",
            keys=names,
            expected="Finite values were expected",
            todo="Get the adapter again from where it was made",
        )
    found = block.current[block.current.isfinite()].abs()
    largest = float(found.max()) if found.numel() else 0.0
    top = torch.finfo(getattr(torch, DTYPES[store].torch)).max
    raise NonFiniteError(
        f"with the adapters the largest finite value is {largest:.6g}",
        path=weight.file,
        keys=[weight.key],
        expected=f"{store} holds finite values up to {top:.6g}",
        todo="Bake at a lower strength, or store as bfloat16 or float32 with --dtype",
    )


def _not_finite(terms: tuple[Term, ...]) -> list[str]:
    """The names of tensors of the adapters that hold NaN or infinity."""
    refs = [term.tensor for term in terms if term.tensor is not None]
    refs += [ref for term in terms if term.module is not None for _, ref in term.module.tensors()]
    floating = (ref for ref in refs if DTYPES[ref.dtype].floating)
    return [ref.name for ref in floating if not bool(ref.load().to(torch.float64).isfinite().all())]
