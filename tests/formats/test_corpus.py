"""Real files of real trainers, against the inventory that says what each is."""

from __future__ import annotations

import csv
import functools
from collections import Counter
from pathlib import Path

import factories as make
import pytest

import loratools as lt
from loratools import formats
from loratools.errors import NotAnAdapterError, UnsafePickleError
from loratools.ops import files
from loratools.tensors import TensorRef

CORPUS = Path(__file__).resolve().parents[2] / ".." / "shared" / "corpus"
pytestmark = pytest.mark.skipif(not CORPUS.is_dir(), reason="the corpus is not beside the repository")

# The inventory's labels: (layout, variant, type, kind); the variant is None where a label covers several.
LABELS: dict[str, tuple[str, str | None, str, str]] = {
    "adapterhub": ("adapterhub", "", "bottleneck-adapter", ""),
    "cloneofsimo-pt-list": ("cloneofsimo", "pt-list", "adapter", "lora"),
    "cloneofsimo-safetensors": ("cloneofsimo", "", "adapter", "lora"),
    "custom-w_a_b": ("sam", "w_a_b", "adapter", "lora"),
    "diffusers-attnprocs": ("diffusers", "attn-procs", "adapter", "lora"),
    "diffusers-lora-updown": ("diffusers", "lora-updown", "adapter", "lora"),
    "diffusers-peft-keys": ("diffusers", "peft-keys", "adapter", "lora"),
    "diffusers-peft-noprefix": ("diffusers", "no-prefix", "adapter", "lora"),
    "kohya-malformed": ("kohya", "malformed", "adapter", "lora"),
    "loralib-like": ("loralib", None, "adapter", "lora"),
    "lycoris-lokr": ("kohya", "", "adapter", "lokr"),
    "mlx-npz": ("mlx", "", "adapter", "lora"),
    "mlx-safetensors": ("mlx", "", "adapter", "lora"),
    "peft-adalora": ("peft", "", "adapter", "adalora"),
    "peft-ia3": ("peft", "", "ia3", "ia3"),
    "peft-lora": ("peft", "", "adapter", "lora"),
    "peft-lora-pickle": ("peft", "", "adapter", "lora"),
    "peft-prefix_tuning": ("peft", "", "prefix-tuning", ""),
    "peft-prompt_tuning": ("peft", "", "prompt-tuning", ""),
    "peft-unilora": ("peft", None, "adapter", "unilora"),
    "textual-inversion": ("textual-inversion", "", "textual-inversion", ""),
}
NOT_ADAPTERS = {
    "not-adapter/JustinJiangNext__lora-2.0/weights.pth": "checkpoint",
    "not-adapter/Inishpy__lerobot-libero/adapter_model.bin": "unknown",
    "not-adapter/ostris__ai-toolkit/toolkit/keymaps/stable_diffusion_sd1_ldm_base.safetensors": "empty",
}
# The inventory's words for a base model: the architecture that we must name.
ARCHS = {
    "SD1.x (cross 768)": "sd15",
    "SD1.x UNet": "sd15",
    "SD2.x (cross 1024)": "sd2",
    "animefull-final-pruned.safetensors": "sd15",
    "FLUX.1 (4 single blocks proj_out)": "flux",
    "openai/whisper-base": "speech",
    "nateraw/vit-age-classifier": "vision",
    "roberta-base": "llm",
    "EleutherAI/gpt-neo-125M": "llm",
    "BERT-base": "llm",
    "GPT-2-like 384-wide, 6 layers": "llm",
    "PY007/TinyLlama-1.1B-intermediate-step-480k-1T": "llm",
    "Mistral-7B-like (4096/1024 GQA, last 4 layers)": "llm",
    "mlx-community/Qwen2.5-0.5B-Instruct-4bit": "llm",
}
DTYPES = {"float32": "F32", "float16": "F16", "int64": "I64"}


