"""What ``pack`` and ``unpack`` return: plain values that a report shows and ``--json`` writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from loratools.model import EMPTY
from loratools.ops.prediction_results import Estimate


class Packed(NamedTuple):
    """One adapter of a pack.

    Attributes:
        name: In the pack, and of its file or folder there.
        path: Relative to the pack, with "/" between names; empty where it is a core of a shared basis.
        source: The file that it was read from.
        source_sha256: Of that file.
        hash: Of ΔW, whatever the spelling: equal ones mean the same ΔW but for rounding.
        layout: What the source was spelt in.
        rank: The largest of its modules, a count.
        bucket: The rank that all of its modules are padded to with zeros, a count.
        ranks: By module, where they differ: the rank of each before it was padded.
        modules: How many there are.
        scales: The smallest and the largest of what multiplied up · down in the source; in the pack it is 1.
        rounded: Whether values were rounded to the store dtype once more than in the source.
        dtype: The store dtype, a safetensors name.
        base: What the source calls its base model, or empty.
        bytes: Of its files in the pack, or of its cores.
        sha256: Of its weights in the pack, or empty.
        error: With a shared basis: ‖ΔW − ΔW'‖_F / ‖ΔW‖_F over all modules; else None.
        errors: With a shared basis: the same by module.
    """

    name: str
    path: str
    source: str
    source_sha256: str
    hash: str
    layout: str
    rank: int
    bucket: int
    ranks: Mapping[str, int]
    modules: int
    scales: tuple[float, float]
    rounded: bool
    dtype: str
    base: str
    bytes: int
    sha256: str
    error: float | None = None
    errors: Mapping[str, float] = EMPTY


class Alias(NamedTuple):
    """An adapter that does what another one in the pack does.

    Attributes:
        name: That it would have had.
        of: The name of the one that is kept.
        source: The file that it was read from.
        source_sha256: Of that file.
        error: ‖ΔW − ΔW'‖_F over the larger ‖ΔW‖_F, in float64 of both as they would be stored.
    """

    name: str
    of: str
    source: str
    source_sha256: str
    error: float


class Unfit(NamedTuple):
    """An input that is not in the pack.

    Attributes:
        name: That it would have had.
        source: The file.
        causes: Why, in sentences.
    """

    name: str
    source: str
    causes: tuple[str, ...]


class SharedPart(NamedTuple):
    """One module's basis.

    Attributes:
        module: Its name.
        shape: Of ΔW flattened: (out, in).
        rank: Of the basis, a count.
        adapters: How many have a core for it.
        error: √ mean (‖ΔW − ΔW'‖_F / ‖ΔW‖_F)² over them.
        rounds: Of the alternation, a count.
    """

    module: str
    shape: tuple[int, int]
    rank: int
    adapters: int
    error: float
    rounds: int


class PackReport(NamedTuple):
    """What ``pack`` did, or would do.

    Attributes:
        output: The pack.
        layout: Of its adapters.
        runtime: The program that they were checked for, or empty.
        bytes: Of the adapters or of the shared basis with its cores; the index is not counted.
        adapters: In their order.
        aliases: Inputs that were found to be the same as one of these.
        unfit: Inputs that were left out.
        reused: How many were finished by the run that this one went on from.
        notes: What the caller should know.
        shared: The modules of a shared basis; empty without one.
        estimate: What it would take, on a dry run; None otherwise.
    """

    output: str
    layout: str
    runtime: str
    bytes: int
    adapters: tuple[Packed, ...]
    aliases: tuple[Alias, ...]
    unfit: tuple[Unfit, ...]
    reused: int
    notes: tuple[str, ...]
    shared: tuple[SharedPart, ...] = ()
    estimate: Estimate | None = None


class Unpacked(NamedTuple):
    """One adapter that came out of a pack.

    Attributes:
        name: As it was asked for.
        of: The name of the adapter in the pack that it is: another one where it was a duplicate.
        path: Where it lies now.
        rank: The largest of its modules, a count.
        bytes: Of its files.
    """

    name: str
    of: str
    path: str
    rank: int
    bytes: int


class UnpackReport(NamedTuple):
    """What ``unpack`` did.

    Attributes:
        pack: The pack.
        output: The folder.
        layout: Of the adapters.
        adapters: In the order of their names.
        bytes: Of all files.
    """

    pack: str
    output: str
    layout: str
    adapters: tuple[Unpacked, ...]
    bytes: int
