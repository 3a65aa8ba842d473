"""Lists of tensors as torch.save writes them: whole or not there, the same bytes each time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loratools import io
from loratools.errors import OutputExistsError, WriteError
from loratools.io.pickle_writer import write_pickle_list
from loratools.tensors import LazySource, TensorRef, from_torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64]


def refs(*tensors: torch.Tensor) -> list[TensorRef]:
    return [from_torch(str(number), tensor) for number, tensor in enumerate(tensors)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_reads_what_is_written(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = [
        torch.arange(6).reshape(2, 3).to(dtype),
        torch.ones((), dtype=dtype),
        torch.ones(0, 2, dtype=dtype),
    ]
    size = write_pickle_list(tmp_path / "a.pt", refs(*tensors))
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    assert isinstance(found, list)
    assert size == (tmp_path / "a.pt").stat().st_size
    assert [(each.dtype, each.tolist()) for each in found] == [
        (each.dtype, each.tolist()) for each in tensors
    ]
    opened = io.open_tensors(tmp_path / "a.pt")
    assert (opened.container, list(opened.tensors)) == ("pickle", ["0", "1", "2"])


def test_a_view_takes_only_its_own_bytes_along(tmp_path: Path) -> None:
    whole = torch.zeros(1000, 1000)
    size = write_pickle_list(tmp_path / "a.pt", refs(whole[:2, :3], whole[5]))
    assert size < 20_000


def test_a_transposed_reference_is_written_as_it_looks(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    write_pickle_list(tmp_path / "a.pt", [ref.flipped() for ref in refs(tensor)])
    (found,) = torch.load(tmp_path / "a.pt", weights_only=True)
    assert torch.equal(found, tensor.t())
    assert found.is_contiguous()


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    tensors = refs(torch.arange(4.0), torch.ones(2, 2))
    write_pickle_list(tmp_path / "a.pt", tensors)
    write_pickle_list(tmp_path / "b.pt", tensors)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_a_file_may_be_written_over_the_one_it_is_read_from(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save([torch.arange(4.0), torch.ones(3)], path)
    opened = io.open_tensors(path)
    write_pickle_list(path, reversed(list(opened.tensors.values())), overwrite=True)
    first, second = torch.load(path, weights_only=True)
    assert (first.tolist(), second.tolist()) == ([1.0] * 3, [0.0, 1.0, 2.0, 3.0])


def test_an_existing_file_is_refused_and_left(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"mine")
    with pytest.raises(OutputExistsError):
        write_pickle_list(tmp_path / "a.pt", refs(torch.ones(1)))
    assert (tmp_path / "a.pt").read_bytes() == b"mine"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="does not exist"):
        write_pickle_list(tmp_path / "none" / "a.pt", refs(torch.ones(1)))


def test_nothing_is_left_behind_when_a_tensor_cannot_be_loaded(tmp_path: Path) -> None:
    def fail() -> torch.Tensor:
        raise RuntimeError("gone")

    broken = TensorRef("x", (1,), "F32", LazySource(fail))
    with pytest.raises(RuntimeError, match="gone"):
        write_pickle_list(tmp_path / "a.pt", [*refs(torch.ones(1)), broken])
    assert not list(tmp_path.iterdir())


def test_progress_counts_every_tensor(tmp_path: Path) -> None:
    said: list[int] = []
    write_pickle_list(tmp_path / "a.pt", refs(torch.ones(2), torch.ones(3, 3)), progress=said.append)
    assert said == [8, 36]
