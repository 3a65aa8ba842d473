"""Weights by block, component and pattern from the command line: what each does to ΔW, and what is told of it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import factories as make
import numpy as np
import pytest

import loratools as lt
from loratools import archs
from tests.cli.running import invoke

LENGTHS = [(arch, length) for arch in ("sd15", "sdxl", "flux") for length in archs.get(arch).vectors]


def run(*arguments: object) -> dict[str, Any]:
    done = invoke("merge", *arguments, "--overwrite", "--json")
    assert done.exit_code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def assert_weighed(made: lt.Adapter, merged: lt.Adapter, weights: dict[lt.Target, float]) -> None:
    """Every module's ΔW times its weight, to what float32 factors hold."""
    assert merged.modules.keys() == {target for target in made.modules if weights[target]}
    for target, module in merged.modules.items():
        want = weights[target] * made.modules[target].delta().numpy()
        found = module.delta().numpy()
        assert np.linalg.norm(found - want) <= 1e-5 * np.linalg.norm(want), target


def label_of(arch: str, target: lt.Target) -> str:
    return archs.get(arch).block(target.component, target.path) or ""


@pytest.mark.parametrize("maker", [make.kohya, make.diffusers])
@pytest.mark.parametrize(("arch", "length"), LENGTHS)
def test_a_signed_vector_multiplies_each_block_once(
    arch: str, length: int, maker: Any, tmp_path: Path
) -> None:
    made = lt.load(maker(tmp_path / "a.safetensors", arch, seed=3).path)
    numbers = [(-1) ** place * (place + 1) / 10 for place in range(length)]
    numbers[1] = 0.0
    named = dict(zip(archs.get(arch).vectors[length], numbers, strict=True))
    output = tmp_path / "m.safetensors"
    report = run(made.path, "--weights", "-2", "--block-weights", ",".join(map(str, numbers)), "-o", output)
    labels = {target: label_of(arch, target) for target in made.modules}
    weights = {target: -2 * named.get(label, 1.0) for target, label in labels.items()}
    # What is left may not tell one architecture from another.
    assert_weighed(made, lt.load(output, arch=arch), weights)
    counts = Counter(label for label in labels.values() if label in named)
    hits = [(hit["name"], hit["weight"], hit["modules"]) for hit in report["inputs"][0]["multipliers"]]
    assert sorted(hits) == sorted((label, named[label], count) for label, count in counts.items())
    missed = len(labels) - counts.total()
    told = [note for note in report["notes"] if "lie in no block that the block weights name" in note]
    assert [note.partition(" modules")[0] for note in told] == (
        [f"{missed} of {len(labels)}"] if missed else []
    )


@pytest.mark.parametrize("gradient", ["0.25→1", "0.25->1", "0.25..1"])
def test_layers_of_a_language_model(gradient: str, tmp_path: Path) -> None:
    made = lt.load(make.peft(tmp_path / "a").path)
    patterns = ("--weight-for", f"layers.0-1={gradient}", "--weight-for", r"q_proj$=-0.4")
    report = run(made.path, *patterns, "-o", tmp_path / "m")
    weights = {}
    for target in made.modules:
        layer = target.path.split("layers.")[1].split(".")[0]
        weights[target] = -0.4 if target.path.endswith("q_proj") else {"0": 0.25, "1": 1.0}[layer]
    assert_weighed(made, lt.load(tmp_path / "m"), weights)
    hits = {hit["name"]: hit["modules"] for hit in report["inputs"][0]["multipliers"]}
    queries = sum(target.path.endswith("q_proj") for target in made.modules)
    assert hits == {"layers.0-1": len(weights) - queries, "q_proj$": queries}


def test_a_vector_or_a_preset_for_each_input(tmp_path: Path) -> None:
    one, two = (lt.load(make.kohya(tmp_path / f"{seed}.safetensors", seed=seed).path) for seed in (1, 2))
    half = ",".join(["0.5"] * 26)
    output = tmp_path / "m.safetensors"
    run(one.path, two.path, "--block-weights", "none", "--block-weights", half, "-o", output)
    merged = lt.load(output)
    for target, module in merged.modules.items():
        first = 0.0 if label_of("sd15", target) else 1.0
        want = first * one.modules[target].delta() + 0.5 * two.modules[target].delta()
        assert float((module.delta() - want).norm()) <= 1e-5 * float(want.norm()), target


def test_weights_named_one_by_one_leave_the_rest_in_silence(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors")
    report = run(made.path, "--block-weights", "MID=0.5", "-o", tmp_path / "m.safetensors")
    assert [hit["name"] for hit in report["inputs"][0]["multipliers"]] == ["MID"]
    assert not [note for note in report["notes"] if "block weights" in note]
