"""Bake, extract and verify where the system has less to offer, as on Windows.

No reads at offsets, no copying by the kernel, no sync of data or of folders, no room in advance, and no renaming or
removing of what is open.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import factories
import pytest
from safetensors.torch import load_file

from loratools.io import _copier, _lock, mapped, regions
from loratools.ops.bake import bake
from loratools.ops.extract import extract
from loratools.ops.verify import verify
from tests.ops import sd15_checkpoints

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what is open is read from /proc")


def is_open(path: str | os.PathLike[str]) -> bool:
    """Whether this process has a file, or one in a folder, open or mapped."""
    real = os.path.realpath(path)
    names = []
    for number in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:  # that of the listing itself
            continue
    maps = Path("/proc/self/maps").read_text().splitlines()
    names += [parts[5] for line in maps if len(parts := line.split(None, 5)) > 5]
    return any(name == real or name.startswith(real + os.sep) for name in names)


@pytest.fixture
def poor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system of few talents."""
    monkeypatch.setattr(regions, "_READ", regions._read_by_seeking)
    monkeypatch.setattr(regions, "_WRITE", regions._write_by_seeking)
    monkeypatch.setattr(regions, "_WAYS", (regions._by_memory,))
    monkeypatch.setattr(regions, "_PIECE", 1000)
    monkeypatch.setattr(regions, "clone_file", lambda source, target: False)
    monkeypatch.setattr(_copier, "_SYNC", None)
    monkeypatch.setattr(mapped, "_PREAD", None)
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(_lock, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=lambda *_: None))

    def refusing(name: str, checked: int) -> None:
        original: Callable[..., object] = getattr(os, name)

        def strict(*paths: object, **options: object) -> object:
            for path in paths[:checked]:
                if isinstance(path, str | os.PathLike) and is_open(path):
                    raise PermissionError(13, "The process cannot access the file", os.fspath(path))
            return original(*paths, **options)

        monkeypatch.setattr(os, name, strict)

    refusing("replace", 2)
    refusing("rename", 2)
    refusing("unlink", 1)
    opened = os.open

    def no_folders(path: str, flags: int, *rest: int, **options: object) -> int:
        # Others than us (tempfile, shutil) ask for folders by flags that Windows does not have.
        if os.path.isdir(path) and flags == os.O_RDONLY and not options:
            raise PermissionError(13, "Permission denied", path)
        return opened(path, flags, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", no_folders)


def same(one: Path, other: Path) -> None:
    """Whether two checkpoints hold the same files."""
    if one.is_file():
        assert one.read_bytes() == other.read_bytes()
        return
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (sd15_checkpoints.safetensors, "base.safetensors"),
        (sd15_checkpoints.pickle, "base.ckpt"),
        (sd15_checkpoints.sharded, "base"),
    ],
)
@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
def test_a_bake_comes_out_the_same(request, tmp_path: Path, write, name: str, dtype: str) -> None:
    adapter = factories.kohya(tmp_path / "style.safetensors", "sd15", seed=1).path
    base = write(tmp_path / name, sd15_checkpoints.tensors())
    suffix = ".safetensors" if dtype != "keep" and base.is_file() else base.suffix
    here, there = tmp_path / f"here{suffix}", tmp_path / f"there{suffix}"
    bake(base, [adapter], here, dtype=dtype)
    request.getfixturevalue("poor")
    bake(base, [adapter], there, dtype=dtype)
    same(here, there)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert verify(base, [adapter], there).ok
    bake(base, [adapter], there, dtype=dtype, overwrite=True)
    same(here, there)
    if dtype == "keep":
        # The base itself is what is written.
        bake(base, [adapter], base, overwrite=True)
        same(here, base)


def test_an_extraction_comes_out_the_same(request, tmp_path: Path) -> None:
    adapter = factories.kohya(tmp_path / "style.safetensors", "sd15", seed=1).path
    base = sd15_checkpoints.pickle(tmp_path / "base.ckpt", sd15_checkpoints.tensors())
    tuned = tmp_path / "tuned.safetensors"
    bake(base, [adapter], tuned, dtype="float32")
    extract(base, tuned, tmp_path / "here.safetensors", rank=3)
    request.getfixturevalue("poor")
    extract(base, tuned, tmp_path / "there.safetensors", rank=3)
    extract(base, tuned, tmp_path / "there.safetensors", rank=3, overwrite=True)
    same(tmp_path / "here.safetensors", tmp_path / "there.safetensors")
    assert load_file(tmp_path / "there.safetensors")


def test_an_interrupted_bake_of_shards_is_gone_on_with(request, tmp_path: Path) -> None:
    adapter = factories.kohya(tmp_path / "style.safetensors", "sd15", seed=1).path
    base = sd15_checkpoints.sharded(tmp_path / "base", sd15_checkpoints.tensors(), 3)
    bake(base, [adapter], tmp_path / "here")
    request.getfixturevalue("poor")
    whole = 0

    def interrupt(_: str, done: int, total: int) -> None:
        nonlocal whole
        whole = total
        if done > 0.7 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bake(base, [adapter], tmp_path / "there", resume=True, progress=interrupt)
    assert whole
    assert not (tmp_path / "there").exists()
    bake(base, [adapter], tmp_path / "there", resume=True)
    same(tmp_path / "here", tmp_path / "there")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
