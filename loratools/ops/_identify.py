"""What a checkpoint is: its architecture by names and shapes, and for every stored tensor the weight that it is.

The inverse of looking an adapter's modules up: whatever a base calls its weights, they get the architecture's names.
Nothing has to be known: a tensor of no table is called what the checkpoint calls it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from loratools import archs
from loratools.archs._names import parse, spoken
from loratools.archs._table import Table
from loratools.io.base import Base, Weight
from loratools.model import Adapter, Rows, Target
from loratools.ops import _unet_depth
from loratools.ops._network import Network, Stored, explained, modules_of, networks, split_key
from loratools.ops._pieces import dialects, meaning
from loratools.tensors import DTYPES

MATRIX, EMBEDDING, NORM, BARE = "matrix", "embedding", "norm", "bare"

# What marks a denoiser, in one file and as a folder of a diffusers model: it tells more than what lies beside it.
_DENOISERS = ("model.diffusion_model.", "diffusion_model.", "unet.", "transformer.", "prior.")
# Folders of a diffusers model, and prefixes in one file, that no adapter changes.
_ELSEWHERE = ("first_stage_model.", "vae.", "safety_checker.", "model_ema.", "image_encoder.")
_EMBEDDINGS = frozenset(
    {
        "embed_in",
        "embed_positions",
        "embed_tokens",
        "position_embedding",
        "position_embeddings",
        "positional_embedding",
        "relative_attention_bias",
        "shared",
        "tok_embeddings",
        "token_embedding",
        "token_type_embeddings",
        "word_embeddings",
        "wpe",
        "wte",
    }
)
# GPT-2's layers, which keep their weights as (in, out).
_CONV1D = frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})
_PROJECTION = "text_projection"


class Located(NamedTuple):
    """A stored weight, and what it is.

    Attributes:
        part: The subfolder of a diffusers model that it lies in, or empty.
        weight: The tensor; None where there is a bias alone.
        bias: The bias beside it, with the same rows, or None.
        role: "matrix" (a linear layer's or a convolution's), "embedding" (vocabulary, dim), "norm" or "bare" (a
            parameter without a module of its own), as far as names and shapes tell.
        turned: Whether it is stored as (in, out).
    """

    part: str
    weight: Weight | None
    bias: Weight | None
    role: str
    turned: bool = False


class Identified(NamedTuple):
    """What a checkpoint is.

    Attributes:
        arch: The architecture's name, or "unknown".
        targets: Every weight at the grain that it is stored in, in the order of the checkpoint: q, k and v of a
            fused weight are rows of it. Their rows are the stored ones in the stored order.
        others: (part, key) of what belongs to no known component: another network, a buffer, a scale.
        candidates: The architectures that nothing tells apart.
    """

    arch: str
    targets: Mapping[Target, Located]
    others: tuple[tuple[str, str], ...] = ()
    candidates: tuple[str, ...] = ()


def identify(base: Base, arch: str | None = None, hint: Adapter | None = None) -> Identified:
    """What a checkpoint is, from keys and shapes alone.

    Args:
        base: From :func:`loratools.io.base.keys_of`.
        arch: The architecture, overriding detection.
        hint: An adapter made for it, which settles what nothing else tells.

    Raises:
        ArchitectureError: Nobody has described ``arch``.
    """
    candidates: tuple[str, ...] = ()
    name = archs.get(arch).name if arch is not None else ""
    if not name:
        found = detect(base)
        candidates = found.candidates
        name = settled(found, [hint] if hint is not None else [])
    targets: dict[Target, Located] = {}
    claimed: set[tuple[str, str]] = set()
    for component, network in _claims(base, name):
        table = _table(name, component, network)
        for path, rows, stored in _named(table, network):
            located = _located(network, path, stored)
            target = Target(component, path, rows)
            if located is None or target in targets:
                continue
            targets[target] = located
            claimed.update((network.part, w.key) for w in (stored.weight, stored.bias) if w is not None)
    others = [(part, key) for part, keys in base.parts.items() for key in keys if (part, key) not in claimed]
    return Identified(name, targets, tuple(others), candidates)


def detect(base: Base) -> archs.Detection:
    """The architecture of a checkpoint by the names and widths of its matrices, the denoiser's where it is marked."""
    stems: dict[str, tuple[int, int] | None] = {}
    for part, weights in base.parts.items():
        front = f"{part}." if part else ""
        for key, weight in weights.items():
            path, leaf = split_key(key)
            stem = front + path
            if leaf != "weight" or len(weight.shape) < 2 or stem.startswith(_ELSEWHERE):
                continue
            stems[stem] = (weight.shape[0], weight.shape[1]) if DTYPES[weight.dtype].floating else None
    for prefix in _DENOISERS:
        own = {stem: shape for stem, shape in stems.items() if stem.startswith(prefix)}
        if own:
            return archs.detect(own, {})
    return archs.detect(stems, {}) if stems else archs.Detection("unknown")