def rows() -> list[dict[str, str]]:
    if not CORPUS.is_dir():
        return []
    with open(CORPUS / "INVENTORY.tsv", encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def ids(row: dict[str, str]) -> str:
    return row["path"]


READABLE = [row for row in rows() if row["layout"] != "unreadable"]
ADAPTERS = [row for row in READABLE if row["layout"] in LABELS and LABELS[row["layout"]][2] == "adapter"]


@functools.cache
def read(path: str) -> lt.Adapter:
    return files.read(CORPUS / path)


def tensors(adapter: lt.Adapter) -> list[TensorRef]:
    return [ref for m in adapter.modules.values() for _, ref in m.tensors()] + list(adapter.extras.values())


def test_the_inventory_names_every_weight_file() -> None:
    suffixes = (".safetensors", ".bin", ".pt", ".pth", ".npz", ".ckpt")
    found = {str(path.relative_to(CORPUS)) for path in CORPUS.rglob("*") if path.name.endswith(suffixes)}
    assert found == {row["path"] for row in rows()}


@pytest.mark.parametrize("row", READABLE, ids=ids)
def test_a_file_is_what_the_inventory_says(row: dict[str, str]) -> None:
    adapter = read(row["path"])
    dtypes = Counter(
        {DTYPES[part.split(":")[0]]: int(part.split(":")[1]) for part in row["dtypes"].split(",") if part}
    )
    assert Counter(ref.dtype for ref in tensors(adapter)) == dtypes
    if row["layout"] == "not-adapter":
        assert adapter.type == NOT_ADAPTERS[row["path"]]
        assert not adapter.modules
        assert len(adapter.extras) == int(row["n_modules"])
        return
    layout, variant, kind_of_file, kind = LABELS[row["layout"]]
    assert (adapter.layout.name, adapter.type) == (layout, kind_of_file)
    assert variant is None or adapter.layout.variant == variant
    if not kind:
        assert not adapter.modules
        assert len(adapter.extras) == int(row["n_modules"])
        return
    assert adapter.kinds == {kind: int(row["n_modules"])}
    ranks = {str(module.rank) for module in adapter.modules.values() if module.rank is not None}
    assert ranks == (set() if row["ranks"] == "-" else set(row["ranks"].split(",")))
    assert all(
        (module.alpha_tensor is not None) == (row["has_alpha"] == "y") for module in adapter.modules.values()
    )
    if row["base_arch"] in ARCHS:
        assert adapter.arch == ARCHS[row["base_arch"]] or kind == "unilora"


@pytest.mark.parametrize("row", READABLE, ids=ids)
def test_nothing_that_is_no_lora_loads_as_one(row: dict[str, str]) -> None:
    if row["layout"] in LABELS and LABELS[row["layout"]][2] == "adapter":
        assert lt.load(CORPUS / row["path"]).modules
    else:
        with pytest.raises(NotAnAdapterError, match="not a LoRA adapter"):
            lt.load(CORPUS / row["path"])


@pytest.mark.parametrize("row", [row for row in rows() if row["layout"] == "unreadable"], ids=ids)
def test_code_in_a_pickle_is_refused_by_its_name(row: dict[str, str]) -> None:
    with pytest.raises(UnsafePickleError, match="GGUFTensor"):
        files.read(CORPUS / row["path"])


@pytest.mark.parametrize("row", ADAPTERS, ids=ids)
def test_every_adapter_is_written_back_byte_for_byte(row: dict[str, str], tmp_path: Path) -> None:
    path = CORPUS / row["path"]
    adapter = read(row["path"])
    before = make.digest(path)
    form = formats.get(adapter.layout.name)
    output = tmp_path / ("out" if form.folder else "out.safetensors")
    lt.save(adapter, output)
    assert make.digest(path) == before
    new, metadata = make.read_safetensors(output / form.weights if output.is_dir() else output)
    assert metadata == dict(adapter.metadata)
    if path.suffix == ".safetensors":
        old, said = make.read_safetensors(path)
        assert list(new.items()) == list(old.items())
        assert list(metadata.items()) == list(said.items())
    else:
        from loratools import io

        opened = io.open_tensors(path).tensors
        # A bare list has no names; its matrices are numbered in pairs.
        if adapter.layout.variant != "pt-list":
            assert list(new) == list(opened)
        old = [(ref.dtype, ref.shape, ref.load().contiguous().numpy().tobytes()) for ref in opened.values()]
        assert list(new.values()) == old
    again = lt.load(output)
    assert list(again.modules) == list(adapter.modules)


@pytest.mark.parametrize("row", [row for row in ADAPTERS if row["layout"] != "lycoris-lokr"], ids=ids)
def test_every_lora_has_a_finite_delta_of_the_bases_shape(row: dict[str, str]) -> None:
    for module in list(read(row["path"]).modules.values())[:3]:
        small = module.shape is not None and module.shape[0] * module.shape[1] < 4_000_000
        if module.kind == "lora" and small:
            delta = module.delta()
            assert tuple(delta.shape) == module.shape
            assert bool(delta.isfinite().all())


def test_what_the_inventory_says_of_odd_files() -> None:
    cases = {
        "diffusers-peft-keys/leighwoods__public-loras/at-15578f9f/lora.safetensors": "sd_1.5",
        "loralib-like/umarsahmad__vl-fastapi-app/lora_weights.pt": "no alpha",
        "mlx-npz/hungphamdinh__MLX_Model/adapters.npz": "20",
        "not-adapter/Inishpy__lerobot-libero/adapter_model.bin": "303 alphas",
    }
    for path, word in cases.items():
        assert any(word in note for note in read(path).notes), path


def test_a_reversed_loralib_file_has_the_fused_weights_shape() -> None:
    adapter = read("loralib-like/umarsahmad__vl-fastapi-app/lora_weights.pt")
    assert adapter.layout.variant == "transposed"
    shapes = {module.shape for module in adapter.modules.values()}
    assert (3 * 384, 384) in shapes
