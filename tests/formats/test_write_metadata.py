"""What goes with the modules: training metadata, configurations, embedded tokens, hashes of what is written."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import factories as make
import pytest
import torch

import loratools as lt
from loratools import formats, io
from loratools.errors import LayoutError, MalformedFileError
from loratools.model import Adapter, Layout
from loratools.tensors import from_torch

CORPUS = Path(__file__).resolve().parents[2] / ".." / "shared" / "corpus"
KEPT = "loratools.adapter_config"
ALL = ("kohya", "lycoris", "onetrainer", "comfy", "diffusers", "ai-toolkit", "peft")


def document(adapter: Adapter, layout: str) -> formats.Document:
    """The adapter named anew."""
    return formats.document(replace(adapter, order=()), Layout(layout), formats.get(layout))


def again(adapter: Adapter, layout: str) -> Adapter:
    """Written and read, without a file."""
    made = document(adapter, layout)
    refs = {ref.name: ref for ref in made.tensors}
    return formats.read(refs, metadata=made.metadata, config=made.config or {})


@pytest.mark.parametrize("layout", ["kohya", "lycoris", "onetrainer"])
def test_hashes_are_those_of_the_file(layout: str, tmp_path: Path) -> None:
    adapter = lt.load(make.kohya(tmp_path / "a.safetensors", "sdxl").path)
    made = document(adapter, layout)
    blank = {key: set(made.metadata[key]) for key in made.computed}
    assert blank == {"sshs_model_hash": {"0"}, "sshs_legacy_hash": {"0"}}
    path = tmp_path / "b.safetensors"
    io.write_safetensors(path, made.tensors, made.metadata, computed=made.computed)
    data = path.read_bytes()
    payload = data[8 + int.from_bytes(data[:8], "little") :]
    _, metadata = make.read_safetensors(path)
    assert metadata["sshs_model_hash"] == hashlib.sha256(payload).hexdigest()
    assert metadata["sshs_legacy_hash"] == "e3b0c442"


def test_naming_reads_no_data(tmp_path: Path) -> None:
    """Hashes need all of it, and are left to the writer."""

    class Untouched:
        def raw(self) -> memoryview:
            raise AssertionError("data was read")

    adapter = lt.load(make.kohya(tmp_path / "a.safetensors", "sd15", alpha=None).path)
    modules = {
        target: module._replace(
            factors={r: f._replace(source=Untouched()) for r, f in module.factors.items()}
        )
        for target, module in adapter.modules.items()
    }
    for layout in ("kohya", "diffusers", "comfy"):
        assert document(replace(adapter, modules=modules), layout).tensors


@pytest.mark.parametrize("layout", ALL)
def test_training_metadata_is_in_every_layout_and_comes_back(layout: str, tmp_path: Path) -> None:
    said = {
        "ss_seed": "7",
        "ss_tag_frequency": '{"1_x": {"cat": 3}}',
        "modelspec.title": "Ä",
        "modelspec.trigger_phrase": "xx",
        "ss_network_dim": "4",
        "ss_network_alpha": "4",
        "ss_network_module": "networks.lora",
        "strange": "kept",
    }
    stale = {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8}
    made = make.kohya(
        tmp_path / "a.safetensors", "sd15", alpha=None, rank=4, only=["lora_unet"], metadata={**said, **stale}
    )
    there = again(lt.load(made.path), layout)
    assert {key: there.metadata[key] for key in said} == said
    hashed = [key for key in there.metadata if key.startswith("sshs_")]
    assert bool(hashed) == (layout in ("kohya", "lycoris", "onetrainer"))
    back = document(there, "kohya").metadata
    assert {key: back[key] for key in said} == said


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "comfy"])
def test_dimensions_that_have_changed_are_told_truly(layout: str, tmp_path: Path) -> None:
    said = {"ss_network_dim": "128", "ss_network_alpha": "64"}
    made = make.kohya(tmp_path / "a.safetensors", "sd15", rank=4, alpha=2.0, metadata=said)
    metadata = document(lt.load(made.path), layout).metadata
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "2")


@pytest.mark.parametrize(
    ("kind", "said", "argued", "module", "algorithm"),
    [
        ("lora", "", "", "networks.lora", None),
        ("lora", "networks.lora_flux", "", "networks.lora_flux", None),
        ("lora", "networks.oft", "", "networks.lora", None),
        ("lora", "lycoris.kohya", "loha", "lycoris.kohya", "lora"),
        ("lora", "lycoris.kohya", "locon", "lycoris.kohya", "locon"),
        ("loha", "", "", "lycoris.kohya", "loha"),
        ("lokr", "networks.lora", "", "lycoris.kohya", "lokr"),
        ("lokr", "lycoris.kohya", "lokr", "lycoris.kohya", "lokr"),
        ("oft", "", "", "lycoris.kohya", "diag-oft"),
        ("oft", "networks.oft", "", "networks.oft", None),
        ("full", "", "", "lycoris.kohya", "full"),
    ],
)
def test_the_network_is_that_of_the_modules(
    kind: str, said: str, argued: str, module: str, algorithm: str | None, tmp_path: Path
) -> None:
    stated = {"ss_network_module": said} if said else {}
    if argued:
        stated["ss_network_args"] = json.dumps({"algo": argued})
    made = make.kohya(tmp_path / "a.safetensors", "sd15", kind=kind, metadata=stated, only=["attn"])
    metadata = document(lt.load(made.path, arch="sd15"), "kohya").metadata
    assert metadata["ss_network_module"] == module
    assert json.loads(metadata.get("ss_network_args", "{}")).get("algo") == algorithm
    assert metadata.get("ss_network_dim") == ("4" if kind in ("lora", "loha", "lokr") else None)


def test_butterfly_blocks_are_named(tmp_path: Path) -> None:
    key = "lora_te_text_model_encoder_layers_0_mlp_fc1.oft_blocks"
    adapter = formats.read({key: from_torch(key, torch.zeros(2, 3, 4, 4))}, arch="sd15")
    assert json.loads(document(adapter, "kohya").metadata["ss_network_args"]) == {"algo": "boft"}


PEFT_SAID: dict[str, Any] = {
    "base_model_name_or_path": "org/base",
    "task_type": "CAUSAL_LM",
    "revision": "abc",
    "lora_dropout": 0.1,
    "init_lora_weights": "pissa",
}


def unet_folder(folder: Path, **fields: Any) -> Adapter:
    """A PEFT adapter of SDXL's UNet, whose modules every image layout has names for."""
    paths = tuple(
        (weight.diffusers.removeprefix("unet."), weight.shape)
        for weight in make.SDXL
        if weight.component == "denoiser" and len(weight.shape) == 2
    )
    return lt.load(make.peft(folder, paths, alpha=4.0, rank=4, config={**PEFT_SAID, **fields}).path)


