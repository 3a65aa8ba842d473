import json

import factories
import pytest

from loratools.ops import verify as operation
from tests.cli.running import invoke
from tests.ops import sd15_checkpoints
from tests.report.checkpoint_samples import failed_report, verify_report


def run(*arguments):
    return invoke("verify", *arguments)


@pytest.fixture
def answer(monkeypatch):
    """What the operation was called with, and what it returns."""
    found = {"report": verify_report()}

    def verify(base, adapters, baked, **options):
        found["asked"] = {"base": base, "adapters": adapters, "baked": baked, **options}
        return found["report"]

    monkeypatch.setattr(operation, "verify", verify)
    return found


def test_options_reach_the_operation(answer):
    result = run(
        *("base", "a", "b", "baked", "--weights", "1,-0.5", "--components", "denoiser"),
        *("--skip-missing", "--arch", "sd15"),
    )
    assert result.exit_code == 0, result.stderr
    assert answer["asked"] == {
        "base": "base",
        "adapters": ("a", "b"),
        "baked": "baked",
        "weights": (1.0, -0.5),
        "components": ("denoiser",),
        "skip_missing": True,
        "arch": "sd15",
        "engine": None,
        "progress": None,
    }


def test_what_is_not_baked_is_exit_status_1_with_the_report(answer):
    answer["report"] = failed_report()
    result = run("base", "a", "baked")
    assert result.exit_code == 1
    assert "Not baked as it should be" in result.stdout
    assert result.stderr == ""
    as_json = run("base", "a", "baked", "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["ok"] is False
    assert run("base", "a", "baked", "--quiet").output == ""
    assert run("base", "a", "baked", "--quiet").exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("base", "baked"), "Missing argument"),
        (("base", "a", "baked", "--weights", "1,2"), "2 weights for 1 adapter."),
        (("base", "a", "baked", "--components", ""), "has an empty name"),
    ],
)
def test_wrong_usage_is_exit_status_2(answer, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert "asked" not in answer


def test_the_base_is_no_bake_of_itself(tmp_path):
    base = sd15_checkpoints.safetensors(tmp_path / "base.safetensors", sd15_checkpoints.tensors())
    adapter = factories.kohya(tmp_path / "a.safetensors", "sd15").path
    result = run(base, adapter, base, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["kept"] == 0.0
    assert {tensor["verdict"] for tensor in found["tensors"]} == {"not baked"}


def test_what_is_not_there_is_exit_status_1(tmp_path):
    result = run(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
