"""ΔW of what PEFT trains, against the weights that PEFT itself merges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from loratools import kinds
from loratools.model import Module, Target
from loratools.tensors import TensorRef, from_torch

pytestmark = pytest.mark.peers

ROLES = {"oft_R.weight": "oft_r", "lora_A.weight": "down", "lora_B.weight": "up", "lora_E": "lora_E"}


def peft_delta(
    layer: torch.nn.Module, config: Any
) -> tuple[dict[str, TensorRef], TensorRef | None, torch.Tensor, torch.Tensor]:
    """The adapter's factors and magnitude by role, the base weight, and what merging changes in it."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    weight = layer.weight.detach().clone()  # type: ignore[union-attr]
    model = peft.get_peft_model(torch.nn.Sequential(layer), config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "base_layer" not in name and "magnitude" not in name:
                tensor.copy_(torch.randn_like(tensor) * 0.2)
            if "magnitude" in name:
                tensor.mul_(1.5)
    state = peft.get_peft_model_state_dict(model)
    tensors = {key.removeprefix("base_model.model.0."): tensor.clone() for key, tensor in state.items()}
    magnitude = tensors.pop("lora_magnitude_vector", None)
    factors = {ROLES.get(key, key): from_torch(key, tensor) for key, tensor in tensors.items()}
    merged = model.merge_and_unload()[0].weight.detach()
    found = from_torch("lora_magnitude_vector", magnitude) if magnitude is not None else None
    return factors, found, weight, merged - weight


def linear() -> torch.nn.Module:
    return torch.nn.Linear(16, 12, bias=False)


def conv() -> torch.nn.Module:
    return torch.nn.Conv2d(8, 12, 3, bias=False)


CASES: list[tuple[str, str, Callable[[], torch.nn.Module], str, dict[str, Any], float]] = [
    ("loha", "loha", linear, "LoHaConfig", {"r": 2, "alpha": 4}, 2.0),
    ("loha-tucker", "loha", conv, "LoHaConfig", {"r": 2, "alpha": 4, "use_effective_conv2d": True}, 2.0),
    ("loha-conv", "loha", conv, "LoHaConfig", {"r": 2, "alpha": 4}, 2.0),
    ("lokr", "lokr", linear, "LoKrConfig", {"r": 1, "alpha": 3}, 3.0),
    ("lokr-both", "lokr", linear, "LoKrConfig", {"r": 1, "alpha": 3, "decompose_both": True}, 3.0),
    ("lokr-tucker", "lokr", conv, "LoKrConfig", {"r": 1, "alpha": 2, "use_effective_conv2d": True}, 2.0),
    ("lokr-conv", "lokr", conv, "LoKrConfig", {"r": 1, "alpha": 2}, 2.0),
    ("oft", "oft", linear, "OFTConfig", {"r": 4, "oft_block_size": 0}, 1.0),
    ("oft-shared", "oft", linear, "OFTConfig", {"r": 4, "oft_block_size": 0, "block_share": True}, 1.0),
    ("oft-conv", "oft", conv, "OFTConfig", {"r": 0, "oft_block_size": 9}, 1.0),
    ("ia3-out", "ia3", linear, "IA3Config", {"feedforward_modules": []}, 1.0),
    ("ia3-in", "ia3", linear, "IA3Config", {"feedforward_modules": ["0"]}, 1.0),
    ("ia3-conv", "ia3", conv, "IA3Config", {"feedforward_modules": ["0"]}, 1.0),
    ("dora", "lora", linear, "LoraConfig", {"r": 2, "lora_alpha": 4, "use_dora": True}, 2.0),
    ("dora-conv", "lora", conv, "LoraConfig", {"r": 2, "lora_alpha": 4, "use_dora": True}, 2.0),
]


@pytest.mark.parametrize(
    ("name", "kind", "layer", "config", "options", "scale"), CASES, ids=[case[0] for case in CASES]
)
def test_delta_is_what_peft_merges(name, kind, layer, config, options, scale) -> None:
    peft = pytest.importorskip("peft")
    made = getattr(peft, config)(target_modules=["0"], **options)
    factors, magnitude, weight, wanted = peft_delta(layer(), made)
    found_kind = kinds.of_roles(factors)
    assert found_kind is not None
    assert found_kind.name == kind
    module = Module(
        Target("model", "0"),
        kind,
        factors,
        scale=scale,
        magnitude=magnitude,
        magnitude_axis=None if magnitude is None else "out",
    )
    found = kinds.delta(module, weight)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
