import json
import shlex

import factories as make
import pytest
from rich.console import Console

import loratools as lt
from loratools.report.doctor_text import doctor_text
from loratools.report.values import ASCII, UNICODE
from tests.cli.running import invoke
from tests.ops.doctoring import FAULTS


def run(*arguments):
    return invoke("doctor", *arguments)


def commands(text):
    """The commands in a report, with what a shell takes for one line on one line."""
    joined = " ".join(text.split())
    return [
        part.split(" error: ")[0].split(" warning: ")[0] for part in joined.replace("\\ ", "").split("$ ")[1:]
    ]


@pytest.fixture
def plain(tmp_path):
    return make.peft(tmp_path / "plain").path


def test_a_healthy_adapter_has_status_0(plain):
    result = run(plain)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "would work" in result.stdout
    assert "would work in vllm" in " ".join(run(plain, "--for", "vllm").stdout.split())


def test_a_faulty_one_has_status_1_and_is_told_what_to_run(tmp_path):
    path, _ = FAULTS["prefix-doubled"](tmp_path / "adapter")
    result = run(path)
    assert (result.exit_code, result.stderr) == (1, "")
    assert "would not work (1 error)" in " ".join(result.stdout.split())
    command = commands(result.stdout)[0]
    assert command.startswith("loratools convert ")
    assert command.endswith(" --to peft")


def test_json_is_alone_on_stdout_and_has_every_field(tmp_path):
    path, _ = FAULTS["refused"](tmp_path / "adapter")
    result = run(path, "--for", "vllm", "--json")
    assert (result.exit_code, result.stderr) == (1, "")
    found = json.loads(result.stdout)
    assert found["ok"] is False
    assert (found["for"], found["base"], found["layout"], found["modules"]) == ("vllm", None, "peft", 5)
    assert found["counts"] == {"error": 1, "warning": 0, "info": 0}
    (finding,) = found["findings"]
    assert (finding["code"], finding["severity"], finding["feature"]) == ("refused", "error", "dora")
    assert len(finding["keys"]) == 5
    assert {"what", "why", "mend", "command"} <= finding.keys()


def test_a_file_that_cannot_be_read_is_a_finding(tmp_path):
    path, _ = FAULTS["unreadable"](tmp_path / "adapter")
    result = run(path, "--json")
    assert result.exit_code == 1
    (finding,) = json.loads(result.stdout)["findings"]
    assert finding["code"] == "unreadable"
    missing = json.loads(run(tmp_path / "nothing.safetensors", "--json").stdout)
    assert [each["code"] for each in missing["findings"]] == ["unreadable"]


def test_options_reach_the_operation(tmp_path):
    path, _ = FAULTS["rank-limit"](tmp_path / "adapter")
    assert run(path, "--for", "vllm").exit_code == 0
    assert run(path, "--for", "vllm", "--max-rank", "4").exit_code == 1
    values, _ = FAULTS["nonfinite"](tmp_path / "values")
    assert run(values).exit_code == 1
    assert run(values, "--no-values").exit_code == 0
    assert run(values, "--no-values", "--base", tmp_path / "nothing").exit_code == 1


def test_quiet_is_silent_and_says_it_by_its_status(tmp_path, plain):
    path, _ = FAULTS["untrained"](tmp_path / "adapter")
    for given, status in ((path, 1), (plain, 0)):
        result = run(given, "--quiet")
        assert (result.exit_code, result.output) == (status, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-rank", "4"], "Add --for"),
        (["--for", "ollama"], "'ollama' is not one of"),
        (["--arch", "sd16"], "no architecture"),
        (["--max-rank", "0", "--for", "vllm"], "0"),
    ],
)
def test_wrong_usage_has_status_2(arguments, message, plain):
    result = run(plain, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize("width", [40, 60, 100])
@pytest.mark.parametrize("symbols", [UNICODE, ASCII])
def test_all_of_it_fits(width, symbols, tmp_path, monkeypatch):
    path, _ = FAULTS["mixed-styles"](tmp_path / "adapter")
    # Short, so that no word is longer than a line.
    monkeypatch.chdir(path.parent)
    report = lt.doctor(path.name, runtime="diffusers")
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(doctor_text(report, width=width, symbols=symbols))
    shown = captured.get()
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= width
    lines = [each.command for each in report.findings if each.command]
    assert commands(shown) == list(dict.fromkeys(lines))
    assert lines
    # One command that mends several things is shown once.
    again = " ".join(shown.split()).count("The command above mends this, too.")
    assert again == len(lines) - len(set(lines)) > 0


@pytest.mark.parametrize("width", [30, 80, 200])
def test_a_command_with_spaces_in_a_path_stays_what_it_is(width, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make.mlx(tmp_path / "my own adapter of 2026")
    report = lt.doctor("my own adapter of 2026", runtime="vllm")
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(doctor_text(report, width=width, symbols=UNICODE))
    (command,) = [each.command for each in report.findings if each.command]
    shown = captured.get().partition("$ ")[2]
    # As a shell reads it: a line goes on behind a backslash that is in no quotes.
    joined = "".join(line.rstrip() + "\n" for line in shown.splitlines()).replace(" \\\n", " ").strip()
    if width > 30:
        assert shlex.split(joined) == shlex.split(command)
    else:
        assert "of\\" not in shown.replace(" ", "")
