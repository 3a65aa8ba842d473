"""Tensors that know their shape now and their data later, byte for byte."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools import tensors
from loratools.errors import MalformedFileError
from loratools.tensors import DTYPES, BytesSource, LazySource, TensorRef, from_scalar, from_torch

WHOLE = [row for row in DTYPES.values() if row.torch and row.bits >= 8 and row.name != "C64"]


@pytest.mark.parametrize("row", DTYPES.values(), ids=lambda row: row.name)
def test_the_table_agrees_with_torch_and_numpy(row: tensors.DType) -> None:
    if row.torch and hasattr(torch, row.torch) and row.bits >= 8:
        kind = getattr(torch, row.torch)
        assert kind.itemsize * 8 == row.bits
        assert kind.is_floating_point == row.floating
    if row.numpy:
        assert np.dtype(row.numpy).itemsize * 8 == row.bits


@pytest.mark.parametrize("row", WHOLE, ids=lambda row: row.name)
def test_bytes_come_back_as_they_went(row: tensors.DType) -> None:
    kind = getattr(torch, row.torch)
    tensor = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(kind)
    ref = from_torch("x", tensor)
    assert (ref.name, ref.shape, ref.dtype, ref.nbytes, ref.numel) == (
        "x",
        (2, 3),
        row.name,
        6 * row.bits // 8,
        6,
    )
    again = TensorRef("y", ref.shape, ref.dtype, BytesSource(memoryview(bytearray(ref.raw()))))
    assert torch.equal(again.load().view(torch.uint8), tensor.view(torch.uint8))
    np.testing.assert_array_equal(again.numpy().astype(np.float64), tensor.to(torch.float64).numpy())


def test_a_view_is_stored_as_it_looks() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)[:, ::2].t()
    ref = from_torch("x", tensor)
    assert bytes(ref.raw()) == tensor.contiguous().numpy().tobytes()


def test_flipping_touches_no_data_and_twice_is_nothing() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    ref = from_torch("x", tensor)
    flipped = ref.flipped()
    assert (flipped.shape, flipped.stored_shape) == ((3, 2), (2, 3))
    assert torch.equal(flipped.load(), tensor.t())
    np.testing.assert_array_equal(flipped.numpy(), tensor.t().numpy())
    assert bytes(flipped.raw()) == bytes(ref.raw())
    assert flipped.flipped().shape == ref.shape
    assert torch.equal(flipped.flipped().load(), tensor)


def test_an_empty_tensor() -> None:
    ref = TensorRef("x", (0, 4), "F32", BytesSource(memoryview(b"")))
    assert ref.load().shape == (0, 4)
    assert ref.numpy().shape == (0, 4)
    assert from_torch("x", torch.zeros(0, 4)).nbytes == 0


@pytest.mark.parametrize("dtype", ["F16", "F32", "F64", "BF16", "I64", "I16", "I8", "U8", "BOOL"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_a_single_number_is_read_without_torch(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape, dtype=getattr(torch, DTYPES[dtype].torch))
    assert from_torch("x", tensor).scalar() == 1.0


def test_several_numbers_are_no_scalar() -> None:
    with pytest.raises(MalformedFileError, match=r"x\.alpha.*\[2\]"):
        from_torch("x.alpha", torch.ones(2)).scalar()


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_scalar_goes_and_comes_back(value: float) -> None:
    assert from_scalar("x", value, "F32").scalar() == value
    assert from_scalar("x", value, "F64").scalar() == value


def test_scalars_that_cannot_be_stored() -> None:
    with pytest.raises(MalformedFileError, match="BF16"):
        from_scalar("x", 1.0, "BF16")
    with pytest.raises((MalformedFileError, OverflowError, struct.error)):
        from_scalar("x", 1e30, "F16")


def test_bfloat16_is_widened_exactly_or_left_as_bits() -> None:
    tensor = torch.randn(64).bfloat16()
    ref = from_torch("x", tensor)
    np.testing.assert_array_equal(ref.numpy(), tensor.float().numpy())
    bits = ref.numpy(widen=False)
    assert bits.dtype == np.uint16
    np.testing.assert_array_equal(bits, tensor.view(torch.uint16).numpy())


def test_a_lazy_source_is_asked_only_for_its_data() -> None:
    asked = []

    def load() -> torch.Tensor:
        asked.append(1)
        return torch.ones(2)

    ref = TensorRef("x", (2,), "F32", LazySource(load))
    assert (ref.nbytes, ref.renamed("y").name, asked) == (8, "y", [])
    assert ref.load().sum() == 2
    assert asked == [1]


@pytest.mark.parametrize(
    ("shape", "dtype", "size"), [((3, 4), "F4", 6), ((8,), "F6_E2M3", 6), ((), "F64", 8)]
)
def test_sizes_of_packed_dtypes(shape: tuple[int, ...], dtype: str, size: int) -> None:
    assert tensors.nbytes(shape, dtype) == size


def test_a_packed_tensor_that_ends_within_a_byte_is_malformed() -> None:
    with pytest.raises(MalformedFileError, match="whole bytes"):
        tensors.nbytes((3,), "F4")


def test_a_dtype_that_safetensors_lacks() -> None:
    with pytest.raises(MalformedFileError, match="complex128"):
        tensors.dtype_of(torch.zeros(1, dtype=torch.complex128))
