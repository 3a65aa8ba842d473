"""PEFT's resizes as a reference: the same ranks, and the same ΔW."""

from __future__ import annotations

import json
from pathlib import Path

import factories
import numpy as np
import pytest
from safetensors.numpy import load_file

import loratools as lt
from loratools.ops.resize import resize_file

ORACLE = Path(__file__).resolve().parents[2] / ".." / "shared" / "oracle"
pytestmark = pytest.mark.skipif(
    not ORACLE.is_dir(), reason="the reference results are not beside the repository"
)
CASES = sorted(path.name for path in ORACLE.glob("peft_resize__*")) if ORACLE.is_dir() else []


@pytest.mark.parametrize("case", CASES)
def test_a_resize_is_pefts(case, tmp_path):
    manifest = json.loads((ORACLE / case / "manifest.json").read_text("utf-8"))
    params, compare = manifest["params"], manifest["compare"]
    rule = "rank" if isinstance(params["rank"], int) else "energy"
    report = resize_file(
        ORACLE / case / manifest["inputs"]["adapter"]["path"], tmp_path / "out", **{rule: params["rank"]}
    )
    expected = load_file(ORACLE / case / manifest["expected"]["delta_out"]["path"])
    found = {
        key.split("/", 1)[1]: delta for key, delta in factories.deltas_of(lt.load(tmp_path / "out")).items()
    }
    assert set(found) == set(expected)
    for path, want in expected.items():
        np.testing.assert_allclose(
            found[path], want, rtol=compare["rtol"], atol=compare["atol"], err_msg=path
        )
    assert {each.target: each.rank for each in report.modules} == params["ranks"]
    for each in report.modules:
        assert abs(each.error - params["rel_err"][each.target]) < 1e-4


def test_every_case_is_checked():
    assert len(CASES) >= 2


@pytest.mark.parametrize("case", ["peft_tolora__loha", "peft_tolora__lokr"])
def test_other_kinds_keep_what_peft_keeps(case, tmp_path):
    manifest = json.loads((ORACLE / case / "manifest.json").read_text("utf-8"))
    before = load_file(ORACLE / case / manifest["expected"]["delta"]["path"])
    rank = next(value for value in manifest["params"]["ranks"] if isinstance(value, int))
    resize_file(ORACLE / case / manifest["inputs"]["adapter"]["path"], tmp_path / "out", rank=rank)
    peft = factories.deltas_of(lt.load(ORACLE / case / manifest["expected"][f"lora_rank_{rank}"]["path"]))
    found = factories.deltas_of(lt.load(tmp_path / "out"))
    assert len(found) == len(before)
    for key, want in peft.items():
        np.testing.assert_allclose(found[key], want, rtol=1e-3, atol=1e-4 * np.abs(want).max())
