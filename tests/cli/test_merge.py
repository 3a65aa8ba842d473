import json
import os
import subprocess
import sys

import factories
import numpy as np
import pytest

import loratools as lt
from tests.cli.running import invoke


def run(*arguments):
    return invoke("merge", *arguments)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [
        factories.kohya(folder / f"{seed}.safetensors", "sd15", seed=seed, rank=2 + seed) for seed in range(2)
    ]


@pytest.fixture
def pair(made):
    return [one.path for one in made]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.safetensors"


@pytest.mark.parametrize("weights", ["0.8,-0.5", "-1,0.5"])
def test_weights_multiply_the_changes(made, pair, out, weights):
    result = run(*pair, "--weights", weights, "-o", out)
    assert result.exit_code == 0, result.stderr
    first, second = map(float, weights.split(","))
    expected = {key: first * made[0].deltas[key] + second * made[1].deltas[key] for key in made[0].deltas}
    factories.assert_close(factories.deltas_of(lt.load(out)), expected)
    # A long path folds, so blanks are left out.
    assert str(out) in "".join(result.stdout.split())


def test_json_is_alone_on_stdout(pair, out):
    result = run(*pair, "-o", out, "--json")
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert found["dry_run"] is False
    assert found["bytes"] == out.stat().st_size
    assert [each["weight"] for each in found["inputs"]] == [1.0, 1.0]
    assert found["method"] == "linear"


def test_quiet_is_silent(pair, out):
    result = run(*pair, "-o", out, "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert out.exists()


def test_a_dry_run_writes_nothing_and_knows_the_size(pair, out):
    planned = run(*pair, "-o", out, "--dry-run", "--json")
    assert planned.exit_code == 0
    assert not out.exists()
    assert "nothing was written" in run(*pair, "-o", out, "--dry-run").stdout
    assert not os.listdir(out.parent)
    written = json.loads(run(*pair, "-o", out, "--json").stdout)
    found = json.loads(planned.stdout)
    assert found["dry_run"] is True
    assert found["ranks"] == written["ranks"]
    assert 0 < found["bytes"] <= written["bytes"]


def test_an_existing_output_is_refused(pair, out):
    out.write_bytes(b"precious")
    result = run(*pair, "-o", out)
    assert result.exit_code == 1
    assert "--overwrite" in result.stderr
    assert out.read_bytes() == b"precious"
    assert run(*pair, "-o", out, "--overwrite").exit_code == 0
    assert lt.load(out).modules


def test_the_output_may_be_an_input(made, tmp_path):
    first = tmp_path / "first.safetensors"
    first.write_bytes(made[0].path.read_bytes())
    assert run(first, made[1].path, "-o", first, "--overwrite").exit_code == 0
    key = next(iter(made[0].deltas))
    found = factories.deltas_of(lt.load(first))[key]
    np.testing.assert_allclose(found, made[0].deltas[key] + made[1].deltas[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing option '--output'"),
        (("-o", "x", "--weights", "1"), "1 weights for 2 inputs"),
        (("-o", "x", "--weights", "1,a"), "'a' is not a number"),
        (("-o", "x", "--weights", "1,nan"), "nan is not a finite number"),
        (("-o", "x", "--weights", ""), "'' is not a number"),
        (("-o", "x", "--method", "tiess"), "Did you mean ties?"),
        (("-o", "x", "--to", "koyha"), "Did you mean kohya?"),
        (("-o", "x", "--arch", "sdlx"), "Did you mean sdxl?"),
        (
            ("-o", "x", "--density", "0.5"),
            "--density is not an option of the method linear. These have it: ties.",
        ),
        (("-o", "x", "--method", "concat", "--rank", "4"), "--rank is not an option of the method concat"),
        (("-o", "x", "--method", "ties", "--density", "0"), "'--density'"),
        (("-o", "x", "--rank", "0"), "'--rank'"),
        (("-o", "x", "--dtype", "int8"), "'--dtype'"),
        (("-o", "x", "--device", "tpu"), "'tpu' is no device"),
        (("-o", "x", "--drop", "everything"), "'--drop'"),
    ],
)
def test_wrong_usage_is_exit_status_2(pair, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*pair, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""
    assert not os.listdir(tmp_path)


def test_what_cannot_be_merged_is_exit_status_1(pair, out, tmp_path):
    other = factories.kohya(tmp_path / "xl.safetensors", "sdxl").path
    result = run(pair[0], other, "-o", out)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert "Traceback" not in result.stderr
    assert not out.exists()


def test_a_method_with_its_options(pair, out):
    arguments = ("--method", "ties", "--density", "0.3", "--lambda", "0.5", "--seed", "7", "--rank", "3")
    result = run(*pair, "-o", out, *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["options"] == {"rank": 3, "density": 0.3, "lambda": 0.5, "seed": 7}
    assert set(found["ranks"]) == {"3"}


def test_layout_and_dtype_are_chosen(pair, tmp_path):
    out = tmp_path / "other.safetensors"
    result = run(*pair, "-o", out, "--to", "diffusers", "--dtype", "bfloat16", "--json")
    assert result.exit_code == 0, result.stderr
    assert set(json.loads(result.stdout)["dtypes"]) == {"BF16"}
    assert lt.load(out).layout.name == "diffusers"


def test_methods_are_listed_without_an_output():
    result = invoke("merge", "--list-methods")
    assert result.exit_code == 0
    for word in ("linear", "concat", "ties", "--density", "Default: 0.2."):
        assert word in result.stdout


def test_debug_shows_the_traceback(pair, out):
    out.write_bytes(b"")
    done = subprocess.run(
        [sys.executable, "-m", "loratools", "merge", *pair, "-o", out, "--debug"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "OutputExistsError" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for another process")
def test_an_interrupt_leaves_no_output(pair, out):
    # The process interrupts itself halfway, so that the moment is the same on every machine.
    code = (
        # A run in the background may have been told to ignore interrupts.
        "import os, signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from loratools.ops import files\nfrom loratools.cli import main\n"
        "files.save = lambda *a, **k: os.kill(os.getpid(), signal.SIGINT)\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "merge", *pair, "-o", out], capture_output=True, text=True
    )
    assert done.returncode == 130
    assert done.stderr.strip() == "Interrupted"
    assert done.stdout == ""
    assert not os.listdir(out.parent)
