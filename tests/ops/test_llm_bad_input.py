"""Adapters of language models that are damaged, contradict themselves, or belong elsewhere: refused, or named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import factories as make
import numpy as np
import pytest
import torch

import loratools as lt
from loratools.errors import LoraError
from loratools.ops import files
from tests.cli.running import invoke
from tests.ops import doctoring

CONFIG = "adapter_config.json"
TARGETS = ["q_proj", "v_proj", "down_proj"]
SAID = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": TARGETS}
ENDLESS = r"((\w|\.)*)*!"


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refused(folder: Path, *arguments: object, says: str = "") -> str:
    """What a command says that fails as it should: status 1, nothing written, no traceback."""
    before = tree(folder)
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    assert tree(folder) == before
    assert "Traceback" not in result.output
    assert "fault in loratools" not in result.stderr
    assert says in result.stderr
    return result.stderr


def unreadable(path: Path) -> LoraError:
    """The error of reading it, in its four parts."""
    with pytest.raises(LoraError) as caught:
        lt.load(path)
    error = caught.value
    assert error.path
    assert error.problem
    assert error.expected
    assert error.todo
    return error


def peft(folder: Path, text: str | None = None, **fields: Any) -> Path:
    made = make.peft(folder)
    if text is not None:
        (made.path / CONFIG).write_text(text, "utf-8")
    return doctoring.edited(made.path, **fields) if fields else made.path


TEXTS = {
    "cut short": ("{", "cannot be read"),
    "empty": ("", "cannot be read"),
    "list": ("[1, 2]", "a JSON list"),
    "null": ("null", "a JSON NoneType"),
    "with a mark in front": ("\ufeff{}", "cannot be read"),
    "nested": ('{"x": ' + "[" * 20000 + "]" * 20000 + "}", "nested more than"),
    "twice": ('{"peft_type": "LORA", "r": 4, "r": 8}', "'r' more than once"),
    "half a character": (json.dumps({**SAID, "revision": "\ud800"}), "cannot be read"),
    "a number without end": (json.dumps(SAID)[:-1] + ', "x": 1' + "0" * 5000 + "}", "cannot be read"),
    "another type": (
        json.dumps({**SAID, "rank_pattern": {"q_proj": "4"}}),
        "rank_pattern of adapter_config.json",
    ),
    "no list": (json.dumps({**SAID, "target_modules": 5}), "target_modules of adapter_config.json is 5"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_configuration_that_is_none_is_refused(case: str, tmp_path: Path) -> None:
    text, problem = TEXTS[case]
    folder = peft(tmp_path / "a", text)
    assert problem in unreadable(folder).problem
    refused(tmp_path, "convert", folder, "-o", tmp_path / "out", "--to", "mlx")
    refused(tmp_path, "merge", folder, folder, "-o", tmp_path / "out")


@pytest.mark.parametrize(
    "text",
    [
        '{"lora_alpha": NaN, ',
        '{"lora_alpha": 1e999, ',
    ],
    ids=["nan", "infinite"],
)
def test_an_alpha_that_is_not_finite_is_refused(text: str, tmp_path: Path) -> None:
    folder = peft(
        tmp_path / "a", text + f'"peft_type": "LORA", "r": 4, "target_modules": {json.dumps(TARGETS)}}}'
    )
    for words in (("convert", folder, "--to", "mlx"), ("merge", folder, folder)):
        assert "inite" in refused(tmp_path, *words, "-o", tmp_path / "out")
    assert {"nonfinite-scale"} <= {each.code for each in lt.doctor(folder).findings}


@pytest.mark.parametrize(
    "text",
    [
        '{"lora_alpha": 1' + "0" * 400 + ", ",
        '{"lora_alpha": 8, "alpha_pattern": {"q_proj": 1' + "0" * 400 + "}, ",
    ],
    ids=["whole", "pattern"],
)
def test_an_alpha_that_no_float_holds_is_refused(text: str, tmp_path: Path) -> None:
    folder = peft(
        tmp_path / "a", text + f'"peft_type": "LORA", "r": 4, "target_modules": {json.dumps(TARGETS)}}}'
    )
    for words in (("convert", folder, "--to", "mlx"), ("merge", folder, folder)):
        refused(tmp_path, *words, "-o", tmp_path / "out", says="which no float holds")
    assert "which no float holds" in " ".join(invoke("doctor", folder).stdout.split())


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_patterns_with_too_many_ways_come_to_an_end(field: str, tmp_path: Path) -> None:
    folder = peft(tmp_path / "a", **{field: {ENDLESS: 4}})
    scales = {module.scale for module in lt.load(folder).modules.values()}
    assert scales == {2.0}
    assert invoke("doctor", folder).exit_code in (0, 1)
    assert invoke("convert", folder, "-o", tmp_path / "out", "--to", "peft").exit_code == 0


def test_targets_with_too_many_ways_come_to_an_end(tmp_path: Path) -> None:
    folder = peft(tmp_path / "a", target_modules=ENDLESS)
    assert any("5 of 5 modules are not among" in note for note in lt.load(folder).notes)
    assert "targets-contradict" in {each.code for each in lt.doctor(folder).findings}


def test_a_pattern_that_no_way_is_known_for_is_refused(tmp_path: Path) -> None:
    folder = peft(tmp_path / "a", alpha_pattern={"(?=(a+)+b)x": 4})
    with pytest.raises(LoraError, match="too many ways") as caught:
        lt.load(folder)
    assert caught.value.expected
    assert caught.value.todo
    refused(tmp_path, "convert", folder, "-o", tmp_path / "out", "--to", "mlx", says="too many ways")


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("text", ["q_proj(", "(" * 5000 + ")" * 5000])
def test_what_is_no_pattern_is_named(field: str, text: str, tmp_path: Path) -> None:
    folder = peft(tmp_path / "a", **{field: {text: 4}})
    assert any(field in note and "no regular expression" in note for note in lt.load(folder).notes)
    assert "pattern-invalid" in {each.code for each in lt.doctor(folder).findings}


@pytest.mark.parametrize("stated", ["LOHA", "VERA", "LROA"])
def test_another_method_than_the_tensors_is_named(stated: str, tmp_path: Path) -> None:
    folder = peft(tmp_path / "a", peft_type=stated)
    adapter = lt.load(folder)
    assert any(f"peft_type of {CONFIG} is {stated}" in note and "LORA" in note for note in adapter.notes)
    assert adapter.kinds == {"lora": 5}
    report = lt.doctor(folder)
    assert not report.ok
    assert "method-contradicts" in {each.code for each in report.findings}


def test_a_configuration_without_a_method_is_named(tmp_path: Path) -> None:
    folder = peft(tmp_path / "a", peft_type=None)
    assert any("states no peft_type" in note for note in lt.load(folder).notes)


def test_a_missing_configuration_is_explained(tmp_path: Path) -> None:
    folder = peft(tmp_path / "a")
    (folder / CONFIG).unlink()
    result = invoke("convert", folder, "-o", tmp_path / "out", "--to", "mlx")
    assert result.exit_code == 0
    assert "a scale of 1 is assumed" in " ".join(result.stdout.split())


@pytest.mark.parametrize("base", ["another architecture", "other widths", "an adapter", "nothing"])
def test_a_base_that_is_another_model_is_refused_by_every_command(base: str, tmp_path: Path) -> None:
    plain, dora = peft(tmp_path / "a"), make.peft(tmp_path / "dora", dora=True).path
    gpt2 = {
        "transformer.h.0.attn.c_attn.weight": torch.zeros(12, 36),
        "transformer.wte.weight": torch.zeros(20, 12),
    }
    make.write_safetensors(tmp_path / "gpt2.safetensors", gpt2, {})
    given = {
        "another architecture": tmp_path / "gpt2.safetensors",
        "other widths": doctoring.base(tmp_path, width=32),
        "an adapter": make.kohya(tmp_path / "sd.safetensors", "sd15").path,
        "nothing": tmp_path / "nothing",
    }[base]
    out = ("-o", tmp_path / "out")
    for words in (
        ("convert", plain, "--to", "mlx", *out),
        ("convert", dora, "--to", "vllm", *out),
        ("merge", plain, plain, *out),
        ("merge", dora, plain, "--rank", 4, *out),
        ("resize", plain, "--rank", 2, *out),
        ("resize", dora, "--rank", 2, *out),
        ("compare", dora, plain),
        ("pack", plain, *out),
        ("doctor", plain),
    ):
        refused(tmp_path, *words, "--base", given)
    refused(tmp_path, "bake", given, plain, "-o", tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("parameters", "shown"), [({"scale": "x"}, "'x'"), ({"scale": True}, "True"), ([1], "[1]")]
)
def test_a_scale_of_mlx_that_is_no_number_is_refused(parameters: object, shown: str, tmp_path: Path) -> None:
    made = make.mlx(tmp_path / "a")
    doctoring.edited(made.path, lora_parameters=parameters)
    assert shown in unreadable(made.path).problem


@pytest.mark.parametrize(
    ("scale", "says"),
    [(float("nan"), "NaN or infinite"), (10**400, "which no float holds")],
    ids=["nan", "whole"],
)
def test_a_scale_of_mlx_that_no_float_holds_is_refused(scale: float, says: str, tmp_path: Path) -> None:
    made = make.mlx(tmp_path / "a")
    doctoring.edited(made.path, lora_parameters={"scale": scale})
    refused(tmp_path, "convert", made.path, "-o", tmp_path / "out", "--to", "peft", says=says)


def test_mlx_without_a_scale_says_what_is_assumed_and_full_that_it_is_not(tmp_path: Path) -> None:
    made = make.mlx(tmp_path / "a")
    doctoring.edited(made.path, lora_parameters={"rank": 4}, num_layers=99)
    assert any("its default of 20 is assumed" in note for note in lt.load(made.path).notes)
    doctoring.edited(made.path, fine_tune_type="full")
    assert "method-contradicts" in {each.code for each in lt.doctor(made.path).findings}


class _Trap:
    """What leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self._path), "w")


