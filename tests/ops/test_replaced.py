"""What PEFT saves in full: whole modules, biases, resized embeddings and rows of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import loratools as lt
from loratools.errors import MalformedFileError, OptionError, ShapeError
from loratools.io.base import Base, Weight, keys_of
from loratools.io.reader import open_tensors
from loratools.model import Adapter, Layout
from loratools.ops._changes import Change, Term
from loratools.ops._replaced import Find, is_vocabulary, terms, vocabulary, wrapped
from loratools.tensors import from_torch
from tests.ops.plain_bake import applied

PREFIX = "base_model.model."
SHAPES = {
    "model.embed_tokens.weight": (6, 4),
    "lm_head.weight": (6, 4),
    "classifier.dense.weight": (4, 4),
    "model.q.weight": (4, 4),
    "model.q.bias": (4,),
}


def base_of(shapes: Mapping[str, tuple[int, ...]] = SHAPES, **config: Any) -> Base:
    weights = {key: Weight(key, shape, "F32", "base.safetensors") for key, shape in shapes.items()}
    return Base("base.safetensors", {"": weights}, configs={"": config})


def find_in(base: Base) -> Find:
    def find(_: str, key: str) -> tuple[str, Weight] | None:
        weight = base.parts[""].get(key)
        return None if weight is None else ("", weight)

    return find


def adapter(tensors: Mapping[str, torch.Tensor], layout: str = "peft", **config: Any) -> Adapter:
    extras = {key: from_torch(key, tensor) for key, tensor in tensors.items()}
    return Adapter({}, extras, layout=Layout(layout), config=config)


def roles(
    found: Adapter, base: Base | None = None, strength: float = 1.0
) -> tuple[list[tuple[str, str]], list[str]]:
    base = base or base_of()
    made, missing = terms(found, 0, strength, base, find_in(base))
    return [(weight.key, term.role) for _, weight, term in made], missing


@pytest.mark.parametrize("case", ["peft_bake__llama_trainable_tokens", "peft_bake__qwen2_bias_all"])
def test_oracle_extras_become_what_peft_merges(case: str, shared: Path) -> None:
    folder = shared / "oracle" / case
    found, base = lt.load(folder / "input" / "adapter"), keys_of(folder / "input" / "base")
    made, missing = terms(found, 0, 1.0, base, find_in(base))
    assert missing == []
    assert len(made) == len(found.extras)
    with (
        open_tensors(folder / "input" / "base" / "model.safetensors") as before,
        open_tensors(folder / "expected" / "merged.safetensors") as merged,
    ):
        for _, weight, term in made:
            after = applied([term], before.tensors[weight.key].load())
            assert torch.equal(after.float(), merged.tensors[weight.key].load())


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("lm_head.weight", "lm_head.weight"),
        (PREFIX + "lm_head.weight", "lm_head.weight"),
        (PREFIX + PREFIX + "lm_head.weight", "lm_head.weight"),
        (PREFIX + "_orig_mod.lm_head.modules_to_save.weight", "lm_head.weight"),
        (PREFIX + "lm_head.modules_to_save.default.weight", "lm_head.weight"),
        (PREFIX + "embed_tokens.weight", "model.embed_tokens.weight"),
        (PREFIX + "model.language_model.embed_tokens.weight", "model.embed_tokens.weight"),
    ],
)
def test_a_saved_module_is_found_however_it_is_spelt(name: str, key: str) -> None:
    assert roles(adapter({name: torch.ones(6, 4)})) == ([(key, "replace")], [])


def test_biases_are_replaced_inside_and_outside_of_wrapped_modules() -> None:
    for name in ("model.q.base_layer.bias", "model.q.bias"):
        assert roles(adapter({PREFIX + name: torch.ones(4)})) == ([("model.q.bias", "replace")], [])


def test_the_bases_own_values_count_only_where_the_vocabulary_grew() -> None:
    kept = {
        PREFIX + "model.embed_tokens.base_layer.weight": torch.ones(6, 4),
        PREFIX + "lm_head.original_module.weight": torch.ones(6, 4),
        PREFIX + "head_of_its_own.original_module.weight": torch.ones(6, 4),
    }
    assert roles(adapter(kept)) == ([], [])
    grown = {
        PREFIX + "model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 4),
        PREFIX + "model.embed_tokens.token_adapter.base_layer.weight": torch.ones(9, 4),
    }
    found = adapter(grown, trainable_token_indices=[1, 8])
    assert roles(found)[0] == [
        ("model.embed_tokens.weight", "replace"),
        ("model.embed_tokens.weight", "rows"),
    ]


def test_a_tensor_that_is_saved_under_two_names_counts_once() -> None:
    tensors = {
        PREFIX + "lm_head.modules_to_save.weight": torch.ones(6, 4),
        PREFIX + "lm_head.original_module.weight": torch.zeros(6, 4),
        PREFIX + "lm_head.weight": torch.ones(6, 4),
    }
    base = base_of()
    made, missing = terms(adapter(tensors), 0, 1.0, base, find_in(base))
    ((_, weight, term),) = made
    assert term.tensor is not None
    assert (weight.key, term.tensor.name, missing) == ("lm_head.weight", PREFIX + "lm_head.weight", [])


def test_what_the_base_lacks_is_named_and_other_layouts_have_nothing_to_bake() -> None:
    name = PREFIX + "score.weight"
    assert roles(adapter({name: torch.ones(2, 4)})) == ([], [name])
    strange = {"bundle_emb.x.string_to_param.*": torch.ones(1, 4), "lora_te_q.alpha": torch.ones(())}
    assert roles(adapter(strange, "kohya")) == ([], ["bundle_emb.x.string_to_param.*"])


@pytest.mark.parametrize(
    ("name", "config", "places"),
    [
        ("embed_tokens.token_adapter.trainable_tokens_delta", {"trainable_token_indices": [5, 0]}, (5, 0)),
        (
            "model.embed_tokens.token_adapter.trainable_tokens_delta.default",
            {"trainable_token_indices": {"lm_head": [1], "embed_tokens": [2, 3]}},
            (2, 3),
        ),
        ("model.embed_tokens.trainable_tokens_delta", {"token_indices": [4, 1]}, (4, 1)),
    ],
)
def test_rows_go_where_the_configuration_says(
    name: str, config: dict[str, Any], places: tuple[int, ...]
) -> None:
    base = base_of()
    found = adapter({PREFIX + name: torch.ones(2, 4)}, **config)
    made, missing = terms(found, 3, 0.5, base, find_in(base))
    ((_, weight, term),) = made
    assert (weight.key, term.role, term.places) == ("model.embed_tokens.weight", "rows", places)
    assert (term.adapter, term.strength, missing) == (3, 0.5, [])


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({}, MalformedFileError, "does not say which rows"),
        ({"trainable_token_indices": {"wte": [1, 2]}}, MalformedFileError, "does not say which rows"),
        ({"trainable_token_indices": ["a", "b"]}, MalformedFileError, "does not say which rows"),
        ({"trainable_token_indices": [1, 6]}, ShapeError, "2 rows up to 6"),
        ({"trainable_token_indices": [1]}, ShapeError, "1 rows up to 1"),
    ],
)
def test_rows_that_cannot_be_placed_are_refused(
    config: dict[str, Any], error: type[Exception], message: str
) -> None:
    name = PREFIX + "model.embed_tokens.token_adapter.trainable_tokens_delta"
    with pytest.raises(error, match=message):
        roles(adapter({name: torch.ones(2, 4)}, **config))


def test_only_a_vocabulary_may_have_more_rows_and_only_with_a_weight_of_one() -> None:
    head = adapter({PREFIX + "lm_head.weight": torch.ones(9, 4)})
    assert roles(head)[0] == [("lm_head.weight", "replace")]
    with pytest.raises(OptionError, match=r"9 rows in the adapter and 6 .* weight of 1"):
        roles(head, strength=0.5)
    for name, shape in (("classifier.dense.weight", (9, 4)), ("lm_head.weight", (6, 5))):
        with pytest.raises(ShapeError, match="only a vocabulary may have more or fewer rows"):
            roles(adapter({PREFIX + name: torch.ones(shape)}))


def changes(
    base: Base, shapes: Mapping[str, tuple[int, ...]], adapters: Callable[[str], int]
) -> list[Change]:
    made = []
    for key, shape in shapes.items():
        term = Term(adapters(key), 1.0, "replace", tensor=from_torch(key, torch.ones(shape)))
        made.append(Change("", base.parts[""][key], (term,), key, "language_model"))
    return made


def test_a_resized_vocabulary_is_told_to_the_configuration() -> None:
    base = base_of()
    both = {"model.embed_tokens.weight": (9, 4), "lm_head.weight": (9, 4)}
    assert vocabulary(base, changes(base, both, lambda _: 0)) == {"": {"vocab_size": 9}}
    nested = base_of(text_config={"vocab_size": 6, "hidden_size": 4})
    said = vocabulary(nested, changes(nested, both, lambda _: 0))
    assert said == {"": {"text_config": {"vocab_size": 9, "hidden_size": 4}}}
    same = {"lm_head.weight": (6, 4)}
    assert vocabulary(base, changes(base, same, lambda _: 0)) == {}


@pytest.mark.parametrize("sizes", [(9, None), (None, 9), (9, 8)])
def test_vocabularies_of_several_sizes_are_refused(sizes: tuple[int | None, int | None]) -> None:
    base = base_of()
    keys = ("model.embed_tokens.weight", "lm_head.weight")
    shapes = {key: (size, 4) for key, size in zip(keys, sizes, strict=True) if size is not None}
    with pytest.raises(ShapeError, match="several sizes"):
        vocabulary(base, changes(base, shapes, lambda _: 0))


def test_two_adapters_cannot_both_change_a_tensor_that_one_resizes() -> None:
    base = base_of()
    (one,) = changes(base, {"lm_head.weight": (9, 4)}, lambda _: 0)
    (two,) = changes(base, {"lm_head.weight": (6, 4)}, lambda _: 1)
    with pytest.raises(OptionError, match="change a tensor that one of them resizes"):
        vocabulary(base, [one._replace(terms=one.terms + two.terms)])


def test_names_of_vocabularies() -> None:
    assert is_vocabulary("transformer.wte.weight")
    assert is_vocabulary("cls.predictions.decoder.bias")
    assert not is_vocabulary("model.layers.0.self_attn.q_proj.weight")
    assert not is_vocabulary("model.embed_positions.weight")


@given(st.lists(st.sampled_from(["model", "transformer", "language_model", "x"]), min_size=1, max_size=4))
def test_wrapped_names_begin_with_the_name_itself_and_are_different(words: list[str]) -> None:
    key = ".".join([*words, "lm_head.weight"])
    names = [*wrapped(key)]
    assert names[0] == key
    assert len({*names}) == len(names)
    assert all(name.endswith("lm_head.weight") for name in names)


@pytest.mark.peers
@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens", "lm_head"], None])
def test_peft_merges_the_same(saved: list[str] | None, resized: bool, tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        attention_bias=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    if resized:
        model.resize_token_embeddings(20)
    rows = None if saved else [1, 15]
    lora = peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        modules_to_save=saved,
        trainable_token_indices=rows,
        bias="all",
        init_lora_weights=False,
    )
    tuned = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for name, value in tuned.named_parameters():
            if value.requires_grad and "lora_" not in name:
                value.add_(1.0)
    tuned.save_pretrained(str(tmp_path / "adapter"))
    found, base = lt.load(tmp_path / "adapter"), keys_of(tmp_path / "base")
    made, missing = terms(found, 0, 1.0, base, find_in(base))
    assert missing == []
    by_key: dict[str, list[Term]] = {}
    for _, weight, term in made:
        by_key.setdefault(weight.key, []).append(term)
    merged = tuned.merge_and_unload().state_dict()
    with open_tensors(tmp_path / "base" / "model.safetensors") as before:
        for key, ref in before.tensors.items():
            if "q_proj.weight" in key:
                continue
            assert torch.equal(applied(by_key.get(key, []), ref.load()).float(), merged[key]), key
