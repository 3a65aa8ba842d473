"""Terminals of every kind: with colours and without, narrow and wide, and without the characters of reports."""

import os
import re
import subprocess
import sys
from pathlib import Path

import factories
import pytest

from loratools.cli import output
from tests.cli.running import Terminal, invoke

ROOT = Path(__file__).resolve().parents[2]
COLOUR = "\x1b["
OURS = (
    "NO_COLOR",
    "FORCE_COLOR",
    "CLICOLOR",
    "CLICOLOR_FORCE",
    "TERM",
    "COLUMNS",
    "COLORTERM",
    "TTY_COMPATIBLE",
)


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    metadata = {"ss_output_name": "模型 é Δ"}
    return factories.kohya(
        tmp_path_factory.mktemp("terminal") / "flux.safetensors", "flux", metadata=metadata
    ).path


def environment(**given):
    """This one's, with nothing in it about colours but what is given."""
    return {key: value for key, value in os.environ.items() if key not in OURS} | given


def looked_at(*arguments, **given):
    """What the program shows on a terminal of POSIX."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "loratools", *map(str, arguments)],
        cwd=ROOT,
        env=environment(**given),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    try:
        while found := os.read(ours, 4096):
            shown += found
    except OSError:  # Linux has an error where the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    return shown.decode().replace("\r\n", "\n")


@pytest.mark.skipif(os.name != "posix", reason="terminals of POSIX")
@pytest.mark.parametrize(
    ("given", "colours"),
    [
        ({"TERM": "xterm-256color"}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "xterm", "CLICOLOR": "0"}, False),
        ({"TERM": "dumb"}, False),
        ({"TERM": "dumb", "FORCE_COLOR": "1"}, False),
    ],
    ids=str,
)
def test_colours_are_for_terminals_that_have_and_want_them(flux, given, colours):
    shown = looked_at("info", flux, flux, "--no-norms", **given)
    assert bool(re.search(r"\x1b\[[\d;]*3\dm", shown)) == colours
    assert (COLOUR in shown) == (colours or given["TERM"] == "xterm")  # bold is no colour
    assert "flux" in shown


@pytest.mark.skipif(os.name != "posix", reason="terminals of POSIX")
def test_a_bar_is_drawn_on_a_terminal_and_wiped(flux):
    shown = looked_at("convert", flux, "--to", "comfy", "-o", flux.with_name("bar.safetensors"), TERM="xterm")
    assert "converting" in shown
    assert "\x1b[2K" in shown
    plain = looked_at("convert", flux, "--to", "comfy", "-o", flux.with_name("dumb.safetensors"), TERM="dumb")
    assert "converting" not in plain
    assert "\x1b" not in plain


@pytest.mark.parametrize(
    ("given", "colours"),
    [
        ({}, False),
        ({"FORCE_COLOR": "1"}, True),
        ({"CLICOLOR_FORCE": "1"}, True),
        ({"CLICOLOR_FORCE": "1", "CLICOLOR": "0"}, True),
        ({"CLICOLOR_FORCE": "0"}, False),
        ({"CLICOLOR_FORCE": ""}, False),
    ],
    ids=str,
)
def test_colours_in_a_pipe_are_there_for_who_forces_them(flux, given, colours, monkeypatch):
    for name in OURS:
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm-256color"} | given).items():
        monkeypatch.setenv(name, value)
    assert (COLOUR in invoke("info", flux).stdout) == colours
    assert COLOUR not in invoke("info", flux, "--json").stdout


def test_no_color_wins_over_being_forced(flux, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("CLICOLOR_FORCE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[\d;]*3\dm", invoke("info", flux).stdout)


@pytest.mark.parametrize("width", [20, 80, 400])
@pytest.mark.parametrize("options", [[], ["--modules"], ["--no-norms"]], ids=str)
def test_reports_fit_where_they_can(flux, width, options, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    result = invoke("info", flux, *options)
    assert result.exit_code == 0
    # What a narrow terminal has no room for are names and numbers, which are never cut.
    assert width < 80 or max(map(len, result.stdout.splitlines())) <= width
    assert "flux" in result.stdout


@pytest.mark.parametrize("value", ["0", "-5", "many", ""])
def test_a_width_that_is_none_is_no_reason_to_fail(flux, value, monkeypatch):
    monkeypatch.setenv("COLUMNS", value)
    result = invoke("info", flux, "--no-norms")
    assert (result.exit_code, result.stderr) == (0, "")


LACKING = ["ascii", "latin-1", "cp1252", "cp437"]


@pytest.mark.parametrize("encoding", LACKING)
@pytest.mark.parametrize(
    "arguments", [["info", "FILE", "--modules"], ["verify", "--help"], ["info", "模型Δ"]], ids=str
)
def test_what_a_terminal_has_no_character_for_has_a_twin(flux, encoding, arguments):
    done = subprocess.run(
        [sys.executable, "-m", "loratools", *(str(flux) if each == "FILE" else each for each in arguments)],
        cwd=ROOT,
        capture_output=True,
        env=environment(PYTHONIOENCODING=encoding, COLUMNS="90"),
    )
    shown = (done.stdout + done.stderr).decode(encoding)  # is in it, or this fails
    if arguments[1] == "FILE":
        assert r"\u6a21\u578b" in shown
    elif arguments[0] == "verify":
        assert "<Q - W, " in shown
        assert "||" in shown
        assert "?" not in shown
    else:
        assert r"\u6a21\u578b" in shown
        assert done.returncode == 1


def test_a_table_is_straight_where_a_name_is_escaped(capsys, monkeypatch):
    from loratools.report.tables import Column, table

    columns = [Column("name", ["模", "ab"]), Column("size", ["1", "22"], right=True)]
    monkeypatch.setattr(output, "encoding_of", lambda _stream: "ascii")
    output.write_report(lambda width, symbols: table(columns, width=width, symbols=symbols))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[:4] == [" name    size", " ------------", r" \u6a21     1", " ab        22"]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_the_bar_needs_no_characters_that_the_terminal_lacks(encoding, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    terminal = Terminal()
    terminal.encoding = encoding
    monkeypatch.setattr("sys.stderr", terminal)
    for in_bytes in (False, True):
        with output.progress("baking", in_bytes=in_bytes) as progress:
            progress("模型." * 30 + "weight", 1, 2)
    terminal.getvalue().encode(encoding)
    assert "baking" in terminal.getvalue()


def test_a_terminal_that_vanishes_does_not_end_the_work(monkeypatch):
    class Vanished(Terminal):
        def write(self, text):
            raise OSError(5, "Input/output error")

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", Vanished())
    with output.progress("baking") as progress:
        progress("a", 1, 2)
        progress("b", 2, 2)


def test_no_bar_where_nobody_looks(capsys):
    with output.progress("baking") as progress:
        assert progress is None
    assert capsys.readouterr().err == ""
