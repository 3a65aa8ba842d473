"""What every adapter kind declares: the roles it needs, and what its shapes say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

from loratools.errors import IncompleteModuleError, UnsupportedKindError
from loratools.model import Module
from loratools.tensors import TensorRef

if TYPE_CHECKING:
    import torch

Factors = Mapping[str, TensorRef]
Shape = tuple[int, ...]


# LyCORIS' sparse residual, which may lie beside the factors of any kind and is added to ΔW.
SPARSE = ("bias_indices", "bias_values", "bias_size")

_WIDENED = 1 << 17  # elements


class StandIn(NamedTuple):
    """A base weight of rank one, W = left · rightᵀ: enough to tell two readings of a module apart by random probes.

    Attributes:
        left: (out,), float64.
        right: (in · kh · kw,), float64.
    """

    left: torch.Tensor
    right: torch.Tensor


class Applier(Protocol):
    """ΔW · x without building ΔW."""

    def __call__(self, module: Module, x: torch.Tensor, base: StandIn) -> torch.Tensor:
        """What the module adds to the outputs.

        Args:
            module: Of this kind, without its magnitude.
            x: Inputs (in · kh · kw, n), float64.
            base: Stands for the base weight, for kinds whose ΔW depends on it.

        Returns:
            ΔW · x, scale included, as (out, n) in float64.
        """


class Dense(Protocol):
    """ΔW as a whole."""

    def __call__(self, module: Module, base: torch.Tensor | None) -> torch.Tensor:
        """ΔW without the magnitude and the sparse residual.

        Args:
            module: Of this kind.
            base: The base weight (out, in[, kh, kw]) in float64; not None where the kind needs it.

        Returns:
            ΔW, scale included, in float64: of the weight's shape, or with its kernel flattened.
        """


class Factored(NamedTuple):
    """A matrix as two factors, (out, rank) and (rank, in · kh · kw), in float64.

    Attributes:
        up: (out, rank).
        down: (rank, in · kh · kw).
        energy: The fraction of the matrix's Σσ² that they keep: 1 where they are the matrix itself.
    """

    up: torch.Tensor
    down: torch.Tensor
    energy: float = 1.0


class Factoring(Protocol):
    """ΔW as a product of two factors, without building ΔW."""

    def __call__(self, module: Module, base: torch.Tensor | None, rank: int | None) -> Factored | None:
        """The factors of ΔW, scale excluded, without the magnitude and whatever lies beside the kind's factors.

        Args:
            module: Of this kind.
            base: The base weight (out, in[, kh, kw]) in float64; not None where the kind needs it.
            rank: A kind that knows its singular values may return the best approximation of this rank; the others
                return the matrix itself, as they all do for None.

        Returns:
            None where the factors would be no smaller than ΔW.
        """


class Kind(NamedTuple):
    """One adapter kind.

    Attributes:
        name: As shown and written in reports ("lora", "loha", …).
        title: The name people know it by.
        needs: Alternatives of roles; one of them must be there whole.
        may: Roles that may come along.
        rank: The rank that the factors' shapes say, or None.
        shape: The base weight's shape (out, in[, kh, kw]) that they say, or None.
        sized: The same from the whole module, where its variant is needed for it.
        specific: Kinds with a higher value are tried first where two fit.
        low_rank: Whether ΔW is a product of two factors, so that it can be computed in factor space.
        row_axes: Along which axis of which factors the weight's rows run; the other factors serve all rows alike.
            None where the rows cannot be taken apart.
        part_axes: As ``row_axes``, another choice where the factors leave one: for parts of a weight that are to be put
            together and agree in all other factors.
        products: Pairs of roles (left, right) that are multiplied over the rank: modules of several rows are one
            with left block-diagonal and right stacked. Kinds without any stack their row factors, if the others agree.
        linear: Roles of which the first that is there may be multiplied by a number instead of ΔW.
        scaled: Whether an alpha, or a configuration, says what multiplies ΔW.
        shared: Roles of tensors that are one for all modules of a file.
        needs_base: Whether ΔW depends on the base weight, or on a shape that the base alone tells.
        alone: Whether a module of a kind that needs the base can be computed without, as what else is known tells.
        apply: ΔW · x without building ΔW; None where it is not known how.
        dense: ΔW as a whole; None where it is not known how.
        factored: ΔW as a product of two factors; None where it is none.
    """

    name: str
    title: str
    needs: tuple[tuple[str, ...], ...]
    may: tuple[str, ...] = ()
    rank: Callable[[Factors], int | None] = lambda _: None
    shape: Callable[[Factors], Shape | None] = lambda _: None
    sized: Callable[[Module], Shape] | None = None
    specific: int = 1
    low_rank: bool = False
    row_axes: Callable[[Factors], Mapping[str, int] | None] = lambda _: None
    part_axes: Callable[[Factors], Mapping[str, int] | None] = lambda _: None
    products: tuple[tuple[str, str], ...] = ()
    linear: tuple[str, ...] = ()
    scaled: bool = True
    shared: tuple[str, ...] = ()
    needs_base: bool = False
    alone: Callable[[Module], bool] = lambda _: False
    apply: Applier | None = None
    dense: Dense | None = None
    factored: Factoring | None = None

    def fits(self, roles: frozenset[str]) -> bool:
        """Whether these roles are exactly what the kind is made of."""
        known = {
            "alpha",
            "magnitude",
            "scalar",
            *SPARSE,
            *self.may,
            *(role for need in self.needs for role in need),
        }
        return roles <= known and any(roles >= set(need) for need in self.needs)


def first_axis(*roles: str) -> Callable[[Factors], int | None]:
    """The length of the first axis of whichever of these factors is there."""

    def rank(factors: Factors) -> int | None:
        return next((factors[role].shape[0] for role in roles if role in factors), None)

    return rank


def by_rows(factors: Factors, **axes: int) -> Mapping[str, int] | None:
    """The axes of those factors that are there; None beside a sparse residual, whose rows are values, not an axis."""
    if not factors.keys().isdisjoint(SPARSE):
        return None
    return {role: axis for role, axis in axes.items() if role in factors}


def said(module: Module) -> dict[str, str]:
    """The words of a module's variant: what its configuration says ("topk=3 coft" is topk 3, and coft)."""
    return {name: value for name, _, value in (word.partition("=") for word in module.variant.split())}


