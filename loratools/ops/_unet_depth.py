"""UNets with other counts of resnets, levels or attentions than the published ones: distilled and tiny models.

diffusers' names tell levels and places, and mean the same in any UNet. The original ones number all blocks in one
sequence, in which a number means something else as soon as a level is shorter: so those of a UNet of its own depth
are generated from what its keys show.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from loratools.archs._names import parse
from loratools.archs._table import DIFFUSERS, Table
from loratools.archs._unet import unet

# The words that only the original numbering has.
_NUMBERED = ("input_blocks", "output_blocks")


class Depth(NamedTuple):
    """How a UNet is built on its way down.

    Attributes:
        resnets: How many each level has.
        attention: Which levels have attention, from the finest to the coarsest.
    """

    resnets: int
    attention: tuple[bool, ...]


class Renumbered(NamedTuple):
    """A UNet whose blocks are numbered otherwise than the architecture's.

    Attributes:
        usual: The architecture's table.
        own: The table of this one.
    """

    usual: Table
    own: Table

    def path(self, path: str, *, numbered: bool) -> str | None:
        """The native path in this UNet's numbers, or None where it has no such weight.

        Args:
            path: In the architecture's native names, or as a file spelt it where its table has no such name.
            numbered: Whether the path's numbers are this UNet's, instead of those that the architecture's table
                has for what diffusers would call it.
        """
        name: str | None = path
        if not numbered and self.usual.native(path) is not None:
            name = self.usual.spell(path, None, DIFFUSERS)
        found = self.own.find(*parse(name)) if name is not None else None
        return found[0].native % found[1] if found is not None else None


def renumbered(usual: Table, paths: Collection[str]) -> Renumbered | None:
    """The numbering of a base's UNet, where it is not the architecture's; None where it is, or there is no UNet.

    Args:
        usual: The architecture's table of the denoiser.
        paths: The modules that the base has of it.
    """
    own = depth(paths)
    if own is None:
        return None
    published = depth([twin for _, twin in usual.rows if isinstance(twin, str)])
    if published is None or published == own:
        return None
    sizes = any(path.startswith(("add_embedding.", "label_emb.")) for path in paths)
    return Renumbered(usual, unet(own.attention, size_embedding=sizes, resnets=own.resnets))


def depth(paths: Iterable[str]) -> Depth | None:
    """The depth of a UNet by its modules' names, diffusers' or the original ones; None where they are no UNet's.

    Levels of different lengths are nobody's: None too.
    """
    levels: dict[int, set[str]] = {}
    attends: set[int] = set()
    blocks: dict[int, set[str]] = {}
    for path in paths:
        half, _, rest = path.partition(".")
        number, _, rest = rest.partition(".")
        if not number.isdigit():
            continue
        part, _, rest = rest.partition(".")
        if half == "input_blocks":
            blocks.setdefault(int(number), set()).add(f"{part}.{rest.partition('.')[0]}")
        elif half == "down_blocks" and part == "resnets":
            levels.setdefault(int(number), set()).add(rest.partition(".")[0])
        elif half == "down_blocks" and part == "attentions":
            attends.add(int(number))
    if blocks:
        return _numbered(blocks)
    lengths = {len(resnets) for resnets in levels.values()}
    if len(lengths) != 1:
        return None
    return Depth(lengths.pop(), tuple([level in attends for level in sorted(levels)]))


def _numbered(blocks: dict[int, set[str]]) -> Depth | None:
    """The depth by the original names: a sampler ends a level."""
    levels: list[list[bool]] = [[]]
    for number in sorted(blocks.keys() - {0}):  # block 0 is the convolution that comes before all levels
        inside = blocks[number]
        if "0.op" in inside:
            levels.append([])
        else:
            levels[-1].append(any(name.startswith("1.") for name in inside))
    lengths = {len(level) for level in levels}
    if len(lengths) != 1 or 0 in lengths:
        return None
    return Depth(lengths.pop(), tuple([any(level) for level in levels]))


def spelt_by_number(keys: Iterable[str]) -> bool:
    """Whether an adapter's keys number blocks as the original names do."""
    return any(word in key for key in keys for word in _NUMBERED)
