"""Every adapter of the corpus to every layout that can hold it, and back; and where one cannot, why not."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from pathlib import Path

import factories as make
import pytest
import torch

from loratools import formats
from loratools.errors import ArchitectureError, ConversionError, LoraError, OptionError
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
    "cloneofsimo-pt-list": UNET | {"attn-procs", "cloneofsimo"},
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
    form = formats.get(layout)
    suffix = ".gguf" if form.container == "gguf" else ".safetensors"
    return folder / (name if form.folder else name + suffix)


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
    assert ".part" not in str(error)
    if isinstance(error, ArchitectureError | OptionError):
        # It is the model that the program does not run, or that has to be described, not a tensor.
        assert re.search(
            r"it is for .* runs .* models.*--to|--base: a folder with its config\.json", str(error)
        )
        assert not list(folder.iterdir())
        return
    assert error.keys
    assert error.keys[0] in str(error)
    assert any(
        word in str(error) for word in ("--drop", "--to", "--base", "--arch", "Choose", "Save it", "Save the")
    )
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


def comes_back(row: dict[str, str], layout: str) -> bool:
    # Parts that were never trained are zero: fused, there is nothing to tell them apart by, nor to lose.
    return not (layout == "peft" and row["layout"] == "custom-w_a_b" and "zero-up 24/24" in row["oddities"])


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
        if comes_back(row, layout):
            back(written, adapter, layout, folder)
    assert held >= HOLDS[row["layout"]]
    assert make.digest(source) == before


# Names and shapes alone. By file: the architecture to read it as, where the makers' stand-in widths fit none; how many
# modules each layout writes, or what it says that it cannot hold.
PLANS: dict[str, tuple[str | None, dict[str, int | str]]] = {
    "anima_lora_kohya_format": ("anima", {"kohya": 11, "diffusers": 11, "comfy": 11}),
    "anima_lora_lokr_format": ("anima", {"kohya": 3, "diffusers": "LoKr", "comfy": 3}),
    "flux_control_lora_format": (
        None,
        dict.fromkeys(("kohya", "diffusers", "comfy"), "tensors that belong to no module"),
    ),
    "flux_lokr_bfl_format": ("flux", {"kohya": 6, "diffusers": "LoKr", "comfy": 6}),
    "flux_lora_diffusers_base_model_format": (None, {"kohya": 191, "diffusers": 381, "comfy": 191}),
    "flux_lora_diffusers_no_proj_mlp_format": (None, {"kohya": 190, "diffusers": 342, "comfy": 190}),
    "flux_lora_kohya_with_te1_format": (None, {"kohya": 376, "diffusers": 566, "comfy": 376}),
    "krea2_lora_kohya_format": (
        None,
        {"kohya": 40, "diffusers": "names whose dots", "comfy": "names whose dots"},
    ),
    "qwen_image_lora_kohya_format": ("qwen_image", {"kohya": 8, "diffusers": "LoKr", "comfy": 8}),
    "stripped__peft_adapter_model.safetensors": (None, {"kohya": 191, "diffusers": 381, "comfy": 191}),
}


def skeleton(name: str, arch: str | None) -> Adapter:
    """A file of which only names and shapes are known; its factors are zero, its alphas one."""

    def zeros(shape: tuple[int, ...]) -> LazySource:
        return LazySource(lambda: torch.zeros(shape) if shape else torch.ones(()))

    rows = json.loads((SKELETONS / f"{name}.json").read_text("utf-8"))
    # What is no tensor (a header's metadata, a nested checkpoint) has no shape.
    shapes = {key: tuple(row["shape"]) for key, row in rows.items() if "shape" in row}
    return formats.read(
        {key: TensorRef(key, shape, "F32", zeros(shape)) for key, shape in shapes.items()}, arch=arch
    )


@needs_skeletons
@pytest.mark.parametrize("name", PLANS)
def test_large_files_are_planned_without_losing_a_key(name: str) -> None:
    arch, plans = PLANS[name]
    adapter = skeleton(name, arch)
    for layout, expected in plans.items():
        if isinstance(expected, str):
            with pytest.raises(LoraError, match=expected) as caught:
                convert.convert(adapter, layout)
            assert set(caught.value.keys) <= set(adapter.order)
            continue
        converted = convert.convert(adapter, layout)
        assert len(converted.adapter.modules) == expected
        fates = Counter(entry.fate for entry in converted.ledger)
        assert fates.keys() <= {"moved", "split", "fused", "folded", "metadata", "implied"}
        assert [entry.key for entry in converted.ledger] == list(adapter.order)
        written = {ref.name for ref in converted.document.tensors}
        reached = {key for entry in converted.ledger for key in entry.into}
        assert {key for key in written - reached if not key.endswith(".alpha")} == set()


@needs_skeletons
def test_every_skeleton_of_an_adapter_has_a_plan() -> None:
    found = {path.stem for path in SKELETONS.glob("*.json") if skeleton(path.stem, None).modules}
    assert found == PLANS.keys()
