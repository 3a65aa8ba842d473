"""Float8 weights with scales: W = q · scale, with one scale for all, one per row, or one per block.

Sources: ComfyUI's ``scale_weight`` (one number), compressed-tensors' and ModelOpt's ``weight_scale`` (one number, or
one per output), and the block scales of DeepSeek-V3's ``weight_scale_inv`` (arXiv 2412.19437, section 3.3: 128 x 128,
with smaller blocks at the edges), which multiply as well in spite of their name. Nothing here knows those names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from loratools.errors import NonFiniteError, ShapeError

_BLOCK = 128
_PATTERNS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Stored values from (values divided by their scales, dtype, the scales).
Rounding = Callable[[torch.Tensor, torch.dtype, torch.Tensor], torch.Tensor]


class Quantised(NamedTuple):
    """A matrix as float8 values and scales.

    Attributes:
        data: The stored values.
        scale: The scales, in the dtype and shape of those given; the same object where none had to grow.
        grown: How many scales had to grow, a count.
        most: The largest factor by which one grew; infinite where one was 0, 1 where none grew.
    """

    data: torch.Tensor
    scale: torch.Tensor
    grown: int
    most: float


def dequantise(stored: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """q · scale.

    Args:
        stored: Float8 values (out, in) or (out, in, kh, kw).
        scale: One number; one per row as (out,) or with axes of length 1; or a matrix of one per block of rows and
            inputs.
        dtype: Of the result: float32 or float64.

    Raises:
        ShapeError: The scales do not fit the matrix.
        NonFiniteError: A scale is NaN or infinite.
    """
    values = stored.to(dtype)
    for part, factor in _parts(values, _checked(scale, values.shape).to(dtype)):
        part.mul_(factor)
    return values


def quantise(
    values: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    rounding: Rounding | None = None,
) -> Quantised:
    """Float8 values and scales of a matrix; nothing is clamped.

    A scale stays where all it divides fit the dtype (|x| / scale of at most 448 for float8_e4m3fn, 57344 for
    float8_e5m2). Where not, it grows just enough, rounded up in its own dtype.

    Args:
        values: float32 or float64, of the matrix's shape.
        scale: As it was until now, in a form that ``dequantise`` takes.
        dtype: The float8 dtype.
        rounding: Makes the stored values; None rounds to nearest.

    Raises:
        ShapeError: The scales do not fit the matrix.
        NonFiniteError: A value or a scale is NaN or infinite.
    """
    if values.numel() and not bool(torch.isfinite(values.sum()) or values.isfinite().all()):
        raise NonFiniteError("a matrix holds NaN or infinity", expected="Finite values were expected")
    _checked(scale, values.shape)
    fitting = _fitting(values, scale, torch.finfo(dtype).max)
    rose = fitting > scale.to(fitting.dtype)
    grown = int(rose.sum())
    new = fitting.to(scale.dtype) if grown else scale
    # A scale of 0 belongs to a block of zeros.
    safe = new.to(values.dtype)
    safe = safe.masked_fill(safe == 0, 1.0)
    divided = values.clone()
    for part, factor in _parts(divided, safe):
        part.div_(factor)
    stored = divided.to(dtype) if rounding is None else rounding(divided, dtype, safe)
    most = float((fitting[rose] / scale.to(fitting.dtype)[rose]).max()) if grown else 1.0
    return Quantised(stored, new, grown, most)


def spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The scales, float32 or float64, as a tensor that broadcasts over the matrix.

    Raises:
        ShapeError: They do not fit it.
    """
    simple = _simple(scale, shape)
    if simple is not None:
        return simple
    high, long = _blocks(scale, shape)
    rows = scale.repeat_interleave(high, 0)[: shape[0]]
    return rows.repeat_interleave(long, 1)[:, : shape[1]]


