import json
import os
import re
import subprocess
import sys
import time

import factories
import pytest
import torch
from safetensors.torch import load_file

from loratools.cli import output
from loratools.ops import bake as operation
from tests.cli.running import Terminal, invoke
from tests.ops import sd15_checkpoints
from tests.report.checkpoint_samples import bake_report


def run(*arguments):
    return invoke("bake", *arguments)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bake")
    base = sd15_checkpoints.safetensors(folder / "base.safetensors", sd15_checkpoints.tensors())
    adapters = [factories.kohya(folder / f"{seed}.safetensors", "sd15", seed=seed).path for seed in range(2)]
    return base, *adapters


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.safetensors"


@pytest.fixture
def asked(monkeypatch):
    """What the operation was called with; it does nothing."""
    found = {}

    def bake(base, adapters, output, **options):
        found.update(base=base, adapters=adapters, output=output, **options)
        return bake_report(output=output)

    monkeypatch.setattr(operation, "bake", bake)
    return found


def test_options_reach_the_operation(asked):
    result = run(
        *("base", "a", "b", "-o", "out", "--weights", "0.8,-0.5", "--components", "denoiser, text_encoder"),
        *("--precise", "--rounding", "stochastic", "--seed", "7", "--resume", "--skip-missing"),
        *("--arch", "sd15", "--dtype", "bfloat16", "--device", "cpu", "--overwrite", "--dry-run"),
    )
    assert result.exit_code == 0, result.stderr
    assert asked == {
        "base": "base",
        "adapters": ("a", "b"),
        "output": "out",
        "weights": (0.8, -0.5),
        "components": ("denoiser", "text_encoder"),
        "precise": True,
        "rounding": "stochastic",
        "seed": 7,
        "resume": True,
        "engine": None,
        "skip_missing": True,
        "arch": "sd15",
        "dtype": "bfloat16",
        "device": "cpu",
        "overwrite": True,
        "dry_run": True,
        "progress": None,
    }
    assert "nothing was written" in result.stdout


def test_defaults(asked):
    assert run("base", "a", "-o", "out").exit_code == 0
    changed = {name: value for name, value in asked.items() if value is not None and value is not False}
    assert changed == {
        "base": "base",
        "adapters": ("a",),
        "output": "out",
        "rounding": "nearest",
        "seed": 0,
        "dtype": "keep",
        "device": "auto",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("base", "-o", "x"), "Missing argument 'ADAPTER...'"),
        (("base", "a"), "Missing option '--output'"),
        (("base", "a", "b", "-o", "x", "--weights", "1"), "1 weight for 2 adapters"),
        (("base", "a", "-o", "x", "--weights", "1,2"), "2 weights for 1 adapter."),
        (("base", "a", "-o", "x", "--weights", "one"), "'one' is not a number"),
        (("base", "a", "-o", "x", "--weights", "inf"), "inf is not a finite number"),
        (("base", "a", "-o", "x", "--components", "denoiser,"), "has an empty name"),
        (("base", "a", "-o", "x", "--rounding", "up"), "'--rounding'"),
        (("base", "a", "-o", "x", "--seed", "-1"), "'--seed'"),
        (("base", "a", "-o", "x", "--dtype", "fp16"), "Did you mean float16?"),
        (("base", "a", "-o", "x", "--device", "tpu"), "'tpu' is no device"),
        (("base", "a", "-o", "x", "--arch", "sd1.5"), "Did you mean sd15?"),
        (("base", "a", "-o", "x", "--threads", "0"), "'--threads'"),
        (("base", "a", "-o", "x", "--to", "kohya"), "No such option"),
    ],
)
def test_wrong_usage_is_exit_status_2(asked, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""
    assert not asked


def test_a_bake_writes_the_sum(made, out):
    result = run(*made, "-o", out, "--weights", "0.8,-0.5")
    assert result.exit_code == 0, result.stderr
    assert "".join(str(out).split()) in "".join(result.stdout.split())
    before, after = load_file(made[0]), load_file(out)
    assert before.keys() == after.keys()
    same = [key for key in before if torch.equal(before[key], after[key])]
    assert same == ["first_stage_model.decoder.conv_in.weight"]
    assert invoke("verify", *made, out, "--weights", "0.8,-0.5").exit_code == 0
    assert invoke("verify", *made, out).exit_code == 1
    assert os.listdir(out.parent) == [out.name]


def test_json_is_alone_on_stdout(made, out):
    result = run(*made[:2], "-o", out, "--json")
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert found["dry_run"] is False
    assert found["bytes"] == out.stat().st_size
    assert found["weights"] == [1.0]
    assert found["arch"] == "sd15"
    assert found["kept"] == pytest.approx(1.0, abs=0.01)
    assert len(found["tensors"]) == found["matched"][0] == len(factories.SD15)


def test_quiet_is_silent(made, out):
    result = run(*made[:2], "-o", out, "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert out.exists()


def test_a_dry_run_writes_nothing_and_knows_the_size(made, out):
    planned = run(*made, "-o", out, "--dry-run", "--json")
    assert planned.exit_code == 0, planned.stderr
    assert not os.listdir(out.parent)
    found = json.loads(planned.stdout)
    assert found["dry_run"] is True
    assert found["estimate"]["seconds"] > 0
    assert "nothing was written" in run(*made, "-o", out, "--dry-run").stdout
    assert not os.listdir(out.parent)
    written = json.loads(run(*made, "-o", out, "--json").stdout)
    assert found["bytes"] == written["bytes"]


def test_an_existing_output_is_refused(made, out):
    out.write_bytes(b"precious")
    result = run(*made, "-o", out)
    assert result.exit_code == 1
    assert "--overwrite" in result.stderr
    assert out.read_bytes() == b"precious"
    assert run(*made, "-o", out, "--overwrite").exit_code == 0


def test_an_adapter_of_another_model_is_exit_status_1(made, out, tmp_path):
    other = factories.kohya(tmp_path / "flux.safetensors", "flux").path
    result = run(made[0], other, "-o", out)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert "Traceback" not in result.stderr
    assert not out.exists()


def test_an_unknown_component_is_exit_status_1(made, out):
    result = run(*made, "-o", out, "--components", "denoisser")
    assert result.exit_code == 1
    assert "denoiser" in result.stderr
    assert not os.listdir(out.parent)


def test_the_bar_shows_bytes_rate_and_remaining_time_in_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with output.progress("extracting", in_bytes=True) as progress:
        name = "model.diffusion_model.input_blocks.1.1.proj_in.weight"
        for done in (1, 2):
            progress(name, done * 512_000_000, 2_048_000_000)
            time.sleep(0.15)  # the bar is drawn ten times a second
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", terminal.getvalue())
    lines = [line.strip("\r") for line in shown.splitlines() if "GB" in line]
    assert any("1.0/2.0 GB" in line for line in lines)
    joined = "".join(shown.split())
    assert "/s" in joined
    assert "proj_in.weight" in joined


def test_planning_does_not_wait_for_torch():
    code = (
        "import sys, loratools.cli.bake, loratools.ops.bake\n"
        "print({'torch', 'numpy', 'rich'} & {name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
