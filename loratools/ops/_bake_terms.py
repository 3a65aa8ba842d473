"""From a plan's terms to the steps that change a base tensor."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from loratools import kinds
from loratools.errors import ShapeError
from loratools.model import Module
from loratools.ops import _bake_steps as steps
from loratools.ops._assemble import assemble, is_whole, overlaps, rows_first
from loratools.ops._changes import Change, Piece, Span, Term
from loratools.ops._delta_rows import DeltaRows
from loratools.tensors import TensorRef


class Compiled(NamedTuple):
    """The steps of one change.

    Attributes:
        steps: In order.
        products: Those that add a product of factors.
        low_rank: Whether there are no others.
        reads_base: Whether a step reads rows of the base besides those it changes.
    """

    steps: tuple[steps.Step, ...]
    products: tuple[steps.Product, ...]
    low_rank: bool
    reads_base: bool


class Compiler(NamedTuple):
    """What the terms of one change have in common.

    Attributes:
        change: Of which the terms are.
        base: The tensor, outputs first, as stored (float8 with scales dequantised).
        turned: Whether it is stored as (in, out).
        dtype: To compute in.
        device: Where.
    """

    change: Change
    base: torch.Tensor
    turned: bool
    dtype: torch.dtype
    device: str

    def all(self) -> Compiled:
        """The steps of all terms.

        Raises:
            ShapeError: A module does not fit the tensor.
            UnsupportedKindError: A module cannot be computed.
        """
        made = tuple(self._step(term) for term in self.change.terms)
        products = tuple(step for step in made if isinstance(step, steps.Product))
        reads = any(
            isinstance(step, steps.Addition | steps.Decomposition) and step.delta.base is not None
            for step in made
        )
        return Compiled(made, products, len(products) == len(made), reads)

    def _step(self, term: Term) -> steps.Step:
        if term.role == "weight" and term.module is not None:
            return self._weight(term, term.module)
        if term.role == "bias" and term.module is not None:
            return self._bias(term, term.module)
        if term.tensor is None:
            raise AssertionError(f"a term of role {term.role!r} without what it needs")
        if term.role == "rows":
            # Tensors of tokens may be stored in fewer bits than an index can pick from.
            values = term.tensor.load().to(self.device, self.dtype)
            return steps.Exchange(values, term.places, term.strength, self.turned, self._follows(term))
        values = rows_first(term.tensor.load(), self.turned)
        return steps.Replacement(values, term.strength, self._follows(term))

    def _follows(self, term: Term) -> bool:
        """Whether another adapter has changed the tensor before a term does."""
        return self.change.terms[0].adapter != term.adapter

    def _weight(self, term: Term, module: Module) -> steps.Step:
        spans = term.spans or ((0, len(self.base), 0),)
        along = module.magnitude is not None and module.magnitude_axis == "in"
        base = self._whole(term) if kinds.get(module.kind).needs_base or along else None
        rows = len(base) if base is not None else _rows(module, spans)
        delta = DeltaRows(module, rows, base, self.dtype, self.device)
        if delta.product is not None:
            self._refuse_other_width(module, delta.product[1].shape[1])
        elif module.shape is not None:
            self._refuse_other_width(module, math.prod(module.shape[1:]))
        if module.magnitude is not None:
            return self._decomposition(term, module, delta, spans, base if along else None)
        if delta.product is not None:
            return steps.Product(*delta.product, term.strength * delta.scale, spans)
        return steps.Addition(delta, term.strength, spans)

    def _decomposition(
        self,
        term: Term,
        module: Module,
        delta: DeltaRows,
        spans: tuple[Span, ...],
        base: torch.Tensor | None,
    ) -> steps.Decomposition:
        assert module.magnitude is not None
        magnitude = module.magnitude.load().to(self.device, self.dtype).flatten()
        axes = self.base.dim()
        wanted = self.base.shape[1] if base is not None else delta.rows
        if magnitude.numel() != wanted:
            raise ShapeError(
                f"{module.target}: {magnitude.numel()} magnitudes where the base weight has {wanted}",
                path=self.change.weight.file,
                keys=[module.magnitude.name],
                expected=f"One per {'input' if base is not None else 'output'} was expected",
                todo="The file is damaged, or it was made for another base model",
            )
        along = None
        if base is not None:
            like = torch.empty(0, dtype=self.dtype, device=self.device)
            along = steps.input_norms(delta, base, term.strength if term.inside else 1.0, like)
        shape = [-1 if axis == (base is not None) else 1 for axis in range(axes)]
        return steps.Decomposition(delta, magnitude.reshape(shape), along, term.strength, term.inside, spans)

    def _whole(self, term: Term) -> torch.Tensor:
        """All rows of what the term's module changes."""
        spans = term.spans or ((0, len(self.base), 0),)
        own = Piece(self.change.weight, spans, term.turned, self.change.scale)
        pieces = term.pieces or (own,)
        alone = len(pieces) == 1 and pieces[0].weight == self.change.weight
        if alone and is_whole(pieces[0].spans, len(self.base)):
            return self.base
        return assemble(pieces, self.dtype)

    def _refuse_other_width(self, module: Module, width: int) -> None:
        own = self.base[:1].numel()
        if width != own:
            raise ShapeError(
                f"{module.target}: the factors are for {width} inputs, the base has {own}",
                path=self.change.weight.file,
                keys=[self.change.weight.key],
                expected="Factors for the inputs that the base has were expected",
                todo="Give the base model that the adapter was trained on",
            )

    def _bias(self, term: Term, module: Module) -> steps.Values:
        """What a module adds to a bias.

        PEFT multiplies ``up_bias`` by the scale as it does the product. A ``diff_b`` beside low-rank factors is added
        as it is, like their ``diff``.
        """
        factors = module.factors
        spans = term.spans or ((0, len(self.base), 0),)
        if "ia3_l" in factors:
            # b' = b · l, as PEFT does with a vector along the outputs.
            vector = _vector(factors["ia3_l"], self)
            values = torch.zeros(max(len(vector), _last(spans)), dtype=self.dtype, device=self.device)
            for start, stop, at in overlaps(spans, 0, len(self.base)):
                bias = self.base[at : at + stop - start].to(self.device, self.dtype)
                values[start:stop] = (vector[start:stop] - 1.0) * bias
            return steps.Values(values.mul_(term.strength), spans)
        own_scale = module.scale if module.kind == "full" else 1.0
        scales = {"up_bias": module.scale, "diff_b": own_scale, "b_norm": own_scale}
        found = [_vector(factors[role], self) * scale for role, scale in scales.items() if role in factors]
        if not found or len(found[0]) < _last(spans):
            raise ShapeError(
                f"{module.target}: nothing for a bias of {len(self.base)} values",
                path=self.change.weight.file,
                keys=[self.change.weight.key],
                expected="One value per output was expected",
                todo="The adapter's file is damaged, or it was made for another base model",
            )
        return steps.Values(torch.stack(found).sum(dim=0).mul_(term.strength), spans)


def _vector(ref: TensorRef, compiler: Compiler) -> torch.Tensor:
    return ref.load().to(compiler.device, compiler.dtype).flatten()


def _last(spans: tuple[Span, ...]) -> int:
    return max(stop for _, stop, _ in spans)


def _rows(module: Module, spans: tuple[Span, ...]) -> int:
    """How many rows a module's ΔW has."""
    return module.shape[0] if module.shape else _last(spans)
