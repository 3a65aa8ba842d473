"""Tensors on the disk between two steps: they come back as they were, and leave nothing behind."""

from __future__ import annotations

import errno
import os
import threading

import pytest
import torch

from loratools.errors import MalformedFileError, ReadError, ShapeError, WriteError
from loratools.io import spool as module
from loratools.io.spool import Spool
from loratools.tensors import TensorRef, from_torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_was_put_comes_back(tmp_path, dtype):
    tensor = (torch.arange(24).reshape(4, 3, 2) % 5).to(dtype)
    with Spool(tmp_path) as spool:
        spool.put(torch.ones(1, dtype=torch.uint8))  # so that the others lie at odd offsets
        ref = spool.put(tensor, "up")
        assert (ref.name, ref.shape) == ("up", (4, 3, 2))
        for found in (ref.load(), ref.load()):
            assert found.dtype == dtype
            assert found.view(torch.uint8).equal(tensor.view(torch.uint8))
        assert bytes(ref.raw()) == tensor.view(torch.uint8).numpy().tobytes()
        assert spool.size == 1 + ref.nbytes


def test_views_scalars_and_empty_tensors(tmp_path):
    tensor = torch.arange(12.0).reshape(3, 4)
    with Spool(tmp_path) as spool:
        for given in (
            tensor.t(),
            tensor[1:, ::2],
            torch.tensor(2.5),
            torch.empty(0, 3),
            tensor.requires_grad_(),
        ):
            assert spool.put(given).load().equal(given.detach())


def test_a_loaded_tensor_is_ones_own(tmp_path):
    with Spool(tmp_path) as spool:
        ref = spool.put(torch.zeros(3))
        ref.load().fill_(1.0)
        assert ref.load().tolist() == [0, 0, 0]


@pytest.mark.parametrize("rows", [0, 1, 3, 5])
def test_the_first_rows_alone_are_read(tmp_path, monkeypatch, rows):
    tensor = torch.arange(20, dtype=torch.bfloat16).reshape(5, 4)
    read = []
    original = module.read_at

    def noted(file, start, buffer, **options):
        read.append((start, buffer.nbytes))
        original(file, start, buffer, **options)

    monkeypatch.setattr(module, "read_at", noted)
    with Spool(tmp_path) as spool:
        spool.put(torch.zeros(10))
        head = spool.head(spool.put(tensor, "down"), rows)
        assert (head.name, head.shape, head.dtype) == ("down", (rows, 4), "BF16")
        assert head.load().equal(tensor[:rows])
        assert read == ([(40, rows * 8)] if rows else [])
        assert spool.head(head, 0).shape == (0, 4)


def test_rows_that_are_not_there(tmp_path):
    with Spool(tmp_path) as spool:
        ref = spool.put(torch.zeros(5, 4), "down")
        for wrong, rows in (
            (ref, 6),
            (ref, -1),
            (ref.flipped(), 2),
            (from_torch("x", torch.zeros(3, 3)), 1),
            (spool.put(torch.tensor(1.0)), 1),
        ):
            with pytest.raises(ShapeError, match=rf"no {rows} first rows in the spool"):
                spool.head(wrong, rows)


def test_threads_put_at_once(tmp_path):
    refs: dict[int, TensorRef] = {}
    with Spool(tmp_path) as spool:

        def work(number):
            for index in range(number, 200, 8):
                refs[index] = spool.put(torch.full((index + 1,), float(index)))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(refs) == 200
        for index, ref in refs.items():
            assert ref.load().equal(torch.full((index + 1,), float(index)))


def test_nothing_is_left_and_nothing_is_read_afterwards(tmp_path):
    with Spool(tmp_path) as spool:
        ref = spool.put(torch.zeros(3))
        if os.name == "posix":
            assert os.listdir(tmp_path) == []
    assert os.listdir(tmp_path) == []
    with pytest.raises(ReadError, match="temporary file was closed"):
        ref.load()
    with pytest.raises(ReadError, match="temporary file was closed"):
        spool.put(torch.zeros(3))


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(ShapeError), Spool(tmp_path) as spool:
        spool.head(spool.put(torch.zeros(3)), 4)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_and_a_missing_folder(tmp_path, monkeypatch):
    with pytest.raises(WriteError, match="No such file") as caught, Spool(tmp_path / "none"):
        pass
    assert caught.value.path == str(tmp_path / "none")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Spool(tmp_path) as spool:
        monkeypatch.setattr(module, "write_at", full)
        with pytest.raises(WriteError, match=r"temporary file cannot be written: No space left.*Make room"):
            spool.put(torch.zeros(3))
    assert os.listdir(tmp_path) == []


def test_a_dtype_without_a_name(tmp_path):
    with Spool(tmp_path) as spool, pytest.raises(MalformedFileError, match="complex128"):
        spool.put(torch.zeros(2, dtype=torch.complex128))