@pytest.mark.parametrize("layout", ["kohya", "lycoris", "onetrainer", "comfy", "ai-toolkit", "diffusers"])
def test_a_peft_configuration_comes_back(layout: str, tmp_path: Path) -> None:
    adapter = unet_folder(tmp_path / "a", layers_to_transform=[0], target_modules="all-linear")
    there = again(adapter, layout)
    back = document(there, "peft")
    assert back.config is not None
    assert {key: back.config[key] for key in PEFT_SAID} == PEFT_SAID
    assert (back.config["r"], back.config["lora_alpha"]) == (4, 4)
    assert back.config.get("layers_to_transform") is None
    assert back.config["target_modules"] == sorted(
        weight.diffusers.removeprefix("unet.")
        for weight in make.SDXL
        if weight.component == "denoiser" and len(weight.shape) == 2
    )
    assert KEPT not in back.metadata
    assert (KEPT in there.metadata) == (layout != "diffusers")


def test_a_language_models_configuration_is_kept_by_its_own_layout(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "a", config={**PEFT_SAID, "use_rslora": True})
    config = document(lt.load(made.path), "peft").config
    assert config is not None
    assert {key: config[key] for key in PEFT_SAID} == PEFT_SAID
    assert config["use_rslora"] is False
    assert config["lora_alpha"] == pytest.approx(16)  # alpha 8 over √4, stated over 4


def test_a_configuration_of_another_method_is_not_said_of_lora(tmp_path: Path) -> None:
    adapter = unet_folder(tmp_path / "a")
    foreign = {**adapter.config, "peft_type": "ADALORA", "init_r": 12}
    config = document(replace(adapter, config=foreign), "peft").config
    assert config is not None
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == "org/base"
    assert "init_r" not in config


def test_diffusers_configurations_come_back_by_component(tmp_path: Path) -> None:
    header = {
        "unet": {"r": 4, "lora_alpha": 4, "lora_dropout": 0.25, "task_type": "X"},
        "text_encoder": {"r": 4, "lora_alpha": 4, "lora_dropout": 0.5},
    }
    made = make.diffusers(tmp_path / "a.safetensors", "sd15", header=header)
    there = again(lt.load(made.path), "kohya")
    assert "lora_adapter_metadata" not in there.metadata
    kept = json.loads(there.metadata[KEPT])
    assert kept == {
        "denoiser": {"lora_dropout": 0.25, "task_type": "X"},
        "text_encoder": {"lora_dropout": 0.5},
    }
    back = json.loads(document(there, "diffusers").metadata["lora_adapter_metadata"])
    assert (back["unet.lora_dropout"], back["text_encoder.lora_dropout"]) == (0.25, 0.5)
    assert back["unet.r"] == 4