def wide(ref: TensorRef) -> torch.Tensor:
    """A factor in float64."""
    import torch

    return ref.load().to(torch.float64)


def times(ref: TensorRef, x: torch.Tensor) -> torch.Tensor:
    """A factor, flattened behind its first axis, times a matrix in float64.

    It is widened a few rows at a time, so that as much as is read is never held in float64.
    """
    import torch

    matrix = ref.load().flatten(1)
    step = max(1, _WIDENED // max(1, matrix.shape[1]))
    starts = range(0, max(1, len(matrix)), step)
    return torch.cat([matrix[start : start + step].to(torch.float64) @ x for start in starts])


def needed(module: Module, base: torch.Tensor | None, title: str) -> torch.Tensor:
    """The base weight of a module that depends on it.

    Raises:
        UnsupportedKindError: It is not there.
    """
    if base is None:
        raise UnsupportedKindError(
            f"{module.target}: the ΔW of {title} modules depends on the base weight",
            keys=[ref.name for _, ref in module.tensors() if ref.name],
            expected="The weight that the adapter was trained on was expected",
            todo="Give the base model with --base",
        )
    return base


def with_residual(product: Applier) -> Applier:
    """The same and LyCORIS' sparse residual, where there is one."""

    def apply(module: Module, x: torch.Tensor, base: StandIn) -> torch.Tensor:
        outputs = product(module, x, base)
        beside = residual(module)
        return outputs if beside is None else outputs + beside @ x

    return apply


def residual(module: Module) -> torch.Tensor | None:
    """LyCORIS' sparse residual as a sparse matrix (out, in · kh · kw) in float64, or None where there is none.

    The scale does not multiply it: LyCORIS' extraction writes it together with alpha = rank.

    Raises:
        IncompleteModuleError: One of its three tensors is missing.
    """
    import torch

    missing = [role for role in SPARSE if role not in module.factors]
    if len(missing) == len(SPARSE):
        return None
    if missing:
        raise IncompleteModuleError(
            f"{module.target} has a sparse residual without its {' and '.join(missing)}",
            keys=[ref.name for role, ref in module.factors.items() if role in SPARSE],
            expected="Indices, values and the size of the matrix were expected",
            todo="The file is incomplete; get it again from where it was made",
        )
    indices, values, size = (module.factors[role] for role in SPARSE)
    shape = [int(length) for length in _unsigned(size).flatten()]
    return torch.sparse_coo_tensor(_unsigned(indices), wide(values).flatten(), shape, check_invariants=True)


def _unsigned(ref: TensorRef) -> torch.Tensor:
    # LyCORIS casts to int16, which turns whatever is above 32767 negative.
    whole = ref.load().long()
    return whole & 0xFFFF if ref.dtype == "I16" else whole
