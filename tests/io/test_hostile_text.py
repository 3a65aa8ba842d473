"""JSON, YAML and lists of names that were written to harm: deep, huge, twice, and names that lead elsewhere."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

import loratools as lt
from loratools import io
from loratools.errors import LayoutError, LoraError, MalformedFileError, ReadError
from loratools.io import json_text
from loratools.io._model_files import read_index, read_json
from loratools.io.base import keys_of
from loratools.ops import recipe
from loratools.tensors import from_torch
from tests import factories as make

torch = pytest.importorskip("torch")

DEEP = {
    "lists": "[" * 5000 + "]" * 5000,
    "objects": '{"a":' * 5000 + "1" + "}" * 5000,
    # json follows these, and printing or comparing them would not
    "lists that json follows": "[" * 400 + "]" * 400,
}


@pytest.mark.parametrize("case", DEEP)
def test_deep_nesting_is_refused_and_never_a_recursion_error(case: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="levels deep"):
        json_text.loads(DEEP[case])
    path = tmp_path / "x.json"
    path.write_text(DEEP[case])
    with pytest.raises(MalformedFileError, match="levels deep"):
        read_json(os.fspath(path), "the index")
    with pytest.raises(MalformedFileError, match="levels deep"):
        recipe.read(path)


def test_nesting_up_to_the_limit_is_read() -> None:
    text = "[" * json_text.DEEPEST + "]" * json_text.DEEPEST
    assert json.dumps(json_text.loads(text)) == text
    with pytest.raises(ValueError, match="levels deep"):
        json_text.loads(f"[{text}]")


def test_numbers_that_no_float_holds_are_refused_and_the_largest_others_read() -> None:
    assert json_text.loads(str(10**30)) == 10**30  # what tokenizers say for "no limit"
    for text in (str(10**400), f'{{"a": [-{10**400}]}}'):
        with pytest.raises(ValueError, match="no float holds"):
            json_text.loads(text)
    with pytest.raises(ValueError, match="limit"):
        json_text.loads("1" * 5000)


def test_half_a_surrogate_pair_and_names_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="surrogates"):
        json_text.loads(r'{"\ud800": 1}')
    assert json_text.loads(r'"\ud83d\ude00"') == "\N{GRINNING FACE}"
    with pytest.raises(json_text.TwiceError, match="more than once"):
        json_text.loads('[{"a": 1, "a": 2}]')
    assert json_text.loads('{"a": 1, "a": 1}') == {"a": 1}


def test_values_in_messages_take_a_line_whatever_their_size() -> None:
    own: list = []
    own.append(own)
    bomb: list = ["x" * 100]
    for _ in range(40):  # each level twice the one below: 2**40 texts if it were written out
        bomb = [bomb, bomb]
    for value in ("x" * 10**6, list(range(10**5)), {str(n): n for n in range(10**4)}, 16**6000, own, bomb):
        shown = json_text.brief(value)
        assert 0 < len(shown) <= 80
        assert "\n" not in shown
    assert json_text.brief([1, "a"]) == "[1, 'a']"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_pipes_are_refused_rather_than_waited_for(tmp_path: Path) -> None:
    for name in ("model.safetensors.index.json", "recipe.json"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(LoraError):
        keys_of(tmp_path)
    with pytest.raises(LoraError, match="not a regular file"):
        keys_of(tmp_path / "model.safetensors.index.json")
    with pytest.raises(LoraError, match="not a regular file"):
        recipe.read(tmp_path / "recipe.json")


NAMES = (
    *(
        "../x.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "",
        ".",
        "a\\b",
        "C:x",
        "file:///x",
        "a\x00b",
    ),
    *("s3://bucket/x.safetensors", "hf://org/name/x.safetensors", "https://example.org/x.safetensors"),
)


@pytest.mark.parametrize("name", NAMES)
def test_an_index_that_names_anything_but_files_beside_it_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(MalformedFileError, match="do not lie in its own folder") as caught:
        keys_of(tmp_path)
    assert caught.value.keys == (name,)
    assert "\x00" not in str(caught.value)


def test_an_index_that_names_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": path.name}}))
    with pytest.raises(MalformedFileError, match="JSON text, not tensors"):
        keys_of(tmp_path)


def test_an_index_of_many_shards_is_answered_with_five_of_their_names(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    count = 20_000
    path.write_text(json.dumps({"weight_map": {f"k{n}": f"s{n}.safetensors" for n in range(count)}}))
    with pytest.raises(LoraError, match=f"{count} of {count} shards are missing") as caught:
        keys_of(tmp_path)
    assert len(str(caught.value)) < 1000


def test_a_text_beyond_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratools.io.storage.TEXT", 1000)
    path = tmp_path / "x.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "x" * 1000}}))
    with pytest.raises(MalformedFileError, match="more than 1,000 bytes"):
        read_index(os.fspath(path))


CONFIGURATIONS = {
    "pattern is a number": {"rank_pattern": 3},
    "patterns of another method": {"peft_type": "LOHA", "rank_pattern": 7},
    "names in lists": {"target_modules": [["q_proj"]]},
    "names of names": {"modules_to_save": [["lm_head"], {"a": 1}]},
    "a method that is a list": {"peft_type": ["LORA"]},
    "a base that is an object": {"base_model_name_or_path": {"a": []}},
    "parameters of MLX": {"lora_parameters": [1]},
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_configurations_of_other_types_are_refused_by_field(case: str, tmp_path: Path) -> None:
    fields = CONFIGURATIONS[case]
    made = make.peft(tmp_path / "a")
    config = made.path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
    with pytest.raises(MalformedFileError, match=r"of adapter_config.json is") as caught:
        lt.load(made.path)
    assert set(caught.value.keys) <= set(fields)
    assert lt.doctor(made.path).findings


@pytest.mark.parametrize("container", ["json", "yaml"])
def test_recipes_of_wild_values_are_refused_as_ours(container: str, tmp_path: Path) -> None:
    if container == "yaml":
        pytest.importorskip("yaml")
    path = tmp_path / f"r.{container}"
    for text in (
        '{"inputs": [{"path": "a", "weight": 1' + "0" * 320 + "}]}",
        '{"inputs": [{"path": "a", "weight": [[[[1]]]]}]}',
        '{"inputs": [{"path": ""}]}',
        '{"inputs": "x"}',
        '{"inputs": [{"path": "a"}], "recipe": ' + "9" * 300 + "}",
    ):
        path.write_text(text)
        with pytest.raises(LoraError) as caught:
            recipe.read(path)
        assert len(str(caught.value)) < 1000


def test_yaml_that_multiplies_itself_or_holds_itself_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    path = tmp_path / "r.yaml"
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    path.write_text("\n".join(["a0: &a0 x", *levels, "inputs: *a11"]))
    with pytest.raises(LoraError, match="which means nothing"):
        recipe.read(path)
    path.write_text("inputs: &x [*x]\n")
    with pytest.raises(MalformedFileError, match="entry of inputs"):
        recipe.read(path)
    path.write_text("inputs: [{path: a, weight: 0x" + "f" * 6000 + "}]\n")
    with pytest.raises(MalformedFileError, match=re.escape("weight is (a number of")):
        recipe.read(path)
    path.write_text("inputs:\n" + "- {path: a}\n" * 100_000)
    with pytest.raises(MalformedFileError, match="characters of YAML"):
        recipe.read(path)
    path.write_text("- " * 3000)
    with pytest.raises(MalformedFileError, match="no YAML"):
        recipe.read(path)


def test_metadata_that_is_deep_json_is_refused_or_passed_over(tmp_path: Path) -> None:
    deep = DEEP["lists"]
    path = make.kohya(
        tmp_path / "k.safetensors", metadata={"ss_network_args": deep, "ss_tag_frequency": deep}
    ).path
    assert lt.info(path, norms=False).modules
    lt.save(lt.load(path), tmp_path / "again.safetensors")
    path = make.diffusers(tmp_path / "d.safetensors", metadata={"lora_adapter_metadata": deep}).path
    with pytest.raises(MalformedFileError, match="lora_adapter_metadata is not JSON"):
        lt.load(path)


def test_types_of_values_that_are_none_are_refused_by_the_writer_of_gguf(tmp_path: Path) -> None:
    for text in ("{", "[1]", '{"a": 1}', DEEP["lists"]):
        with pytest.raises(LayoutError, match=r"gguf.types"):
            io.write_gguf(
                tmp_path / "x.gguf", [from_torch("a", torch.ones(2))], {"a": "1", "gguf.types": text}
            )


def test_a_folder_in_the_place_of_a_text_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").mkdir()
    with pytest.raises(ReadError):
        recipe.read(tmp_path / "recipe.json")