def settled(found: archs.Detection, hints: Iterable[Adapter]) -> str:
    """The architecture found, or the one of its candidates that adapters point at; the first one otherwise.

    Candidates share all their names: whichever it is, the same tensors are meant.
    """
    if not found.candidates:
        return found.arch
    said = [name for hint in hints for name in (hint.arch, *hint.candidates)]
    return next((name for name in said if name in found.candidates), found.candidates[0])


def _claims(base: Base, arch: str) -> list[tuple[str, Network]]:
    """The components that a checkpoint holds, with their networks."""
    rows = archs.get(arch).components
    found: list[tuple[str, Network]] = []
    bare: list[archs.Component] = []
    for row in rows:
        for network in networks(base, arch, row.name):
            if "" in base.parts and not network.prefix:
                bare.append(row)
            else:
                found.append((row.name, network))
    if not found and bare:
        whole = Network("", "", modules_of(base.parts[""]))
        found.append((max(bare, key=lambda row: explained(arch, row.name, whole)).name, whole))
    # Of prefixes that begin alike, the longest claims a key.
    return sorted(found, key=lambda claim: -len(claim[1].prefix))


def _table(arch: str, component: str, network: Network) -> Table | None:
    """The names of a network: the architecture's, or a UNet's own where that has other blocks."""
    row = archs.component(arch, component)
    if row is None or row.table is None:
        return None
    other = _unet_depth.renumbered(row.table, network.modules)
    if other is None or all(meaning(row.table, path) is not None for path in network.modules):
        return row.table
    return other.own


def _named(table: Table | None, network: Network) -> Iterable[tuple[str, Rows | None, Stored]]:
    """Every module of a network with its native path and the rows that it is."""
    order = dialects(table, network.modules) if table is not None else ()
    for path, stored in network.modules.items():
        found = None
        if table is not None:
            found = _spoken(table, path, order[0]) if table.homonyms else meaning(table, path)
        native, rows = found if found is not None else (path, None)
        yield native, rows, stored


def _spoken(table: Table, path: str, dialect: str) -> tuple[str, Rows | None] | None:
    """As ``meaning``, in a dialect."""
    found = table.find(*parse(path))
    if found is None or not found[0].homonyms:
        return meaning(table, path)
    name = spoken(found[0], dialect)
    return name.native % found[1], name.rows


def _located(network: Network, path: str, stored: Stored) -> Located | None:
    """What a stored module is; None for buffers, which are no numbers to add anything to."""
    main = stored.weight or stored.bias
    if main is None or (not DTYPES[main.dtype].floating and stored.bare):
        return None
    shape = main.shape if stored.weight is not None else ()
    last = path.rpartition(".")[2]
    projects = is_projection(path, stored)
    if stored.bare and not projects:
        role = BARE
    elif len(shape) < 2:
        role = NORM
    elif len(shape) == 2 and last in _EMBEDDINGS and stored.bias is None:
        role = EMBEDDING
    else:
        role = MATRIX
    turned = role == MATRIX and is_conv1d(path, shape) and keeps_inputs_first(network.modules)
    return Located(network.part, stored.weight, stored.bias, role, turned or projects)


def is_conv1d(path: str, shape: tuple[int, ...]) -> bool:
    """Whether a weight is one of those that GPT-2 keeps as (in, out), by its name."""
    return len(shape) == 2 and path.rpartition(".")[2] in _CONV1D


def is_projection(path: str, stored: Stored) -> bool:
    """Whether a parameter is OpenCLIP's projection of a text, (in, out); elsewhere it is a linear layer's weight."""
    weight = stored.weight if stored.bare else None
    return weight is not None and len(weight.shape) == 2 and path.rpartition(".")[2] == _PROJECTION


def keeps_inputs_first(modules: Mapping[str, Stored]) -> bool:
    """Whether a network keeps such weights as (in, out), by the lengths of their biases, which are one per output."""
    for path, (weight, bias, _) in modules.items():
        if weight is None or bias is None or not is_conv1d(path, weight.shape):
            continue
        if weight.shape[0] != weight.shape[1]:
            return bias.shape == weight.shape[1:]
    return False
