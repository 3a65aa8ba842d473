"""Adapter kinds: what their roles and shapes say."""

from __future__ import annotations

import factories as make
import numpy as np
import pytest
import torch

from loratools import kinds
from loratools.errors import IncompleteModuleError, ShapeError, UnsupportedKindError
from loratools.kinds import lora
from loratools.model import Module, Target
from loratools.tensors import TensorRef, from_torch

SUFFIX_ROLES = {
    "a1.weight": "glora_a1",
    "a2.weight": "glora_a2",
    "b1.weight": "glora_b1",
    "b2.weight": "glora_b2",
    "weight": "ia3_weight",
}


def refs(tensors: dict[str, torch.Tensor]) -> dict[str, TensorRef]:
    return {name: from_torch(name, tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("kind", "name", "rank", "shape"),
    [
        ("loha", "loha", 3, (12, 8)),
        ("lokr", "lokr", 3, (12, 8)),
        ("lokr_full", "lokr", None, (12, 8)),
        ("oft", "oft", None, None),
        ("glora", "glora", 3, (12, 8)),
        ("ia3", "ia3", None, None),
        ("full", "full", None, (12, 8)),
    ],
)
def test_a_kinds_rank_and_shape_come_from_its_factors(kind: str, name: str, rank, shape) -> None:
    made = make.foreign_factors(kind, (12, 8), 3, torch.float32, np.random.default_rng(0))
    factors = refs({SUFFIX_ROLES.get(suffix, suffix): tensor for suffix, tensor in made.items()})
    found = kinds.of_roles([*factors, "alpha"])
    assert found is not None
    assert found.name == name
    assert found.rank(factors) == rank
    assert found.shape(factors) == shape


def test_loha_in_tucker_form() -> None:
    factors = refs(
        {
            "hada_t1": torch.ones(3, 3, 3, 3),
            "hada_w1_a": torch.ones(3, 12),
            "hada_w1_b": torch.ones(3, 8),
            "hada_t2": torch.ones(3, 3, 3, 3),
            "hada_w2_a": torch.ones(3, 12),
            "hada_w2_b": torch.ones(3, 8),
        }
    )
    kind = kinds.of_roles(factors)
    assert kind is not None
    assert (kind.name, kind.rank(factors), kind.shape(factors)) == ("loha", 3, (12, 8, 3, 3))


@pytest.mark.parametrize(
    ("tensors", "shape"),
    [
        ({"lokr_w1": (2, 2), "lokr_w2": (6, 4, 3, 3)}, (12, 8, 3, 3)),
        ({"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 2), "lokr_w2": (6, 4)}, (12, 8)),
        (
            {"lokr_w1": (2, 2), "lokr_t2": (3, 3, 3, 3), "lokr_w2_a": (3, 6), "lokr_w2_b": (3, 4)},
            (12, 8, 3, 3),
        ),
    ],
)
def test_lokrs_shape_in_all_its_forms(tensors: dict[str, tuple[int, ...]], shape: tuple[int, ...]) -> None:
    factors = refs({name: torch.ones(size) for name, size in tensors.items()})
    kind = kinds.of_roles(factors)
    assert kind is not None
    assert kind.shape(factors) == shape


@pytest.mark.parametrize(
    "roles", [["hada_w1_a"], ["up"], ["up", "down", "lokr_w1"], ["lokr_w1"], [], ["alpha"]]
)
def test_roles_that_make_no_kind(roles: list[str]) -> None:
    assert kinds.of_roles(roles) is None


@pytest.mark.parametrize(
    ("up", "down", "mid"),
    [
        ((4, 2), (3, 4), None),
        ((4, 0), (0, 4), None),
        ((4, 2, 1, 1), (2, 4, 1, 1), (3, 2, 3, 3)),
        ((4,), (4, 4), None),
        ((4, 2), (2,), None),
    ],
)
def test_factors_that_cannot_be_multiplied_are_refused(up, down, mid) -> None:
    factors = {"up": torch.ones(up), "down": torch.ones(down), **({"mid": torch.ones(mid)} if mid else {})}
    with pytest.raises(ShapeError, match=r"file: x\.y"):
        lora.check(refs(factors), "x.y", "file")


def test_a_missing_factor_is_named() -> None:
    with pytest.raises(IncompleteModuleError, match=r"file: x\.y has no up factor"):
        lora.check(refs({"down": torch.ones(2, 2)}), "x.y", "file")


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1, 1), (6, 5, 3, 3), (6, 5, 3), (6, 5, 2, 3, 3)])
def test_delta_is_the_product_of_the_weights_shape(shape: tuple[int, ...]) -> None:
    factors, product = make.lora_factors(shape, 2, torch.float32, np.random.default_rng(1))
    module = Module(Target("model", "w"), "lora", refs(factors), scale=-0.5, rank=2, shape=shape)
    delta = module.delta()
    assert delta.dtype == torch.float32
    assert tuple(delta.shape) == shape
    np.testing.assert_allclose(delta.numpy(), -0.5 * product, atol=1e-6)


def test_delta_of_a_tucker_form() -> None:
    factors, product = make.lora_factors((6, 5, 3, 3), 2, torch.float32, np.random.default_rng(1), mid=True)
    module = Module(Target("model", "w"), "lora", refs(factors), scale=2.0, rank=2, shape=(6, 5, 3, 3))
    np.testing.assert_allclose(module.delta().numpy(), 2.0 * product, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "title"), [("vera", "VeRA"), ("hra", "HRA"), ("experts", "LoRA on fused experts")]
)
def test_a_delta_that_cannot_be_computed_is_refused_by_name(kind: str, title: str) -> None:
    with pytest.raises(UnsupportedKindError, match=title):
        Module(Target("model", "w"), kind, {}).delta()
