"""Rows moved as bits: views where nothing has to be copied, and comparisons that look at every byte."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import factories as make
import numpy as np
import pytest
import torch

from loratools.errors import NonFiniteError
from loratools.io import open_tensors, write_safetensors
from loratools.ops import _bits, _cast
from loratools.tensors import BytesSource, TensorRef, from_torch

ROOT = Path(__file__).resolve().parents[2]


def in_memory(values: np.ndarray) -> TensorRef:
    return TensorRef("x", values.shape, "F32", BytesSource(memoryview(bytearray(values.tobytes()))))


def address(ref: TensorRef) -> int:
    return np.frombuffer(ref.raw(), np.uint8).__array_interface__["data"][0]


def test_whole_rows_in_one_run_are_a_view_of_the_tensor():
    values = np.arange(24, dtype=np.float32).reshape(6, 4)
    ref = in_memory(values)
    middle = _bits.taken(ref, 0, [1], 3)
    assert address(middle) == address(ref) + 2 * 4 * 4
    np.testing.assert_array_equal(middle.numpy(), values[2:4])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("places", [[0], [1, 2], [2, 0], [2, 1, 0]])
@pytest.mark.parametrize("flipped", [False, True])
def test_shares_are_taken_in_the_order_given(axis, places, flipped):
    values = np.arange(36, dtype=np.float32).reshape(6, 6)
    ref = in_memory(values).flipped() if flipped else in_memory(values)
    parts = np.split(values.T if flipped else values, 3, axis=axis)
    wanted = np.concatenate([parts[place] for place in places], axis=axis)
    taken = _bits.taken(ref, axis, places, 3)
    np.testing.assert_array_equal(taken.numpy(), wanted)
    np.testing.assert_array_equal(taken.load().numpy(), wanted)


def test_rows_of_an_unaligned_map_are_tensors(tmp_path):
    odd = from_torch("a", torch.zeros(3, dtype=torch.uint8))
    values = torch.randn(4, 2)
    write_safetensors(tmp_path / "x", [odd, from_torch("b", values)], {}, order="given")
    with open_tensors(tmp_path / "x") as file:
        rows = _bits.taken(file.tensors["b"], 0, [1], 2)
        assert torch.equal(rows.load(), values[2:])


@pytest.mark.parametrize("size", [1, 1 << 16, (1 << 16) + 1, (1 << 17) + 3])
def test_a_single_other_bit_is_found_wherever_it_lies(size):
    values = np.ones(size, np.float32)
    assert _bits.same_bits(in_memory(values), in_memory(values))
    for place in {0, size // 2, size - 1}:
        other = values.copy()
        other.view(np.uint32)[place] ^= 1
        assert not _bits.same_bits(in_memory(values), in_memory(other))


def test_the_same_matrix_stored_either_way_has_the_same_bits():
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    turned = in_memory(np.ascontiguousarray(values.T)).flipped()
    assert _bits.same_bits(in_memory(values), turned)
    assert not _bits.same_bits(in_memory(values), in_memory(values + 1).flipped())


@pytest.mark.parametrize("axis", [0, 1])
def test_support_tells_columns_that_begin_with_zeros_from_zero_ones(axis):
    values = np.zeros((6, 3), np.float32)
    values[:, 0] = 1.0  # everywhere
    values[5, 1] = 1.0  # the last row of the last share alone
    values[0, 2] = -0.0  # minus zero is zero
    ref = in_memory(np.ascontiguousarray(values if axis == 0 else values.T))
    found = _bits.support(ref, axis, [[0], [1, 2]], 3)
    assert found.tolist() == [[True, False, False], [True, True, False]]


def test_a_cast_in_parts_is_the_cast_of_the_whole(monkeypatch):
    monkeypatch.setattr(_cast, "_PART", 5)
    values = torch.randn(4, 3, dtype=torch.float64)
    cast = _cast.cast(from_torch("x", values), "BF16", 0.3)
    assert torch.equal(cast.load(), (values * 0.3).to(torch.bfloat16))
    assert torch.equal(
        _cast.cast(from_torch("x", values).flipped(), "F16").load(), values.t().to(torch.float16)
    )


def test_a_value_out_of_range_is_found_in_any_part(monkeypatch):
    monkeypatch.setattr(_cast, "_PART", 5)
    values = torch.ones(12)
    values[11] = 1e6
    with pytest.raises(NonFiniteError, match=r"1e\+06 do not fit F16"):
        _cast.cast(from_torch("x", values), "F16").load()


def test_eight_bit_factors_can_be_multiplied():
    values = torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn)
    assert _cast.cast(from_torch("x", values), "F8_E4M3", 0.5).load().float().tolist() == [0.5, -1.0]


def test_a_verified_renaming_needs_neither_torch_nor_numpy(tmp_path):
    made = make.kohya(tmp_path / "a.safetensors", "sdxl")
    code = (
        "import sys; from loratools.ops.convert import convert_file\n"
        f"report = convert_file({str(made.path)!r}, {str(tmp_path / 'b.safetensors')!r}, to='diffusers')\n"
        "assert report.error == 0.0, report.error\n"
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, timeout=60
    )
    assert not {"torch", "numpy"} & set(done.stdout.split())
