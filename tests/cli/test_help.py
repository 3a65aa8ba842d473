import subprocess
import sys

import pytest

import loratools
from loratools.cli import COMMANDS
from tests.cli.render_docs import DOCS, help_of, page
from tests.cli.running import invoke

PROBE = """
import sys
from loratools.cli import cli
try:
    cli(sys.argv[1:], prog_name="loratools")
finally:
    print(sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "numpy", "rich", "scipy"}),
          sorted(name for name in sys.modules if name.startswith("loratools.cli.") and "_" not in name),
          file=sys.stderr)
"""


def loaded(*arguments: str) -> str:
    """What a process that ran the command had imported, as its last line on stderr says."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=True
    )
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_the_docs_hold_the_help_verbatim(command):
    assert help_of(*command) in DOCS.read_text("utf-8"), (
        "write the page anew: python -m tests.cli.render_docs"
    )


def test_the_docs_are_as_rendered():
    assert DOCS.read_text("utf-8") == page()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_summary_is_the_first_sentence_of_the_help(command):
    assert f"\n  {COMMANDS[command]}\n" in help_of(command)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples_and_the_common_options(command):
    text = help_of(command)
    assert f"  loratools {command} " in text.partition("Examples:")[2]
    for option in ("--json", "--threads", "--quiet", "--debug"):
        assert option in text


def test_help_imports_no_command_and_nothing_heavy():
    assert loaded("--help") == "[] ['loratools.cli.failures', 'loratools.cli.output']"
    assert "'loratools.cli.info'" in loaded("info", "--help")
    assert loaded("merge", "--help").startswith("[] ")
    assert "loratools.cli.info" not in loaded("merge", "--help")


def test_version():
    result = invoke("--version")
    assert result.stdout == f"loratools {loratools.__version__}\n"


def test_python_m_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "loratools", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"loratools {loratools.__version__}\n"


def test_an_unknown_command_is_answered_with_the_nearest():
    result = invoke("inof")
    assert result.exit_code == 2
    assert "No such command 'inof'. Did you mean info?" in result.stderr
    known = "bake, compare, convert, doctor, extract, info, merge, pack, resize, unpack, verify"
    assert f"There are: {known}." in invoke("zzz").stderr


def test_the_command_line_offers_the_options_that_methods_have():
    from loratools.cli.merge import command
    from loratools.registry import scan

    offered = {name for param in command.params for name in param.opts}
    had = {
        f"--{option.name}"
        for method in scan("loratools.methods", "METHOD").values()
        for option in method.options
    }
    assert had <= offered
    stated = {f"--{name}" for name in ("rank", "density", "lambda", "seed")}
    assert stated <= had
