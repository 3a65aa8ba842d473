import errno
import subprocess
import sys

import click
import pytest

from loratools.cli import failures
from loratools.errors import LoraError
from tests.cli.running import invoke


@pytest.fixture
def run(monkeypatch):
    """Run ``info`` with its work replaced by something that raises."""

    def failing(error, *arguments):
        def fail(*_args, **_kwargs):
            raise error

        monkeypatch.setattr("loratools.cli.info._named", fail)
        return invoke("info", "x.safetensors", *arguments)

    return failing


def test_an_error_is_its_message_and_exit_status_1(run):
    result = run(LoraError("the file is cut short", path="a.safetensors", todo="Download it again"))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == "Error: a.safetensors: the file is cut short. Download it again.\n"


def test_debug_lets_the_traceback_through(run):
    error = LoraError("broken")
    result = run(error, "--debug")
    assert result.exit_code == 1
    assert result.exception is error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "a.safetensors"),
            "a.safetensors: Permission denied.",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device."),
        (MemoryError(), "There is not enough memory."),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), "There is not enough memory."),
        (RuntimeError("odd"), "RuntimeError: odd. This is a fault in loratools"),
    ],
)
def test_other_errors_are_sentences_too(run, error, message):
    result = run(error)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {message}")
    assert "Traceback" not in result.stderr


def test_an_interrupt_is_one_word_and_130(run):
    result = run(KeyboardInterrupt())
    assert result.exit_code == 130
    assert result.stderr == "Interrupted\n"


def test_usage_errors_pass_unchanged(run):
    result = run(click.UsageError("wrong"))
    assert result.exit_code == 2
    assert "Error: wrong" in result.stderr


def test_a_bytes_file_name_is_shown():
    assert failures.message(OSError(errno.EIO, "Input/output error", b"a")) == "a: Input/output error."


@pytest.mark.skipif(sys.platform == "win32", reason="SIGPIPE semantics of POSIX pipes")
def test_a_closed_pipe_ends_quietly():
    process = subprocess.Popen(
        [sys.executable, "-m", "loratools", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    process.wait()
    assert b"Traceback" not in error


def test_memory_that_torch_cannot_get_is_no_fault_of_ours(run):
    result = run(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 96000000000 bytes"))
    assert result.exit_code == 1
    assert "not enough memory" in result.stderr
