"""Readers that go before the end, streams that are closed, and devices that are full: for all that prints."""

import os
import subprocess
import sys
from pathlib import Path

import factories
import pytest

ROOT = Path(__file__).resolve().parents[2]
FULL = "/dev/full"

pytestmark = pytest.mark.skipif(os.name != "posix", reason="POSIX pipes and devices")
full = pytest.mark.skipif(not os.path.exists(FULL), reason=f"there is no {FULL}")


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return factories.kohya(tmp_path_factory.mktemp("pipes") / "flux.safetensors", "flux").path


@pytest.fixture
def gone():
    """A pipe that nobody reads from."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.fixture
def device():
    """A device that is full."""
    with open(FULL, "wb") as opened:
        yield opened


def run(*arguments, **streams):
    """Exit status, stdout and stderr of the program."""
    done = subprocess.run(
        [sys.executable, "-m", "loratools", *map(str, arguments)],
        cwd=ROOT,
        text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams},
    )
    return done.returncode, done.stdout, done.stderr


PRINTING = [
    ["--help"],
    ["--version"],
    ["info", "--help"],
    ["merge", "--list-methods"],
    ["info", "FILE"],
    ["info", "FILE", "--json", "--debug"],
    ["info", "FILE", "FILE", "--modules", "--no-norms", "--debug"],
    ["doctor", "FILE", "--json"],
]


def filled(arguments, file):
    return [file if each == "FILE" else each for each in arguments]


@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
def test_a_reader_that_has_seen_enough_is_no_failure(flux, gone, arguments):
    assert run(*filled(arguments, flux), stdout=gone) == (0, None, "")


def test_a_reader_that_goes_on_the_way_is_none_either(flux):
    command = [sys.executable, "-m", "loratools", "info", flux, flux, flux, flux, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert process.stdout.read(1) == b"["
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 0)
    process.stderr.close()


def test_a_reader_that_has_gone_hides_no_failure(flux, gone, tmp_path):
    missing = tmp_path / "missing.safetensors"
    status, _, error = run("info", flux, missing, stdout=gone)
    assert status == 1
    assert error == (f"Error: {missing}: no such file. A file of tensors was expected. Check the path.\n")


@full
@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["info", "--help"], ["merge", "--list-methods"], ["info", "FILE", "--json"]],
    ids=" ".join,
)
def test_a_full_device_is_a_failure_of_what_only_prints(flux, device, arguments):
    assert run(*filled(arguments, flux), stdout=device) == (1, None, "Error: No space left on device.\n")


@pytest.mark.parametrize(
    "arguments", [["info", "missing"], ["no-such-command"], ["info", "missing", "--debug"]]
)
def test_a_message_that_nobody_reads_changes_no_exit_status(gone, arguments):
    expected = 1 if arguments[0] == "info" else 2
    assert run(*arguments, stderr=gone) == (expected, "", None)


@full
def test_a_message_that_has_no_room_changes_no_exit_status(device, flux):
    assert run("info", "missing", stderr=device) == (1, "", None)
    status, shown, _ = run("info", flux, stderr=device)
    assert status == 0
    assert "flux.safetensors" in shown


@full
def test_no_room_on_either_stream(device):
    assert run("info", "missing", stdout=device, stderr=device) == (1, None, None)


def test_all_streams_may_be_closed(flux, tmp_path):
    out = tmp_path / "out.safetensors"
    command = [sys.executable, "-m", "loratools", "convert", flux, "--to", "comfy", "-o", out]
    done = subprocess.run(["sh", "-c", '"$@" <&- >&- 2>&-', "sh", *map(str, command)], cwd=ROOT)
    assert done.returncode == 0
    assert run("info", out, "--quiet")[0] == 0


def test_a_connection_that_breaks_is_no_reader_that_has_gone(monkeypatch):
    from tests.cli.running import invoke

    def broken(*_args, **_named):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("loratools.cli.info._named", broken)
    result = invoke("info", "x")
    assert (result.exit_code, result.stderr) == (1, "Error: Broken pipe.\n")
