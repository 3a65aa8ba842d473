"""Every adapter of the corpus to every layout that can hold it, and back; and where one cannot, why not."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import factories as make
import pytest
import torch

from loratools import formats
from loratools.errors import ConversionError, LoraError
from loratools.model import Adapter, Target
from loratools.ops import _bits, convert, files
from loratools.tensors import LazySource, TensorRef

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"
CORPUS = SHARED / "corpus"
SKELETONS = SHARED / "skeletons"
needs_corpus = pytest.mark.skipif(not CORPUS.is_dir(), reason="the corpus is not beside the repository")
needs_skeletons = pytest.mark.skipif(
    not SKELETONS.is_dir(), reason="the skeletons are not beside the repository"
)

# What diffusers and Kohya's relatives hold of a Stable Diffusion: layouts with names or numbers for its UNet.
UNET = {"ai-toolkit", "comfy", "diffusers", "kohya", "lycoris", "onetrainer", "peft"}
ATTENTION = UNET | {"attn-procs", "cloneofsimo", "loralib"}
PATHS = {"loralib", "peft"}
# By the inventory's label: the layouts that must hold it. Others may, or refuse it properly.
HOLDS: dict[str, set[str]] = {
    "cloneofsimo-pt-list": (UNET - {"peft"}) | {"attn-procs", "cloneofsimo"},
    "cloneofsimo-safetensors": {"cloneofsimo", "comfy", "kohya", "lycoris", "onetrainer"},
    "custom-w_a_b": {"sam", *PATHS},
    "diffusers-attnprocs": ATTENTION,
    "diffusers-lora-updown": ATTENTION,
    "diffusers-peft-keys": UNET | {"loralib", "musubi", "xlabs"},
    "diffusers-peft-noprefix": ATTENTION - {"cloneofsimo"},
    "kohya-malformed": ATTENTION,
    "loralib-like": PATHS,
    "lycoris-lokr": {"ai-toolkit", "comfy", "kohya", "lycoris", "onetrainer"},
    "mlx-npz": PATHS,
    "mlx-safetensors": PATHS,
    "peft-adalora": {"peft"},
    "peft-lora": {"peft"},
    "peft-lora-pickle": PATHS,
    "peft-unilora": {"peft"},
}


def rows() -> list[dict[str, str]]:
    if not CORPUS.is_dir():
        return []
    with open(CORPUS / "INVENTORY.tsv", encoding="utf-8", newline="") as stream:
        return [row for row in csv.DictReader(stream, delimiter="\t") if row["layout"] in HOLDS]


def output(folder: Path, name: str, layout: str) -> Path:
    return folder / (name if formats.get(layout).folder else f"{name}.safetensors")


def content(adapter: Adapter) -> dict[Target, tuple[str, float, dict[str, tuple[object, ...]]]]:
    """Every module's kind, scale and factors, bit for bit."""
    return {
        target: (
            module.kind,
            module.scale,
            {role: (ref.shape, ref.dtype, _bits.bits(ref).tobytes()) for role, ref in module.factors.items()},
        )
        for target, module in adapter.modules.items()
    }


def refused(error: LoraError, adapter: Adapter, folder: Path) -> None:
    """A proper refusal: keys named, a way out shown, and nothing left behind."""
    assert not isinstance(error, ConversionError), error
    assert error.keys
    assert error.keys[0] in str(error)
    assert ".part" not in str(error)
    assert any(word in str(error) for word in ("--drop", "--to", "Write it"))
    assert not list(folder.iterdir())
    known = {*adapter.order, *(str(target) for target in adapter.modules)}
    if "cannot leave out" in str(error):
        assert known.isdisjoint(error.keys)
    else:
        assert all(key in known or key.split(":")[0] in adapter.components() for key in error.keys)


def back(written: Path, adapter: Adapter, layout: str, folder: Path) -> None:
    """What was converted brought home: the input again."""
    form = formats.get(adapter.layout.name)
    arch = adapter.arch if adapter.arch != "unknown" else None
    again = output(folder, "back", form.name)
    convert.convert_file(written, again, to=form.name, arch=arch)
    found = files.load(again, arch=arch)
    assert set(found.extras) == set(adapter.extras)
    unscaled = all(module.scale == 1.0 for module in adapter.modules.values())
    if unscaled or "none" not in (form.alpha, formats.get(layout).alpha):
        assert content(found) == content(adapter)
    else:
        convert.verify(adapter, convert.convert(adapter, form.name), found)


@needs_corpus
@pytest.mark.parametrize("row", rows(), ids=lambda row: row["path"])
def test_every_adapter_there_and_back(row: dict[str, str], tmp_path: Path) -> None:
    source = CORPUS / row["path"]
    before = make.digest(source)
    adapter = files.load(source)
    held = set()
    for layout in formats.writable():
        folder = tmp_path / layout
        folder.mkdir()
        written = output(folder, "there", layout)
        try:
            report = convert.convert_file(source, written, to=layout)
        except LoraError as error:
            refused(error, adapter, folder)
            continue
        held.add(layout)
        assert report.weights
        assert [entry.key for entry in report.ledger] == list(adapter.order)
        assert not report.dropped
        if formats.get(adapter.layout.name).speller is not None:
            back(written, adapter, layout, folder)
    assert held >= HOLDS[row["layout"]]
    assert make.digest(source) == before
