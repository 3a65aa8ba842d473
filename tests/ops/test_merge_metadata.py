"""What a merged file says of itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import factories as make
import pytest

import loratools as lt
from loratools.ops.merge import merge_files

COMMON = {"ss_base_model_version": "sdxl_base_v1-0", "ss_resolution": "(1024, 1024)"}


@pytest.fixture
def two(tmp_path: Path) -> list[make.Made]:
    tags = [{"10_style": {"ink": 3, " wash": 1}}, {"10_style": {"ink": 2}, "5_person": {"anna": 5}}]
    return [
        make.kohya(
            tmp_path / f"{name}.safetensors",
            "sdxl",
            seed=number,
            metadata={
                **COMMON,
                "ss_output_name": name,
                "ss_tag_frequency": json.dumps(tags[number]),
                "sshs_model_hash": "0" * 64,
                "ss_network_dim": "4",
            },
        )
        for number, name in enumerate(("style", "person"))
    ]


def metadata(path: Path) -> dict[str, str]:
    return make.read_safetensors(path)[1]


def test_what_all_agree_on_is_kept_and_the_rest_is_not(two: list[make.Made], tmp_path: Path) -> None:
    merge_files([made.path for made in two], tmp_path / "m.safetensors")
    said = metadata(tmp_path / "m.safetensors")
    assert {key: said[key] for key in COMMON} == COMMON
    assert "ss_output_name" not in said
    assert said["sshs_model_hash"] != "0" * 64


def test_tags_are_united_and_added_up(two: list[make.Made], tmp_path: Path) -> None:
    merge_files([made.path for made in two], tmp_path / "m.safetensors")
    tags = json.loads(metadata(tmp_path / "m.safetensors")["ss_tag_frequency"])
    assert tags == {"10_style": {"ink": 5, "wash": 1}, "5_person": {"anna": 5}}


def test_the_record_names_the_inputs_by_their_bytes(two: list[make.Made], tmp_path: Path) -> None:
    report = merge_files([made.path for made in two], tmp_path / "m.safetensors", weights=[0.5, -0.25])
    record = json.loads(metadata(tmp_path / "m.safetensors")["loratools.merge"])
    hashes = [hashlib.sha256(made.path.read_bytes()).hexdigest() for made in two]
    assert record["method"] == "linear"
    assert record["version"] == lt.__version__
    assert [row["sha256"] for row in record["inputs"]] == hashes
    assert [row["weight"] for row in record["inputs"]] == [0.5, -0.25]
    assert [row["name"] for row in record["inputs"]] == ["style.safetensors", "person.safetensors"]
    assert [row["sha256"] for row in report.inputs] == hashes
    assert str(tmp_path) not in json.dumps(metadata(tmp_path / "m.safetensors"))


def test_hashes_are_of_the_file_that_is_there_now(two: list[make.Made], tmp_path: Path) -> None:
    adapter = lt.load(two[0].path)
    first = json.loads(lt.merge([adapter]).metadata["loratools.merge"])["inputs"][0]["sha256"]
    assert first == hashlib.sha256(two[0].path.read_bytes()).hexdigest()


def test_a_merge_of_merges_records_its_own_inputs(two: list[make.Made], tmp_path: Path) -> None:
    merge_files([made.path for made in two], tmp_path / "m.safetensors")
    merge_files([tmp_path / "m.safetensors", two[0].path], tmp_path / "n.safetensors")
    record = json.loads(metadata(tmp_path / "n.safetensors")["loratools.merge"])
    assert [row["name"] for row in record["inputs"]] == ["m.safetensors", "style.safetensors"]


def test_the_report_says_what_was_done(two: list[make.Made], tmp_path: Path) -> None:
    report = merge_files([made.path for made in two], tmp_path / "m.safetensors", rank=3, dtype="float16")
    again = lt.load(tmp_path / "m.safetensors")
    assert (report.method, report.layout, report.arch) == ("linear", "kohya", "sdxl")
    assert report.ranks == {3: len(again.modules)}
    assert len(report.modules) == len(again.modules)
    assert {row.inputs for row in report.modules} == {(0, 1)}
    assert 0 < report.energy < 1
    assert sum(report.dtypes.values()) == 2 * len(again.modules)
    assert set(report.dtypes) == {"F16"}


def test_a_dtype_beyond_the_metadata_does_not_make_it_lie(two: list[make.Made], tmp_path: Path) -> None:
    merge_files([made.path for made in two], tmp_path / "m.safetensors", rank=3)
    said = metadata(tmp_path / "m.safetensors")
    assert said["ss_network_dim"] == "3"


def test_peft_records_go_into_the_header(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "style")
    lt.save(lt.merge([lt.load(made.path)], weights=[2]), tmp_path / "m")
    said = metadata(tmp_path / "m" / "adapter_model.safetensors")
    record = json.loads(said["loratools.merge"])
    assert record["inputs"][0]["name"] == "style/adapter_model.safetensors"
    assert record["inputs"][0]["sha256"] == hashlib.sha256(made.file.read_bytes()).hexdigest()
