"""The leading singular vectors of matrices by block Krylov iteration, with a bound on what a further search could find.

A block X of random columns is multiplied by A = DᵀD again and again; all blocks together are the orthonormal basis
Q (in, b). The best approximation whose rows lie in it has the energies θ², the eigenvalues of T = QᵀAQ, and loses
exactly ‖D − DQQᵀ‖² + Σ_{i>k} θᵢ² at rank k. What the best possible one of rank k could hold more, the *gap*
S_k − Σ_{i≤k} θᵢ², is bounded in two ways, and the iteration ends when the smaller one says that the error is within
1 + tolerance of the optimum.

*By the residual.* With an orthonormal complement, A = [[T, Bᵀ], [B, C]], and C ⪯ μ·I for μ = ‖D − DQQᵀ‖_F² = tr C.
Eigenvalues are monotone, so S_k, the sum of the k largest of A, is at most that of [[T, Bᵀ], [B, μ·I]], which is found
exactly: B has the rank of one block, the residual A·Q − Q·T of the last block, β after its orthogonalisation. It
is a proof without conditions (Ky Fan's sums and Weyl's monotonicity), and sharp where what is outside the basis is
small against θ_k²: low rank plus noise, spectra that decay.

*By the rate.* In a flat tail (white noise) there is no such gap, and no bound can be proved for less than the cost of
the exact way. There the gap shrinks at least like 1/q² in the number of products q, the rate that block Krylov spaces
of a Gaussian start have for every spectrum (Musco & Musco 2015, theorem 1); if the last product gained δ, then
δ·q²/(2q + 1) remains. Where gains shrink by a factor ρ from one product to the next, δ·ρ/(1 − ρ) remains. The smaller
of the two is taken for every θᵢ² by itself, ρ no less than a quarter, and half as much again is added to the sum (more
at ranks of a few), since these are rates and no bounds with constants: tests compare it with the truth. It is an
estimate that only the random start protects, not a proof; the residual's bound is one, and the exact way needs none.

Blocks are as wide as the rank, to the next multiple of 16, so that equal singular values cannot hide from a Gaussian
start. Wider ones (oversampling) need more columns in all before the error is as small, since the degree of the
polynomial counts for more than the width: at rank 32 and 1280 x 1280, blocks of 48 took 240 and blocks of 32 took 160
to 192 (Meyer, Musco, Musco: "On the unreasonable effectiveness of single vector Krylov methods for low-rank
approximation", SODA 2024).

Products are float32, all small algebra is float64. Where the energies subtract to a small remainder, it is
computed once from the matrix itself, and what later blocks hold is subtracted from that. A remainder below what float32
resolves is left to the exact way.

Musco, Musco: "Randomized block Krylov methods for stronger and faster approximate singular value decomposition",
NeurIPS 2015.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from loratools.maths._approximation import Approximation, polished
from loratools.maths._blocks import Rows, new_directions
from loratools.maths._products import images_of, rest_of
from loratools.maths.rank import Float64, Rule, needed

COMPUTE = torch.float64

# Matrix products are quickest per column at these widths.
_WIDTH_STEP = 16
_FEWEST_PRODUCTS = 2
_SAFETY = 1.5
_FASTEST, _SLOWEST = 0.25, 0.999
# Below this share of what it is subtracted from, the remainder is computed anew: the difference is off by about 1e-8.
_SUBTRACTED = 3e-5
# Below this share, rounding in float32 products is no longer small against the remainder's own directions.
_RESOLVED = 1e-9


class Target(NamedTuple):
    """What a search is for.

    Attributes:
        rule: Of the rank.
        tolerance: The excess of the error over the optimum that is allowed, a fraction.
        seed: Of the random start.
    """

    rule: Rule
    tolerance: float
    seed: int


class Size(NamedTuple):
    """How large a matrix is.

    Attributes:
        energy: ‖D‖_F², above 0.
        noise: The Frobenius norm below which what is left of it means nothing.
    """

    energy: float
    noise: float


class _Ended(NamedTuple):
    """That the search of one matrix is over, and at which rank; None where it failed."""

    rank: int | None
    lost: float = 0.0
    gap: float = 0.0


def width_for(rank: int) -> int:
    """Vectors in a block that finds this rank: at least as many, a multiple of 16."""
    return -(-rank // _WIDTH_STEP) * _WIDTH_STEP


def search(
    matrices: torch.Tensor, sizes: list[Size], target: Target, width: int, products: int
) -> list[Approximation | None]:
    """The leading part of every matrix of a batch, each searched until its own tolerance is met.

    Args:
        matrices: (n, out, in) float32 with out ≥ in, finite.
        sizes: One per matrix.
        target: What is wanted.
        width: Columns of a block, at most in.
        products: The most multiplications with DᵀD.

    Returns:
        One per matrix; None where the tolerance was not met, or the rank asked for needs a wider block.
    """
    found: list[Approximation | None] = [None] * len(sizes)
    active = list(range(len(sizes)))
    state = _State.begin(matrices, sizes, width, target.seed, products)
    for number in range(1, products + 1):
        state.multiply()
        ends = [state.judge(place, target, number) for place in range(len(active))]
        for place, end in enumerate(ends):
            if end is not None and end.rank is not None:
                found[active[place]] = state.finish(place, end)
        going = [place for place, end in enumerate(ends) if end is None]
        if not going or state.basis.shape[1] + width > matrices.shape[2]:
            break
        if len(going) < len(active):
            state.keep(going)
            active = [active[place] for place in going]
    return found


class _State:
    """The bases of a batch of matrices while they grow.

    Vectors are rows here, so that a basis grows by contiguous pieces.

    Attributes:
        block: The newest directions, (n, width, in) float32, orthonormal rows.
        basis: Qᵀ, (n, b, in) float32, orthonormal rows.
        images: (D·Q)ᵀ, (n, b, out) float32.
        left: Per matrix ‖D − DQQᵀ‖_F², as far as subtracting tells; and from how much was subtracted.
        small: T, (n, b, b) float64.
        values: The eigenvalues of T per matrix, descending.
        gains: Per matrix, what each of them grew by in the latest product and in the one before.
    """

    def __init__(
        self, matrices: torch.Tensor, sizes: list[Size], block: torch.Tensor, basis: Rows, images: Rows
    ) -> None:
        self.matrices, self.sizes, self.block = matrices, sizes, block
        self.width = int(block.shape[1])
        self._basis, self._images = basis, images
        self.small = block.new_empty(len(sizes), 0, 0, dtype=COMPUTE)
        self.coupling: torch.Tensor | None = None
        self.values: list[Float64] = []
        self.gains: list[list[Float64]] = [[] for _ in sizes]
        self.left = [(size.energy, size.energy) for size in sizes]

    @classmethod
    def begin(
        cls, matrices: torch.Tensor, sizes: list[Size], width: int, seed: int, products: int = 4
    ) -> _State:
        """A start that is drawn on the CPU and the same for every matrix, so that no device or batch changes it."""
        generator = torch.Generator().manual_seed(seed)
        start = torch.linalg.qr(torch.randn(matrices.shape[2], width, generator=generator)).Q.mT
        count, out, inner = matrices.shape
        block = start.to(matrices.device).expand(count, -1, -1).contiguous()
        most = min(width * products, inner)
        # Pages that are never written to take no memory.
        basis = Rows(block.new_empty(count, most, inner))
        images = Rows(block.new_empty(count, most, out))
        return cls(matrices, sizes, block, basis, images)

    @property
    def basis(self) -> torch.Tensor:
        """See the class."""
        return self._basis.held

    @property
    def images(self) -> torch.Tensor:
        """See the class."""
        return self._images.held

    def multiply(self) -> None:
        """Take one more block into the basis."""
        if self.values:
            self.advance()
        self.coupling = None
        image = images_of(self.block, self.matrices)
        wide, held = image.to(COMPUTE), self.images
        own = wide @ wide.mT
        # Beyond the block before there is nothing but rounding.
        last = wide @ held[:, -self.width :].to(COMPUTE).mT
        across = torch.cat([(image @ held[:, : -self.width].mT).to(COMPUTE), last], 2)
        self._basis.append(self.block)
        self._images.append(image)
        upper = torch.cat([self.small, across.mT], 2)
        self.small = torch.cat([upper, torch.cat([across, own], 2)], 1)
        taken = own.diagonal(dim1=-2, dim2=-1).sum(-1).tolist()
        self.left = [(left - each, start) for (left, start), each in zip(self.left, taken, strict=True)]
        found = torch.linalg.eigvalsh(self.small).flip(1).clamp_min(0.0).cpu().numpy()
        for place, before in enumerate(self.values):
            gain = (found[place][: before.size] - before).clip(0.0)
            self.gains[place] = [gain, *self.gains[place][:1]]
        self.values = list(found)

    def advance(self) -> torch.Tensor:
        """Replace the block by what its image under DᵀD adds to the basis; its coefficients there, β."""
        if self.coupling is None:
            image = self.images[:, -self.width :] @ self.matrices
            self.block, self.coupling = new_directions(image, self.basis)
        return self.coupling

    def keep(self, places: list[int]) -> None:
        """Go on with some of the matrices alone."""
        index = torch.tensor(places, device=self.block.device)
        self.matrices, self.block, self.small = (
            tensor[index] for tensor in (self.matrices, self.block, self.small)
        )
        self._basis, self._images = self._basis.chosen(index), self._images.chosen(index)
        self.coupling = None if self.coupling is None else self.coupling[index]
        self.sizes = [self.sizes[place] for place in places]
        self.values = [self.values[place] for place in places]
        self.gains = [self.gains[place] for place in places]
        self.left = [self.left[place] for place in places]

    def judge(self, place: int, target: Target, number: int) -> _Ended | None:
        """Whether one matrix is done (or cannot be done); None to go on."""
        squares, (energy, level) = self.values[place], self.sizes[place]
        noise = level**2
        impossible = _Ended(None) if number >= _FEWEST_PRODUCTS else None
        outside = self._outside(place)
        tails = outside + np.append(np.cumsum(squares[::-1])[::-1], 0.0)
        meaningful = int(np.argmax(tails <= noise)) if outside <= noise else None
        full = min(self.matrices.shape[1:])
        rank = needed(target.rule, np.sqrt(squares), energy, full)
        if meaningful is not None and (rank is None or meaningful < rank):
            lost = float(tails[meaningful])
            return _Ended(meaningful, lost, lost)
        if rank is None or width_for(rank) > self.width or tails[rank] < _RESOLVED * energy:
            return impossible
        lost = float(tails[rank])
        allowed = lost * (1.0 - (1.0 + target.tolerance) ** -2)
        gap = self._gap_by_rate(place, rank, number)
        if gap > allowed:
            gap = self._gap_by_residual(place, rank, outside)
        return _Ended(rank, lost, gap) if gap <= allowed else None

    def finish(self, place: int, end: _Ended) -> Approximation:
        """The singular vectors of the approximation within the basis."""
        rank = end.rank or 0
        vectors = torch.linalg.eigh(self.small[place]).eigenvectors.flip(1)[:, :rank]
        # The product of the transposes is quicker than that with a transpose.
        fine = end.lost < _SUBTRACTED * self.sizes[place].energy
        turned = vectors.mT if fine else vectors.mT.to(self.basis.dtype)
        right, left = ((turned @ held[place].to(turned.dtype)).mT for held in (self.basis, self.images))
        u, sigma, vh = polished(left, right)
        return Approximation(u, sigma, vh, end.lost, end.gap, np.sqrt(self.values[place]))

    def _outside(self, place: int) -> float:
        """‖D − DQQᵀ‖_F², by subtracting or from the matrix; later blocks are then subtracted from that."""
        left, start = self.left[place]
        if left > _SUBTRACTED * start:
            return left
        total = rest_of(self.matrices[place], self.basis[place], self.images[place].mT)
        self.left[place] = (total, total)
        return total

    def _gap_by_residual(self, place: int, rank: int, outside: float) -> float:
        squares = self.values[place]
        if rank == 0 or outside >= squares[rank - 1]:
            return float("inf")
        small, coupling = self.small[place], self.advance()[place]
        old, new = small.shape[0], coupling.shape[0]
        bordered = small.new_zeros(old + new, old + new)
        bordered[:old, :old] = small
        bordered[old:, old - new : old] = coupling
        bordered[old - new : old, old:] = coupling.T
        bordered[old:, old:].diagonal().fill_(outside)
        bound = torch.linalg.eigvalsh(bordered)[-rank:].sum()
        return max(0.0, float(bound) - float(squares[:rank].sum()))

    def _gap_by_rate(self, place: int, rank: int, number: int) -> float:
        gains = [gain[:rank] for gain in self.gains[place] if gain.size >= rank]
        if not gains or rank == 0:
            return float("inf")
        # The gains of one value are erratic; those of several even each other out.
        safety = _SAFETY * (1.0 + 1.0 / rank)
        if len(gains) == 1:
            return safety * float(gains[0].sum())
        steps = number - 1
        ratio = np.clip(gains[0] / np.maximum(gains[1], np.finfo(np.float64).tiny), _FASTEST, _SLOWEST)
        remains = np.minimum(steps**2 / (2 * steps + 1), ratio / (1.0 - ratio))
        return safety * float(gains[0] @ remains)
