"""Places for the data of tensors: what is derived from a header once serves every file that has the same header."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratools.tensors import BytesSource

if TYPE_CHECKING:
    import torch


class Slot(BytesSource):
    """Data that lies in a buffer which is exchanged for the next file's.

    Attributes:
        asked: Whether anybody has asked for the data since this was last set to False.
    """

    __slots__ = ("asked",)

    def __init__(self, buffer: memoryview) -> None:
        super().__init__(buffer)
        self.asked = False

    def raw(self) -> memoryview:
        """The buffer itself."""
        self.asked = True
        return self.buffer

    def torch(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """A copy: the data need not be aligned, and the buffer is exchanged."""
        self.asked = True
        return BytesSource(bytearray(self.buffer)).torch(shape, dtype)


class Slots:
    """The slots of one file, and where its data lies.

    Args:
        places: Start and end of every tensor's data, bytes from the start of the file.
        data: The file.
    """

    def __init__(self, places: Sequence[tuple[int, int]], data: memoryview) -> None:
        self._places = tuple(places)
        self.slots = tuple([Slot(data[start:stop]) for start, stop in places])
        self._asked: tuple[tuple[int, int], ...] = ()
        self._values: tuple[bytes, ...] = ()

    def fix(self, most: int) -> bool:
        """Keep the data that has been asked for: what follows from it holds where it is the same.

        Args:
            most: Bytes that may be kept.

        Returns:
            Whether it was no more.
        """
        asked = [number for number, slot in enumerate(self.slots) if slot.asked]
        self._asked = tuple([self._places[number] for number in asked])
        if sum(stop - start for start, stop in self._asked) > most:
            return False
        self._values = tuple([bytes(self.slots[number].buffer) for number in asked])
        return True

    def agrees(self, data: memoryview) -> bool:
        """Whether another file has the data that was asked for of the first."""
        return all(
            data[start:stop] == value for (start, stop), value in zip(self._asked, self._values, strict=True)
        )

    def bind(self, data: memoryview) -> None:
        """Let the slots hold another file's data."""
        for slot, (start, stop) in zip(self.slots, self._places, strict=True):
            slot.buffer = data[start:stop]
