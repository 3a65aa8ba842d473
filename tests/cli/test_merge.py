import json
import os
import subprocess
import sys

import factories
import numpy as np
import pytest

import loratools as lt
from loratools.registry import scan
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
    assert found["estimate"]["workers"] > 0
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
            "--density is not an option of the method linear, which takes --rank. These have it: ",
        ),
        (
            ("-o", "x", "--method", "iso-cts", "--common", "1.5"),
            "'--common': 1.5 is not a fraction in [0, 1]",
        ),
        (("-o", "x", "--method", "ties", "--seed", "-1"), "'--seed': -1 is not a whole number in [0, 2^63)"),
        (("-o", "x", "--block-weights", "IN04"), "Write IN04=0.5, or one of ALL,"),
        (("-o", "x", "--weight-for", "attn"), "'attn' is no PATTERN=WEIGHT"),
        (("-o", "x", "--weight-for", "attn(=1"), "no regular expression"),
        (("-o", "x", "--weight-for", "a=1", "--weight-for", "a=2"), "'a' has two weights"),
        (("-o", "x", "--protect-energy", "0.5"), "--protect-energy is of no use without --protect"),
        (("-o", "x", "--boost", "2"), "'--boost'"),
        (("-o", "x", "--recipe", "r.json", "--rank", "2"), "and inputs, --rank was given too"),
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
    assert found["options"] == {"rank": 3, "density": 0.3, "lambda": 0.5, "majority": "total", "seed": 7}
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
    lines = result.stdout.splitlines()
    for name, method in scan("loratools.methods", "METHOD").items():
        assert [line for line in lines if line.split()[:1] == [name] and line.endswith(method.summary)]


def test_every_option_of_every_method_is_offered_and_reaches_it(pair, out):
    taken = {"--density": "0.4", "--lambda": "0.5", "--seed": "3", "--majority": "frequency", "--epsilon": "0.2",
             "--gamma": "0.05", "--common": "0.5", "--part-rank": "1", "--beta": "0.5", "--width": "0.2",
             "--rank": "2"}  # fmt: skip
    seen = set()
    for name, method in scan("loratools.methods", "METHOD").items():
        for option in method.options:
            flag = f"--{option.name}"
            if flag in seen or flag not in taken:
                continue
            seen.add(flag)
            result = run(*pair, "-o", out, "--method", name, flag, taken[flag], "--dry-run", "--json")
            assert result.exit_code == 0, result.stderr
            assert str(json.loads(result.stdout)["options"][option.name]) == taken[flag]
    declared = {
        f"--{each.name}" for method in scan("loratools.methods", "METHOD").values() for each in method.options
    }
    assert declared == seen


def test_a_method_with_too_many_inputs_names_those_that_take_them(pair, out):
    result = run(*pair, pair[0], "-o", out, "--method", "slerp")
    assert result.exit_code == 1
    assert "3 inputs for slerp. slerp takes at most 2." in result.stderr
    assert "linear" in result.stderr


def test_what_weights_hit_is_in_both_reports(pair, out):
    arguments = ("--block-weights", "BASE=0.5", "--weight-for", r"attn1\.to_q=0..1")
    wrong = run(*pair, "-o", out, *arguments)
    assert wrong.exit_code == 2
    assert "gradient" in wrong.stderr
    arguments = ("--block-weights", "BASE=0.5", "--weight-for", r"2:attn1=-0.5")
    result = run(*pair, "-o", out, *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    first, second = (each["multipliers"] for each in json.loads(result.stdout)["inputs"])
    assert [(each["by"], each["name"]) for each in first] == [("block", "BASE")]
    paths = [target.path for target in lt.load(pair[1]).modules]
    assert second[1] == {
        "by": "pattern",
        "name": "2:attn1",
        "weight": "-0.5",
        "modules": sum("attn1" in path for path in paths),
    }
    shown = " ".join(run(*pair, "-o", out, "--overwrite", *arguments).stdout.split())
    assert f"2:attn1=-0.5 ({second[1]['modules']} modules)" in shown
    idle = run(*pair, "-o", out, "--overwrite", "--weight-for", "nowhere=1")
    assert idle.exit_code == 1
    assert "match no module" in idle.stderr


def test_a_preset_is_its_vector(pair, tmp_path):
    vector = ",".join(["1", *"0" * 3, *"1" * 8, *"0" * 5])
    for name, weights in (("a", "midd"), ("b", vector)):
        assert run(*pair, "-o", tmp_path / f"{name}.safetensors", "--block-weights", weights).exit_code == 0
    one, other = (factories.deltas_of(lt.load(tmp_path / f"{name}.safetensors")) for name in "ab")
    factories.assert_close({key: other[key] for key in one}, one)


def test_a_recipe_repeats_a_merge_from_the_command_line(pair, tmp_path):
    first, again, saved = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "mix.yaml"
    arguments = ("--method", "dare-ties", "--seed", "5", "--weights", "0.7,-0.2", "--boost", "0.6")
    assert run(*pair, "-o", first, *arguments, "--save-recipe", saved).exit_code == 0
    result = run("--recipe", saved, "-o", again, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["options"]["seed"] == 5
    assert again.read_bytes() == first.read_bytes()


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