def _checked(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    wide = scale.to(torch.float32)
    if not bool(wide.isfinite().all()):
        raise NonFiniteError("a float8 scale is NaN or infinite", expected="Finite scales were expected")
    if _simple(wide, shape) is None:
        _blocks(wide, shape)
    return wide


def _simple(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
    """One scale for all, one per row, or scales that broadcast by themselves; None where they are blocks."""
    if scale.numel() == 1:
        return scale.reshape(())
    axes = len(shape)
    if scale.dim() == 1 and len(scale) == shape[0]:
        return scale.reshape(-1, *(1 for _ in range(axes - 1)))
    if scale.dim() == axes and all(own in (1, whole) for own, whole in zip(scale.shape, shape, strict=True)):
        return scale
    if scale.shape[0] == shape[0] and scale.numel() == shape[0]:
        return scale.reshape(-1, *(1 for _ in range(axes - 1)))
    return None


def _blocks(scale: torch.Tensor, shape: torch.Size) -> tuple[int, int]:
    """Height and length of the blocks that a matrix of scales stands for.

    Raises:
        ShapeError: No blocks of one size make so many.
    """
    if scale.dim() == 2 and len(shape) == 2:
        sizes = [_block(whole, count) for whole, count in zip(shape, scale.shape, strict=True)]
        if sizes[0] and sizes[1]:
            return sizes[0], sizes[1]
    raise ShapeError(
        f"float8 scales of shape {list(scale.shape)} for a weight of shape {list(shape)}",
        expected=f"One number, one per row, or one per block (as {_BLOCK} x {_BLOCK}) was expected",
        todo="The file is damaged; get it again from where it was made",
    )


def _block(whole: int, count: int) -> int:
    """The length of blocks of which ``count`` cover a side, preferably 128 or another power of two; 0 for none."""
    likely = [_BLOCK, *(1 << power for power in range(12)), -(-whole // max(1, count))]
    return next((size for size in likely if -(-whole // size) == count), 0)


def _parts(values: torch.Tensor, scale: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Views of a matrix with the scales that broadcast over each: all at once, or by rows of blocks."""
    simple = _simple(scale, values.shape)
    if simple is not None:
        return [(values, simple)]
    high, long = _blocks(scale, values.shape)
    width = values.shape[1]
    rows = (scale[row].repeat_interleave(long)[:width] for row in range(scale.shape[0]))
    return [(values[row * high : (row + 1) * high], factors) for row, factors in enumerate(rows)]


def _fitting(values: torch.Tensor, scale: torch.Tensor, top: float) -> torch.Tensor:
    """The scales, those grown that would not do, as float64 of the scales' shape and representable in their dtype."""
    largest = _largest(values, scale).to(torch.float64)
    old = scale.to(torch.float64)
    needed = torch.where(largest > old.abs() * top, largest / top, old)
    new = needed.to(scale.dtype)
    short = new.to(torch.float64).abs() * top < largest
    # Rounded down: the next larger value, whose pattern is the next.
    bits = new.view(_PATTERNS[scale.dtype.itemsize])
    return (bits + short.to(bits.dtype)).view(scale.dtype).to(torch.float64)


def _largest(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The largest magnitude that each scale divides, of the scales' shape."""
    simple = _simple(scale.to(torch.float32), values.shape)
    if simple is not None:
        axes = [axis for axis in range(values.dim()) if simple.dim() == 0 or simple.shape[axis] == 1]
        size = values.abs()
        return (size.amax(dim=axes) if axes else size).reshape(scale.shape)
    found = torch.empty(scale.shape, dtype=values.dtype)
    high, long = _blocks(scale.to(torch.float32), values.shape)
    for row in range(scale.shape[0]):
        columns = values[row * high : (row + 1) * high].abs().amax(dim=0)
        padded = torch.nn.functional.pad(columns, (0, long * scale.shape[1] - len(columns)))
        found[row] = padded.reshape(-1, long).amax(dim=1)
    return found
