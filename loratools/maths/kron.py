"""Factors of Kronecker and Hadamard products from the factors of their parts, without building either.

(U₁·D₁) ⊗ (U₂·D₂) = (U₁ ⊗ U₂)·(D₁ ⊗ D₂), of rank r₁·r₂, and its singular values are the products of theirs. The
elementwise (U₁·D₁) ∘ (U₂·D₂) has the row-wise Khatri-Rao product of the ups and the column-wise one of the downs as
factors, of rank r₁·r₂ too. Van Loan: "The ubiquitous Kronecker product", J. Comput. Appl. Math. 2000; Hyeon-Woo,
Ye-Bin, Oh: "FedPara", arXiv 2108.06098, proposition 1.
"""

from __future__ import annotations

import math

import torch

from loratools.maths.lowrank import (
    COMPUTE,
    Compressed,
    Factors,
    Svd,
    balanced,
    check_rank,
    dense_svd,
    numerical_rank,
    retained,
    signed,
)


def kronecker(one: Factors, other: Factors) -> Factors:
    """Factors of the Kronecker product of two matrices, of the product of their ranks."""
    # torch.kron gives up on transposed views.
    up = torch.kron(one.up.contiguous(), other.up.contiguous())
    return Factors(up, torch.kron(one.down.contiguous(), other.down.contiguous()))


def khatri_rao(one: Factors, other: Factors) -> Factors:
    """Factors of the elementwise product of two matrices of one shape, of the product of their ranks."""
    up = one.up[:, :, None] * other.up[:, None, :]
    down = one.down[:, None, :] * other.down[None, :, :]
    return Factors(up.flatten(1), down.flatten(0, 1))


def thin(matrix: torch.Tensor) -> Factors:
    """A matrix (out, in) as exact factors of its numerical rank, a count.

    By its singular value decomposition where that lowers the rank; else the matrix itself beside an identity.

    Raises:
        NonFiniteError: It holds NaN or Inf.
    """
    found = dense_svd(matrix)
    kept = numerical_rank(found.sigma, (matrix.shape[0], matrix.shape[1]), matrix.dtype)
    if kept < min(matrix.shape):
        return balanced(signed(Svd(found.u[:, :kept], found.sigma[:kept], found.vh[:kept])))
    identity = torch.eye(min(matrix.shape), dtype=matrix.dtype, device=matrix.device)
    return Factors(identity, matrix) if matrix.shape[0] <= matrix.shape[1] else Factors(matrix, identity)


def leading(one: Svd, other: Svd, rank: int) -> Compressed:
    """The best approximation of a given rank of a Kronecker product, from the decompositions of its parts.

    Args:
        one: Of the left matrix.
        other: Of the right matrix.
        rank: A count of at least 1; where the numerical rank is lower, that is kept.

    Raises:
        OptionError: The rank is below 1.
    """
    check_rank(rank)
    products = torch.outer(one.sigma, other.sigma).flatten()
    sigma, order = products.sort(descending=True, stable=True)
    shape = (one.u.shape[0] * other.u.shape[0], one.vh.shape[1] * other.vh.shape[1])
    real = numerical_rank(sigma, shape, COMPUTE)
    kept = min(rank, real)
    left, right = order[:kept] // len(other.sigma), order[:kept] % len(other.sigma)
    u = one.u[:, None, left] * other.u[None, :, right]
    vh = one.vh[left][:, :, None] * other.vh[right][:, None, :]
    factors = balanced(signed(Svd(u.flatten(0, 1), sigma[:kept], vh.flatten(1))))
    return Compressed(factors, 1.0 if kept == real else retained(sigma, kept), sigma)


def evened(factors: Factors) -> Factors:
    """The same matrix with factors of about one size, so that neither is lost to a narrow store dtype.

    They are multiplied by powers of two, which rounds nothing.
    """
    up, down = float(factors.up.abs().max()), float(factors.down.abs().max())
    if not (up and down and math.isfinite(up) and math.isfinite(down)):
        return factors
    power = round(math.log2(down / up) / 2)
    return Factors(factors.up * 2.0**power, factors.down * 2.0**-power)


def frobenius(factors: Factors) -> float:
    """‖up @ down‖_F from the Gram matrices of the factors; exact to half the digits of float64 where terms cancel."""
    up, down = factors.up.to(COMPUTE), factors.down.to(COMPUTE)
    return math.sqrt(max(0.0, float(((up.T @ up) * (down @ down.T)).sum())))
