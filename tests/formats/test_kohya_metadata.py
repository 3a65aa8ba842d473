"""What Kohya's tools expect in the header: true dimensions, and the two hashes by their definitions."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import factories as make
import pytest
import safetensors.torch
import torch

import loratools as lt


def written(adapter: lt.Adapter, path: Path, **options: object) -> tuple[dict[str, str], bytes]:
    """The metadata and the payload of what is written."""
    lt.save(adapter, path, **options)
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size])["__metadata__"], data[8 + size :]


def test_the_model_hash_is_that_of_the_payload(tmp_path: Path) -> None:
    made = make.diffusers(tmp_path / "a.safetensors", "sd15")
    metadata, payload = written(lt.load(made.path), tmp_path / "b.safetensors", layout="kohya")
    assert metadata["sshs_model_hash"] == hashlib.sha256(payload).hexdigest()


@pytest.mark.parametrize("rank", [4, 320])
def test_both_hashes_are_those_of_the_reference_serialisation(rank: int, tmp_path: Path) -> None:
    """sd-scripts hashes what the safetensors package serialises with the ``ss_`` metadata alone."""
    made = make.kohya(
        tmp_path / "a.safetensors",
        "sdxl",
        rank=rank,
        metadata={"ss_seed": "7", "modelspec.title": "Ä", "ss_output_name": "x", "other": "y"},
    )
    metadata, _ = written(lt.load(made.path), tmp_path / "b.safetensors", dtype="float16")
    if rank == 320:
        assert (tmp_path / "b.safetensors").stat().st_size > 0x110000
    tensors = safetensors.torch.load_file(tmp_path / "b.safetensors")
    trained = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    serialised = safetensors.torch.save(tensors, trained)
    size = struct.unpack("<Q", serialised[:8])[0]
    assert metadata["sshs_model_hash"] == hashlib.sha256(serialised[8 + size :]).hexdigest()
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(serialised[0x100000:0x110000]).hexdigest()[:8]


def test_a_short_files_legacy_hash_is_that_of_nothing(tmp_path: Path) -> None:
    made = make.diffusers(tmp_path / "a.safetensors", "sd15")
    metadata, _ = written(lt.load(made.path), tmp_path / "b.safetensors", layout="kohya")
    assert metadata["sshs_legacy_hash"] == "e3b0c442"


def test_dimensions_are_the_tensors_own(tmp_path: Path) -> None:
    made = make.kohya(
        tmp_path / "a.safetensors",
        rank=4,
        alpha=2.0,
        ranks={"conv": 8},
        alphas={"conv": 1.0},
        metadata={
            "ss_network_dim": "128",
            "ss_network_alpha": "64",
            "ss_network_args": '{"conv_dim": "99", "x": "1"}',
        },
    )
    metadata, _ = written(lt.load(made.path), tmp_path / "b.safetensors", dtype="float16")
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "2")
    assert json.loads(metadata["ss_network_args"]) == {"x": "1", "conv_dim": "8", "conv_alpha": "1"}


def test_mixed_dimensions_are_dynamic(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", ranks={"attn2": 8}, alphas={"attn2": 3.0})
    metadata, _ = written(lt.load(made.path), tmp_path / "b.safetensors", dtype="float16")
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("Dynamic", "Dynamic")


@pytest.mark.parametrize(
    ("arch", "stated", "expected"),
    [
        ("sd15", None, "sd_v1"),
        ("sdxl", None, "sdxl_base_v1-0"),
        ("flux", None, "flux1"),
        ("sdxl", "sd_v1", "sdxl_base_v1-0"),
    ],
)
def test_the_base_version_is_made_true(arch: str, stated: str | None, expected: str, tmp_path: Path) -> None:
    metadata = {"ss_base_model_version": stated} if stated else {}
    made = make.kohya(tmp_path / "a.safetensors", arch, metadata=metadata)
    found, _ = written(lt.load(made.path), tmp_path / "b.safetensors", dtype="float16")
    assert found["ss_base_model_version"] == expected


@pytest.mark.parametrize("layout", ["diffusers", "comfy", "ai-toolkit"])
def test_what_kohya_says_of_the_training_goes_into_other_layouts_and_its_hashes_do_not(
    layout: str, tmp_path: Path
) -> None:
    said = {
        "ss_seed": "7",
        "ss_tag_frequency": '{"1_x": {"cat": 3}}',
        "modelspec.title": "x",
        "modelspec.trigger_phrase": "xx",
        "licence": "mine",
    }
    stale = {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8, "modelspec.hash_sha256": "0x0"}
    made = make.kohya(tmp_path / "a.safetensors", "sd15", alpha=None, metadata={**said, **stale})
    metadata, _ = written(lt.load(made.path), tmp_path / "b.safetensors", layout=layout)
    assert {key: metadata[key] for key in said} == said
    assert not metadata.keys() & stale.keys()
    assert "ss_network_dim" not in metadata
    back, payload = written(lt.load(tmp_path / "b.safetensors"), tmp_path / "c.safetensors", layout="kohya")
    assert {key: back[key] for key in said} == said
    assert back["sshs_model_hash"] == hashlib.sha256(payload).hexdigest()


def test_a_kohya_file_from_diffusers_has_alpha_in_every_module(tmp_path: Path) -> None:
    made = make.diffusers(
        tmp_path / "a.safetensors",
        "sdxl",
        rank=4,
        header={"unet": {"r": 4, "lora_alpha": 3}},
        scales={"unet.": 0.75},
    )
    lt.save(lt.load(made.path), tmp_path / "b.safetensors", layout="kohya")
    tensors, _ = make.read_safetensors(tmp_path / "b.safetensors")
    stems = {key.partition(".")[0] for key in tensors}
    assert stems == {weight.kohya for weight in make.SDXL}
    assert all(tensors[f"{stem}.alpha"][:2] == ("F32", ()) for stem in stems)
    again = lt.load(tmp_path / "b.safetensors")
    make.assert_close(make.deltas_of(again), made.deltas)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_alpha_that_a_narrow_dtype_would_round_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    header = {"unet": {"r": 4, "lora_alpha": 0.1}}
    made = make.diffusers(
        tmp_path / "a.safetensors",
        "sdxl",
        rank=4,
        dtype=dtype,
        header=header,
        only=["unet."],
        scales={"unet.": 0.025},
    )
    lt.save(lt.load(made.path), tmp_path / "b.safetensors", layout="kohya")
    for module in lt.load(tmp_path / "b.safetensors").modules.values():
        assert module.scale == pytest.approx(0.025, rel=1e-6)
