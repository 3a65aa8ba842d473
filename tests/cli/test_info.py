import json
import os
import subprocess
import sys
from pathlib import Path

import factories
import pytest

from tests.cli.running import invoke


def run(*arguments):
    return invoke("info", *arguments)


@pytest.fixture
def style(tmp_path):
    return factories.kohya(tmp_path / "style.safetensors", "sd15", rank=4).path


@pytest.fixture
def broken(tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"\xff" * 64)
    return path


def test_one_file_is_one_object(style):
    result = run(style, "--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert found["type"] == "adapter"
    assert found["layout"] == "kohya"
    assert found["arch"] == "sd15"
    assert found["path"] == str(style)
    assert found["bytes"] == style.stat().st_size
    assert found["kinds"] == {"lora": len(found["modules"])}
    assert all(module["norm"] > 0 for module in found["modules"])


def test_without_norms_nothing_is_computed(style):
    found = json.loads(run(style, "--json", "--no-norms").stdout)
    assert {module["norm"] for module in found["modules"]} == {None}
    assert {module["rank"] for module in found["modules"]} == {4}


@pytest.mark.parametrize(("option", "heavy"), [("--no-norms", {"numpy", "torch"}), ("--modules", {"torch"})])
def test_no_more_is_imported_than_needed(style, option, heavy):
    code = (
        "import sys\nfrom loratools.cli import cli\n"
        "try:\n    cli(sys.argv[1:])\nfinally:\n    print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "info", str(style), option], capture_output=True, text=True, check=True
    )
    assert "Stable Diffusion 1.x" in done.stdout
    assert not heavy & set(done.stderr.split())


def test_a_named_file_that_cannot_be_read_is_exit_status_1(style, broken):
    result = run(style, broken, "--json")
    assert result.exit_code == 1
    good, bad = json.loads(result.stdout)
    assert good["error"] is None
    assert bad["path"] == str(broken)
    assert bad["error"].startswith(str(broken))
    assert result.stderr == f"Error: {bad['error']}\n"


def test_a_missing_file_is_exit_status_1_and_still_json(tmp_path):
    result = run(tmp_path / "none.safetensors", "--json")
    assert result.exit_code == 1
    assert "none.safetensors" in json.loads(result.stdout)["error"]
    alone = run(tmp_path / "none.safetensors")
    assert alone.stdout == ""
    assert alone.stderr.count("none.safetensors") == 1


def test_a_folder_is_walked_and_tolerates_what_cannot_be_read(tmp_path, style, broken):
    (tmp_path / "sub").mkdir()
    factories.kohya(tmp_path / "sub" / "b.safetensors", "sdxl")
    (tmp_path / "notes.txt").write_text("no model")
    result = run(tmp_path, "--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    found = {Path(each["path"]).name: each for each in json.loads(result.stdout)}
    assert found.keys() == {"style.safetensors", "broken.safetensors", "b.safetensors"}
    assert found["broken.safetensors"]["error"]
    assert found["b.safetensors"]["arch"] == "sdxl"
    table = run(tmp_path)
    assert table.exit_code == 0
    assert "unreadable" in table.stdout
    assert found["broken.safetensors"]["error"][-20:] in table.stdout.replace("\n ", "")


def test_a_folder_with_one_file_is_still_a_list(tmp_path, style):
    assert len(json.loads(run(tmp_path, "--json").stdout)) == 1


def test_an_adapter_folder_is_one_adapter(tmp_path):
    folder = factories.peft(tmp_path / "poem").path
    found = json.loads(run(folder, "--json").stdout)
    assert found["layout"] == "peft"
    assert "Adapter" in run(folder).stdout


def test_an_empty_folder_says_so(tmp_path):
    result = run(tmp_path)
    assert result.exit_code == 0
    assert "No adapters in" in result.stdout
    assert json.loads(run(tmp_path, "--json").stdout) == []


def test_without_path_the_current_folder_s_adapters(tmp_path, style, monkeypatch):
    factories.peft(tmp_path / "poem")
    (tmp_path / "deeper").mkdir()
    factories.kohya(tmp_path / "deeper" / "not_here.safetensors", "sd15")
    factories.write_safetensors(tmp_path / "empty.safetensors", {}, None)
    monkeypatch.chdir(tmp_path)
    found = json.loads(run("--json").stdout)
    assert [each["path"] for each in found] == ["poem", "style.safetensors"]
    result = run()
    assert result.exit_code == 0
    assert "style.safetensors" in result.stdout
    assert "not_here" not in result.stdout


def test_without_path_and_adapters_it_is_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run()
    assert result.exit_code == 0
    assert "No adapters in the current folder" in result.stdout
    assert "loratools info PATH" in result.stdout.replace("\n", " ")


def test_every_module_of_several_files(tmp_path, style):
    other = factories.kohya(tmp_path / "other.safetensors", "sd15").path
    text = run(style, other, "--modules").stdout
    count = len(json.loads(run(style, "--json", "--no-norms").stdout)["modules"])
    assert text.count("stable rank") >= 2
    assert text.count("transformer_") >= count


def test_an_unknown_architecture_is_wrong_usage(style):
    result = run(style, "--arch", "sdlx")
    assert result.exit_code == 2
    assert "Did you mean sdxl?" in result.stderr


def test_names_that_are_no_text_do_not_end_the_report(tmp_path, style):
    if sys.platform != "linux":
        pytest.skip("file names are bytes on Linux only")
    odd = os.fsencode(tmp_path) + b"/od\xffd\x1b[31m.safetensors"
    os.rename(style, odd)
    done = subprocess.run([sys.executable, "-m", "loratools", "info", odd], capture_output=True, check=True)
    assert b"\x1b" not in done.stdout
    assert b".safetensors" in done.stdout
    assert json.loads(run(os.fsdecode(odd), "--json").stdout)["type"] == "adapter"


def test_threads_reach_the_libraries(style):
    code = (
        "import os, sys\nfrom loratools.cli import cli\n"
        "try:\n    cli(sys.argv[1:])\nfinally:\n    print(os.environ['OMP_NUM_THREADS'], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "info", str(style), "--threads", "3", "--no-norms"],
        capture_output=True,
        text=True,
    )
    assert done.stderr.split()[-1] == "3"
    assert run(style, "--threads", "0").exit_code == 2


def test_real_files_of_every_kind(shared):
    result = run(shared / "corpus", "--no-norms", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert len(found) > 30
    for each in found:
        assert each["error"] is None or each["path"].find("unreadable") > 0
