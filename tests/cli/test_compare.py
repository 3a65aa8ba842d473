import json

import factories
import pytest

from tests.cli.running import invoke


def run(*arguments):
    return invoke("compare", *arguments)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [
        factories.kohya(folder / f"{seed}.safetensors", "sd15", seed=seed, rank=2 + seed).path
        for seed in range(3)
    ]


def test_two_adapters_are_compared(paths):
    result = run(*paths[:2])
    assert result.exit_code == 0, result.stderr
    assert "different adapters" in result.stdout
    assert "64 rows" in result.stdout
    assert result.stderr == ""


def test_json_is_alone_on_stdout_and_has_every_figure(paths):
    result = run(*paths[:2], "--json", "--modules", "--suggest", "--exact")
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert [each["path"] for each in found["adapters"]] == [str(path) for path in paths[:2]]
    assert found["cosines"][0][0] == 1.0
    assert found["sampled_rows"] == 0
    (pair,) = found["pairs"]
    assert pair["cosine"] == pytest.approx(found["cosines"][0][1], rel=1e-12)
    assert pair["verdict"] == "different"
    assert len(pair["modules"]) == found["targets"]
    assert {"target", "column_overlap", "row_angle", "sign_conflict", "distance"} <= pair["modules"][0].keys()
    assert set(pair["components"]) == {"denoiser", "text_encoder"}
    assert found["suggestion"]["method"] == "linear"


def test_options_reach_the_operation(paths):
    plain = json.loads(run(*paths[:2], "--json").stdout)
    asked = json.loads(
        run(*paths[:2], "--json", "--weights", "1,-2", "--components", "denoiser", "--threads", "1").stdout
    )
    denoiser = plain["pairs"][0]["components"]["denoiser"]
    assert asked["pairs"][0]["cosine"] == pytest.approx(-denoiser["cosine"], abs=1e-12)
    assert asked["pairs"][0]["ratio"] == pytest.approx(2.0 * denoiser["ratio"])
    assert plain["pairs"][0]["modules"] == []
    assert plain["suggestion"] is None


def test_several_adapters_make_a_matrix(paths):
    result = run(*paths, "--suggest")
    assert result.exit_code == 0
    assert "cosines" in result.stdout
    assert "Suggested: --method linear" in result.stdout


def test_quiet_is_silent(paths):
    result = run(*paths[:2], "--quiet")
    assert (result.exit_code, result.output) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one adapter"),
        (["{1}", "--weights", "1"], "1 weight for 2 adapters"),
        (["{1}", "--device", "abacus"], "no device"),
        (["{1}", "--components", "a,,b"], "empty name"),
        (["{1}", "--arch", "sd16"], "no architecture"),
    ],
)
def test_wrong_usage_has_status_2(arguments, message, paths):
    result = run(paths[0], *(each.replace("{1}", str(paths[1])) for each in arguments))
    assert result.exit_code == 2
    assert message in result.stderr


def test_what_the_operation_refuses_has_status_1(paths):
    result = run(*paths[:2], "--components", "vae")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "vae" in result.stderr
