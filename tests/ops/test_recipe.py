"""A recipe repeats a merge bit for bit, and refuses what it was not made of."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import factories as make
import numpy as np
import pytest

import loratools as lt
from loratools.errors import (
    LoraError,
    MalformedFileError,
    MissingFileError,
    OptionError,
    OutputExistsError,
)
from loratools.ops import recipe
from loratools.ops.merge import merge_files, merge_recipe


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "adapters"
    folder.mkdir()
    return [
        make.kohya(folder / f"{seed}.safetensors", "sd15", seed=seed, rank=2 + seed % 2).path
        for seed in range(3)
    ]


def written(folder: Path, document: object, name: str = "r.json") -> Path:
    place = folder / name
    place.write_text(document if isinstance(document, str) else json.dumps(document), "utf-8")
    return place


EVERYTHING = [
    {},
    {"method": "dare-ties", "density": 0.4, "seed": 11, "rank": 3, "majority": "frequency"},
    {"weights": [0.3, -1.5], "dtype": "bfloat16", "layout": "diffusers"},
    {
        "component_weights": {"text_encoder": 1e-05},
        "block_weights": [{"MID": -0.5}, "OUTALL"],
        "weight_for": {r"2:attn\d": "0.25", "attn1": 2},
        "boost": 0.5,
    },
]


@pytest.mark.parametrize("options", EVERYTHING, ids=["plain", "method", "stored", "weighed"])
def test_running_it_again_gives_the_same_bytes(paths: list[Path], tmp_path: Path, options: dict) -> None:
    first, again, saved = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "r.yaml"
    before = merge_files(paths[:2], first, save_recipe=saved, **options)
    after = merge_recipe(saved, again)
    assert first.read_bytes() == again.read_bytes()
    assert after._replace(output=before.output) == before


def test_protection_and_the_rest_are_repeated(paths: list[Path], tmp_path: Path) -> None:
    first, again, saved = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "r.yaml"
    steps = {"protect": [paths[0], paths[2]], "protect_energy": 0.7, "protect_strength": 2.0}
    merge_files(paths[:2], first, save_recipe=saved, arch="sd15", drop=["extras"], **steps)
    merge_recipe(saved, again)
    assert first.read_bytes() == again.read_bytes()
    plain = tmp_path / "plain.safetensors"
    merge_files(paths[:2], plain)
    assert make.read_safetensors(plain)[0] != make.read_safetensors(first)[0]


def test_a_recipe_moves_with_its_inputs(paths: list[Path], tmp_path: Path) -> None:
    merge_files(paths[:2], tmp_path / "a.safetensors", save_recipe=tmp_path / "r.yaml")
    said = json.loads((tmp_path / "r.yaml").read_text("utf-8"))
    assert [row["path"] for row in said["inputs"]] == ["adapters/0.safetensors", "adapters/1.safetensors"]
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.move(tmp_path / "adapters", moved / "adapters")
    shutil.move(tmp_path / "r.yaml", moved / "r.yaml")
    merge_recipe(moved / "r.yaml", tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_an_input_elsewhere_has_a_whole_path(paths: list[Path], tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    saved = tmp_path / "recipes" / "r.json"
    merge_files(paths[:1], tmp_path / "a.safetensors", save_recipe=saved)
    found = recipe.read(saved)
    assert found.paths == (os.path.realpath(paths[0]),)


def test_the_metadata_holds_it_without_folders(paths: list[Path], tmp_path: Path) -> None:
    merge_files(paths[:2], tmp_path / "a.safetensors", method="ties", seed=4)
    text = make.read_safetensors(tmp_path / "a.safetensors")[1]["loratools.recipe"]
    said = json.loads(text)
    assert str(tmp_path) not in text
    assert (said["recipe"], said["version"], said["method"]) == (1, lt.__version__, "ties")
    assert said["options"]["seed"] == 4
    # Beside its inputs, it is a recipe.
    place = written(paths[0].parent, text)
    merge_recipe(place, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_peft_folder_is_verified_with_its_configuration(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "style")
    saved = tmp_path / "r.json"
    merge_files([made.path], tmp_path / "a", save_recipe=saved, weights=[0.5])
    merge_recipe(saved, tmp_path / "b")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    config = tmp_path / "style" / "adapter_config.json"
    changed = json.loads(config.read_text("utf-8"))
    changed["lora_alpha"] += 1
    config.write_text(json.dumps(changed), "utf-8")
    with pytest.raises(MalformedFileError, match="config_sha256"):
        merge_recipe(saved, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_other_bytes_are_refused_and_named(paths: list[Path], tmp_path: Path) -> None:
    saved = tmp_path / "r.json"
    merge_files(paths[:2], tmp_path / "a.safetensors", save_recipe=saved)
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(MalformedFileError, match=r"1 sums of the inputs.*1\.safetensors: sha256"):
        merge_recipe(saved, tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


def test_by_hand_in_yaml(paths: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    text = (
        "inputs:\n  - path: adapters/0.safetensors\n    weight: 0.5\n  - path: adapters/1.safetensors\n"
        "    weight: 1e-1\nmethod: ties\noptions: {density: 5e-1}\nblock_weights: [{MID: 1e-2}]\n"
    )
    report = merge_recipe(written(tmp_path, text, "r.yaml"), tmp_path / "b.safetensors")
    merge_files(
        paths[:2],
        tmp_path / "a.safetensors",
        weights=[0.5, 0.1],
        method="ties",
        density=0.5,
        block_weights={"MID": 0.01},
    )
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert any("no sha256 of 0.safetensors, 1.safetensors" in note for note in report.notes)


def test_yaml_without_its_package_says_so_and_json_needs_none(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    saved = tmp_path / "r.yaml"
    merge_files(paths[:1], tmp_path / "a.safetensors", save_recipe=saved)
    merge_recipe(saved, tmp_path / "b.safetensors")
    with pytest.raises(OptionError, match="PyYAML is not installed"):
        recipe.read(written(tmp_path, "inputs:\n  - path: x\n", "hand.yaml"))


def test_another_version_is_mentioned(paths: list[Path], tmp_path: Path) -> None:
    place = written(tmp_path, {"version": "0.0.1", "inputs": [{"path": "adapters/0.safetensors"}]})
    report = merge_recipe(place, tmp_path / "b.safetensors", dry_run=True)
    assert any("loratools 0.0.1" in note for note in report.notes)
    assert not (tmp_path / "b.safetensors").exists()


INPUTS = [{"path": "adapters/0.safetensors"}]


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ([], "the recipe is \\[\\]"),
        ({}, "no inputs"),
        ({"inputs": []}, "no inputs"),
        ({"inputs": ["a"]}, "an entry of inputs is 'a'"),
        ({"inputs": [{"weight": 1}]}, "has no path"),
        ({"inputs": [{"path": "a", "wieght": 1}]}, "'wieght'.*Did you mean: weight"),
        ({"inputs": INPUTS, "metod": "ties"}, "'metod'.*Did you mean: method"),
        ({"inputs": INPUTS, "method": "tiess"}, "no merge method 'tiess'.*Did you mean: ties"),
        ({"inputs": INPUTS, "method": 3}, "method of the recipe is 3.*text"),
        ({"inputs": INPUTS, "recipe": 2}, "format 2"),
        ({"inputs": INPUTS, "method": "ties", "options": {"dens": 1}}, "no option 'dens'"),
        ({"inputs": [{"path": "a", "weight": "x"}]}, "weight is 'x'"),
        ({"inputs": INPUTS, "block_weights": [3]}, "a set of block_weights is 3"),
        ({"inputs": INPUTS, "boost": True}, "boost of the recipe is True"),
        ("{", "no JSON"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, document: object, said: str) -> None:
    with pytest.raises(LoraError, match=said) as caught:
        recipe.read(written(tmp_path, document))
    assert caught.value.path == str(tmp_path / "r.json")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such recipe"):
        merge_recipe(tmp_path / "none.json", tmp_path / "b.safetensors")
    place = written(tmp_path, {"inputs": [{"path": "none.safetensors"}]})
    with pytest.raises(MissingFileError, match=r"none\.safetensors"):
        merge_recipe(place, tmp_path / "b.safetensors")


def test_a_recipe_takes_no_place_of_anything(paths: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    for place in (out, paths[0]):
        with pytest.raises(OptionError, match="take the place"):
            merge_files(paths[:1], out, save_recipe=place, overwrite=True)
    saved = written(tmp_path, "precious")
    with pytest.raises(OutputExistsError):
        merge_files(paths[:1], out, save_recipe=saved)
    assert saved.read_text("utf-8") == "precious"
    assert not out.exists()


def test_a_failed_merge_and_a_dry_run_leave_no_recipe(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, out = tmp_path / "r.json", tmp_path / "a.safetensors"
    merge_files(paths[:1], out, save_recipe=saved, dry_run=True)

    def fails(*_: object, **__: object) -> int:
        raise OSError("the disk is full")

    monkeypatch.setattr("loratools.ops.files.save", fails)
    with pytest.raises(OSError, match="disk is full"):
        merge_files(paths[:1], out, save_recipe=saved)
    assert sorted(os.listdir(tmp_path)) == ["adapters"]


def test_numbers_of_any_type_are_plain_in_a_recipe(paths: list[Path]) -> None:
    adapter = lt.load(paths[0])
    one = np.float32(0.5)
    merged = lt.merge(
        [adapter],
        weights=[one],
        component_weights={"denoiser": one},
        block_weights=np.full(17, one),
        weight_for={"attn": one},
    )
    said = json.loads(merged.metadata["loratools.recipe"])
    assert said["inputs"][0]["weight"] == 0.5
    assert said["component_weights"] == [{"denoiser": 0.5}]
    assert said["block_weights"] == [[0.5] * 17]
    assert said["weight_for"] == {"attn": "0.5"}
