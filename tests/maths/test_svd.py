"""Whatever the matrix, the error is within a thousandth of the best possible, and what is said of it is true."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loratools.errors import NonFiniteError, OptionError, ShapeError
from loratools.maths import _gram_svd, _krylov
from loratools.maths.rank import Rule
from loratools.maths.svd import decompose, decompose_batch

COMPUTE = torch.float64


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(out, width, sigma, seed=0):
    """A float32 matrix of given singular values."""
    count = len(sigma)
    u = torch.linalg.qr(gaussian(out, count, seed=seed).to(COMPUTE)).Q
    v = torch.linalg.qr(gaussian(width, count, seed=seed + 1).to(COMPUTE)).Q
    return (u * torch.as_tensor(np.asarray(sigma, np.float64)) @ v.T).float()


def student(out, width):
    """Independent entries with heavy tails (2.5 degrees of freedom)."""
    found = np.random.default_rng(3).standard_t(2.5, (out, width))
    return torch.from_numpy(found.astype(np.float32))


def matrices(out, width):
    size = min(out, width)
    step = np.arange(1, size + 1)
    low = gaussian(out, 16) @ gaussian(16, width, seed=1)
    return {
        "white": gaussian(out, width),
        "student": student(out, width),
        "slow": with_spectrum(out, width, step**-0.3),
        "power": with_spectrum(out, width, step**-1.0),
        "graded": with_spectrum(out, width, 0.9**step),
        "exponential": with_spectrum(out, width, np.exp(-step / 3.0)),
        "low rank, little noise": low + 1e-3 * gaussian(out, width, seed=2),
        "low rank, much noise": low + 2.0 * gaussian(out, width, seed=2),
        "steps": with_spectrum(out, width, np.where(step <= 16, 1.0, np.where(step <= 32, 0.35, 0.3))),
        "plateau": with_spectrum(out, width, np.where(step <= 100, 1.0, 0.2)),
        "orthogonal": with_spectrum(out, width, np.ones(size)),
        "spike": gaussian(out, width)
        + 1e6 * (step[0] == 1) * torch.eye(out, width)[:, :1] @ gaussian(1, width),
        "rounded rank 16": low,
    }


SHAPES = [(200, 200), (640, 420), (420, 640), (60, 500)]
NAMES = sorted(matrices(40, 40))


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def zoo(request):
    found = matrices(*request.param)
    return {name: (matrix, torch.linalg.svdvals(matrix.to(COMPUTE))) for name, matrix in found.items()}


def check(found, matrix, sigma, tolerance=1e-3):
    """The promises of ``Decomposed``, against the dense decomposition and the dense difference."""
    rank = found.sigma.numel()
    square = float(sigma.square().sum())
    optimum = float(sigma[rank:].square().sum())
    lost = float((matrix.to(COMPUTE) - found.u * found.sigma @ found.vh).square().sum())
    floor = 1e-26 * square
    assert lost <= optimum * (1 + tolerance) ** 2 + floor
    assert found.lost == pytest.approx(lost, rel=2e-3, abs=floor)
    assert found.lost - found.gap <= optimum * (1 + 1e-4) + floor
    assert found.energy == pytest.approx(square, rel=1e-12)
    assert found.captured == pytest.approx(float(found.sigma.square().sum()), rel=1e-5)
    assert found.captured <= found.bound <= found.energy
    eye = torch.eye(rank, dtype=COMPUTE)
    torch.testing.assert_close(found.u.T @ found.u, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.vh @ found.vh.T, eye, rtol=0, atol=1e-12)
    assert bool((found.sigma.diff() <= 0).all())


@pytest.mark.parametrize("method", ["auto", "exact", "randomized"])
@pytest.mark.parametrize("name", NAMES)
def test_error_is_within_a_thousandth_of_the_optimum(zoo, name, method):
    matrix, sigma = zoo[name]
    for rank in (1, 20, 40):
        found = decompose(matrix, Rule("rank", rank), method=method)
        assert found.sigma.numel() == rank
        check(found, matrix, sigma)


@pytest.mark.parametrize("shape", [(2048, 640), (640, 2048)])
def test_one_singular_value_of_a_long_matrix(shape):
    for matrix in (gaussian(*shape), student(*shape)):
        found = decompose(matrix, Rule("rank", 1))
        assert found.method == "randomized"
        check(found, matrix, torch.linalg.svdvals(matrix.to(COMPUTE)))


def test_equal_singular_values_as_many_as_a_block_is_wide():
    step = np.arange(400)
    for count in (16, 17, 40):
        matrix = with_spectrum(420, 400, np.where(step < count, 1.0, 0.05))
        check(
            decompose(matrix, Rule("rank", 16), method="randomized"),
            matrix,
            torch.linalg.svdvals(matrix.to(COMPUTE)),
        )


def test_a_merged_adapter_takes_two_products(monkeypatch):
    products = []
    multiply = _krylov._State.multiply
    monkeypatch.setattr(_krylov._State, "multiply", lambda self: (products.append(1), multiply(self))[1])
    base = gaussian(700, 600, seed=5)
    tuned = base + 0.01 * gaussian(700, 12) @ gaussian(12, 600, seed=1)
    found = decompose(tuned - base, Rule("rank", 32), noise=2.0**-24 * float(base.norm()))
    assert (found.method, found.sigma.numel(), len(products)) == ("randomized", 12, 2)


@pytest.mark.parametrize("seed", range(6))
def test_the_bound_holds_from_every_start(seed):
    for matrix in (
        gaussian(500, 400),
        student(400, 500),
        gaussian(400, 8) @ gaussian(8, 400, seed=1) / 9 + gaussian(400, 400),
    ):
        sigma = torch.linalg.svdvals(matrix.to(COMPUTE))
        found = decompose(matrix, Rule("rank", 6), method="randomized", seed=seed)
        assert found.method == "randomized"
        check(found, matrix, sigma)


def test_the_bound_by_the_residual_is_a_bound_at_every_step():
    matrix = with_spectrum(300, 250, 0.7 ** np.arange(250))
    squares = torch.linalg.svdvals(matrix.to(COMPUTE)).square()
    size = _krylov.Size(float(matrix.to(COMPUTE).square().sum()), 0.0)
    state = _krylov._State.begin(matrix[None], [size], 16, 0)
    bounded = 0
    for _ in range(3):
        state.multiply()
        for rank in range(1, 17):
            gap = state._gap_by_residual(0, rank, state._outside(0))
            missing = float(squares[:rank].sum()) - float(state.values[0][:rank].sum())
            assert missing <= gap + 1e-6 * float(squares[0])
            bounded += gap < float("inf")
    assert bounded > 20


def test_the_tolerance_is_the_callers():
    matrix = gaussian(640, 640)
    sigma = torch.linalg.svdvals(matrix.to(COMPUTE))
    errors = []
    for tolerance in (3e-2, 1e-3, 1e-5):
        found = decompose(matrix, Rule("rank", 8), method="randomized", tolerance=tolerance)
        check(found, matrix, sigma, tolerance)
        errors.append(found.error)
    assert errors[0] > errors[1] > errors[2]


def test_where_the_search_does_not_end_the_exact_way_is_taken(monkeypatch):
    monkeypatch.setattr("loratools.maths.svd._PRODUCTS", 2)
    matrix = gaussian(300, 280)
    found = decompose(matrix, Rule("rank", 8), method="randomized")
    assert found.method == "exact"
    check(found, matrix, torch.linalg.svdvals(matrix.to(COMPUTE)), 1e-9)


def test_auto_searches_large_matrices_alone():
    rule = Rule("rank", 4)
    assert decompose(gaussian(500, 400), rule).method == "randomized"
    assert decompose(gaussian(500, 60), rule).method == "exact"
    assert decompose(gaussian(500, 400), Rule("rank", 200)).method == "exact"


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (3, 3), (2, 700), (700, 2), (33, 34)])
@pytest.mark.parametrize("method", ["auto", "exact", "randomized"])
def test_tiny_and_thin_matrices(shape, method):
    matrix = gaussian(*shape)
    found = decompose(matrix, Rule("rank", 32), method=method)
    assert found.sigma.numel() == min(*shape, 32)
    check(found, matrix, torch.linalg.svdvals(matrix.to(COMPUTE)))


@pytest.mark.parametrize("method", ["auto", "exact", "randomized"])
def test_zero_matrix(method):
    found = decompose(torch.zeros(300, 200), Rule("rank", 8), method=method)
    assert (tuple(found.u.shape), tuple(found.sigma.shape), tuple(found.vh.shape)) == (
        (300, 0),
        (0,),
        (0, 200),
    )
    assert (found.energy, found.captured, found.bound, found.error, found.optimum) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e18])
@pytest.mark.parametrize("size", [20, 120, 300])
def test_scale_changes_nothing_else(scale, size):
    power = 2.0 ** round(np.log2(scale))
    matrix = student(size, size) + 1.0
    plain, scaled = (decompose(given, Rule("rank", 8)) for given in (matrix, matrix * power))
    torch.testing.assert_close(scaled.u, plain.u, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scaled.sigma, plain.sigma * power, rtol=1e-6, atol=0.0)
    assert scaled.energy == pytest.approx(plain.energy * power**2, rel=1e-12)
    assert scaled.error == pytest.approx(plain.error, rel=1e-5)


@pytest.mark.parametrize("size", [30, 90, 300])
@pytest.mark.parametrize("method", ["auto", "exact", "randomized"])
def test_the_rank_never_exceeds_the_true_one(size, method):
    # Small whole numbers: the product has rank 5 without rounding.
    left, right = (
        torch.randint(-3, 4, (size, 5), generator=torch.Generator().manual_seed(s)) for s in (0, 1)
    )
    matrix = (left @ right.T).float()
    found = decompose(matrix, Rule("rank", 16), method=method)
    assert found.sigma.numel() == 5
    assert found.error < 1e-12


@pytest.mark.parametrize("size", [30, 90, 300])
@pytest.mark.parametrize("method", ["auto", "exact", "randomized"])
def test_the_rank_below_the_noise_of_a_subtraction(size, method):
    base = gaussian(size, size, seed=5)
    tuned = base + 0.01 * gaussian(size, 6) @ gaussian(6, size, seed=1)
    noise = 2.0**-24 * float(tuned.norm())
    for rule in (Rule("rank", 16), Rule("energy", 1.0), Rule("error", 1e-12)):
        found = decompose(tuned - base, rule, method=method, noise=noise)
        assert found.sigma.numel() == 6
        assert found.lost <= noise**2
    assert decompose(tuned - base, Rule("rank", 4), method=method, noise=noise).sigma.numel() == 4
    assert decompose(tuned - base, Rule("rank", 16), method=method, noise=1e9).sigma.numel() == 0


@pytest.mark.parametrize("size", [40, 300])
def test_small_singular_values_beside_a_large_one(size):
    sigma = np.concatenate([[1.0], 1e-9 * 0.5 ** np.arange(9)])
    matrix = torch.zeros(size, size)
    matrix.diagonal()[:10] = torch.from_numpy(sigma).float()
    found = decompose(matrix, Rule("rank", 7), method="randomized")
    assert found.method == "exact"
    np.testing.assert_allclose(found.sigma.numpy(), np.float32(sigma[:7]), rtol=1e-6)


@pytest.mark.parametrize("method", ["exact", "randomized"])
@pytest.mark.parametrize(
    "rule",
    [Rule("energy", 0.6), Rule("energy", 0.95), Rule("error", 0.3), Rule("ratio", 0.21), Rule("ratio", 12.5)],
)
def test_rank_rules(rule, method):
    matrix = with_spectrum(900, 700, np.arange(1, 701) ** -1.0)
    sigma = torch.linalg.svdvals(matrix.to(COMPUTE))
    found = decompose(matrix, rule, method=method)
    check(found, matrix, sigma)
    exact = decompose(matrix, rule, method="exact").sigma.numel()
    assert found.sigma.numel() in ((exact,) if method == "exact" else (exact, exact + 1))
    if rule.kind == "energy":
        assert found.captured >= rule.value * found.energy * (1 - 1e-9)


def test_the_block_grows_until_a_rule_is_answered():
    matrix = with_spectrum(800, 800, np.where(np.arange(800) < 60, 1.0, 0.01))
    found = decompose(matrix, Rule("energy", 0.995), method="randomized")
    assert (found.method, found.sigma.numel()) == ("randomized", 60)


@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_a_batch_gives_what_single_calls_give(method):
    stack = torch.stack([*matrices(300, 260).values(), torch.zeros(300, 260)])
    for rule in (Rule("rank", 8), Rule("energy", 0.5)):
        together = decompose_batch(stack, rule, method=method)
        for matrix, one in zip(stack, together, strict=True):
            alone = decompose(matrix, rule, method=method)
            assert (one.method, one.sigma.numel()) == (alone.method, alone.sigma.numel())
            torch.testing.assert_close(one.sigma, alone.sigma, rtol=1e-4, atol=1e-7 * alone.energy**0.5)
            assert one.lost == pytest.approx(alone.lost, rel=1e-4, abs=1e-12 * alone.energy)
    assert decompose_batch(torch.zeros(0, 5, 5), Rule("rank", 1)) == []


def test_the_seed_decides_and_the_input_stays():
    matrix = gaussian(400, 300)
    before = matrix.clone()
    first, again, other = (
        decompose(matrix, Rule("rank", 4), method="randomized", seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first.u, again.u)
    assert torch.equal(first.vh, again.vh)
    assert not torch.equal(first.u, other.u)
    assert torch.equal(matrix, before)


def test_a_driver_that_fails_is_replaced(monkeypatch):
    import scipy.linalg

    def fails(*args, **options):
        raise scipy.linalg.LinAlgError("did not converge")

    def fails_too(*args, **options):
        raise torch.linalg.LinAlgError("did not converge")

    matrix = gaussian(80, 70)
    sigma = torch.linalg.svdvals(matrix.to(COMPUTE))
    monkeypatch.setattr(scipy.linalg, "eigh", fails)
    check(decompose(matrix, Rule("rank", 9), method="exact"), matrix, sigma, 1e-9)
    monkeypatch.setattr(torch.linalg, "eigh", fails_too)
    check(decompose(matrix, Rule("rank", 9), method="exact"), matrix, sigma, 1e-9)


def test_the_gram_matrix_is_added_up_in_tiles(monkeypatch):
    matrix = gaussian(300, 90)
    whole = decompose(matrix, Rule("rank", 5), method="exact")
    monkeypatch.setattr(_gram_svd, "_TILE_ELEMENTS", 64 * 90)
    tiled = decompose(matrix, Rule("rank", 5), method="exact")
    torch.testing.assert_close(tiled.sigma, whole.sigma, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("size", [4, 300])
def test_not_finite(size, value):
    matrix = gaussian(size, size)
    matrix[1, 2] = value
    with pytest.raises(NonFiniteError):
        decompose(matrix, Rule("rank", 2))


def test_refusals():
    matrix = gaussian(5, 4)
    for options in ({"method": "dense"}, {"tolerance": 0.0}, {"noise": -1.0}):
        with pytest.raises(OptionError):
            decompose(matrix, Rule("rank", 2), **options)
    with pytest.raises(OptionError):
        decompose(matrix, Rule("rank", 0))
    with pytest.raises(OptionError):
        decompose_batch(matrix[None], Rule("rank", 1), noise=(0.0, 0.0))
    for shape in ((5,), (0, 4), (2, 2, 2)):
        with pytest.raises(ShapeError):
            decompose(torch.zeros(shape), Rule("rank", 1))
