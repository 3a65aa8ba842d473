"""Signals that ask for an end: the first is orderly, the second ends at once, and nothing shows a traceback."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import click
import factories
import pytest
from click.testing import CliRunner

from loratools.cli import _group
from loratools.io import work_folder

ROOT = Path(__file__).resolve().parents[2]
APART = 0.2  # seconds between two signals that are two, which is more than what counts as one
LIMIT = 30  # seconds until a process that does not end fails its test

# The program, with something in place of what writes a file: it says that it has begun, and stays.
HANGING = """
import os, signal, sys, time
# A run in the background may have been told to ignore interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
from loratools.ops import files
from loratools import cli

def say(text):
    os.write(1, text)

{code}
files.write = write
cli.main()
"""
SLEEPING = """
def write(*given, **named):
    say(b"b")
    time.sleep(60)
"""
# A clean-up that takes long.
CLEANING = """
def write(*given, **named):
    try:
        say(b"b")
        time.sleep(60)
    finally:
        say(b"c")
        time.sleep(60)
"""
# A call of a library that no signal interrupts: it waits for itself.
STUCK = """
import ctypes, threading
def write(*given, **named):
    mutex = ctypes.create_string_buffer(128)
    wait = ctypes.CDLL(None).pthread_mutex_lock
    wait(mutex)
    threading.Timer(0.5, say, (b"b",)).start()  # by then this thread is in there
    wait(mutex)
"""
# Work in a thread that goes on after the main thread was interrupted, for as long as it takes.
THREADED = """
import threading
from concurrent.futures import ThreadPoolExecutor
begun = threading.Event()
def work():
    begun.set()
    time.sleep(60)
def write(*given, **named):
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        begun.wait()
        say(b"b")
        working.result()
"""
# The file is whole and about to be brought to the disk.
SYNCING = """
real, write = os.fsync, files.write
def fsync(handle):
    real(handle)
    say(b"b")
    time.sleep(60)
os.fsync = fsync
"""
# An exception in a finaliser is shown and forgotten.
FINALISER = """
class Closing:
    def __del__(self):
        say(b"b")
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            time.sleep(0.01)
def write(*given, **named):
    Closing()
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return factories.kohya(tmp_path_factory.mktemp("signals") / "flux.safetensors", "flux").path


@pytest.fixture
def start(tmp_path, flux):
    """Start a conversion whose writing is replaced; it has begun when this returns."""
    started = []

    def begin(code, *more, stderr=subprocess.PIPE, **named):
        command = [sys.executable, "-c", HANGING.format(code=code), "convert", flux, "--to", "comfy"]
        process = subprocess.Popen(
            [*command, "-o", tmp_path / "out.safetensors", *more],
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
            **named,
        )
        started.append(process)
        assert process.stdout.read(1) == b"b"
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def ended(process):
    """Exit status and stderr of a process that is about to end."""
    _, error = process.communicate(timeout=LIMIT)
    return process.returncode, error.decode()


posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


@posix
@pytest.mark.parametrize(
    ("number", "word", "option"),
    [
        (signal.SIGINT, "Interrupted", "--quiet"),
        (signal.SIGINT, "Interrupted", "--debug"),
        (signal.SIGTERM, "Terminated", "--debug"),
        (signal.SIGHUP, "Hung up", "--json"),
    ],
)
def test_one_signal_ends_a_run_in_order(start, tmp_path, number, word, option):
    process = start(SLEEPING, option)
    process.send_signal(number)
    assert ended(process) == (128 + number, f"{word}\n")
    assert not os.listdir(tmp_path)


@posix
@pytest.mark.parametrize("code", [SYNCING, FINALISER], ids=["fsync", "finaliser"])
def test_one_signal_is_enough_wherever_it_comes(start, tmp_path, code):
    process = start(code)
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, "Interrupted\n")
    assert not os.listdir(tmp_path)