def test_a_header_without_prefixes_is_the_denoisers(tmp_path: Path) -> None:
    header = {"": {"r": 4, "lora_alpha": 4, "lora_dropout": 0.25}}
    made = make.diffusers(tmp_path / "a.safetensors", "sd15", header=header, prefix=False)
    config = document(lt.load(made.path), "peft").config
    assert config is not None
    assert config["lora_dropout"] == 0.25


@pytest.mark.parametrize("text", ["{", "[]", '{"denoiser": 3}'])
def test_a_broken_note_of_ours_is_said(text: str, tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sd15", metadata={KEPT: text})
    with pytest.raises(MalformedFileError, match=r"loratools\.adapter_config"):
        document(lt.load(made.path), "diffusers")


@pytest.mark.peers
def test_peft_accepts_a_configuration_that_went_through_kohya(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    full = peft.LoraConfig(r=4, lora_alpha=4, lora_dropout=0.1, target_modules=["to_q"]).to_dict()
    full = {key: sorted(value) if isinstance(value, set) else value for key, value in full.items()}
    adapter = unet_folder(tmp_path / "a", **{**full, "peft_type": "LORA", "init_lora_weights": True})
    config = document(again(adapter, "kohya"), "peft").config
    assert config is not None
    assert peft.LoraConfig(**config).lora_dropout == 0.1
    header = json.loads(document(adapter, "diffusers").metadata["lora_adapter_metadata"])
    peft.LoraConfig(**{key.removeprefix("unet."): value for key, value in header.items()})


PACKED = "bundle_emb.style.string_to_param.*"


@pytest.mark.parametrize("layout", ["lycoris", "onetrainer", "comfy"])
def test_packed_embeddings_go_along(layout: str, tmp_path: Path) -> None:
    vectors = torch.randn(2, 768)
    made = make.kohya(tmp_path / "a.safetensors", "sd15", extra={PACKED: vectors})
    there = {ref.name: ref for ref in document(lt.load(made.path), layout).tensors}
    assert torch.equal(there[PACKED].load(), vectors)


@pytest.mark.parametrize("layout", ["kohya", "lycoris", "onetrainer", "comfy"])
def test_trained_tokens_become_packed_embeddings(layout: str, tmp_path: Path) -> None:
    adapter = lt.load(make.kohya(tmp_path / "a.safetensors", "sd15").path)
    tokens = {f"<s{n}>": from_torch(f"<s{n}>", torch.full((768,), float(n))) for n in (1, 2)}
    marks = dict.fromkeys(tokens, "<embed>")
    foreign = replace(adapter, layout=Layout("cloneofsimo"), extras=tokens, metadata=marks, order=())
    there = {ref.name: ref for ref in document(foreign, layout).tensors}
    for n in (1, 2):
        found = there[f"bundle_emb.<s{n}>.string_to_param.*"]
        assert found.shape == (1, 768)
        assert found.load().unique().tolist() == [n]


@pytest.mark.skipif(not CORPUS.is_dir(), reason="the corpus is not beside the repository")
def test_the_tokens_of_a_real_file_have_a_place() -> None:
    form = formats.get("kohya")
    path = CORPUS / "cloneofsimo-safetensors" / "TedLee109__ML-final" / "final_lora.safetensors"
    adapter = lt.load(path)
    adopted = [form.adopt(ref, adapter) for ref in adapter.extras.values()]
    assert [(ref.name, ref.shape) for ref in adopted if ref is not None] == [
        ("bundle_emb.<s1>.string_to_param.*", (1, 768)),
        ("bundle_emb.<s2>.string_to_param.*", (1, 768)),
    ]


@pytest.mark.parametrize(
    ("layout", "key", "marked"),
    [
        ("diffusers", PACKED, False),
        ("peft", PACKED, False),
        ("ai-toolkit", PACKED, False),
        ("comfy", "strange.tensor", False),
        ("comfy", "<a.b>", True),
        ("comfy", "<plain>", False),
    ],
)
def test_what_has_no_place_is_named(layout: str, key: str, marked: bool, tmp_path: Path) -> None:
    said = {key: "<embed>"} if marked else {}
    made = make.kohya(
        tmp_path / "a.safetensors",
        "sd15",
        only=["lora_unet"],
        alpha=None,
        extra={key: torch.ones(768)},
        metadata=said,
    )
    adapter = lt.load(made.path)
    with pytest.raises(LayoutError, match="--drop extras") as caught:
        document(adapter, layout)
    assert caught.value.keys == (key,)
