"""Every spelling of every factor: stem, role and style are told apart from the key alone."""

from __future__ import annotations

import pytest

from loratools import kinds
from loratools.formats._group import clean
from loratools.formats._parse import split
from loratools.kinds._base import SPARSE
from loratools.registry import scan
from loratools.tensors import from_scalar

SPELLINGS = [
    ("lora_unet_mid.lora_down.weight", "lora_unet_mid", "down"),
    ("lora_unet_mid.lora_up.weight", "lora_unet_mid", "up"),
    ("lora_unet_mid.lora_mid.weight", "lora_unet_mid", "mid"),
    ("lora_unet_mid.alpha", "lora_unet_mid", "alpha"),
    ("lora_unet_mid.dora_scale", "lora_unet_mid", "magnitude"),
    ("lora_unet_mid_lora_down.weight", "lora_unet_mid", "down"),
    ("lora_unet_mid_lora_up.weight", "lora_unet_mid", "up"),
    ("a.b.lora_A.weight", "a.b", "down"),
    ("a.b.lora_B.weight", "a.b", "up"),
    ("a.b.lora_B.bias", "a.b", "up_bias"),
    ("a.b.lora_embedding_A", "a.b", "embedding_down"),
    ("a.b.lora_embedding_B", "a.b", "embedding_up"),
    ("a.b.lora_magnitude_vector", "a.b", "magnitude"),
    ("a.b.lora_magnitude_vector.weight", "a.b", "magnitude"),
    ("a.b.magnitude", "a.b", "magnitude"),
    ("a.b.lora.down.weight", "a.b", "down"),
    ("a.b.lora.up.weight", "a.b", "up"),
    ("a.b.lora_linear_layer.down.weight", "a.b", "down"),
    ("a.b.lora_linear_layer.up.weight", "a.b", "up"),
    ("a.processor.to_q_lora.down.weight", "a.processor.to_q", "down"),
    ("a.processor.to_q_lora.up.weight", "a.processor.to_q", "up"),
    ("a.b.lora_A", "a.b", "down"),
    ("a.b.lora_B", "a.b", "up"),
    ("a.b.lora_a", "a.b", "down"),
    ("a.b.lora_b", "a.b", "up"),
    ("a.b.m", "a.b", "magnitude"),
    ("a.b.lora_a.weight", "a.b", "down"),
    ("a.b.lora_b.weight", "a.b", "up"),
    ("unet:12:up", "unet:12", "up"),
    ("unet:12:down", "unet:12", "down"),
    ("w_a_007", "w_007", "down"),
    ("w_b_007", "w_007", "up"),
    ("a.b.lora_E", "a.b", "lora_E"),
    ("a.b.ranknum", "a.b", "ranknum"),
    ("s.diff", "s", "diff"),
    ("s.diff_b", "s", "diff_b"),
    ("s.w_norm", "s", "w_norm"),
    ("s.b_norm", "s", "b_norm"),
    ("s.a1.weight", "s", "glora_a1"),
    ("s.b2.weight", "s", "glora_b2"),
    ("s.on_input", "s", "on_input"),
    ("s.oft_blocks", "s", "oft_blocks"),
    ("s.oft_diag", "s", "oft_diag"),
    ("s.oft_R.weight", "s", "oft_r"),
    ("a.ia3_l", "a", "ia3_l"),
    ("a.vera_lambda_b", "a", "vera_lambda_b"),
    *(
        (f"s.{name}", "s", name)
        for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    ),
    *((f"s.lokr_{name}", "s", f"lokr_{name}") for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
]


@pytest.mark.parametrize(("key", "stem", "role"), SPELLINGS)
def test_a_key_is_taken_apart(key: str, stem: str, role: str) -> None:
    part = split(key)
    assert part is not None
    assert (part.stem, part.suffix.role, part.adapter) == (stem, role, "")


@pytest.mark.parametrize("name", ["default", "my-style", "0"])
@pytest.mark.parametrize(
    ("factor", "role"),
    [("lora_A{}.weight", "down"), ("lora_B{}.weight", "up"), ("lora_embedding_A{}", "embedding_down")],
)
def test_an_adapters_name_inside_the_key_is_found(name: str, factor: str, role: str) -> None:
    part = split("model.q_proj." + factor.format("." + name))
    assert part is not None
    assert (part.stem, part.suffix.role, part.adapter) == ("model.q_proj", role, name)


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.0.weight",
        "lm_head.bias",
        "alpha",
        "lora_A.weight.extra",
        "",
        ".",
        "lora_unet_mid",
        "<token>",
    ],
)
def test_what_is_no_factor_is_left_alone(key: str) -> None:
    assert split(key) is None


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("base_model.model.model.layers.0.q_proj", "model.layers.0.q_proj"),
        ("base_model.model.base_model.model.x", "x"),
        ("base_model.model._fsdp_wrapped_module.x.y", "x.y"),
        ("_orig_mod.base_model.model.x", "x"),
        ("base_model.model.layers._fsdp_wrapped_module.0._orig_mod.x", "layers.0.x"),
        ("transformer.x", "transformer.x"),
    ],
)
def test_wrappers_are_taken_off(stem: str, name: str) -> None:
    assert clean(stem) == name


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("unet.x.attn1.processor.to_q", "unet.x.attn1.to_q"),
        ("x.attn2.processor.to_out", "x.attn2.to_out.0"),
        ("text_encoder.x.self_attn.to_k", "text_encoder.x.self_attn.k_proj"),
        ("text_encoder.x.self_attn.to_out", "text_encoder.x.self_attn.out_proj"),
    ],
)
def test_attention_processors_names_become_the_modules(stem: str, name: str) -> None:
    assert clean(stem, "attn-procs") == name


