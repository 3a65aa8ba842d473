"""ΔW of every kind: as a whole, applied, and by rows, against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loratools import kinds
from loratools.errors import IncompleteModuleError, ShapeError, UnsupportedKindError
from loratools.kinds._base import StandIn
from loratools.model import Module
from tests.kinds import samples as make

FLOAT32 = 2.0**-22


def close(found: torch.Tensor, wanted: np.ndarray, tolerance: float = 1e-12) -> None:
    assert tuple(found.shape) == wanted.shape
    assert np.linalg.norm(found.double().numpy() - wanted) <= tolerance * np.linalg.norm(wanted)


@pytest.mark.parametrize("name", make.NAMES)
def test_delta_is_its_definition(name: str) -> None:
    module, base, delta = make.sample(name)
    found = kinds.delta(module, torch.from_numpy(base))
    assert found.dtype == torch.float32
    close(found, delta, FLOAT32)
    close(kinds.delta(module, torch.from_numpy(base), wide=True), delta)


@pytest.mark.parametrize(
    "name", [name for name in make.NAMES if not kinds.get(make.sample(name).module.kind).needs_base]
)
def test_what_adds_to_the_base_does_not_need_it(name: str) -> None:
    module, _, delta = make.sample(name)
    close(kinds.delta(module, wide=True), delta)


@pytest.mark.parametrize("name", make.NAMES)
def test_applied_to_inputs_is_the_product_with_delta(name: str) -> None:
    module, base, _ = make.sample(name)
    rng = np.random.default_rng(1)
    left, right = rng.normal(size=make.OUT), rng.normal(size=base[0].size)
    inputs = torch.from_numpy(rng.normal(size=(base[0].size, 3)))
    stand_in = torch.from_numpy(np.outer(left, right).reshape(base.shape))
    delta = kinds.delta(module, stand_in, wide=True).flatten(1)
    applied = kinds.get(module.kind).apply
    assert applied is not None
    found = applied(module, inputs, StandIn(torch.from_numpy(left), torch.from_numpy(right)))
    close(found, (delta @ inputs).numpy())


def part_of(module: Module, part: int, parts: int) -> Module:
    """The module of one of several equal shares of the rows."""
    axes = kinds.get(module.kind).row_axes(module.factors)
    assert axes is not None
    factors = dict(module.factors)
    for role, axis in axes.items():
        factors[role] = make.ref(factors[role].load().chunk(parts, dim=axis)[part].numpy())
    return module._replace(factors=factors, shape=kinds.get(module.kind).shape(factors))


WHOLE = ("sparse", "boft", "vera", "miss", "miss-mini")
TAKEN_APART = [name for name in make.NAMES if name not in (*WHOLE, "oft-constrained")]


@pytest.mark.parametrize("name", TAKEN_APART)
def test_rows_taken_apart_are_rows_of_delta(name: str) -> None:
    module, base, delta = make.sample(name)
    height = make.OUT // 3
    for part in range(3):
        rows = slice(part * height, (part + 1) * height)
        found = kinds.delta(part_of(module, part, 3), torch.from_numpy(base[rows]), wide=True)
        close(found, delta[rows])


def test_rows_of_a_kronecker_product_with_one_row_on_the_left_are_those_of_the_right() -> None:
    rng = np.random.default_rng(3)
    arrays = {
        "lokr_w1": rng.normal(size=(1, 2)),
        "lokr_w2_a": rng.normal(size=(6, 1)),
        "lokr_w2_b": rng.normal(size=(1, 4)),
    }
    module = make.module_of("lokr", arrays, 0.5)
    whole = kinds.delta(module, wide=True)
    parts = [kinds.delta(part_of(module, part, 2), wide=True) for part in range(2)]
    close(torch.cat(parts), whole.numpy())


def test_a_rotation_of_the_inputs_is_shared_by_all_rows() -> None:
    module = make.sample("oft-peft").module
    assert kinds.get("oft").row_axes(module.factors) == {}


@pytest.mark.parametrize("name", WHOLE)
def test_rows_that_cannot_be_taken_apart(name: str) -> None:
    module = make.sample(name).module
    assert kinds.get(module.kind).row_axes(module.factors) is None


@pytest.mark.parametrize("name", ["lora", "loha"])
def test_products_of_several_rows_are_blocks_on_the_left_and_a_stack_on_the_right(name: str) -> None:
    one, two = (
        make.sample(name, 1).module,
        make.sample(name, 2).module._replace(scale=make.sample(name).module.scale),
    )
    factors = {}
    for left, right in kinds.get(one.kind).products:
        first, second = (
            torch.block_diag(*(m.factors[left].load() for m in (one, two))),
            torch.cat([m.factors[right].load() for m in (one, two)]),
        )
        factors |= {left: make.ref(first.numpy()), right: make.ref(second.numpy())}
    fused = one._replace(factors=factors, shape=kinds.get(one.kind).shape(factors))
    apart = torch.cat([kinds.delta(module, wide=True) for module in (one, two)])
    close(kinds.delta(fused, wide=True), apart.numpy())


def decomposed(base: np.ndarray, delta: np.ndarray, magnitude: np.ndarray, axis: int) -> np.ndarray:
    """DoRA by rows or columns, one after the other."""
    changed = base + delta
    result = changed.copy()
    for place, length in enumerate(magnitude):
        index = (place,) if axis == 0 else (slice(None), place)
        result[index] = length * changed[index] / np.linalg.norm(changed[index])
    return result - base


@pytest.mark.parametrize("name", ["lora", "lora-conv", "loha", "lokr-tucker", "oft", "ia3-out"])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_magnitude_sets_the_norms_of_any_kind(name: str, axis: int) -> None:
    module, base, delta = make.sample(name)
    magnitude = np.random.default_rng(5).uniform(1, 2, size=base.shape[axis])
    module = module._replace(magnitude=make.ref(magnitude), magnitude_axis=("out", "in")[axis])
    found = kinds.delta(module, torch.from_numpy(base), wide=True)
    # A float32 step is added to norms of about 3.
    close(found, decomposed(base, delta, magnitude, axis), 1e-6)


def test_a_row_of_zeros_has_no_direction_to_decompose() -> None:
    module, base, _ = make.sample("lora")
    zero = np.zeros_like(base)
    zero[1:] = 1.0
    still = module._replace(scale=0.0, magnitude=make.ref(np.ones(make.OUT)), magnitude_axis="out")
    found = kinds.delta(still, torch.from_numpy(zero))
    assert bool(found.isfinite().all())
    assert not found[0].any()


@pytest.mark.parametrize("name", ["glora", "ia3-out", "oft", "oft-peft"])
def test_without_the_base_the_kind_is_refused_by_name(name: str) -> None:
    module = make.sample(name).module
    with pytest.raises(
        UnsupportedKindError,
        match=kinds.get(module.kind).title.replace("(", r"\(").replace(")", r"\)") + ".*--base",
    ):
        kinds.delta(module)


def test_without_the_base_a_magnitude_is_refused() -> None:
    module = make.sample("loha").module._replace(magnitude=make.ref(np.ones(make.OUT)), magnitude_axis="out")
    with pytest.raises(UnsupportedKindError, match=r"DoRA.*--base"):
        kinds.delta(module)


@pytest.mark.parametrize("name", ["lora", "oft", "oft-peft", "glora", "ia3-out", "boft"])
def test_a_base_of_another_shape_is_refused(name: str) -> None:
    module = make.sample(name).module
    with pytest.raises(ShapeError, match=r"w: .*\[?1[03]"):
        kinds.delta(module, torch.ones(13, 10))


def test_a_magnitude_of_another_length_is_refused() -> None:
    module, base, _ = make.sample("lora")
    short = module._replace(magnitude=make.ref(np.ones(3)), magnitude_axis="out")
    with pytest.raises(ShapeError, match=r"3 magnitudes.*One per output"):
        kinds.delta(short, torch.from_numpy(base))


def test_a_sparse_residual_lacks_nothing() -> None:
    module = make.sample("sparse").module
    factors = {role: ref for role, ref in module.factors.items() if role != "bias_size"}
    with pytest.raises(IncompleteModuleError, match="without its bias_size"):
        kinds.delta(module._replace(factors=factors))


def test_indices_that_int16_made_negative_are_read() -> None:
    width = 40_000
    module = make.module_of("lora", {"up": np.zeros((2, 1)), "down": np.zeros((1, width))}, 1.0)
    # 39999 and 40000 as LyCORIS casts them.
    beside = {
        "bias_indices": make.ref(np.array([[1], [39_999 - 65_536]]), torch.int16),
        "bias_values": make.ref(np.array([3.0])),
        "bias_size": make.ref(np.array([2, width - 65_536]), torch.int16),
    }
    found = kinds.delta(module._replace(factors={**module.factors, **beside}))
    assert found[1, 39_999] == 3.0
    assert int(found.count_nonzero()) == 1


def test_a_shared_block_turns_all_inputs() -> None:
    module, base, _ = make.sample("oft-peft")
    packed = module.factors["oft_r"].load()[:1]
    shared = module._replace(factors={"oft_r": make.ref(packed.numpy())})
    repeated = module._replace(factors={"oft_r": make.ref(packed.repeat(2, 1).numpy())})
    weight = torch.from_numpy(base)
    close(kinds.delta(shared, weight, wide=True), kinds.delta(repeated, weight, wide=True).numpy())


@pytest.mark.parametrize("variant", ["cayley", "neumann=2", "neumann=7", "coft=0.1", "cayley coft=0.1"])
def test_rotations_that_pefts_configuration_names(variant: str) -> None:
    module, base, _ = make.sample("oft-peft")
    said = dict(word.split("=") for word in variant.split() if "=" in word)
    packed = module.factors["oft_r"].load().numpy()
    turned = []
    for row, columns in zip(packed, np.split(base, len(packed), axis=1), strict=True):
        skew, one = np.zeros((4, 4)), np.eye(4)
        skew[np.triu_indices(4, 1)] = row
        skew -= skew.T
        limit = float(said.get("coft", np.inf)) / np.sqrt(len(packed))
        skew *= min(1.0, limit / np.linalg.norm(skew))
        if "cayley" in variant:
            turn = (one - skew) @ np.linalg.inv(one + skew)
        else:
            count = int(said.get("neumann", 5))
            factors = [1.0, *[2.0] * (count - 1)]
            factors[-1] = factors[-1] if count < 3 else 1.0
            turn = sum(each * np.linalg.matrix_power(skew, power) for power, each in enumerate(factors))
        turned.append(columns @ turn.T)
    found = kinds.delta(module._replace(variant=variant), torch.from_numpy(base), wide=True)
    close(found, np.concatenate(turned, axis=1) - base)


def test_a_convolutions_vector_of_peft_is_told_by_the_base() -> None:
    base = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    for length, axis in ((6, 0), (4, 1)):
        vector = np.linspace(0.5, 2.0, length).reshape(1, length, 1, 1)
        module = make.module_of("ia3", {"ia3_l": vector}, 1.0)
        shape = [1, 1, 1, 1]
        shape[axis] = length
        close(kinds.delta(module, base, wide=True), base.numpy() * (vector.reshape(shape) - 1))
    square = make.module_of("ia3", {"ia3_l": np.ones((1, 4, 1, 1))}, 1.0)
    with pytest.raises(ShapeError, match="a shape that tells which"):
        kinds.delta(square, torch.ones(4, 4, 3, 3))


def test_forms_of_oft_that_nobody_described_are_refused() -> None:
    for factors in ({"oft_r": np.ones((2, 4, 4))}, {"boft_r": np.ones((2, 4, 4))}):
        with pytest.raises(UnsupportedKindError, match="OFT in this form"):
            kinds.delta(make.module_of("oft", factors, 1.0), torch.ones(8, 8))
    module, base, _ = make.sample("oft-peft")
    with pytest.raises(UnsupportedKindError, match="OFT in this form"):
        kinds.delta(module._replace(variant="expm"), torch.from_numpy(base))
