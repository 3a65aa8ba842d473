"""What becomes of a run whose report cannot be shown, and of one that is interrupted early."""

import json
import os
import signal
import subprocess
import sys

import factories
import pytest

from tests.cli.running import invoke

pytestmark = pytest.mark.skipif(os.name != "posix", reason="POSIX pipes, shells and signals")
FULL = "/dev/full"


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return factories.kohya(tmp_path_factory.mktemp("streams") / "flux.safetensors", "flux").path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.safetensors"


def shell(redirection, *arguments):
    """Run loratools with its streams redirected by a shell."""
    command = [sys.executable, "-m", "loratools", *map(str, arguments)]
    return subprocess.run(["sh", "-c", f'"$@" {redirection}', "sh", *command], capture_output=True, text=True)


@pytest.mark.parametrize("option", ["--quiet", "--json", "--no-verify"])
def test_a_closed_stdout_is_no_fault(flux, out, option):
    done = shell(">&-", "convert", flux, "--to", "comfy", "-o", out, option)
    assert (done.returncode, done.stderr) == (0, "")
    assert invoke("info", out).exit_code == 0


def test_messages_for_a_closed_stderr_are_lost_and_the_exit_status_stays(tmp_path):
    done = shell("2>&-", "info", tmp_path / "missing.safetensors")
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.parametrize("option", ["--json", "--verify"])
def test_a_reader_that_has_gone_does_not_undo_the_work(flux, out, option):
    command = [sys.executable, "-m", "loratools", "convert", flux, "--to", "comfy", "-o", out, option]
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
    assert out.exists()


@pytest.mark.skipif(not os.path.exists(FULL), reason=f"there is no {FULL}")
@pytest.mark.parametrize("option", ["--json", "--verify"])
def test_a_full_stdout_is_told_apart_from_an_output_that_was_not_written(flux, out, option):
    done = shell(f">{FULL}", "convert", flux, "--to", "comfy", "-o", out, option)
    assert done.returncode == 0
    assert done.stderr == (f"Warning: {out} was written; the report could not be: No space left on device.\n")
    assert out.exists()


@pytest.mark.skipif(not os.path.exists(FULL), reason=f"there is no {FULL}")
def test_a_report_that_is_all_the_work_fails_with_stdout(flux):
    done = shell(f">{FULL}", "info", flux, "--no-norms")
    assert done.returncode == 1
    assert done.stderr == "Error: No space left on device.\n"


@pytest.mark.parametrize("command", ["convert", "merge", "info"])
def test_what_may_be_read_is_the_reader_s_to_say(flux, out, command, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_args, **_kwargs: False)
    inputs = [flux, flux] if command == "merge" else [flux]
    writing = [] if command == "info" else ["-o", out]
    result = invoke(command, *inputs, *writing, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)


SWALLOWING = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):
        pass
except BaseException:
    pass
"""


def test_an_interrupt_that_an_import_would_swallow_still_counts(flux, out, tmp_path):
    module = tmp_path / "modules" / "swallowing.py"
    module.parent.mkdir()
    module.write_text(SWALLOWING)
    code = (
        # A run in the background may have been told to ignore interrupts.
        "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from loratools.ops import files\nfrom loratools.cli import main\nwrite = files.write\n"
        "def late(*a, **k):\n    import swallowing\n    time.sleep(20)\n    return write(*a, **k)\n"
        "files.write = late\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "convert", flux, "--to", "comfy", "-o", out],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(module.parent), os.getcwd()])},
        timeout=19,
    )
    assert done.returncode == 130
    assert done.stderr.strip() == "Interrupted"
    assert not out.exists()
    assert os.listdir(tmp_path) == ["modules"]


def test_an_interrupt_while_the_program_is_imported_shows_no_traceback(tmp_path):
    (tmp_path / "click.py").write_text("raise KeyboardInterrupt")
    done = subprocess.run(
        [sys.executable, "-m", "loratools", "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])},
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_an_interrupt_that_is_ignored_stays_ignored():
    code = (
        "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nfrom loratools import cli\n"
        "cli.cli = lambda **_: print(signal.getsignal(signal.SIGINT).name)\ncli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == signal.SIG_IGN.name
