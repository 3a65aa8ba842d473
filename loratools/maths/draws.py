"""Random numbers that depend on where they are for, not on when they are drawn.

Every element of a matrix has its own: a hash of (key, row, column). Tiles, devices, threads and the order of work
change nothing. The hash is the finaliser of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number
generators", OOPSLA 2014), applied twice; it is integer arithmetic throughout, which all devices agree on.
"""

from __future__ import annotations

import hashlib

import torch

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_WORD = 1 << 64
_FRACTION = 53  # bits of a float64


def key_of(seed: int, *parts: str | int) -> int:
    """A 64-bit key for draws.

    Args:
        seed: The user's.
        parts: What the draws are for: a module's name, an adapter's position.
    """
    text = "\0".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def uniform(key: int, start: int, shape: tuple[int, int], device: torch.device | str = "cpu") -> torch.Tensor:
    """Rows of a matrix of independent numbers in [0, 1), float64 with 53 random bits.

    Args:
        key: From :func:`key_of`.
        start: The index of the first row in the whole matrix.
        shape: (rows, columns).
        device: Where.
    """
    rows = torch.arange(start, start + shape[0], dtype=torch.int64, device=device)[:, None]
    columns = torch.arange(shape[1], dtype=torch.int64, device=device)[None, :]
    mixed = _mixed(_mixed(rows * _signed(_GOLDEN) + _signed(key)) + columns * _signed(_GOLDEN))
    return _shifted(mixed, 64 - _FRACTION).to(torch.float64) * 2.0**-_FRACTION


def _mixed(words: torch.Tensor) -> torch.Tensor:
    words = (words ^ _shifted(words, 30)) * _signed(_FIRST)
    words = (words ^ _shifted(words, 27)) * _signed(_SECOND)
    return words ^ _shifted(words, 31)


def _shifted(words: torch.Tensor, by: int) -> torch.Tensor:
    """A logical shift to the right: torch's own copies the sign."""
    return (words >> by) & ((1 << (64 - by)) - 1)


def _signed(word: int) -> int:
    """The same 64 bits as torch's int64 has them."""
    word %= _WORD
    return word - _WORD if word >= _WORD // 2 else word
