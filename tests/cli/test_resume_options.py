"""--resume and --clean: what interrupted runs have left is taken up, or removed and told of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import factories
import pytest

from loratools.io.work_folder import place_of
from tests.cli.running import invoke

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ["merge", "resize", "bake", "convert", "pack", "unpack"]


def left(output: Path) -> Path:
    """What a run has left that was killed."""
    folder = place_of(output)
    folder.mkdir()
    (folder / "part-0123456789abcdef.bin").write_bytes(bytes(1234))
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_clean_removes_what_is_left_and_needs_the_output_alone(tmp_path: Path, command: str) -> None:
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"kept")
    folder = left(output)
    done = invoke(command, "--clean", "-o", output)
    assert (done.exit_code, done.stdout) == (0, f"Removed {folder} (1,234 bytes).\n")
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]
    assert output.read_bytes() == b"kept"
    again = invoke(command, "--clean", "-o", output)
    assert (again.exit_code, again.stdout) == (0, f"Nothing is left of interrupted runs of {output}.\n")


@pytest.mark.parametrize("command", [*COMMANDS, "extract"])
def test_clean_tells_as_json_and_can_be_silent(tmp_path: Path, command: str) -> None:
    output = tmp_path / "out.safetensors"
    folder = left(output)
    done = invoke(command, "--json", "-o", output, "--clean")
    assert json.loads(done.stdout) == {"removed": [str(folder)], "bytes": 1234}
    assert invoke(command, "--clean", "--quiet", "-o", output).stdout == ""


def test_clean_takes_the_name_that_an_extraction_finds_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    factories.write_safetensors(
        tmp_path / "tuned.safetensors", {"model.layers.0.mlp.up_proj.weight": _ones()}, None
    )
    folder = left(tmp_path / "tuned-lora-r32.safetensors")
    done = invoke(
        "extract", "none.safetensors", "tuned.safetensors", "--to", "peft", "--arch", "llm", "--clean"
    )
    folder_of_peft = place_of(tmp_path / "tuned-lora-r32")
    assert done.exit_code == 0, done.output
    assert folder.exists()
    left(tmp_path / "tuned-lora-r32")
    again = invoke(
        "extract", "none.safetensors", "tuned.safetensors", "--to", "peft", "--arch", "llm", "--clean"
    )
    assert again.exit_code == 0
    assert not folder_of_peft.exists()


def _ones() -> object:
    import torch

    return torch.ones(4, 4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--clean"], "Missing option '--output'"),
        (["--clean", "-o", ""], "the name is empty"),
        (["--clean", "--resume", "-o", "x"], "--clean and --resume exclude each other"),
        (["-o", "x", "--dry-run", "--clean"], "--clean and --dry-run exclude each other"),
    ],
)
def test_what_clean_cannot_be_asked_for_is_a_usage_error(given: list[str], said: str) -> None:
    done = invoke("resize", *given)
    assert done.exit_code == 2
    assert said in done.stderr
    assert done.stdout == ""


def test_what_clean_says_is_in_characters_that_the_output_has(tmp_path: Path) -> None:
    left(tmp_path / "模型")
    done = subprocess.run(
        [sys.executable, "-m", "loratools", "convert", "--clean", "-o", "模型"],
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii:strict", "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\u6a21\\u578b.work (1,234 bytes)." in done.stdout


def test_an_interrupted_extraction_says_where_it_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loratools.ops import extract

    def interrupted(_base: str, _tuned: str, output: str, **_options: object) -> None:
        left(Path(output))
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(extract, "extract", interrupted)
    factories.write_safetensors(
        tmp_path / "tuned.safetensors", {"model.layers.0.mlp.up_proj.weight": _ones()}, None
    )
    given = ("extract", "base", "tuned.safetensors", "--to", "peft", "--arch", "llm", "--resume")
    done = invoke(*given)
    assert done.exit_code == 130
    assert f"What is done is kept in {place_of(tmp_path / 'tuned-lora-r32')}: " in done.stderr


def test_a_resumed_merge_says_what_there_was(tmp_path: Path) -> None:
    for seed in (1, 2):
        factories.kohya(tmp_path / f"{seed}.safetensors", "sd15", seed=seed)
    paths = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    done = invoke("merge", *paths, "--rank", 2, "-o", tmp_path / "out.safetensors", "--resume", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["resumed"] == 0
    assert any(note.startswith("nothing to resume") for note in report["notes"])
