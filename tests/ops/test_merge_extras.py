"""What lies beside the factors in a merge: modules saved in full, biases, added words, and DoRA."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import factories as make
import pytest
import torch
from safetensors.torch import save_file

import loratools as lt
from loratools.errors import (
    LayoutError,
    LoraError,
    MalformedFileError,
    OptionError,
    ShapeError,
    UnsupportedKindError,
)
from loratools.ops.merge import merge, merge_files, merge_recipe
from tests.cli.running import invoke

PREFIX = "base_model.model."
HEAD = PREFIX + "lm_head.weight"
EMBEDDING = PREFIX + "model.embed_tokens.weight"
ROWS = PREFIX + "model.embed_tokens.token_adapter.trainable_tokens_delta"
Q = "model.layers.0.self_attn.q_proj"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapter(
    folder: Path,
    extra: Mapping[str, torch.Tensor],
    words: Mapping[str, int] | None = None,
    seed: int = 0,
    **config: Any,
) -> lt.Adapter:
    """An adapter with tensors beside its factors, and maybe a tokenizer of five own words beside it."""
    made = make.peft(folder, seed=seed, extra=extra, config=config)
    if words is not None:
        said = {"model": {"vocab": {letter: place for place, letter in enumerate("abcde")}}}
        said["added_tokens"] = [{"id": place, "content": word} for word, place in words.items()]
        (folder / "tokenizer.json").write_text(json.dumps(said))
    return lt.load(made.path)


def base(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir()
    save_file({key.replace("__", "."): value for key, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def heads(tmp_path: Path) -> tuple[list[lt.Adapter], torch.Tensor, torch.Tensor]:
    one, two = normal(6, 4, seed=1), normal(6, 4, seed=2)
    saved = {"modules_to_save": ["lm_head"]}
    inputs = [adapter(tmp_path / "a", {HEAD: one}, **saved), adapter(tmp_path / "b", {HEAD: two}, **saved)]
    return inputs, one, two


def of(merged: lt.Adapter, key: str = HEAD) -> torch.Tensor:
    return merged.extras[key].load()


def test_modules_that_differ_are_refused_with_what_can_be_done(tmp_path: Path) -> None:
    inputs, _, _ = heads(tmp_path)
    with pytest.raises(LayoutError, match=r"lm_head.*--full-modules average, first") as caught:
        merge(inputs)
    assert caught.value.keys == (HEAD, HEAD)


def test_each_way_of_merging_full_modules(tmp_path: Path) -> None:
    inputs, one, two = heads(tmp_path)
    start = normal(6, 4, seed=3)
    model = base(tmp_path / "base", lm_head__weight=start)
    weights = [0.6, 0.2]
    wanted = {
        "first": one,
        "2": two,
        "average": (0.6 * one + 0.2 * two) / 0.8,
        "sum": start + 0.6 * (one - start) + 0.2 * (two - start),
    }
    for way, values in wanted.items():
        merged, _ = merge(inputs, weights=weights, full_modules=way, base=model)
        torch.testing.assert_close(of(merged), values)
        assert merged.config["modules_to_save"] == ["lm_head"]
    carried, report = merge(inputs[:1], weights=[0.5])
    assert torch.equal(of(carried), one)
    assert any("carried whole" in note for note in report.notes)
    half, report = merge(inputs[:1], weights=[0.5], full_modules="sum", base=model)
    torch.testing.assert_close(of(half), start + 0.5 * (one - start))
    assert not any("carried whole" in note for note in report.notes)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"full_modules": "sum"}, "no base model"),
        ({"full_modules": "3"}, "1 to 2"),
        ({"full_modules": "last"}, "'last'"),
        ({"full_modules": "average", "weights": [1, -1]}, "add up to 0"),
    ],
)
def test_ways_that_are_none_are_refused(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    inputs, _, _ = heads(tmp_path)
    with pytest.raises(OptionError, match=match):
        merge(inputs, **options)


def test_the_input_that_is_named_has_to_hold_it(tmp_path: Path) -> None:
    inputs, _, _ = heads(tmp_path)
    inputs.append(adapter(tmp_path / "c", {}))
    with pytest.raises(OptionError, match=r"input 3 has no lm_head\.weight"):
        merge(inputs, full_modules=3)


def test_heads_of_other_sizes_are_no_average(tmp_path: Path) -> None:
    key = PREFIX + "score.weight"
    inputs = [adapter(tmp_path / str(size), {key: normal(size, 4)}) for size in (2, 3)]
    with pytest.raises(ShapeError, match=r"\[2, 4\] against \[3, 4\]"):
        merge(inputs, full_modules="average")


def test_biases_are_summed_as_differences_from_the_base(tmp_path: Path) -> None:
    """A bias of an adapted module lies in PEFT's wrapper, whether or not it did so in the input."""
    start, one, two = normal(16, seed=1), normal(16, seed=2), normal(16, seed=3)
    inputs = [
        adapter(tmp_path / "a", {f"{PREFIX}{Q}.bias": one}, bias="all"),
        adapter(tmp_path / "b", {f"{PREFIX}{Q}.base_layer.bias": two}, bias="lora_only"),
    ]
    assert any(target.path == Q for target in inputs[0].modules)
    with pytest.raises(LayoutError, match=r"q_proj\.bias.*with --base"):
        merge(inputs)
    model = base(
        tmp_path / "base",
        **{f"{Q}.bias".replace(".", "__"): start, f"{Q}.weight".replace(".", "__"): normal(16, 16)},
    )
    merged, _ = merge(inputs, weights=[0.7, -0.4], base=model)
    assert [*merged.extras] == [f"{PREFIX}{Q}.base_layer.bias"]
    torch.testing.assert_close(
        of(merged, f"{PREFIX}{Q}.base_layer.bias"), start + 0.7 * (one - start) - 0.4 * (two - start)
    )
    assert merged.config["bias"] == "all"


