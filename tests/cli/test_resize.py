"""``loratools resize``: options, exit statuses, and what is printed where."""

from __future__ import annotations

import json

import factories
import pytest

import loratools as lt
from tests.cli.running import invoke


def run(*arguments):
    return invoke("resize", *arguments)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return factories.kohya(tmp_path_factory.mktemp("in") / "style.safetensors", "sd15", rank=6)


def test_it_writes_and_reports(made, tmp_path):
    output = tmp_path / "small.safetensors"
    result = run(made.path, "-o", output, "--rank", 2)
    assert result.exit_code == 0, result.output
    assert {module.rank for module in lt.load(output).modules.values()} == {2}
    for part in ("rank 2", "6 before, 2 now", "energy kept", "text_encoder", "wrote"):
        assert part in result.stdout


def test_json_is_alone_on_stdout(made, tmp_path):
    output = tmp_path / "small.safetensors"
    result = run(made.path, "-o", output, "--energy", 0.9, "--json")
    found = json.loads(result.stdout)
    assert (found["rule"], found["bytes"]) == ("energy 0.9", output.stat().st_size)
    assert found["bytes_before"] == made.path.stat().st_size
    assert found["energy"] >= 0.9
    assert set(found["components"]) == {"denoiser", "text_encoder"}
    assert len(found["modules"]) == len(made.deltas)
    assert found["dry_run"] is False


def test_a_dry_run_writes_nothing(made, tmp_path):
    output = tmp_path / "small.safetensors"
    result = run(made.path, "-o", output, "--size", "30kB", "--dry-run", "--json")
    assert json.loads(result.stdout)["bytes"] <= 30_000
    assert not output.exists()


def test_a_size_is_the_files(made, tmp_path):
    output = tmp_path / "small.safetensors"
    assert run(made.path, "-o", output, "--size", "30 kB", "--quiet").stdout == ""
    assert output.stat().st_size <= 30_000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "No rank rule"),
        (("--rank", 2, "--energy", 0.9), "exclude each other"),
        (("--rank", 0), "--rank"),
        (("--energy", 2), "--energy"),
        (("--size", "many"), "is no size"),
        (("--rank", 2, "--min-rank", 4, "--max-rank", 2), "--min-rank 4"),
        (("--to-rank-of", "llama"), "--to-rank-of"),
        (("--energy", 0.9, "--against", "x", "--against-norm", "nuclear"), "--against-norm"),
    ],
)
def test_wrong_usage_is_status_two(made, tmp_path, arguments, said):
    result = run(made.path, "-o", tmp_path / "out.safetensors", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not (tmp_path / "out.safetensors").exists()


def test_a_servers_rank_may_stand_alone(made, tmp_path):
    result = run(made.path, "-o", tmp_path / "out.safetensors", "--to-rank-of", "vllm", "--json")
    assert {each["rank"] for each in json.loads(result.stdout)["modules"]} == {8}


def test_the_plot_shows_every_component(made, tmp_path):
    result = run(made.path, "-o", tmp_path / "out.safetensors", "--rank", 2, "--plot")
    assert "energy kept by rank: denoiser" in result.stdout
    assert "energy kept by rank: text_encoder" in result.stdout


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_plot_fits_a_pipe_of_any_width(made, tmp_path, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    result = run(made.path, "-o", tmp_path / "out.safetensors", "--energy", 0.8, "--plot", "--dry-run")
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= width
    assert "\x1b" not in result.stdout
    start = lines.index(next(line for line in lines if "energy kept by rank: denoiser" in line))
    bars = [line.rstrip().rsplit(" ", 1)[-1] for line in lines[start:] if line.rstrip()[-1:] in ("█", "#")][
        :4
    ]
    assert [len(bar) for bar in bars] == sorted(len(bar) for bar in bars)
    assert len(bars[0]) < len(bars[-1])


def test_in_place_with_overwrite_alone(tmp_path):
    made = factories.kohya(tmp_path / "style.safetensors", "sd15", rank=6)
    before = made.path.read_bytes()
    refused = run(made.path, "-o", made.path, "--rank", 2)
    assert refused.exit_code == 1
    assert made.path.read_bytes() == before
    assert run(made.path, "-o", made.path, "--rank", 2, "--overwrite").exit_code == 0
    assert made.path.stat().st_size < len(before)


def test_another_layout_and_dtype(made, tmp_path):
    output = tmp_path / "out.safetensors"
    result = run(made.path, "-o", output, "--rank", 2, "--to", "diffusers", "--dtype", "bfloat16", "--json")
    assert json.loads(result.stdout)["dtypes"] == {"BF16": 2 * len(made.deltas)}
    assert lt.load(output).layout.name == "diffusers"
