"""What no adapter touches is compared byte by byte, to the last one."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from loratools.errors import MalformedFileError
from loratools.io.base import keys_of
from loratools.ops import _verify_untouched
from loratools.ops._verify_tasks import UNEXPECTED, Kept

SIZE = 2500


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """Writes two tensors, and gives the task of comparing them in pieces of 1,000 bytes."""
    monkeypatch.setattr(_verify_untouched, "_PIECE", 1000)

    def make(before, after):
        for name, tensor in (("before", before), ("after", after)):
            save_file({"w": tensor}, tmp_path / f"{name}.safetensors")
        files = (keys_of(tmp_path / f"{name}.safetensors") for name in ("before", "after"))
        return Kept("w", *(file.parts[""]["w"] for file in files))

    return make


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, SIZE])
def test_the_same_bytes_are_untouched(pair, size):
    data = torch.arange(size).to(torch.uint8)
    assert _verify_untouched.untouched(pair(data, data)) is None


@pytest.mark.parametrize("place", [0, 999, 1000, 2000, SIZE - 1])
def test_one_other_byte_is_found_wherever_it_lies(pair, place):
    data = torch.arange(SIZE).to(torch.uint8)
    other = data.clone()
    other[place] += 1
    found = _verify_untouched.untouched(pair(data, other))
    assert found is not None
    assert found.verdict == UNEXPECTED


def test_a_file_that_became_shorter_is_said(pair):
    data = torch.arange(SIZE).to(torch.uint8)
    task = pair(data, data)
    with open(task.weight.file, "r+b") as file:
        file.truncate(task.weight.start + 1500)
    with pytest.raises(MalformedFileError):
        _verify_untouched.untouched(task)