def test_pickled_arrays_are_never_executed(tmp_path: Path) -> None:
    folder, trap = tmp_path / "a", tmp_path / "sprung"
    folder.mkdir()
    stem = "model.layers.0.self_attn.q_proj"
    arrays = {
        f"{stem}.lora_a": np.ones((16, 4), np.float32),
        f"{stem}.lora_b": np.array([_Trap(trap)], dtype=object),
    }
    np.savez(folder / "adapters.npz", **arrays)
    refused(tmp_path, "convert", folder, "-o", tmp_path / "out", "--to", "peft", says="Python objects")
    assert not trap.exists()


def _gguf(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    said = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "model" / "config.json").write_text(json.dumps(said))
    words = ("-o", tmp_path / "a.gguf", "--to", "gguf", "--base", tmp_path / "model")
    assert invoke("convert", peft(tmp_path / "a"), *words).exit_code == 0
    return tmp_path / "a.gguf"


def test_a_gguf_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = _gguf(tmp_path).read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in range(0, len(whole), 64):
        cut.write_bytes(whole[:length])
        with pytest.raises(LoraError) as caught:
            files.load(cut)
        assert caught.value.path == str(cut)
        assert caught.value.todo


def test_a_gguf_file_of_an_unknown_architecture_is_refused_with_near_ones(tmp_path: Path) -> None:
    path = _gguf(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"llama", b"llamx"))
    said = refused(tmp_path, "convert", path, "-o", tmp_path / "out", "--to", "peft", says="llamx")
    assert "Did you mean: llama" in said


