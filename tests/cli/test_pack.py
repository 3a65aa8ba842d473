"""``loratools pack`` and ``unpack`` as they are typed."""

from __future__ import annotations

import json

import factories as make
import pytest

from tests.cli.running import invoke


@pytest.fixture
def library(tmp_path):
    for number in range(2):
        make.peft(tmp_path / f"lib/a{number}", seed=number)
    make.peft(tmp_path / "lib/twin", seed=1)
    return tmp_path / "lib"


def test_a_pack_is_written_told_and_taken_apart(library, tmp_path):
    done = invoke("pack", library, "-o", tmp_path / "out", "--for", "vllm", "--ranks", "8,16")
    assert done.exit_code == 0, done.stderr
    assert "2 in the peft layout, checked for vllm" in done.stdout
    assert "Same: twin is a1" in done.stdout
    shown = invoke("info", tmp_path / "out")
    assert "a pack of adapters" in shown.stdout
    back = invoke("unpack", tmp_path / "out", "twin", "-o", tmp_path / "back", "--json")
    assert back.exit_code == 0, back.stderr
    said = json.loads(back.stdout)
    assert [(each["name"], each["of"], each["rank"]) for each in said["adapters"]] == [("twin", "a1", 4)]
    assert (tmp_path / "back/twin/adapter_config.json").is_file()


def test_json_says_what_the_index_says(library, tmp_path):
    done = invoke("pack", library, "-o", tmp_path / "out", "--json", "--dtype", "float16")
    said = json.loads(done.stdout)
    index = json.loads((tmp_path / "out/index.json").read_text("utf-8"))
    assert said["adapters"] == index["adapters"]
    assert said["aliases"] == index["aliases"]
    assert said["shared_basis"] is None
    assert {each["dtype"] for each in said["adapters"]} == {"F16"}


def test_a_shared_basis_is_told_with_its_errors(library, tmp_path):
    done = invoke("pack", library, "-o", tmp_path / "out", "--shared-basis", "4")
    assert done.exit_code == 0, done.stderr
    assert "worst module" in done.stdout
    said = json.loads(
        invoke("pack", library, "-o", tmp_path / "dry", "--shared-basis", "4", "--dry-run", "--json").stdout
    )
    assert {part["rank"] for part in said["shared_basis"]} == {4}
    assert not (tmp_path / "dry").exists()
    text = invoke("unpack", tmp_path / "out", "-o", tmp_path / "back")
    assert "3 in the peft layout" in text.stdout


def test_what_does_not_fit_ends_with_status_1_and_is_listed_on_request(library, tmp_path):
    (library / "broken.safetensors").write_bytes(b"nothing")
    refused = invoke("pack", library, "-o", tmp_path / "out")
    assert refused.exit_code == 1
    assert "1 of 4 inputs do not fit: broken" in refused.stderr
    assert not (tmp_path / "out").exists()
    done = invoke("pack", library, "-o", tmp_path / "out", "--skip-unfit")
    assert done.exit_code == 0
    assert "Left out: broken" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--ranks", "8,x"), "are no ranks"),
        (("--ranks", "0"), "are no ranks"),
        (("--max-rank", "8"), "Add --for"),
        (("--diagonal",), "Add --shared-basis"),
        (("--for", "nothing"), "is not one of"),
    ],
)
def test_wrong_usage(library, tmp_path, arguments, said):
    done = invoke("pack", library, "-o", tmp_path / "out", *arguments)
    assert done.exit_code == 2
    assert said in done.stderr
