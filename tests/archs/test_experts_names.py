"""Names of experts: every style is read as it is spelt, and transformers converts the same names."""

from __future__ import annotations

import re

import pytest

from loratools.archs import _experts as names
from loratools.archs._experts import FAMILIES, FUSED, GGUF, SPLIT, SWITCH, Experts

ROLES = {SPLIT: ("gate", "up", "down"), FUSED: ("gate_up", "down")}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("style", [SPLIT, FUSED, SWITCH, GGUF])
def test_what_is_spelt_is_read(family: Experts, style: str) -> None:
    for role in ROLES.get(style, ROLES[SPLIT]):
        number = 7 if style == SPLIT else None
        found = names.place(names.spell(family, style, "model.layers.3.", role, number))
        assert found is not None
        assert (found.block, found.role, found.number) == ("model.layers.3.", role, number)
        assert family in found.families


def test_other_parts_of_a_mixture_are_no_experts() -> None:
    block = "model.layers.0."
    for path in ("mlp.gate", "mlp.shared_experts.up_proj", "mlp.shared_expert.gate_proj", "mlp.gate_proj"):
        assert names.place(block + path) is None
    assert names.place("transformer_blocks.0.ff_i.experts.1.w1") is None
    assert names.is_owner(f"{block}mlp.experts")
    assert not names.is_owner(f"{block}mlp")


def test_a_model_type_is_of_one_family() -> None:
    types = [kind for family in FAMILIES for kind in family.model_types]
    assert len(types) == len(set(types))


@pytest.mark.peers
def test_transformers_converts_these_names() -> None:
    mapping = pytest.importorskip("transformers.conversion_mapping").get_checkpoint_conversion_mapping
    compared = set()
    for family in FAMILIES:
        for kind in family.model_types:
            singles = {
                pattern: converter.target_patterns
                for converter in mapping(kind) or ()
                for pattern in converter.source_patterns
                if re.search(r"experts\.\*\.", pattern)
            }
            for role in ("gate", "up", "down") if singles else ():
                tail = names.spell(family, SPLIT, "", role, 0).replace(".0.", ".*.").partition("experts")[2]
                targets = [
                    goal for pattern, goal in singles.items() if pattern.endswith(f"experts{tail}.weight")
                ]
                fused = names.spell(family, FUSED, "", "down" if role == "down" else "gate_up")
                leaf = fused.rpartition(".")[2]
                assert [goal[0].endswith(f"experts.{leaf}") for goal in targets] == [True], (
                    kind,
                    role,
                    singles,
                )
                compared.add(kind)
    assert {"mixtral", "qwen3_moe", "deepseek_v3", "olmoe", "jamba", "lfm2_moe"} <= compared
