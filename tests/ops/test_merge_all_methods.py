"""Every merge method from files to a file: convolutions, embeddings, fused weights, transposed layers, several layouts.

What must come out is told by the method itself, given each adapter's ΔW as the factory states it, dense and in float64.
So what is tested is all that lies around the method: reading, scales, weights, flattening, rows, and writing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import factories as make
import numpy as np
import pytest
import torch

import loratools as lt
from loratools.maths.lowrank import Factors
from loratools.methods import Options, Part, get, methods
from loratools.ops.merge import merge_files

NAMES = sorted(methods())
# Methods that declare no law repeat another tool's arithmetic on factors: their results are not those of ΔW.
ON_DELTA = [name for name in NAMES if get(name).laws]
WEIGHTS = (0.75, -0.5)
# No weight of these files has a larger rank.
FULL = 64


class Case(NamedTuple):
    """Two inputs, what is asked for, and where the result goes."""

    make: Callable[[Path], tuple[make.Made, make.Made]]
    output: str
    options: Mapping[str, Any]


def _sd15(folder: Path) -> tuple[make.Made, make.Made]:
    """3x3 and 1x1 convolutions, with and without lora_mid, and linear layers of two components."""
    only = ["attn2_to_k", "proj_out", "conv1", "downsamplers", "mlp_fc1"]
    one = make.kohya(folder / "a.safetensors", seed=1, rank=4, alpha=1.0, mid=True, only=only)
    return one, make.kohya(
        folder / "b.safetensors", seed=2, rank=2, ranks={"conv1": 3}, only=[only[0], *only[2:]]
    )


def _flux(folder: Path) -> tuple[make.Made, make.Made]:
    """Fused weights in one file, their parts in the other."""
    one = make.kohya(folder / "a.safetensors", "flux", seed=1, rank=3, alpha=1.5, only=["double", "final"])
    only = ["transformer_blocks.1", "transformer_blocks.0.attn.to", "norm_out"]
    return one, make.diffusers(folder / "b.safetensors", "flux", seed=2, rank=2, only=only)


def _peft(folder: Path) -> tuple[make.Made, make.Made]:
    """An embedding, a rank of its own, and rsLoRA in one of two."""
    model = make.LLAMA[:3]
    one = make.peft(folder / "a", model, seed=1, embedding=True, config={"use_rslora": True})
    return one, make.peft(folder / "b", model, seed=2, rank=2, ranks={model[1][0]: 3}, embedding=True)


def _gpt2(folder: Path) -> tuple[make.Made, make.Made]:
    """Layers that hold their weights transposed."""
    config = {"fan_in_fan_out": True}
    one = make.peft(folder / "a", make.GPT2, seed=1, rank=3, config=config)
    return one, make.peft(folder / "b", make.GPT2, seed=2, rank=2, config=config)


def _mlx(folder: Path) -> tuple[make.Made, make.Made]:
    """Another layout with transposed factors."""
    return make.mlx(folder / "a", seed=1, rank=3, scale=2.0), make.peft(folder / "b", seed=2, rank=2)


CASES = {
    "sd15": Case(_sd15, "m.safetensors", {}),
    "flux": Case(_flux, "m.safetensors", {}),
    "sd15 to diffusers": Case(_sd15, "m.safetensors", {"layout": "diffusers"}),
    "peft": Case(_peft, "m", {}),
    "gpt2": Case(_gpt2, "m", {}),
    "mlx to peft": Case(_mlx, "m", {"layout": "peft"}),
}


def asked(name: str) -> dict[str, Any]:
    """Options with which a method truncates nothing."""
    method = get(name)
    needs = not method.lossless and "rank" in {option.field for option in method.options}
    return {"rank": FULL} if needs else {}


def part(weight: float, delta: np.ndarray, source: int) -> Part:
    """A dense ΔW as a part, without the directions that rounding to float32 has added."""
    u, sigma, vh = torch.linalg.svd(torch.from_numpy(delta.reshape(delta.shape[0], -1)), full_matrices=False)
    kept = sigma > 1e-5 * sigma[0]
    return Part(Factors(u[:, kept], sigma[kept, None] * vh[kept]), weight, 1.0, source)


def expected(name: str, inputs: list[dict[str, np.ndarray]], key: str) -> np.ndarray:
    """What the method makes of the inputs' dense ΔW at one base weight."""
    parts = [
        part(weight, deltas[key], source)
        for source, (weight, deltas) in enumerate(zip(WEIGHTS, inputs, strict=True))
        if key in deltas
    ]
    options = Options(key=key.partition("/")[2], **asked(name))
    shape = next(deltas[key].shape for deltas in inputs if key in deltas)
    return get(name).combine(parts, options).factors.delta().numpy().reshape(shape)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ON_DELTA)
def test_a_merged_file_holds_what_the_method_makes_of_the_changes(
    name: str, case: str, tmp_path: Path
) -> None:
    made = CASES[case].make(tmp_path)
    output = tmp_path / CASES[case].output
    options = {**asked(name), **CASES[case].options, "dtype": "float32"}
    report = merge_files([each.path for each in made], output, method=name, weights=WEIGHTS, **options)
    found = make.whole(lt.load(output))
    inputs = [make.whole(lt.load(each.path)) for each in made]
    assert set(found) == set(inputs[0]) | set(inputs[1])
    for key, delta in found.items():
        want = expected(name, inputs, key)
        size = np.linalg.norm(want) + sum(np.linalg.norm(deltas.get(key, 0.0)) for deltas in inputs)
        assert np.linalg.norm(delta - want) <= 1e-5 * size, key
    assert report.method == name
    assert report.energy == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("name", ON_DELTA)
def test_a_module_that_one_input_has_is_merged_like_any_other(name: str, tmp_path: Path) -> None:
    """Whatever a method does to a single change, it does at weight 1 too."""
    one = make.kohya(tmp_path / "a.safetensors", seed=1, only=["attn2_to_k", "mlp_fc1"])
    two = make.kohya(tmp_path / "b.safetensors", seed=2, only=["attn2_to_k"])
    options: dict[str, Any] = {"method": name, "dtype": "keep", **asked(name)}
    if "lam" in {option.field for option in get(name).options}:
        options["lam"] = 0.5
    merge_files([one.path, two.path], tmp_path / "m.safetensors", **options)
    found = make.deltas_of(lt.load(tmp_path / "m.safetensors"))
    key = next(key for key in one.deltas if key not in two.deltas)
    chosen = {field: value for field, value in options.items() if field in ("rank", "lam")}
    truth = get(name).combine([part(1.0, one.deltas[key], 0)], Options(key=key.partition("/")[2], **chosen))
    want = truth.factors.delta().numpy()
    assert np.linalg.norm(found[key] - want) <= 1e-5 * (
        np.linalg.norm(want) + np.linalg.norm(one.deltas[key])
    )


@pytest.mark.parametrize("case", [case for case in CASES if case != "flux"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ON_DELTA])
def test_methods_of_factors_write_what_loads(name: str, case: str, tmp_path: Path) -> None:
    one, _ = CASES[case].make(tmp_path)
    output = tmp_path / CASES[case].output
    options = CASES[case].options
    merge_files([one.path, one.path], output, method=name, weights=[0.5, 0.25], **options)
    found = lt.load(output)
    assert set(make.whole(found)) == set(make.whole(lt.load(one.path)))
    assert all(np.isfinite(delta).all() for delta in make.deltas_of(found).values())
