"""What a header says goes through every layout and comes back, but for what must be true of the file that has it."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import factories as make
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import loratools as lt
from loratools.ops.convert import convert
from tests.formats.travelling import ISSUED, SAID, kohya, numbered_unet, pairs, read, through

# Keys of a Kohya header that are made true for every file that is written.
OF_THE_FILE = (
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
    "ss_network_module",
    "ss_base_model_version",
    "modelspec.architecture",
    "modelspec.hash_sha256",
    "sshs_model_hash",
    "sshs_legacy_hash",
)
HASHED = ("kohya", "lycoris", "onetrainer", "musubi")


def headers() -> st.SearchStrategy[dict[str, str]]:
    """What trainers and tools write, and what nobody has thought of."""
    names = st.text(st.characters(codec="ascii", categories=("L", "N", "P")), min_size=1, max_size=12)
    free = [key for key in OF_THE_FILE if key not in SAID]
    keys = st.builds("".join, st.tuples(st.sampled_from(["ss_", "modelspec.", "my "]), names))
    return st.dictionaries(keys.filter(lambda key: key not in free), st.text(max_size=20), max_size=6)


VIA = [name for name in ISSUED if name != "sam"]


@pytest.mark.parametrize("layout", VIA)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(said=headers())
def test_what_a_header_says_comes_back_through_every_layout(layout: str, said: dict[str, str]) -> None:
    stated = {**SAID, **said}
    there = through(kohya(layout, {**stated, "sshs_model_hash": "0" * 64}), layout)
    assert {key: there.metadata.get(key) for key in stated} == stated
    assert ("sshs_model_hash" in there.metadata) == (layout in HASHED)
    back = convert(there, "kohya").document.metadata
    assert {key: back.get(key) for key in stated} == stated
    # Nothing else is said but what is true of the file.
    assert back.keys() - stated.keys() <= set(OF_THE_FILE)


def test_a_file_of_numbers_keeps_what_it_says(tmp_path: Path) -> None:
    tensors = {
        f"w_{role}_{number:03d}": torch.ones(shape)
        for number in range(24)
        for role, shape in (("a", (1, 768)), ("b", (768, 1)))
    }
    make.write_safetensors(tmp_path / "a.safetensors", tensors, SAID)
    adapter = lt.load(tmp_path / "a.safetensors")
    assert adapter.layout.name == "sam"
    assert convert(adapter, "sam").document.metadata == SAID


@pytest.mark.parametrize("layout", ["comfy", "diffusers", "attn-procs", "loralib", "peft", "cloneofsimo"])
def test_the_network_is_described_as_it_is(layout: str) -> None:
    stale = {
        "ss_network_dim": "128",
        "ss_network_alpha": "64",
        "ss_network_args": '{"conv_dim": "9", "x": "1"}',
    }
    there = through(kohya(layout, stale | {"ss_network_module": "networks.lora"}), layout)
    assert (there.metadata["ss_network_dim"], there.metadata["ss_network_alpha"]) == ("1", "1")
    assert json.loads(there.metadata["ss_network_args"]) == {"x": "1"}


@pytest.mark.parametrize("layout", ["kohya", "comfy", "diffusers", "peft"])
@pytest.mark.parametrize(
    ("key", "said", "kept"),
    [
        ("ss_base_model_version", "sd_v1", "sd_v1"),
        ("ss_base_model_version", "sdxl_base_v1-0", "sd_v1"),
        ("ss_base_model_version", "my own model", "my own model"),
        ("modelspec.architecture", "stable-diffusion-v1/lora", "stable-diffusion-v1/lora"),
        ("modelspec.architecture", "Flux-1-dev/lora", "stable-diffusion-v1/lora"),
        ("modelspec.architecture", "stable-diffusion-xl-v1-base", "stable-diffusion-v1"),
        ("modelspec.architecture", "my own/lora", "my own/lora"),
    ],
)
def test_the_base_model_is_that_of_the_weights(layout: str, key: str, said: str, kept: str) -> None:
    adapter = replace(kohya(layout, {key: said}), order=())
    assert convert(adapter, layout).document.metadata[key] == kept


def test_an_architecture_without_a_name_in_the_specification_is_not_called_by_anothers() -> None:
    stem = "lora_unet_transformer_blocks_0_attn_to_q"
    tensors = pairs([(stem, (8, 8))], "lora_up.weight", "lora_down.weight")
    adapter = read(tensors, {"modelspec.architecture": "flux-1-dev/lora"}, "qwen_image")
    assert "modelspec.architecture" not in convert(adapter, "comfy").document.metadata


def test_an_unknown_architectures_statements_stay() -> None:
    tensors = pairs([("tower.a.lora_x", (4, 4))], "lora_B.weight", "lora_A.weight")
    adapter = read(tensors, {"modelspec.architecture": "flux-1-dev/lora"}, "unknown")
    assert convert(adapter, "peft").document.metadata["modelspec.architecture"] == "flux-1-dev/lora"


def reference_hashes(path: Path) -> tuple[str, str]:
    """sd-scripts' two hashes of a file: of its payload, and of 64 KiB of it under a header of ``ss_`` keys alone."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header, payload = json.loads(data[8 : 8 + size]), data[8 + size :]
    trained = {
        key: value for key, value in sorted(header.pop("__metadata__").items()) if key.startswith("ss_")
    }
    tensors = {
        name: torch.frombuffer(bytearray(payload[slice(*row["data_offsets"])]), dtype=torch.float32).reshape(
            row["shape"]
        )
        for name, row in header.items()
    }
    import safetensors.torch

    whole = safetensors.torch.save(tensors, trained)
    return hashlib.sha256(payload).hexdigest(), hashlib.sha256(whole[0x100000:0x110000]).hexdigest()[:8]


@pytest.mark.parametrize("layout", HASHED)
@pytest.mark.parametrize("rank", [1, 9000])
def test_hashes_of_a_conversion_are_those_of_its_file(layout: str, rank: int, tmp_path: Path) -> None:
    stem = "transformer.transformer_blocks.0.attn.to_out.0"
    tensors = {f"{stem}.lora_A.weight": torch.randn(rank, 16), f"{stem}.lora_B.weight": torch.randn(16, rank)}
    make.write_safetensors(tmp_path / "a.safetensors", tensors, {**SAID, "sshs_model_hash": "stale"})
    adapter = lt.load(tmp_path / "a.safetensors", arch="flux")
    lt.save(adapter, tmp_path / "b.safetensors", layout=layout)
    _, metadata = make.read_safetensors(tmp_path / "b.safetensors")
    found = metadata["sshs_model_hash"], metadata["sshs_legacy_hash"]
    assert found == reference_hashes(tmp_path / "b.safetensors")
    assert (found[1] == "e3b0c442") == (rank == 1)


CONFIG: dict[str, Any] = {
    "base_model_name_or_path": "org/base",
    "task_type": "X",
    "revision": "abc",
    "lora_dropout": 0.1,
    "init_lora_weights": "gaussian",
    "megatron_config": {"a": [1, None]},
}


@pytest.mark.parametrize("layout", [name for name in VIA if name not in ("xlabs", "musubi")])
def test_a_peft_configuration_comes_back_through_every_layout(layout: str, tmp_path: Path) -> None:
    made = make.peft(tmp_path / "a", tuple(numbered_unet()), alpha=4.0, rank=4, config=CONFIG)
    adapter = lt.load(made.path, arch="sd15")
    config = convert(through(adapter, layout), "peft").document.config
    assert config is not None
    assert {key: config[key] for key in CONFIG} == CONFIG
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (
        4,
        4,
        {},
        {},
    )
