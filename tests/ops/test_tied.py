"""Tied embeddings: which of their two uses an adapter changes, and what becomes of the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import loratools as lt
from loratools.errors import ShapeError, UnsupportedKindError
from loratools.io.base import Base, Weight, keys_of
from loratools.io.reader import open_tensors
from loratools.ops._tied_names import is_tied
from loratools.tensors import from_torch
from tests.ops.plain_bake import applied
from tests.ops.tied_plans import EMBED, HEAD, LLAMA, PREFIX, ROWS, adapter, after, base_of, lora, resolved


def test_nothing_happens_where_no_use_changes() -> None:
    plan = resolved(base_of(LLAMA, [EMBED, "model.q.weight"]), adapter(lora("model.q")))
    assert (plan.added, plan.config, plan.missing) == ((), {}, ((),))


def test_lora_on_the_embedding_leaves_the_head_as_it_was() -> None:
    plan = resolved(base_of(LLAMA), adapter(lora("model.embed_tokens", op="linear")))
    (head,) = plan.added
    assert (head.key, head.copied.key, head.change) == (HEAD, EMBED, None)
    assert plan.config == {"": {"tie_word_embeddings": False}}
    assert "tensor of its own" in plan.notes[0]


def test_lora_on_the_head_leaves_the_embedding_as_it_was() -> None:
    module = lora("lm_head")
    plan = resolved(base_of(LLAMA), adapter(module))
    (head,) = plan.added
    assert head.change is not None
    (term,) = head.change.terms
    assert (term.module, term.spans, head.change.weight.key) == (module, ((0, 6, 0),), EMBED)
    assert (plan.changes, plan.missing, plan.matched) == ((), ((),), (1,))


def test_a_dora_of_the_head_knows_its_base_and_its_norm() -> None:
    module = lora("lm_head", magnitude=from_torch("m", torch.ones(6)), magnitude_axis="out")
    (head,) = resolved(base_of(LLAMA), adapter(module)).added
    assert head.change is not None
    (term,) = head.change.terms
    assert term.inside
    assert [piece.weight.key for piece in term.pieces] == [EMBED]


def test_both_uses_change_each_in_its_way() -> None:
    one, two = lora("model.embed_tokens", 1), lora("lm_head", 2)
    before = torch.randn(6, 4)
    embedding, head = after(resolved(base_of(LLAMA), adapter(one), adapter(two)), before)
    torch.testing.assert_close(embedding, before.double() + one.delta().double())
    torch.testing.assert_close(head, before.double() + two.delta().double())


def test_trained_tokens_change_both_uses() -> None:
    plan = resolved(base_of(LLAMA), adapter(tensors=ROWS, trainable_token_indices=[1, 3]))
    assert (plan.added, plan.config) == ((), {})


def test_trained_tokens_of_one_adapter_stay_in_the_head_when_another_unties_it() -> None:
    module = lora("model.embed_tokens")
    tokens = adapter(tensors=ROWS, trainable_token_indices=[1, 3])
    before = torch.zeros(6, 4)
    embedding, head = after(resolved(base_of(LLAMA), tokens, adapter(module)), before)
    rows = torch.zeros(6, 4).double()
    rows[[1, 3]] = 3.0
    torch.testing.assert_close(head, rows)
    torch.testing.assert_close(embedding, rows + module.delta().double())


@pytest.mark.parametrize(("twice", "tied"), [(1.0, True), (2.0, False)])
def test_both_saved_alike_stay_tied_and_apart_they_do_not(twice: float, tied: bool) -> None:
    tensors = {PREFIX + EMBED: torch.ones(6, 4), PREFIX + HEAD: torch.full((6, 4), twice)}
    plan = resolved(base_of(LLAMA), adapter(tensors=tensors))
    assert (not plan.added) == tied
    assert plan.missing == ((),)
    embedding, head = after(plan, torch.zeros(6, 4))
    assert (float(embedding[0, 0]), float(head[0, 0])) == (1.0, twice)


def test_a_saved_embedding_alone_unties_unless_it_was_trained_tied() -> None:
    tensors = {PREFIX + EMBED: torch.ones(6, 4)}
    assert len(resolved(base_of(LLAMA), adapter(tensors=tensors)).added) == 1
    assert not resolved(base_of(LLAMA), adapter(tensors=tensors, ensure_weight_tying=True)).added


def test_a_grown_vocabulary_stays_tied_and_is_told() -> None:
    tensors = {PREFIX + EMBED: torch.ones(9, 4), PREFIX + HEAD: torch.ones(9, 4)}
    plan = resolved(base_of(LLAMA), adapter(tensors=tensors))
    assert (plan.added, plan.config) == ((), {"": {"vocab_size": 9}})
    alone = {PREFIX + EMBED: torch.ones(9, 4)}
    with pytest.raises(ShapeError, match=r"9 rows, lm_head.weight 6"):
        resolved(base_of(LLAMA), adapter(tensors=alone))


def test_a_nested_configuration_is_untied_in_both_places() -> None:
    config = {"model_type": "llava", "text_config": {"tie_word_embeddings": True, "vocab_size": 6}}
    key = "model.language_model.embed_tokens.weight"
    plan = resolved(base_of(config, [key]), adapter(lora("model.language_model.embed_tokens")))
    assert plan.config[""] == {
        "tie_word_embeddings": False,
        "text_config": {"tie_word_embeddings": False, "vocab_size": 6},
    }
    assert plan.added[0].key == HEAD


def test_the_bias_that_the_same_switch_ties_gets_a_tensor_too() -> None:
    config = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    keys = ["bert.embeddings.word_embeddings.weight", "cls.predictions.bias"]
    plan = resolved(base_of(config, keys), adapter(lora("bert.embeddings.word_embeddings")))
    assert [(each.key, each.copied.key) for each in plan.added] == [
        ("cls.predictions.decoder.weight", keys[0]),
        ("cls.predictions.decoder.bias", keys[1]),
    ]


def test_names_of_first_releases_and_of_other_heads() -> None:
    gpt2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    assert resolved(base_of(gpt2, ["wte.weight"]), adapter(lora("wte"))).added[0].key == HEAD
    whisper = {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}
    keys = ["model.decoder.embed_tokens.weight"]
    assert resolved(base_of(whisper, keys), adapter(lora("proj_out"))).added[0].key == "proj_out.weight"


@pytest.mark.parametrize(
    "config",
    [
        {**LLAMA, "tie_word_embeddings": False},
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        {**LLAMA, "architectures": ["LlamaModel"]},
    ],
)
def test_models_that_are_not_tied_or_have_no_head_are_left_alone(config: dict[str, Any]) -> None:
    found = adapter(lora("model.embed_tokens"), lora("lm_head"))
    plan = resolved(base_of(config), found)
    assert (plan.added, plan.missing, plan.matched) == ((), (("lm_head",),), (1,))


def test_a_head_of_its_own_is_no_tie() -> None:
    plan = resolved(base_of(LLAMA, [EMBED, HEAD]), adapter(lora("model.embed_tokens")))
    assert (plan.added, plan.config) == ((), {})


def test_without_a_configuration_nothing_is_guessed() -> None:
    found = adapter(lora("model.embed_tokens"))
    with pytest.raises(UnsupportedKindError, match=r"nothing says whether .* Give the model's folder"):
        resolved(base_of({}), found)
    # A text encoder in one file has no head.
    assert not resolved(base_of({}, ["shared.weight"]), adapter(lora("shared"))).added


def test_uses_that_the_model_cannot_have_apart_are_refused() -> None:
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    base = base_of(config, ["shared.weight", "decoder.q.weight"])
    with pytest.raises(UnsupportedKindError, match="t5 model whose embeddings are not tied"):
        resolved(base, adapter(lora("shared")))


def test_a_head_of_another_shape_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"\[7, 4\].*\[6, 4\]"):
        resolved(base_of(LLAMA), adapter(lora("lm_head", shape=(7, 4))))


def one_storage(*keys: str) -> Base:
    weights = {key: Weight(key, (6, 4), "F32", "model.bin", 64) for key in keys}
    return Base("model.bin", {"": weights}, configs={"": LLAMA})


def test_keys_of_one_storage_change_alike_or_not_at_all() -> None:
    base = one_storage(EMBED, HEAD)
    plan = resolved(base, adapter(tensors=ROWS, trainable_token_indices=[1, 3]))
    assert [change.weight.key for change in plan.changes] == [EMBED, HEAD]
    assert plan.changes[0].terms == plan.changes[1].terms
    alike = {PREFIX + EMBED: torch.ones(6, 4), PREFIX + HEAD: torch.ones(6, 4)}
    assert len(resolved(base, adapter(tensors=alike)).changes) == 2
    with pytest.raises(UnsupportedKindError, match="one tensor in the file") as caught:
        resolved(base, adapter(lora("model.embed_tokens")))
    assert caught.value.keys == (EMBED, HEAD)
    with pytest.raises(UnsupportedKindError, match="one tensor in the file"):
        resolved(one_storage("a.weight", "b.weight"), adapter(lora("a")))


def test_the_oracles_tied_model_has_no_tie_to_settle(shared: Path) -> None:
    folder = shared / "oracle" / "peft_bake__llama_tied_lm_head"
    base, found = keys_of(folder / "input" / "base"), lt.load(folder / "input" / "adapter")
    plan = resolved(base._replace(configs={"": LLAMA}), found)
    assert (plan.added, plan.missing) == ((), ((),))
    with (
        open_tensors(folder / "input" / "base" / "model.safetensors") as before,
        open_tensors(folder / "expected" / "merged.safetensors") as merged,
    ):
        (change,) = plan.changes
        baked = applied(change.terms, before.tensors[change.weight.key].load())
        torch.testing.assert_close(
            baked.float(), merged.tensors[change.weight.key].load(), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({}, None),
        ({"model_type": "newcomer"}, None),
        ({"model_type": "gpt2"}, True),
        ({"model_type": "llama"}, False),
        ({"model_type": "newcomer", "tie_word_embeddings": True}, True),
        ({"model_type": "newcomer", "text_config": {"tie_word_embeddings": False}}, False),
        ({"architectures": ["BertModel"], "model_type": "bert"}, False),
        ({"architectures": [], "model_type": "bert"}, True),
    ],
)
def test_what_a_configuration_says_of_the_tie(config: dict[str, Any], tied: bool | None) -> None:
    assert is_tied(config) is tied