@posix
@pytest.mark.parametrize(
    ("code", "number"),
    [
        (CLEANING, signal.SIGINT),
        (CLEANING, signal.SIGTERM),
        (STUCK, signal.SIGINT),
        (THREADED, signal.SIGINT),
    ],
    ids=["clean-up", "clean-up-terminated", "library", "thread"],
)
def test_the_second_signal_ends_at_once(start, code, number):
    process = start(code, "--debug")
    process.send_signal(number)
    if code is CLEANING:
        assert process.stdout.read(1) == b"c"
    time.sleep(APART)
    assert process.poll() is None
    process.send_signal(number)
    status, error = ended(process)
    assert status == 128 + number
    assert error.strip() == f"Ended at once. {_group.LEFT['clean']}"


@posix
def test_a_signal_that_is_sent_to_the_process_and_its_group_is_one(start, tmp_path):
    process = start(SLEEPING, start_new_session=True)
    process.send_signal(signal.SIGTERM)  # as `timeout` does
    os.killpg(process.pid, signal.SIGTERM)
    assert ended(process) == (143, "Terminated\n")
    assert not os.listdir(tmp_path)


@posix
def test_a_terminal_is_told_at_once_that_a_signal_was_heard(start):
    ours, theirs = pty.openpty()
    process = start(STUCK, stderr=theirs)
    os.close(theirs)
    process.send_signal(signal.SIGINT)
    shown = b""
    while b"Once more ends at once" not in shown:
        shown += os.read(ours, 4096)
    assert b"Stopping" in shown
    time.sleep(APART)
    process.send_signal(signal.SIGINT)
    process.wait(LIMIT)
    with contextlib.suppress(OSError):  # Linux has an error where the other end is closed
        while found := os.read(ours, 4096):
            shown += found
    os.close(ours)
    assert b"Ended at once" in shown
    assert b"Traceback" not in shown
    assert process.returncode == 130


@posix
def test_a_run_under_nohup_outlives_its_terminal(start):
    code = SLEEPING.replace("time.sleep(60)", "time.sleep(0.5)\n    say(b'c')")
    process = start("signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + code, "--no-verify")
    process.send_signal(signal.SIGHUP)
    assert process.stdout.read(1) == b"c"


@posix
def test_a_signal_after_the_work_changes_no_exit_status():
    code = (
        "import os, signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import atexit, numpy\nfrom loratools import cli\n"
        "atexit.register(lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(0.05)))\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


@posix
def test_a_child_of_a_fork_does_not_answer_for_its_parent():
    code = (
        "import os, signal, time\nfrom loratools.cli import _interrupts\n"
        "signal.signal(signal.SIGTERM, signal.SIG_DFL)\n_interrupts.install()\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    for _ in range(3):\n"
        "        try:\n            os.kill(os.getpid(), signal.SIGTERM)\n            time.sleep(0.1)\n"
        "        except KeyboardInterrupt:\n            pass\n"
        "    os._exit(7)\n"
        "status = os.waitpid(child, 0)[1]\nprint(os.waitstatus_to_exitcode(status))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=LIMIT
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "7\n", "")


@pytest.fixture
def job(monkeypatch):
    """A program with one command, which writes an output and is interrupted while it does."""

    @click.command("job")
    @click.option("--output")
    @click.option("--resume", is_flag=True)
    @click.option("--clean", is_flag=True)
    def command(**_given):
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "jobs.job", SimpleNamespace(command=command))
    monkeypatch.setitem(sys.modules, "jobs", SimpleNamespace(job=sys.modules["jobs.job"]))
    program = _group.Commands("program", commands_in="jobs", summaries={"job": "A job."})
    return lambda *given: CliRunner().invoke(program, ["job", *map(str, given)])


@pytest.mark.parametrize(("resume", "kept"), [(True, True), (True, False), (False, True)])
def test_what_can_be_gone_on_with_is_said(job, tmp_path, resume, kept):
    goal = tmp_path / "out"
    if kept:
        work_folder.place_of(goal).mkdir()
    result = job("--output", goal, *(["--resume"] if resume else []))
    assert result.exit_code == 130
    said = (
        f"Interrupted. What is done is kept in {work_folder.place_of(goal)}: the same command with --resume goes on "
        "from there, with --clean removes it.\n"
    )
    assert result.output == (said if resume and kept else "Interrupted\n")


def test_what_may_be_left_depends_on_the_command(job, monkeypatch):
    said = []
    monkeypatch.setattr("loratools.cli._interrupts.leaves", said.append)
    job()
    assert said == [_group.LEFT["clean"]]