def test_a_base_of_an_unknown_type_offers_near_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistrall", "num_attention_heads": 4}))
    words = ("-o", tmp_path / "out.gguf", "--to", "gguf", "--base", tmp_path / "config.json")
    assert (
        "mistral" in refused(tmp_path, "convert", peft(tmp_path / "a"), *words).partition("Did you mean")[2]
    )


def test_inputs_for_different_bases_are_named(tmp_path: Path) -> None:
    first = make.peft(tmp_path / "a", config={"base_model_name_or_path": "org/one"}).path
    other = make.peft(tmp_path / "b", make.GPT2, config={"base_model_name_or_path": "org/two"}).path
    result = invoke("merge", first, other, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0
    notes = [note for note in json.loads(result.stdout)["notes"] if "base models" in note]
    assert notes == ["the inputs name 2 base models: org/one (1), org/two (1), and have no module in common"]


@pytest.mark.parametrize("text", ["{", "[" * 20000 + "]" * 20000, '{"added_tokens": [{"id": "5"}]}'])
def test_a_tokenizer_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    rows = {"base_model.model.model.embed_tokens.weight": torch.ones(21, 16)}
    paths = [
        make.peft(tmp_path / name, seed=seed, extra=rows, config={"modules_to_save": ["embed_tokens"]}).path
        for seed, name in enumerate("ab")
    ]
    for path in paths:
        (path / "tokenizer.json").write_text(text)
    refused(
        tmp_path, "merge", *paths, "-o", tmp_path / "out", "--full-modules", "average", says="tokenizer.json"
    )


@pytest.mark.parametrize("damage", ["cut", "empty", "configuration", "link"])
def test_a_broken_member_of_a_library_is_named_or_left_out(damage: str, tmp_path: Path) -> None:
    library = tmp_path / "library"
    make.peft(library / "whole")
    made = make.peft(library / "broken", seed=2)
    if damage == "configuration":
        (made.path / CONFIG).write_text("{")
    else:
        data = made.file.read_bytes()
        made.file.unlink()
        if damage == "link":
            made.file.symlink_to(tmp_path / "nowhere")
        else:
            made.file.write_bytes(data[:200] if damage == "cut" else b"")
    assert "broken" in refused(tmp_path, "pack", library, "-o", tmp_path / "out")
    assert invoke("pack", library, "-o", tmp_path / "out", "--skip-unfit").exit_code == 0
    assert (tmp_path / "out" / "adapters" / "whole").is_dir()