def test_rows_of_words_are_united(tmp_path: Path) -> None:
    start, one, two = normal(8, 4, seed=1), normal(2, 4, seed=2), normal(2, 4, seed=3)
    inputs = [
        adapter(tmp_path / "a", {ROWS: one}, trainable_token_indices={"embed_tokens": [6, 1]}),
        adapter(tmp_path / "b", {ROWS: two}, trainable_token_indices={"embed_tokens": [6, 3]}),
    ]
    with pytest.raises(LayoutError, match="embed_tokens"):
        merge(inputs)
    merged, _ = merge(inputs, weights=[0.5, 2], full_modules="average")
    assert merged.config["trainable_token_indices"] == {"embed_tokens": [1, 3, 6]}
    torch.testing.assert_close(
        of(merged, ROWS), torch.stack([one[1], two[1], (0.5 * one[0] + 2 * two[0]) / 2.5])
    )
    model = base(tmp_path / "base", model__embed_tokens__weight=start)
    merged, _ = merge(inputs, weights=[0.5, 2], full_modules="sum", base=model)
    wanted = start[[1, 3, 6]] + torch.stack(
        [
            0.5 * (one[1] - start[1]),
            2 * (two[1] - start[3]),
            0.5 * (one[0] - start[6]) + 2 * (two[0] - start[6]),
        ]
    )
    torch.testing.assert_close(of(merged, ROWS), wanted)


def vocabularies(tmp_path: Path, *, tokenizers: bool = True) -> tuple[list[lt.Adapter], list[torch.Tensor]]:
    """Five words of the base; one adds <x> and <y>, the other <y> and <z>, each from row 5 on."""
    common = normal(5, 4, seed=9)
    one, two = torch.cat([common, normal(2, 4, seed=1)]), torch.cat([common, normal(3, 4, seed=2)])
    words = [{"<x>": 5, "<y>": 6}, {"<y>": 5, "<z>": 6, "<w>": 7}]
    inputs = [
        adapter(tmp_path / name, {EMBEDDING: table, HEAD: -table}, own if tokenizers else None)
        for name, table, own in zip("ab", (one, two), words, strict=True)
    ]
    return inputs, [one, two]


def test_added_words_are_united_and_their_ids_reported(tmp_path: Path) -> None:
    inputs, (one, two) = vocabularies(tmp_path)
    with pytest.raises(LayoutError, match="embed_tokens"):
        merge(inputs)
    merged, report = merge(inputs, weights=[3, 1], full_modules="average")
    wanted = torch.cat([one[:6], (3 * one[6:] + two[5:6]) / 4, two[7:], two[6:7]])
    found = {"<x>": 5, "<y>": 6, "<w>": 7, "<z>": 8}
    torch.testing.assert_close(of(merged, EMBEDDING), wanted[[0, 1, 2, 3, 4, 5, 6, 7, 8]])
    torch.testing.assert_close(of(merged, HEAD), -wanted)
    notes = " ".join(report.notes)
    assert "b/adapter_model.safetensors have other ids now: <y> 5 -> 6, <z> 6 -> 8" in notes
    assert (
        "9 rows; the result's tokenizer has to have these words: "
        + ", ".join(f"{word} {place}" for word, place in found.items())
        in notes
    )


def test_the_first_input_decides_on_words_that_both_have(tmp_path: Path) -> None:
    inputs, (one, two) = vocabularies(tmp_path)
    merged, _ = merge(inputs, full_modules="first")
    assert torch.equal(of(merged, EMBEDDING)[:7], one)
    merged, _ = merge(inputs, full_modules="2")
    assert torch.equal(of(merged, EMBEDDING)[6], two[5])