def test_every_role_that_a_kind_needs_can_be_spelt() -> None:
    spelt = {part.suffix.role for key, _, _ in SPELLINGS if (part := split(key)) is not None}
    from loratools.formats import _parse

    spelt |= {suffix.role for suffix in _parse._SUFFIXES.values()}
    # (IA)³ of LyCORIS is a plain ".weight" that only the flag beside it tells, BD-LoRA what its configuration says.
    reachable = spelt | {"ia3_weight", "up_blocks", "down_blocks"}
    for kind in scan("loratools.kinds", "KIND").values():
        assert all(set(need) <= reachable for need in kind.needs), kind.name


def test_no_spelling_of_a_factor_is_beyond_every_kind() -> None:
    from loratools.formats import _parse

    known = {"alpha", "magnitude", "scalar", "embedding_up", "embedding_down", *SPARSE}
    for kind in scan("loratools.kinds", "KIND").values():
        known |= set(kind.may) | {role for need in kind.needs for role in need}
    unread = {suffix.role for suffix in _parse._SUFFIXES.values()} - known
    assert not unread, f"files with {sorted(unread)} would be refused as making no kind"


def test_kinds_are_told_apart_by_their_roles() -> None:
    for kind in scan("loratools.kinds", "KIND").values():
        for need in kind.needs:
            found = kinds.of_roles(need)
            assert found is not None
            # Fused experts are told by shape and configuration; their roles are LoRA's.
            assert found.name == {"experts": "lora"}.get(kind.name, kind.name)


def test_the_order_of_a_modules_tensors_is_of_no_matter() -> None:
    """An alpha in front states no spelling: the attention processors' names are still understood."""
    from loratools.formats._group import group

    stem = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out"
    keys = [f"{stem}_lora.down.weight", f"{stem}_lora.up.weight", f"{stem}_lora.alpha"]
    ref = from_scalar("x", 1.0)
    for order in (keys, keys[::-1], [keys[2], keys[0], keys[1]]):
        groups, left = group({key: ref.renamed(key) for key in order})
        assert not left
        assert [found.name for found in groups.values()] == [
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
        ]
        assert {found.style for found in groups.values()} == {"attn-procs"}


def test_a_key_that_is_another_modules_stem_is_no_suffix_of_it() -> None:
    from loratools.formats._parse import tail_of

    assert tail_of("a.b", "a.b") is None
    assert tail_of("a.bc.alpha", "a.b") is None
    assert tail_of("a.b.alpha", "a.b") is not None
