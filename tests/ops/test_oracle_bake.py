"""Bakes against what PEFT and diffusers made of the same base and adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loratools.ops.bake import bake
from loratools.ops.extract import extract
from loratools.ops.verify import verify

ORACLE = Path(__file__).resolve().parents[2] / ".." / "shared" / "oracle"
pytestmark = pytest.mark.skipif(not ORACLE.is_dir(), reason="the reference results are not there")

FAMILIES = ("peft_bake__*", "peft_bake_multi__*", "diffusers_*", "kohya__*")
CASES = [path.name for family in FAMILIES for path in sorted(ORACLE.glob(family))] if ORACLE.is_dir() else []
REGRESSIONS = [path.name for path in sorted(ORACLE.glob("peft_regression__*"))] if ORACLE.is_dir() else []
# What DoRA changes is of full rank, and what modules_to_save replace too; the others come from factors of low rank.
LOW_RANK = [name for name in CASES if name.startswith("peft_bake__") and not name.endswith("_dora")]
# Biases, rows and experts that are no matrices of their own.
NOT_MATRICES = {
    "peft_bake__qwen2_bias_all",
    "peft_bake__llama_trainable_tokens",
    "peft_bake__mixtral_target_parameters",
}


def _manifest(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ORACLE / name / "manifest.json").read_text())
    return content


def _inputs(name: str) -> tuple[Path, list[Path], Path]:
    """The base, the adapters and the expected weights of a case."""
    said, folder = _manifest(name), ORACLE / name
    base = folder / said["inputs"]["base"]["path"]
    adapters = [folder / each["path"] for role, each in sorted(said["inputs"].items()) if role != "base"]
    expected = said["expected"]
    role = next(role for role in ("fused_true", "merged", "fused") if role in expected)
    return base, adapters, folder / expected[role]["path"]


def _same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], compare: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype, key
        torch.testing.assert_close(
            found[key],
            tensor,
            rtol=compare["rtol"],
            atol=compare["atol"],
            msg=lambda text, key=key: f"{key}: {text}",
        )


@pytest.mark.parametrize("name", CASES)
def test_a_bake_is_what_the_other_tool_made(name: str, tmp_path: Path) -> None:
    base, adapters, expected = _inputs(name)
    output = tmp_path / "baked.safetensors"
    report = bake(base, adapters, output)
    _same(load_file(output), load_file(expected), _manifest(name)["compare"])
    assert not any(report.missing)
    assert report.tensors
    found = verify(base, adapters, output)
    assert found.ok, [each for each in found.tensors if each.verdict != "baked"]


@pytest.mark.parametrize("name", REGRESSIONS)
def test_early_versions_of_peft(name: str, tmp_path: Path) -> None:
    folder = ORACLE / name
    output = tmp_path / "baked.safetensors"
    bake(folder / "base.safetensors", [folder], output)
    _same(load_file(output), load_file(folder / "expected_merged.safetensors"), {"rtol": 1e-4, "atol": 1e-5})


@pytest.mark.parametrize("name", [name for name in LOW_RANK if name not in NOT_MATRICES])
def test_what_was_baked_is_extracted_again(name: str, tmp_path: Path) -> None:
    base, _, expected = _inputs(name)
    ranks = [each["r"] for each in _manifest(name)["params"]["per_module"].values()]
    found = tmp_path / "found"
    extract(base, expected, found, rank=max(ranks), to="peft", embeddings=True, dtype="float32")
    output = tmp_path / "again.safetensors"
    bake(base, [found], output)
    again, wanted = load_file(output), load_file(expected)
    for key, tensor in wanted.items():
        scale = float(tensor.float().abs().max())
        tolerance = 1e-5 if tensor.dtype == torch.float32 else 2 * torch.finfo(tensor.dtype).eps
        torch.testing.assert_close(again[key], tensor, rtol=0, atol=tolerance * scale, msg=f"{name}: {key}")