def test_vocabularies_without_tokenizers_are_refused(tmp_path: Path) -> None:
    inputs, _ = vocabularies(tmp_path, tokenizers=False)
    with pytest.raises(LayoutError, match=r"7, .*8 rows\), and 2 of them have no tokenizer") as caught:
        merge(inputs, full_modules="average")
    assert "added_tokens.json" in caught.value.expected


@pytest.mark.parametrize("content", ["[", "[]", '{"added_tokens": [{"id": "5"}]}', '{"added_tokens": 3}'])
def test_a_damaged_tokenizer_is_named(content: str, tmp_path: Path) -> None:
    inputs, _ = vocabularies(tmp_path)
    (tmp_path / "a" / "tokenizer.json").write_text(content)
    with pytest.raises(MalformedFileError, match=r"a.tokenizer\.json"):
        merge(inputs, full_modules="average")


def test_words_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    inputs, _ = vocabularies(tmp_path)
    (tmp_path / "a" / "added_tokens.json").write_text('{"<far>": 70}')
    with pytest.raises(MalformedFileError, match="<far> 70"):
        merge(inputs, full_modules="average")


def test_what_one_saves_and_another_adapts_is_refused(tmp_path: Path) -> None:
    one = adapter(tmp_path / "a", {})
    path = next(iter(one.modules)).path
    shape = next(iter(one.modules.values())).shape
    assert shape is not None
    two = make.peft(tmp_path / "b", make.GPT2, extra={f"{PREFIX}{path}.weight": normal(*shape)})
    with pytest.raises(LayoutError, match=rf"{path}: saved by"):
        merge([one, lt.load(two.path)])


def test_what_is_meant_for_both_uses_of_an_embedding_is_kept_apart(tmp_path: Path) -> None:
    table = normal(6, 4)
    inputs = [
        adapter(tmp_path / "a", {EMBEDDING: table}, ensure_weight_tying=True),
        adapter(tmp_path / "b", {EMBEDDING: table}, ensure_weight_tying=False),
    ]
    with pytest.raises(LayoutError, match="ensure_weight_tying"):
        merge(inputs)
    merged, _ = merge([inputs[1], adapter(tmp_path / "c", {EMBEDDING: table}), inputs[0]], weights=[0, 0, 1])
    assert merged.config["ensure_weight_tying"] is True


def test_dora_needs_its_base_and_a_rank(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "a", dora=True)
    found = lt.load(made.path)
    shapes = {target.path: module.shape for target, module in found.modules.items()}
    tensors = {
        f"{path}.weight": normal(*shape, seed=4) for path, shape in shapes.items() if shape is not None
    }
    model = base(tmp_path / "base", **{key.replace(".", "__"): value for key, value in tensors.items()})
    with pytest.raises(UnsupportedKindError, match=r"DoRA.*--base"):
        merge([found])
    with pytest.raises(OptionError, match=r"--rank"):
        merge([found], base=model)
    merged, report = merge([found, found], weights=[1, 0.5], base=model, rank=64)
    for target, module in found.modules.items():
        wanted = 1.5 * module.delta(tensors[f"{target.path}.weight"])
        torch.testing.assert_close(merged.modules[target].delta(), wanted, rtol=1e-4, atol=1e-4)
    assert report.energy == pytest.approx(1.0)
    cut, report = merge([found], base=model, rank=2)
    target, module = next(iter(cut.modules.items()))
    assert module.rank == 2
    truth = found.modules[target].delta(tensors[f"{target.path}.weight"]).double()
    lost = float((module.delta().double() - truth).norm() / truth.norm())
    own = next(each for each in report.modules if each.target == str(target))
    assert lost == pytest.approx((1 - own.kept) ** 0.5, rel=1e-3)
    with pytest.raises(LoraError, match=r"q_proj|no weight"):
        merge([found], base=base(tmp_path / "other", x__weight=normal(2, 2)), rank=2)


def test_a_recipe_repeats_it_and_the_command_takes_it(tmp_path: Path) -> None:
    heads(tmp_path)
    model = base(tmp_path / "base", lm_head__weight=normal(6, 4, seed=3))
    paths = [tmp_path / "a", tmp_path / "b"]
    merge_files(paths, tmp_path / "one", full_modules="sum", base=model, save_recipe=tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["base"] == "base"
    merge_recipe(tmp_path / "r.json", tmp_path / "two")
    done = invoke(
        "merge",
        *map(str, paths),
        "-o",
        str(tmp_path / "three"),
        "--full-modules",
        "sum",
        "--base",
        str(model),
    )
    assert done.exit_code == 0, done.output
    files = [(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two", "three")]
    assert len({file.read_bytes() for file in files}) == 1
    wrong = invoke("merge", *map(str, paths), "-o", str(tmp_path / "x"), "--full-modules", "last")
    assert wrong.exit_code == 2
    assert "--full-modules" in wrong.output
