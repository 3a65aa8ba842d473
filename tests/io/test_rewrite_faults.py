"""What goes wrong while a checkpoint is written: it is said at once, and nothing is left behind."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from rewriting import naive, raw, refuse, safetensors, tensors

from loratools.errors import (
    MalformedFileError,
    WriteError,
)
from loratools.io import _copier, atomic_output, pieces, regions
from loratools.io.rewrite import Copied, Restream, Rewrite

ROOT = Path(__file__).resolve().parents[2]
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX resource limits")


def test_a_tensor_that_nobody_put(tmp_path):
    shard, weights = safetensors(tmp_path / "base")
    writer = Rewrite(shard, weights, str(tmp_path / "out"), ["odd", "step"])
    writer.start()
    writer.put("odd", bytes(13))
    with pytest.raises(WriteError, match=r"1 of 2 tensors were not computed \(step\)"):
        writer.finish()
    with pytest.raises(WriteError):
        writer.put("step", bytes(4))
    assert running() == []


def test_a_source_that_changes_meanwhile(tmp_path):
    shard, weights = safetensors(tmp_path / "base")
    with open(tmp_path / "base", "ab") as file:
        file.write(b"more")
    with pytest.raises(MalformedFileError, match=r"bytes now, and had"):
        Rewrite(shard, weights, str(tmp_path / "out"), ()).start()
    os.truncate(tmp_path / "base", shard.size - 100)
    writer = Restream([Copied(key, weight) for key, weight in weights.items()], str(tmp_path / "out"), {})
    writer.start()
    with pytest.raises(MalformedFileError, match=r"base: the file ends at byte"):
        writer.finish()


def test_threads_put_at_once(tmp_path):
    content = {f"w{index}": torch.randn(index + 1) for index in range(400)}
    shard, weights = safetensors(tmp_path / "base", None, content)
    new = {key: tensor + 1 for key, tensor in content.items() if int(key[1:]) % 3}
    writer = Rewrite(shard, weights, str(tmp_path / "out"), [*new])
    writer.start()

    def work(number):
        for key in [*new][number::8]:
            writer.put(key, memoryview(raw(new[key])))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    steps = []
    writer.finish(steps.append)
    assert (tmp_path / "out").read_bytes() == naive((tmp_path / "base").read_bytes(), weights, new)
    assert steps[-1] == shard.size == writer.progress == writer.total
    assert steps == sorted(steps)


def slow(monkeypatch):
    """Copying that waits, byte by byte, until it is let go; returns (has begun, may go on)."""
    begun, go = threading.Event(), threading.Event()
    copy = pieces.copy_range

    def copy_range(*args, step, **options):
        def wait(count):
            begun.set()
            assert go.wait(5)
            step(count)

        copy(*args, step=wait, **options)

    monkeypatch.setattr(regions, "_CHUNK", 1)
    monkeypatch.setattr(pieces, "copy_range", copy_range)
    return begun, go


def running():
    """The threads that did not end by themselves."""
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("loratools-")]
    for thread in threads:
        thread.join(5)
    return [thread.name for thread in threads if thread.is_alive()]


def test_copying_goes_on_behind_the_caller(tmp_path, monkeypatch):
    begun, go = slow(monkeypatch)
    shard, weights = safetensors(tmp_path / "base")
    writer = Rewrite(shard, weights, str(tmp_path / "out"), ["a.weight"])
    writer.start()
    assert begun.wait(5)
    writer.put("a.weight", raw(tensors(1)["a.weight"]))
    assert 64 * 33 * 4 <= writer.progress < writer.total
    seen = []

    def progress(done):
        seen.append(done)
        go.set()

    writer.finish(progress)
    assert seen[0] < seen[-1] == writer.total


@pytest.mark.parametrize("when", ["abort", "with", "finish"])
def test_an_abort_in_the_middle_ends_all_threads(tmp_path, monkeypatch, when):
    begun, go = slow(monkeypatch)
    shard, weights = safetensors(tmp_path / "base")
    writer = Rewrite(shard, weights, str(tmp_path / "out"), [])

    def interrupt(_):
        raise KeyboardInterrupt

    # The copying waits for leave; whoever aborts waits for the copying.
    monkeypatch.setattr(_copier.Copier, "stop", let_go(_copier.Copier.stop, go))
    if when == "with":
        with pytest.raises(KeyboardInterrupt), writer:
            interrupt(begun.wait(5))
    else:
        writer.start()
        assert begun.wait(5)
        if when == "finish":
            with pytest.raises(KeyboardInterrupt):
                writer.finish(interrupt)
        else:
            writer.abort()
    writer.abort()
    assert running() == []
    assert writer.progress < 20
    with pytest.raises(WriteError):
        writer.finish()


def let_go(stop, go):
    def both(self):
        self._stopped = True
        go.set()
        stop(self)

    return both


def test_an_abort_by_one_thread_is_an_error_in_the_one_that_waits(tmp_path, monkeypatch):
    begun, go = slow(monkeypatch)
    monkeypatch.setattr(_copier.Copier, "stop", let_go(_copier.Copier.stop, go))
    shard, weights = safetensors(tmp_path / "base")
    writer = Rewrite(shard, weights, str(tmp_path / "out"), [])
    writer.start()
    assert begun.wait(5)
    aborting = []

    def progress(_):
        if not aborting:
            aborting.append(threading.Thread(target=writer.abort))
            aborting[0].start()

    with pytest.raises(WriteError, match="given up"):
        writer.finish(progress)
    aborting[0].join(5)
    assert running() == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("where", ["copy", "sync"])
def test_what_fails_in_the_background_is_raised_by_the_next_call(tmp_path, monkeypatch, number, where):
    monkeypatch.setattr(_copier, "_SYNCED", 1)
    if where == "copy":
        monkeypatch.setattr(pieces, "copy_range", refuse(number))
    else:
        monkeypatch.setattr(_copier, "_SYNC", refuse(number))
    shard, weights = safetensors(tmp_path / "base")

    def attempt(last):
        with atomic_output(tmp_path / "out", False) as part:
            writer = Rewrite(shard, weights, str(part), ["odd"] if last == "put" else [])
            with writer:
                (writer._copier if where == "copy" else writer._syncer)._thread.join(5)
                if last == "put":
                    writer.put("odd", bytes(13))
                else:
                    writer.finish()

    for last in ("put", "finish"):
        with pytest.raises(WriteError, match=os.strerror(number)):
            attempt(last)
        assert os.listdir(tmp_path) == ["base"]


def test_a_disk_that_is_too_full_shows_before_anything_is_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", refuse(errno.ENOSPC), raising=False)
    shard, weights = safetensors(tmp_path / "base")
    with (
        pytest.raises(WriteError, match=r"No space left on device \([\d,]+ bytes needed"),
        atomic_output(tmp_path / "out", False, shard.size) as part,
    ):
        Rewrite(shard, weights, str(part), ["odd"]).start()
    assert os.listdir(tmp_path) == ["base"]
    assert running() == []


def run(program, folder):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=60, check=False
    )


SHARD = """
    import os, sys
    from loratools.io import atomic_output
    from loratools.io.base import Shard, Weight
    from loratools.io.rewrite import Computed, Copied, Restream, Rewrite
    size = os.path.getsize("base")
    weight = Weight("w", (size // 2,), "U8", "base", size // 4)
    shard = Shard("base", "base", "", "safetensors", size, {}, ("w",))
"""


@posix
@pytest.mark.parametrize("fallocate", [True, False])
def test_a_file_that_may_not_grow_so_far(tmp_path, fallocate):
    (tmp_path / "base").write_bytes(os.urandom(300_000))
    program = f"""{SHARD}
    import resource
    from loratools.errors import WriteError
    if not {fallocate}:
        os.ftruncate = os.posix_fallocate = lambda *_: None
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        with atomic_output("out", False, size) as part:
            writer = Rewrite(shard, {{"w": weight}}, str(part), [])
            writer.start()
            writer.finish()
    except WriteError as error:
        print(error)
    """
    found = run(program, tmp_path)
    assert re.search(r"cannot be written: File too large \(300,000 bytes needed", found.stdout), found.stderr
    assert os.listdir(tmp_path) == ["base"]


@posix
@pytest.mark.parametrize("kind", ["rewrite", "restream", "memory"])
def test_memory_does_not_grow_with_the_file(tmp_path, kind):
    """Neither the ranges nor what is put stay in memory, and torch is never imported."""
    with open(tmp_path / "base", "wb") as file:
        file.truncate(200 << 20)
    program = f"""{SHARD}
    import resource
    if {kind == "memory"}:
        del os.copy_file_range, os.sendfile
        from loratools.io import regions
        regions.sys = type("Other", (), {{"platform": "darwin"}})
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    with atomic_output("out", False) as part:
        if {kind != "restream"}:
            writer = Rewrite(shard, {{"w": weight}}, str(part), [])
        else:
            writer = Restream([Copied("w", weight), Computed("x", "U8", (8 << 20,))], str(part), {{}})
        with writer:
            if {kind == "restream"}:
                writer.put("x", bytes(8 << 20))
            writer.finish()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before
    print(grown < 24 << 20, "torch" in sys.modules, "numpy" in sys.modules, grown, file=sys.stdout)
    """
    found = run(program, tmp_path)
    assert found.stdout.startswith("True False False"), (found.stdout, found.stderr)
